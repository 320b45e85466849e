// The prompt set: what the model did on every prompt, who carries it, and what the numbers can bear.
import { useState } from "preact/hooks";
import { Chart, type Option } from "./charts";
import { data, effectOf, promptText } from "./data";
import { current } from "./download";
import { Absent, Bar, Figure, Table, Tokens, type Column } from "./parts";
import type { Go, State } from "./state";
import { count, interval, percent, plain, signed } from "./text";

const flagsOf = new Map<number, number>();
data.facts?.rows.flagged.forEach((flagged, row) => {
  if (flagged) flagsOf.set(data.facts!.rows.at[row], (flagsOf.get(data.facts!.rows.at[row]) ?? 0) + 1);
});

export function Prompts({ state, go }: { state: State; go: Go }) {
  const { run, prompts } = data;
  const [site, setSite] = useState(data.sites[data.sites.length - 1].name);
  const shares = prompts.sites[site];
  const text = state.find.toLowerCase();
  const rows = [...prompts.id.keys()].filter(
    (at) =>
      (!text || `${prompts.id[at]} ${promptText(at)} ${prompts.group[at]} ${prompts.fact[at] ?? ""}`.toLowerCase().includes(text)) &&
      (!state.filter || (state.filter === "flagged" ? flagsOf.has(at) : prompts.group[at] === state.filter.slice(6) || prompts.half[at] === state.filter)),
  );
  const scale = Math.max(...prompts.id.map((_, at) => Math.abs(effectOf(at))));
  const positive = prompts.id.every((_, at) => effectOf(at) >= 0);
  const part = (key: "shown" | "errors" | "others" | "gap") => (at: number) => shares[key][at] / (effectOf(at) || 1);
  const columns: Column<number>[] = [
    { title: "Prompt", key: "id", value: (at) => prompts.id[at], cell: (at) => <PromptCell at={at} /> },
    { title: "Question", key: "group", value: (at) => prompts.group[at], cell: (at) => <span class="soft">{prompts.group[at]}</span> },
    {
      title: "Half", key: "half", value: (at) => prompts.half[at], hint: "Nodes and facts are chosen on discovery prompts; intervals, tiers and flags come from evaluation prompts.",
      cell: (at) => <span class="soft">{prompts.half[at] ?? "–"}</span>,
    },
    { title: "Clean", key: "clean", number: true, value: (at) => prompts.clean[at], cell: (at) => signed(prompts.clean[at]), hint: `${run.behaviour} on the clean prompt` },
    { title: "Baseline", key: "baseline", number: true, value: (at) => prompts.baseline[at], cell: (at) => signed(prompts.baseline[at]), hint: `with every latent at its baseline (${run.baseline})` },
    {
      title: "Total effect", key: "effect", number: true, value: effectOf, hint: "clean minus baseline, measured",
      cell: (at) => <span class="both"><b>{signed(effectOf(at))}</b><Bar value={effectOf(at)} scale={scale} positive={positive} /></span>,
    },
    { title: "Shown latents", key: "shown", number: true, value: part("shown"), cell: (at) => <Stack shown={part("shown")(at)} errors={part("errors")(at)} others={part("others")(at)} />, hint: "share of the total effect on the latents of the set's graph (blue), on other latents (light), on error nodes (hatched)" },
    { title: "Errors", key: "errors", number: true, value: part("errors"), cell: (at) => percent(part("errors")(at)) },
    { title: "Other latents", key: "others", number: true, value: part("others"), cell: (at) => percent(part("others")(at)) },
    { title: "Gap", key: "gap", number: true, value: (at) => Math.abs(part("gap")(at)), cell: (at) => percent(Math.abs(part("gap")(at))), hint: "what all nodes of this site miss of the total effect" },
    {
      title: "Flags", key: "flags", number: true, value: (at) => flagsOf.get(at) ?? 0,
      cell: (at) =>
        flagsOf.has(at) ? (
          <button type="button" class="badge" onClick={(event) => { event.stopPropagation(); go({ view: "facts", find: prompts.id[at], filter: "flagged" }); }}>
            {flagsOf.get(at)} hidden
          </button>
        ) : "",
    },
  ];
  current.svg = null;
  current.sheet = () => ({
    name: "prompts",
    columns: ["prompt", "text", "group", "half", "answer", "wrong_answer", "expected_fact", "clean", "baseline", "total_effect", ...data.sites.flatMap((each) => ["shown", "errors", "others", "gap"].map((key) => `${key} ${each.name}`)), "flags"],
    rows: rows.map((at) => [
      prompts.id[at], promptText(at), prompts.group[at], prompts.half[at], prompts.answer[at], prompts.wrong[at], prompts.fact[at],
      prompts.clean[at], prompts.baseline[at], effectOf(at),
      ...data.sites.flatMap((each) => (["shown", "errors", "others", "gap"] as const).map((key) => prompts.sites[each.name][key][at])),
      flagsOf.get(at) ?? 0,
    ]),
  });
  const groups = [...new Set(prompts.group)];
  return (
    <>
      <Trust theme={state.theme} />
      <h2>Prompts</h2>
      <div class="tools">
        <input type="search" placeholder="Search prompts" aria-label="Search prompts" value={state.find} onInput={(event) => go({ find: event.currentTarget.value }, { replace: true })} />
        <label>Show <select value={state.filter} onChange={(event) => go({ filter: event.currentTarget.value })}>
          <option value="">all</option>
          <option value="flagged">with flags</option>
          <option value="discovery">discovery half</option>
          <option value="evaluation">evaluation half</option>
          {groups.length > 1 && groups.map((group) => <option value={`group ${group}`}>{group}</option>)}
        </select></label>
        <label>Shares at <select value={site} onChange={(event) => setSite(event.currentTarget.value)}>
          {data.sites.map((each) => <option value={each.name}>{each.title}</option>)}
        </select></label>
        <span class="soft">{count(rows.length, "prompt")} of {prompts.id.length}; click one for its own graph</span>
      </div>
      <Table
        rows={rows} columns={columns} sort={state.view === "prompts" ? state.sort : ""} onSort={(sort) => go({ sort }, { replace: true })} caption="Prompts and their effects"
        onPick={(at) => go({ view: "graph", mode: data.own[at] ? "prompt" : "set", prompt: at, node: "" })} picked={(at) => at === state.prompt}
      />
    </>
  );
}

