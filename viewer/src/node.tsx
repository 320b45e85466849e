// One latent: what it means, where it is on, what it does to the behaviour, what it is made of.
import { Chart, type Option } from "./charts";
import { data, dossierOf, latentName, metaName, promptText, type Dossier } from "./data";
import { current } from "./download";
import { Contexts, Histogram, InPrompts, labelCommand, LogitLens } from "./evidence";
import { Edges, place } from "./graph";
import { graphOf, parseKey, type NodeKey } from "./model";
import { Absent, Bar, Figure } from "./parts";
import { axis } from "./prompts";
import { Waterfall } from "./split";
import type { Go, State } from "./state";
import { interval, percent, plain, signed } from "./text";

export function NodeView({ state, go }: { state: State; go: Go }) {
  const key = parseKey(state.node);
  const latent = key?.kind === "latent" ? key : null;
  return (
    <div class="columns">
      <Choices state={state} go={go} />
      <div>{latent ? <Latent at={latent} state={state} go={go} /> : key?.kind === "error" ? <ErrorNode at={key} state={state} go={go} /> : <p class="absent">Choose a latent on the left, or a node in the graph.</p>}</div>
    </div>
  );
}

function Choices({ state, go }: { state: State; go: Go }) {
  const { nodes } = data.graph;
  const text = state.find.toLowerCase();
  const rows = [...nodes.kind.keys()].filter((k) => nodes.kind[k] === "latent");
  rows.sort((a, b) => Math.abs(nodes.attribution[b] ?? 0) - Math.abs(nodes.attribution[a] ?? 0));
  const scale = Math.abs(nodes.attribution[rows[0]] ?? 1);
  const found = rows.filter((k) => `${nodes.label?.[k]} ${nodes.position[k]} ${data.sites[nodes.site[k] ?? 0].title}`.toLowerCase().includes(text));
  return (
    <nav class="choices" aria-label="Latents of the set's graph">
      <input type="search" placeholder="Search latents" aria-label="Search latents" value={state.find} onInput={(event) => go({ find: event.currentTarget.value }, { replace: true })} />
      <ul class="list">
        {found.slice(0, 200).map((k) => {
          const key = `${nodes.site[k]}/${nodes.position[k]}/${nodes.latent[k]}`;
          return (
            <li><button type="button" aria-current={key === state.node} onClick={() => go({ node: key })}><span>{nodes.label?.[k]} <small>{nodes.position[k]}, {data.sites[nodes.site[k] ?? 0].title}</small></span><Bar value={nodes.attribution[k]} scale={scale} /></button></li>
          );
        })}
        {!found.length && <li class="soft">No latent is called so.</li>}
      </ul>
    </nav>
  );
}

/** The role whose figures are shown: the key's own, or that of the token it stands at. */
function roleOf(at: NodeKey, state: State): string {
  if (data.prompts.roles.includes(at.position)) return at.position;
  const role = data.prompts.role[state.prompt][Number(at.position)];
  return data.prompts.roles[role] ?? at.position;
}

