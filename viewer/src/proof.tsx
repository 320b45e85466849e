// The causal proof of a flag: the removal beside its matched controls, and the swap.
import { Chart, type Option } from "./charts";
import { data, metaName } from "./data";
import { Absent, Figure } from "./parts";
import { axis } from "./prompts";
import { percent, plain, probability, signed } from "./text";

/** The rows of one test: of the same question and kind of fact. */
export function testOf(row: number): number[] {
  const rows = data.facts!.rows;
  return [...rows.at.keys()].filter((k) => rows.removal[k] != null && rows.group[k] === rows.group[row] && rows.kind[k] === rows.kind[row]);
}

/** What the test compares: the mean size of the removals, and of each control, over its prompts. */
export function tested(members: number[]): { observed: number; controls: number[] } | null {
  const rows = data.facts!.rows;
  const known = members.filter((k) => rows.controls[k]);
  if (!known.length || known.length < members.length) return null;
  const mean = (value: (k: number) => number) => members.reduce((total, k) => total + value(k), 0) / members.length;
  const n = rows.controls[known[0]]!.length;
  return {
    observed: mean((k) => Math.abs(rows.removal[k] ?? 0)),
    controls: Array.from({ length: n }, (_, at) => mean((k) => rows.controls[k]![at])),
  };
}

export function Proof({ row, theme }: { row: number; theme: string }) {
  const rows = data.facts!.rows;
  const members = testOf(row);
  const test = tested(members);
  const removal = Math.abs(rows.removal[row] ?? 0);
  const after = rows.behaviour[row] - (rows.removal[row] ?? 0);
  const swapped = rows.swap[row] == null ? null : rows.behaviour[row] - rows.swap[row];
  const counterpart = rows.counterpart?.[row];
  return (
    <>
      <dl class="figures">
        <Figure name="Removal moves the behaviour by" hint="taking the fact's part out of all non-carriers, measured">{signed(rows.removal[row])} <small>of a total effect {signed(rows.total_effect[row])}</small></Figure>
        <Figure name="Shapley value" hint="share of the latents' exact effect, over interventions">{rows.shapley[row] == null ? "not in the split" : signed(rows.shapley[row])} {rows.stderr[row] != null && <small>± {plain(rows.stderr[row], 2)}, rank {rows.rank[row]}</small>}</Figure>
        <Figure name="Hidden share">{percent(rows.hidden_share[row])} <small>{rows.carriers_silent[row] ? "all carriers silent" : "a carrier fired"}</small></Figure>
        <Figure name="Test of the question and kind">p {probability(rows.p[row])} <small>q {probability(rows.q[row])}, {members.length} prompts</small></Figure>
      </dl>
      <div class="grid two">
        <section>
          <h4>The test: mean of {members.length} prompts against its controls</h4>
          {test ? <Against observed={test.observed} controls={test.controls} theme={theme} what="mean removal" /> : <Absent command={`mediation flag ${data.run.path} --meta ${data.metas?.folder ?? "META"}`}>The controls of this run were not kept.</Absent>}
        </section>
        <section>
          <h4>This prompt alone</h4>
          {rows.controls[row] ? <Against observed={removal} controls={rows.controls[row]!} theme={theme} what="removal" /> : <p class="soft">Its controls were not kept.</p>}
        </section>
      </div>
      <h4>Removal and swap <small>what the behaviour becomes</small></h4>
      <Swap clean={rows.behaviour[row]} removed={after} swapped={swapped} baseline={rows.behaviour[row] - rows.total_effect[row]} theme={theme} />
      <p class="soft">
        {swapped == null ? "No swap was measured." : `With ${counterpart == null ? "the counterpart's fact" : `the counterpart's ${metaName(counterpart)}`} in place of ${rows.label[row]}, the answer ${rows.swap_follows[row] ? "follows: the behaviour changes sign" : "stays"}.`}
      </p>
    </>
  );
}

/** The distribution of controls with what was observed as a line. */
function Against({ observed, controls, theme, what }: { observed: number; controls: number[]; theme: string; what: string }) {
  const reached = controls.filter((each) => each >= observed).length;
  const [low, high] = [Math.min(...controls, observed, 0), Math.max(...controls, observed, 0)];
  const span = high - low || 1;
  const [from, width] = [low - 0.04 * span, (1.08 * span) / 36];
  const bins = new Array<number>(36).fill(0);
  for (const each of controls) bins[Math.min(35, Math.floor((each - from) / width))]++;
  return (
    <>
      <Chart
        height={150} theme={theme} label={`${what} ${signed(observed)}; ${reached} of ${controls.length} controls reach it, the largest ${signed(Math.max(...controls))}`}
        option={(c): Option => ({
          grid: { left: 36, right: 14, top: 20, bottom: 34 },
          xAxis: { ...axis(c), name: "size of the effect", nameLocation: "middle", nameGap: 22, min: from, max: from + 36 * width, axisLabel: { color: c.soft, fontSize: 10.5, formatter: (value: number) => plain(value, 2), hideOverlap: true, showMinLabel: false, showMaxLabel: false } },
          yAxis: { ...axis(c), minInterval: 1 },
          series: [
            {
              type: "custom", silent: true, data: bins.map((n, k) => [from + k * width, from + (k + 1) * width, n]), encode: { x: [0, 1], y: 2 },
              renderItem: (_: unknown, api: { value: (k: number) => number; coord: (at: number[]) => number[] }) => {
                const [a, b] = [api.coord([api.value(0), api.value(2)]), api.coord([api.value(1), 0])];
                return { type: "rect", shape: { x: a[0] + 0.5, y: a[1], width: b[0] - a[0] - 1, height: b[1] - a[1] }, style: { fill: c.none } };
              },
              markLine: { silent: true, symbol: "none", data: [{ xAxis: observed, lineStyle: { color: observed > 0 ? c.up : c.down, width: 2.5, type: "solid" }, label: { formatter: `${what} ${signed(observed)}`, color: c.ink, fontSize: 11, fontWeight: 600, position: "end", align: observed > from + 24 * width ? "right" : observed < from + 10 * width ? "left" : "center" } }] },
            },
          ],
        })}
      />
      <p class="soft">{reached} of {controls.length} controls reach it: the same coefficients along directions made of the other facts in these latents.</p>
    </>
  );
}

function Swap({ clean, removed, swapped, baseline, theme }: { clean: number; removed: number; swapped: number | null; baseline: number; theme: string }) {
  const rows: [string, number][] = [["as it is", clean], ["without the fact", removed]];
  if (swapped !== null) rows.push(["with the counterpart's", swapped]);
  rows.push(["the counterpart prompt", baseline]);
  return (
    <Chart
      height={24 * rows.length + 30} theme={theme} label={rows.map(([name, value]) => `${name} ${signed(value)}`).join(", ")}
      option={(c): Option => ({
        grid: { left: 8, right: 50, top: 2, bottom: 22, containLabel: true },
        xAxis: axis(c),
        yAxis: { type: "category", inverse: true, data: rows.map(([name]) => name), axisTick: { show: false }, axisLine: { show: false }, axisLabel: { color: c.ink, fontSize: 11.5 } },
        series: [{ type: "bar", silent: true, barMaxWidth: 14, data: rows.map(([, value], k) => ({ value, itemStyle: { color: value > 0 ? c.up : c.down, opacity: k === 0 || k === rows.length - 1 ? 0.5 : 1 } })), label: { show: true, position: "right", color: c.ink, fontSize: 11, formatter: (each: { value: number }) => signed(each.value) } }],
      })}
    />
  );
}