function PromptCell({ at }: { at: number }) {
  const { prompts } = data;
  const heat = prompts.heat[at].reduce((sum, row) => sum.map((each, k) => each + row[k]), prompts.tokens[at].map(() => 0));
  return (
    <div class="prompt">
      <Tokens at={at} values={heat} />
      <span class="answer">{prompts.answer[at] ?? ""}</span>
      <span class="soft"> not {prompts.wrong[at] ?? ""}</span>
      <small>{prompts.id[at]}</small>
    </div>
  );
}

/** Shares of a total effect: parts that go the other way are left out of the bar and stand in the numbers. */
function Stack({ shown, errors, others }: { shown: number; errors: number; others: number }) {
  const size = (share: number) => `${100 * Math.min(1, Math.max(0, share))}%`;
  return (
    <span class="both">
      <b>{percent(shown)}</b>
      <span class="stack" aria-hidden="true">
        <i class="shown" style={{ width: size(shown) }} />
        <i class="others" style={{ width: size(others) }} />
        <i class="errors" style={{ width: size(errors) }} />
      </span>
    </span>
  );
}

function Trust({ theme }: { theme: string }) {
  const { run } = data;
  const { trust, effect } = run;
  const agreed = trust.estimator_vs_exact[run.estimator] ?? trust.estimator_vs_exact.ig;
  const missed = trust.important_missed;
  return (
    <>
      <h2>What these numbers can bear</h2>
      <dl class="figures">
        <Figure name="Total effect, mean over prompts" hint="bootstrap over prompts, 95 %">{signed(effect.mean)} <small>{interval(effect.low, effect.high)}</small></Figure>
        <Figure name="Behaviour">{run.behaviour.replace("_", " ")} <small>{signed(effect.clean)} clean, {signed(effect.baseline)} {run.baseline}</small></Figure>
        <Figure name="Prompts">{effect.prompts} <small>{run.held_out ? `${run.held_out} held out` : "none held out"}</small></Figure>
        {agreed && <Figure name={`${run.estimator} against exact patching`} hint={`of ${agreed.n} nodes, a stratified sample`}>r {plain(agreed.pearson, 2)} <small>ρ {plain(agreed.spearman, 2)}, same sign {percent(agreed.sign)}, {agreed.n} nodes</small></Figure>}
        {trust.edges_vs_exact && <Figure name="Edges against exact patching">r {plain(trust.edges_vs_exact.pearson, 2)} <small>same sign {percent(trust.edges_vs_exact.sign)}, {trust.edges_vs_exact.n} edges</small></Figure>}
        {missed && <Figure name="Important nodes missed" hint="95 % bound, from a sample of nodes outside the graph on held-out prompts">{missed.at_most == null ? "unknown" : `at most ${percent(missed.at_most)}`} <small>{missed.missed} of {missed.left_out} sampled</small></Figure>}
      </dl>
      {trust.warnings.map((warning) => <p class="warning" role="note">{warning}</p>)}
      <div class="grid three">
        <section>
          <h3>Sites</h3>
          <div class="scroll">
            <table>
              <thead><tr><th scope="col">Site</th><th scope="col" class="number" title="of the activations, by the dictionary, on these prompts">Variance explained</th><th scope="col" class="number" title="cross-entropy recovered">CE</th><th scope="col" class="number" title="active latents per token">L0</th><th scope="col" class="number">On errors</th><th scope="col" class="number" title="what latents and errors together miss of the total effect">Gap</th></tr></thead>
              <tbody>
                {run.fidelity.map((each) => (
                  <tr>
                    <th scope="row">{data.sites.find((site) => site.name === each.site)?.title}</th>
                    <td class="number">{plain(each.variance_explained)}</td><td class="number">{plain(each.cross_entropy_recovered)}</td><td class="number">{plain(each.l0)}</td>
                    <td class="number">{percent(trust.error_share[each.site])}</td><td class="number">{percent(trust.conservation_gap[each.site])}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
          <details><summary>Made from</summary>
            <p class="soft">{run.model}; {run.saes.join(", ")}; estimator {run.estimator}, baseline {run.baseline}, seed {run.seed}; {run.created}, {run.seconds} s; {Object.entries(run.versions).map(([name, version]) => `${name} ${version}`).join(", ")}.</p>
          </details>
        </section>
        <section><h3>Estimator against exact patching</h3><Calibration theme={theme} /></section>
        <section><h3>Total effect by question</h3><Groups theme={theme} /></section>
      </div>
      {run.proof ? <><h3>Faithfulness of circuits</h3><Faithfulness theme={theme} /></> : <Absent command={`mediation prove ${run.path}`}>Whether the circuit alone does what the model does was not measured in this run.</Absent>}
    </>
  );
}

function Calibration({ theme }: { theme: string }) {
  const { nodes } = data.run.calibration;
  const key = data.run.estimator === "atp" ? "atp" : "ig";
  const points = nodes.exact.map((exact, k) => [exact, nodes[key][k]]).filter(([a, b]) => a != null && b != null) as [number, number][];
  const far = Math.max(1e-9, ...points.flat().map(Math.abs));
  return (
    <Chart
      height={190} theme={theme} label={`${key} against the exact effect of ${points.length} nodes`}
      option={(c): Option => ({
        grid: { left: 44, right: 12, top: 8, bottom: 34 },
        xAxis: { ...axis(c), name: "exact", nameLocation: "middle", nameGap: 22, min: -far, max: far },
        yAxis: { ...axis(c), name: "", min: -far, max: far },
        series: [
          { type: "line", data: [[-far, -far], [far, far]], symbol: "none", silent: true, lineStyle: { color: c.none, width: 1, type: "dashed" } },
          { type: "scatter", data: points, symbolSize: 5, silent: true, itemStyle: { color: c.up, opacity: 0.6 } },
        ],
      })}
    />
  );
}

export const axis = (c: { soft: string; line: string }) => ({
  type: "value", axisLabel: { color: c.soft, fontSize: 10.5, formatter: (value: number) => plain(value, 2), hideOverlap: true }, axisLine: { show: true, lineStyle: { color: c.line } },
  splitLine: { lineStyle: { color: c.line, opacity: 0.6 } }, splitNumber: 4, nameTextStyle: { color: c.soft, fontSize: 11 },
});

function Groups({ theme }: { theme: string }) {
  const groups = [...data.run.groups].sort((a, b) => a.mean - b.mean).slice(-12);
  return (
    <Chart
      height={Math.max(90, 22 * groups.length + 30)} theme={theme} label={`Mean total effect of ${groups.length} groups: ${groups.map((each) => `${each.group} ${signed(each.mean)}`).join(", ")}`}
      option={(c): Option => ({
        grid: { left: 8, right: 16, top: 2, bottom: 22, containLabel: true },
        xAxis: axis(c),
        yAxis: { type: "category", data: groups.map((each) => `${each.group} (${each.prompts})`), axisTick: { show: false }, axisLine: { lineStyle: { color: c.line } }, axisLabel: { color: c.ink, fontSize: 11, width: 150, overflow: "truncate" } },
        series: [
          { type: "bar", data: groups.map((each) => ({ value: each.mean, itemStyle: { color: each.mean > 0 ? c.up : c.down } })), barMaxWidth: 11, silent: true },
          whiskers(groups.map((each, k) => [k, each.low, each.high]), c.ink),
        ],
      })}
    />
  );
}

/** Intervals of a bar chart whose categories stand on the y axis. */
export function whiskers(rows: [number, number | null, number | null][], colour: string): Option {
  const data = rows.filter((row): row is [number, number, number] => row[1] != null && row[2] != null);
  return {
    type: "custom", silent: true, data, encode: { x: [1, 2], y: 0 }, z: 5,
    renderItem: (_: unknown, api: { value: (k: number) => number; coord: (at: number[]) => number[] }) => {
      const [low, high] = [api.coord([api.value(1), api.value(0)]), api.coord([api.value(2), api.value(0)])];
      const line = (x1: number, y1: number, x2: number, y2: number) => ({ type: "line", shape: { x1, y1, x2, y2 }, style: { stroke: colour, lineWidth: 1.2 } });
      return { type: "group", children: [line(low[0], low[1], high[0], high[1]), line(low[0], low[1] - 3, low[0], low[1] + 3), line(high[0], high[1] - 3, high[0], high[1] + 3)] };
    },
  };
}

function Faithfulness({ theme }: { theme: string }) {
  const proof = data.run.proof!;
  const kinds = [...new Set(proof.kind)];
  return (
    <div class="grid two">
      {kinds.map((kind) => (
        <section>
          <h4>{kind}</h4>
          <Chart
            height={200} theme={theme} label={`Faithfulness by number of ${kind} kept`}
            option={(c): Option => {
              const names = [...new Set(proof.ranking.filter((_, k) => proof.kind[k] === kind))];
              const shades = [c.up, c.down, c.none, c.soft, c.mark];
              return {
                grid: { left: 40, right: 90, top: 8, bottom: 34 },
                xAxis: { ...axis(c), type: "log", name: `${kind} kept`, nameLocation: "middle", nameGap: 22 },
                yAxis: axis(c),
                series: names.map((name, at) => ({
                  type: "line", name, symbolSize: 4, silent: true, lineStyle: { color: shades[at % 5], width: at ? 1.2 : 2.4 }, itemStyle: { color: shades[at % 5] },
                  data: proof.size.map((size, k) => [size, proof.faithfulness[k], k]).filter(([, , k]) => proof.ranking[k!] === name && proof.kind[k!] === kind),
                  endLabel: { show: true, formatter: "{a}", color: shades[at % 5], fontSize: 10.5 },
                })),
              };
            }}
          />
        </section>
      ))}
    </div>
  );
}