function Latent({ at, state, go }: { at: NodeKey; state: State; go: Go }) {
  const found = dossierOf(at.site, at.latent);
  const role = roleOf(at, state);
  const set = graphOf("set", -1)!;
  const node = set.at.get(`${at.site}/${role}/${at.latent}`);
  const { nodes } = set;
  const site = data.sites[at.site];
  const here = graphOf(state.mode, state.prompt) ?? set;
  const drawn = here.at.get(state.node) ?? here.at.get(`${at.site}/${role}/${at.latent}`);
  const attribution = node === undefined ? null : nodes.attribution[node];
  const score = found?.score ?? null;
  current.svg = null;
  current.sheet = () => sheet(found, role, at);
  return (
    <>
      <header class="title">
        <h2>{found?.label ?? latentName(at.site, at.latent)}</h2>
        <p class="soft">latent {at.latent}, {site.title}, at {role}{score === null ? "" : `; the label predicts where it is on with score ${plain(score)} (.5 is chance), from ${found?.source ?? "an unknown source"}`}</p>
        <button type="button" onClick={() => go({ view: "graph" })}>Show in graph</button>
      </header>
      {found && !found.label && <Absent command={labelCommand(at.site)}>It has no label; it is called by the token it is most on at.</Absent>}
      {node === undefined ? (
        <Absent>It is not among the set's latents at {role}: {here.mode === "prompt" && drawn !== undefined ? "its neighbours in the graph of this prompt are below." : "the page holds nothing more of it."}</Absent>
      ) : (
        <dl class="figures">
          <Figure name="Attribution, mean over prompts">{signed(attribution)}</Figure>
          <Figure name="On held-out prompts" hint="95 % bootstrap over prompts that did not choose it">{signed(nodes.held_out?.[node])} <small>{interval(nodes.low?.[node], nodes.high?.[node])}</small></Figure>
          <Figure name="Recurs">{nodes.tier?.[node] ?? "unknown"} <small>kept in {percent(nodes.frequency?.[node])} of prompts</small></Figure>
          <Figure name="Influence" hint="share of the flow into the behaviour that passes through it">{percent(nodes.influence[node])}</Figure>
          {found?.effects ? <Figure name="Measured: TIE and NIE" hint="total and natural indirect effect of the latent at all its positions">{signed(found.effects.tie)} <small>and {signed(found.effects.nie)}</small></Figure> : <Figure name="Measured effect"><small>not among the strongest, so not measured</small></Figure>}
        </dl>
      )}
      <div class="grid two">
        <section>
          <h3>Where it is on in these prompts</h3>
          {found ? <InPrompts where={found.where} go={go} unit="activation" /> : <p class="soft">Kept for the set's latents only.</p>}
          <h3>Strongest contexts of its dictionary</h3>
          <Contexts found={found} command={labelCommand(at.site)} what="This latent" />
          <Histogram found={found} theme={state.theme} />
          <LogitLens found={found} />
          <Split found={found} role={role} site={at.site} attribution={attribution} state={state} go={go} />
        </section>
        <section>
          <h3>Attribution by prompt</h3>
          <ByPrompt found={found} role={role} node={node} theme={state.theme} go={go} />
          <Exact found={found} role={role} theme={state.theme} />
          <h3>Neighbours <small>in the graph of {here.mode === "prompt" ? "this prompt" : here.mode === "set" ? "the set" : "the contrast"}</small></h3>
          {drawn === undefined ? <p class="soft">It is not in this graph.</p> : <><p class="soft">{place(here, drawn)}</p><Edges graph={here} node={drawn} into go={go} view /><Edges graph={here} node={drawn} into={false} go={go} view /></>}
        </section>
      </div>
    </>
  );
}

function ErrorNode({ at, state, go }: { at: NodeKey; state: State; go: Go }) {
  const graph = graphOf(state.mode, state.prompt)!;
  const node = graph.at.get(state.node);
  current.sheet = current.svg = null;
  return (
    <>
      <header class="title"><h2>Error at {at.position}, {data.sites[at.site].title}</h2><p class="soft">What the dictionary misses of the activation. It has no label and no parts; {percent(data.run.trust.error_share[data.sites[at.site].name])} of the absolute attribution at this site is on error nodes.</p><button type="button" onClick={() => go({ view: "graph" })}>Show in graph</button></header>
      {node !== undefined && <section><p>Attribution {signed(graph.nodes.attribution[node])} {interval(graph.nodes.low?.[node], graph.nodes.high?.[node])}</p><Edges graph={graph} node={node} into={false} go={go} view /></section>}
    </>
  );
}

function ByPrompt({ found, role, node, theme, go }: { found: Dossier | undefined; role: string; node?: number; theme: string; go: Go }) {
  const values = found?.by_prompt[role];
  if (!values || node === undefined) return <p class="soft">Only the set's own latents have their attribution listed by prompt.</p>;
  const rows = values.at.map((at, k) => ({ at, value: values.value[k] })).sort((a, b) => b.value - a.value);
  const silent = data.prompts.id.length - rows.length;
  const { low, high, held_out } = data.graph.nodes;
  return (
    <>
      <Chart
        height={150} theme={theme} label={`Attribution on ${rows.length} prompts, from ${signed(rows[rows.length - 1].value)} to ${signed(rows[0].value)}; mean ${signed(held_out?.[node])} ${interval(low?.[node], high?.[node])}`}
        onClick={(index) => go({ view: "graph", mode: data.own[rows[index].at] ? "prompt" : "set", prompt: rows[index].at })}
        option={(c): Option => ({
          grid: { left: 44, right: 10, top: 8, bottom: 10 },
          xAxis: { type: "category", data: rows.map((row) => row.at), axisLabel: { show: false }, axisTick: { show: false }, axisLine: { lineStyle: { color: c.line } } },
          yAxis: axis(c),
          series: [
            {
              type: "bar", barCategoryGap: "12%", barMaxWidth: 16, cursor: "pointer", data: rows.map((row) => ({ value: row.value, itemStyle: { color: row.value > 0 ? c.up : c.down, opacity: data.prompts.half[row.at] === "discovery" ? 0.55 : 1 } })),
              markLine: held_out?.[node] == null ? undefined : { silent: true, symbol: "none", label: { show: false }, data: [{ yAxis: held_out[node], lineStyle: { color: c.ink, type: "solid" } }, ...[low?.[node], high?.[node]].filter((each) => each != null).map((each) => ({ yAxis: each, lineStyle: { color: c.soft, type: "dashed" } }))] },
            },
          ],
        })}
      />
      <p class="soft">{rows.length} prompts, largest first{silent ? `; on the other ${silent} it has no attribution` : ""}. Pale: discovery half. Lines: held-out mean and its interval. Click a bar for its prompt.</p>
    </>
  );
}

function Exact({ found, role, theme }: { found: Dossier | undefined; role: string; theme: string }) {
  const rows = (found?.exact ?? []).filter((row) => data.prompts.roles[data.prompts.role[row.at][row.position]] === role);
  const key = data.run.estimator === "atp" ? "atp" : "ig";
  return (
    <>
      <h3>Exact check</h3>
      {!rows.length ? (
        <p class="soft">It is not in the run's sample of nodes that were patched exactly. A larger one: <code>mediation trace … --sample 1000</code>.</p>
      ) : rows.length > 8 ? (
        <Chart
          height={150} theme={theme} label={`${key} against the exact effect on ${rows.length} prompts`}
          option={(c): Option => ({ grid: { left: 44, right: 12, top: 8, bottom: 34 }, xAxis: { ...axis(c), name: "exact", nameLocation: "middle", nameGap: 22 }, yAxis: { ...axis(c) }, series: [{ type: "scatter", symbolSize: 6, silent: true, itemStyle: { color: c.up, opacity: 0.7 }, data: rows.map((row) => [row.exact, row[key]]) }] })}
        />
      ) : (
        <table>
          <thead><tr><th scope="col">Prompt</th><th scope="col" class="number">Exact</th><th scope="col" class="number">{key}</th></tr></thead>
          <tbody>{rows.map((row) => <tr><td>{promptText(row.at)}</td><td class="number">{signed(row.exact)}</td><td class="number">{signed(row[key])}</td></tr>)}</tbody>
        </table>
      )}
    </>
  );
}

function Split({ found, role, site, attribution, state, go }: { found: Dossier | undefined; role: string; site: number; attribution: number | null; state: State; go: Go }) {
  const parts = found?.split?.[role];
  const heading = <h3>What it is made of <small>its attribution, divided over its meta-latents</small></h3>;
  if (!data.metas) return <>{heading}<Absent command={`mediation flag ${data.run.path} --meta META`}>No latent of this run was split into meta-latents.</Absent></>;
  if (data.metas.site !== site) return <>{heading}<Absent>The run's meta-SAE is of another site, {data.sites[data.metas.site].title}.</Absent></>;
  if (!parts) return <>{heading}<p class="soft">It has no parts here.</p></>;
  return <>{heading}<Waterfall parts={parts} whole={attribution} theme={state.theme} onPick={(meta) => go({ view: "meta", meta })} /></>;
}

function sheet(found: Dossier | undefined, role: string, at: NodeKey) {
  const values = found?.by_prompt[role];
  const parts = found?.split?.[role];
  return {
    name: `latent-${at.latent}`,
    columns: ["row", "name", "value", "estimate"],
    rows: [
      ...(values?.at.map((each, k) => ["attribution by prompt", data.prompts.id[each], values.value[k], null]) ?? []),
      ...(parts?.meta.map((meta, k) => ["part", metaName(meta), parts.value[k], null]) ?? []),
      ...(found?.exact.map((row) => ["exact check", data.prompts.id[row.at], row.exact, row.ig]) ?? []),
    ],
  };
}
