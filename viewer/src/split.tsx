// The pictures of a split: a latent's attribution falls apart into what its meta-latents, the bias and the residual
// carry, and they add up to it again.
import { Chart, type Colours, type Option } from "./charts";
import { BIAS, latentName, metaName, OTHERS, RESIDUAL, SUMMED, data, type Parts, type PromptSplit } from "./data";
import { axis } from "./prompts";
import { cut, signed, token } from "./text";

const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);

/** Parts one after the other, each beginning where the last one ended: the end is the whole. */
export function Waterfall({ parts, whole, theme, marked, onPick }: { parts: Parts; whole: number | null; theme: string; marked?: number; onPick?: (meta: number) => void }) {
  const rows = parts.meta.map((meta, k) => ({ meta, value: parts.value[k] })).filter((row) => row.value !== 0 || row.meta === RESIDUAL);
  const rank = (meta: number) => (meta >= 0 ? 0 : meta === OTHERS ? 1 : meta === BIAS ? 2 : 3);
  rows.sort((a, b) => rank(a.meta) - rank(b.meta) || Math.abs(b.value) - Math.abs(a.value));
  let at = 0;
  const steps = rows.map((row) => ({ ...row, from: at, to: (at += row.value) }));
  const total = at;
  const names = [...steps.map((step) => metaName(step.meta)), "sum = attribution"];
  const words = `${steps.map((step) => `${metaName(step.meta)} ${signed(step.value)}`).join(", ")}; sum ${signed(total)}`;
  const ends = [0, total, ...steps.flatMap((step) => [step.from, step.to])];
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const room = (high - low || 1) * 0.16;
  return (
    <>
      <Chart
        height={24 * names.length + 34} theme={theme} label={`Split: ${words}`} onClick={(index) => steps[index] && steps[index].meta >= 0 && onPick?.(steps[index].meta)}
        option={(c): Option => ({
          grid: { left: 8, right: 14, top: 4, bottom: 24, containLabel: true },
          xAxis: { ...axis(c), min: low < 0 ? low - room : 0, max: high > 0 ? high + room : 0 },
          yAxis: { type: "category", inverse: true, data: names, axisTick: { show: false }, axisLine: { show: false }, axisLabel: { color: c.ink, fontSize: 11.5, width: 170, overflow: "truncate", formatter: (name: string) => cut(name, 34) } },
          series: [
            {
              type: "custom",
              data: [...steps.map((step, k) => [step.from, step.to, k]), [0, total, steps.length]],
              encode: { x: [0, 1], y: 2 },
              renderItem: (_: unknown, api: { value: (k: number) => number; coord: (at: number[]) => number[]; size: (of: number[]) => number[] }) => {
                const k = api.value(2);
                const [a, b] = [api.coord([api.value(0), k]), api.coord([api.value(1), k])];
                const high_ = Math.min(16, api.size([0, 1])[1] * 0.66);
                const value = k < steps.length ? steps[k].value : total;
                const meta = k < steps.length ? steps[k].meta : null;
                const plainPart = meta !== null && meta < 0;
                const fill = meta === null ? c.ink : plainPart ? c.none : value > 0 ? c.up : c.down;
                const next = api.coord([api.value(1), k + 1]);
                return {
                  type: "group",
                  children: [
                    { type: "rect", shape: { x: Math.min(a[0], b[0]), y: a[1] - high_ / 2, width: Math.max(1, Math.abs(b[0] - a[0])), height: high_, r: 2 }, style: { fill, opacity: plainPart ? 0.75 : 1, ...(meta !== null && meta === marked ? { stroke: c.ink, lineWidth: 2 } : {}) } },
                    ...(k < steps.length ? [{ type: "line", silent: true, shape: { x1: b[0], y1: b[1] + high_ / 2, x2: next[0], y2: next[1] - high_ / 2 }, style: { stroke: c.soft, lineDash: [2, 2], lineWidth: 0.8 } }] : []),
                    { type: "text", silent: true, style: { text: signed(value), x: value < 0 ? Math.min(a[0], b[0]) - 4 : Math.max(a[0], b[0]) + 4, y: a[1], align: value < 0 ? "right" : "left", verticalAlign: "middle", fill: c.ink, fontSize: 11, fontWeight: meta === null ? 700 : 400 } },
                  ],
                };
              },
            },
          ],
        })}
      />
      <p class="soft">{whole === null ? "" : `Parts sum to ${signed(total)}; the node's own attribution is ${signed(whole)}.`} Grey: bias and residual, and meta-latents too small to be named.</p>
    </>
  );
}

interface Link {
  source: string;
  target: string;
  value: number;
}

/**
 * The flow of one prompt at the dictionary's site: latents at their tokens, into what they are made of, into up and
 * down. A ribbon is as wide as the part's size; what goes in on the left comes out on the right.
 */
export function Flow({ rows, at, site, marked, theme, onMeta, onLatent }: { rows: PromptSplit[]; at: number; site: number; marked: number; theme: string; onMeta: (meta: number) => void; onLatent: (row: PromptSplit) => void }) {
  rows = gathered(rows);
  const pooled = new Map<number, number>();
  for (const row of rows) row.meta.forEach((meta, k) => pooled.set(meta, (pooled.get(meta) ?? 0) + Math.abs(row.value[k])));
  const ranked = [...pooled].filter(([meta]) => meta >= 0).sort((a, b) => b[1] - a[1]).slice(0, 9).map(([meta]) => meta);
  const named = new Set(marked >= 0 && pooled.has(marked) ? [marked, ...ranked] : ranked);
  const part = (meta: number) => (meta < 0 || named.has(meta) ? meta : OTHERS);
  const nodes = new Map<string, { text: string; net: number; meta?: number; row?: PromptSplit }>();
  const links = new Map<string, Link & { net: number }>();
  const add = (source: string, target: string, value: number) => {
    const key = `${source}>${target}`;
    const found = links.get(key) ?? { source, target, value: 0, net: 0 };
    found.value += Math.abs(value);
    found.net += value;
    links.set(key, found);
  };
  const total = sum(rows.flatMap((row) => row.value));
  const least = 0.004 * sum(rows.flatMap((row) => row.value.map(Math.abs)));
  rows.forEach((row) => {
    const left = `l${row.position}/${row.latent}`;
    const where = row.latent === SUMMED ? "" : ` · ${token(data.prompts.tokens[at][row.position])}`;
    nodes.set(left, { text: row.latent === SUMMED ? "other latents" : `${short(latentName(site, row.latent))}${where}${row.on ? "" : " (off)"}`, net: sum(row.value), row });
    row.meta.forEach((meta, k) => {
      const value = row.value[k];
      if (Math.abs(value) < least) meta = OTHERS;
      const to = part(meta);
      const middle = `m${to}`;
      const before = nodes.get(middle);
      nodes.set(middle, { text: metaName(to), net: (before?.net ?? 0) + value, meta: to });
      add(left, middle, value);
      add(middle, value > 0 ? "up" : "down", value);
    });
  });
  const [up, down] = ["up", "down"].map((end) => sum([...links.values()].filter((link) => link.target === end).map((link) => link.value)));
  if (up) nodes.set("up", { text: "pushes up", net: up });
  if (down) nodes.set("down", { text: "pushes down", net: -down });
  const ids = [...nodes.keys()];
  const deepest = Math.max(3, rows.length, ids.filter((id) => id.startsWith("m")).length);
  const words = [...nodes].filter(([id]) => id.startsWith("m")).map(([, each]) => `${each.text} ${signed(each.net)}`);
  return (
    <>
      <div class="flowhead" aria-hidden="true"><span>latents at their tokens</span><span>what they are made of</span><span>the behaviour</span></div>
      <Chart
        height={Math.max(220, 34 * deepest)} theme={theme}
        label={`What the latents of this prompt carry: ${words.join(", ")}; up ${signed(up)} and down ${signed(-down)} make ${signed(total)}`}
        onClick={(index, kind) => {
          const each = kind === "node" ? nodes.get(ids[index]) : undefined;
          if (each?.meta !== undefined && each.meta >= 0) onMeta(each.meta);
          else if (each?.row && each.row.latent !== SUMMED) onLatent(each.row);
        }}
        option={(c, width): Option => ({
          series: [
            {
              type: "sankey", left: 4, right: Math.min(130, width * 0.16), top: 6, bottom: 6, nodeWidth: 13, nodeGap: 11, layoutIterations: 24, draggable: false, nodeAlign: "justify",
              emphasis: { focus: "adjacency" },
              label: { color: c.ink, fontSize: 11.5, formatter: (each: { name: string }) => { const node = nodes.get(each.name)!; return `${cut(node.text, 36)}  ${signed(node.net)}`; } },
              data: ids.map((id) => ({ name: id, itemStyle: { color: shade(id, nodes.get(id)!.net, c), borderWidth: id === `m${marked}` ? 2.5 : 0, borderColor: c.ink }, label: id === `m${marked}` ? { fontWeight: 700 } : {} })),
              links: [...links.values()].map((link) => ({ source: link.source, target: link.target, value: link.value, lineStyle: { color: tint(link, c), opacity: link.source === `m${marked}` || link.target === `m${marked}` ? 0.62 : 0.28, curveness: 0.5 } })),
            },
          ],
        })}
      />
      <p class="soft">
        A ribbon is as wide as what its part carries; nothing is lost on the way: up {signed(up)} and down {signed(-down)} make <b>{signed(total)}</b>, what all latents of the site carry in this prompt. Numbers beside a bar are net; a latent that is off acts by having been on at the baseline.
      </p>
    </>
  );
}

/** Latents that carry too little to be seen, with all others in one row. */
function gathered(rows: PromptSplit[]): PromptSplit[] {
  const size = (row: PromptSplit) => sum(row.value.map(Math.abs));
  const least = 0.025 * sum(rows.map(size));
  const small = rows.filter((row) => row.latent === SUMMED || size(row) < least);
  const parts = new Map<number, number>();
  for (const row of small) row.meta.forEach((meta, k) => parts.set(meta, (parts.get(meta) ?? 0) + row.value[k]));
  const rest = { position: SUMMED, latent: SUMMED, on: true, meta: [...parts.keys()], value: [...parts.values()] };
  return [...rows.filter((row) => !small.includes(row)), ...(small.length ? [rest] : [])];
}

const short = (name: string) => cut(name, 22);
const grey = (id: string) => [`m${BIAS}`, `m${RESIDUAL}`, `m${OTHERS}`].includes(id);
const shade = (id: string, net: number, c: Colours) => (grey(id) ? c.none : net > 0 ? c.up : c.down);
const tint = (link: { source: string; target: string; net: number }, c: Colours) =>
  grey(link.source) || grey(link.target) ? c.none : link.net > 0 ? c.up : c.down;
