// The graph: tokens or roles across, sites upward.
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { Canvas, GRID, strength } from "./canvas";
import { data, dossierOf, promptText } from "./data";
import { current } from "./download";
import { layOut } from "./layout";
import { atLeast, graphOf, grouped, groupsOf, parseKey, row, type Graph } from "./model";
import { Absent, Bar } from "./parts";
import { prune, type Kept } from "./prune";
import type { Go, Grouping, Mode, State } from "./state";
import { count, interval, percent, plain, signed } from "./text";

const LISTED = 12;

export function GraphView({ state, go }: { state: State; go: Go }) {
  const graph = useMemo(() => graphOf(state.mode, state.prompt), [state.mode, state.prompt]);
  return (
    <>
      <Toolbar state={state} go={go} graph={graph} />
      {graph ? (
        <Drawn state={state} go={go} plainGraph={graph} />
      ) : (
        <Absent command={`mediation inspect ${data.run.path} --prompt '${data.prompts.id[state.prompt]}'`}>The page holds the graphs of the first {Object.keys(data.own).length} prompts, and this is another.</Absent>
      )}
    </>
  );
}

function Toolbar({ state, go, graph }: { state: State; go: Go; graph: Graph | null }) {
  const { prompts } = data;
  const modes: { id: Mode; title: string }[] = [{ id: "set", title: "Whole set" }, { id: "prompt", title: "One prompt" }];
  if (data.contrast) modes.push({ id: "contrast", title: `Against ${data.contrast.other}` });
  const step = (by: number) => go({ mode: "prompt", prompt: (state.prompt + by + prompts.id.length) % prompts.id.length, node: "" });
  return (
    <div class="tools">
      <span class="segments" role="group" aria-label="Which graph">
        {modes.map((mode) => (
          <button type="button" aria-pressed={state.mode === mode.id} onClick={() => go({ mode: mode.id, node: "" })}>{mode.title}</button>
        ))}
      </span>
      {state.mode === "prompt" && (
        <span class="picker">
          <button type="button" aria-label="Previous prompt" onClick={() => step(-1)}>‹</button>
          <select aria-label="Prompt" value={state.prompt} onChange={(event) => go({ prompt: Number(event.currentTarget.value), node: "" })}>
            {prompts.id.map((id, at) => <option value={at}>{promptText(at)}{prompts.answer[at] ?? ""} · {id}</option>)}
          </select>
          <button type="button" aria-label="Next prompt" onClick={() => step(1)}>›</button>
        </span>
      )}
      <label title="Of the influence of all latents, how much the shown ones must hold">Nodes <input type="range" min={0.05} max={1} step={0.01} value={state.keep} aria-label="Share of the latents' influence kept" onInput={(event) => go({ keep: Number(event.currentTarget.value) }, { replace: true })} /><output>{percent(state.keep)}</output></label>
      <label title="Of the influence of the edges between them, how much the shown ones must hold">Edges <input type="range" min={0.05} max={1} step={0.01} value={state.links} aria-label="Share of the edges' influence kept" onInput={(event) => go({ links: Number(event.currentTarget.value) }, { replace: true })} /><output>{percent(state.links)}</output></label>
      {graph?.nodes.tier?.some(Boolean) && (
        <label>Show <select value={state.tier} onChange={(event) => go({ tier: event.currentTarget.value })}>
          <option value="">{state.mode === "contrast" ? "all differences" : "all tiers"}</option>
          {state.mode !== "contrast" && <option value="contingent">contingent and consensus</option>}
          <option value="consensus">{state.mode === "contrast" ? "q ≤ 0.05" : "consensus"}</option>
        </select></label>
      )}
      <label>Group <select value={state.group} onChange={(event) => go({ group: event.currentTarget.value as Grouping })}>
        <option value="none">nothing</option>
        <option value="meta" disabled={!data.metas || state.mode === "contrast"}>by meta-latent</option>
        {data.graph.groups.length > 0 && <option value="given">as inspected</option>}
        <option value="mine" disabled={!state.mine.length}>my groups ({state.mine.length})</option>
      </select></label>
    </div>
  );
}

function Drawn({ state, go, plainGraph }: { state: State; go: Go; plainGraph: Graph }) {
  const graph = useMemo(
    () => grouped(plainGraph, groupsOf(plainGraph, state)),
    [plainGraph, state.group, state.mine],
  );
  const pinned = useMemo(() => new Set(state.pins.map((key) => graph.at.get(key)).filter((node): node is number => node !== undefined)), [graph, state.pins]);
  const kept = useMemo(
    () => prune(graph.nodes, graph.edges, state.keep, state.links, graph.total, {
      allowed: (node) => graph.mode === "prompt" || atLeast(graph.nodes.tier?.[node], state.tier),
      pinned,
      loose: graph.mode === "contrast",
    }),
    [graph, state.keep, state.links, state.tier, pinned],
  );
  const under = useRef<HTMLDivElement>(null);
  const [room, setRoom] = useState(900);
  const layout = useMemo(() => layOut(graph, kept.nodes, room), [graph, kept, room]);
  const over = useRef<HTMLDivElement>(null);
  const canvas = useRef<Canvas | null>(null);
  const [pointed, setPointed] = useState<number | null>(null);
  const selected = graph.at.get(state.node) ?? null;
  const chosen = selected !== null && kept.nodes.includes(selected) ? selected : null;
  const focus = pointed ?? chosen;
  const events = useRef({ pick: (_: number | null, __: boolean) => {}, open: (_: number) => {} });
  events.current.pick = (node, shift) => {
    if (node === null) go({ node: "" }, { replace: true });
    else if (shift) go({ pins: toggled(state.pins, graph.key[node]) });
    else go({ node: graph.key[node] === state.node ? "" : graph.key[node] });
  };
  events.current.open = (node) => openNode(graph, node, go);
  const height = Math.min(Math.max(330, layout.labelled ? 32 * layout.height + 80 : kept.nodes.length > 400 ? 620 : 460), 900);

  useLayoutEffect(() => {
    const made = (canvas.current = new Canvas(under.current!, over.current!, {
      point: (node) => setPointed(node),
      pick: (node, shift) => events.current.pick(node, shift),
      open: (node) => events.current.open(node),
    }));
    const watch = new ResizeObserver(() => {
      made.resize();
      setRoom(under.current!.clientWidth - GRID.left - GRID.right);
    });
    watch.observe(under.current!);
    return () => {
      watch.disconnect();
      made.dispose();
    };
  }, []);
  useLayoutEffect(() => {
    const share = data.run.trust.error_share;
    const sites = graph.mode === "contrast" ? [] : data.sites.map((site) => (share[site.name] == null ? "" : `error ${percent(share[site.name])}`));
    canvas.current?.draw({ graph, kept, layout, rowNotes: ["", ...sites, ""], pinned });
  }, [graph, kept, layout, pinned, state.theme]);
  useEffect(() => canvas.current?.focus(focus), [focus, graph, kept, layout, state.theme]);

  useEffect(() => {
    // Where a node is drawn, for scripts that point at it: tests, and those that teach.
    Object.assign(under.current!, { locate: (key: string) => canvas.current?.where(graph.at.get(key) ?? -1) });
  }, [graph]);
  current.svg = () => canvas.current?.svg() ?? "";
  current.sheet = () => sheet(graph, kept);

  const onKey = (event: KeyboardEvent) => {
    const next = neighbour(event.key, graph, kept, layout, chosen);
    if (next !== null) go({ node: graph.key[next] }, { replace: true });
    else if (event.key === "Enter" && chosen !== null) openNode(graph, chosen, go);
    else if (event.key === "p" && chosen !== null) go({ pins: toggled(state.pins, graph.key[chosen]) });
    else if (event.key === "Escape") go({ node: "" }, { replace: true });
    else if (event.key === "0") canvas.current?.fit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const kinds = graph.nodes.kind;
  const latents = kept.nodes.filter((node) => kinds[node] === "latent" || kinds[node] === "supernode").length;
  const name = `Attribution graph, ${count(kept.nodes.length, "node")} and ${count(kept.edges.length, "edge")}. Arrow keys move along it, Enter opens a node.`;
  return (
    <div class="graph">
      <div>
        <p class="soft status" role="status">
          {graph.mode === "prompt" && <><b class="quote">{promptText(graph.prompt)}<span class="answer">{data.prompts.answer[graph.prompt]}</span></b> total effect {signed(data.prompts.clean[graph.prompt] - data.prompts.baseline[graph.prompt])}. </>}
          {graph.mode === "contrast" ? contrastWords() : ""}
          {count(latents, graph.mode === "contrast" ? "node" : "latent")} with <b>{percent(kept.held)}</b> of {graph.mode === "contrast" ? "the summed difference" : "the latents' influence"};{" "}
          {kept.nodes.length - 1} of {graph.of.nodes - 1} nodes, {kept.edges.length.toLocaleString("en")} of {graph.of.edges.toLocaleString("en")} edges with {percent(kept.carried)} of those between them.
          {graph.nodes.kind.length < graph.of.nodes && ` The page holds ${graph.nodes.kind.length} of the nodes, the most influential.`}
        </p>
        <div class="canvas" style={{ height: `${height}px` }} tabIndex={0} role="application" aria-label={name} onKeyDown={onKey} onMouseLeave={() => setPointed(null)}>
          <div class="layer" ref={under} />
          <div class="layer over" ref={over} />
        </div>
        <Legend graph={graph} />
      </div>
      <Panel graph={graph} kept={kept} node={focus} state={state} go={go} fit={() => canvas.current?.fit()} />
    </div>
  );
}

function contrastWords(): string {
  const found = data.contrast!;
  return `Differences of ${found.paired ? "pairs of" : ""} ${found.prompts.join(" and ")} held-out prompts, this run minus ${found.other}; smallest p possible ${plain(found.smallest_p, 2)}. ${found.notes.join(" ")} `;
}

const toggled = (list: string[], item: string) => (list.includes(item) ? list.filter((each) => each !== item) : [...list, item]);

export function openNode(graph: Graph, node: number, go: Go) {
  const first = graph.members[node][0];
  const kind = graph.nodes.kind[node];
  if (kind === "latent" || kind === "error") go({ view: "node", node: graph.key[node] });
  else if (kind === "supernode") go({ view: "node", node: graphOf(graph.mode, graph.prompt)!.key[first] });
}

/** Where an arrow key leads: along a level to the next node, or up and down the strongest edge. */
function neighbour(key: string, graph: Graph, kept: Kept, layout: { x: Float64Array; y: Float64Array }, from: number | null): number | null {
  if (!key.startsWith("Arrow")) return null;
  if (from === null) return kept.nodes.find((node) => graph.nodes.kind[node] === "latent") ?? kept.nodes[0] ?? null;
  const { source, target, contribution } = graph.edges;
  if (key === "ArrowUp" || key === "ArrowDown") {
    const [mine, other] = key === "ArrowUp" ? [source, target] : [target, source];
    const edges = [...kept.edges].filter((edge) => mine[edge] === from).sort((a, b) => Math.abs(contribution[b]) - Math.abs(contribution[a]));
    return edges.length ? other[edges[0]] : from;
  }
  const level = [...kept.nodes].filter((node) => row(graph, node) === row(graph, from)).sort((a, b) => layout.x[a] - layout.x[b] || layout.y[b] - layout.y[a]);
  const place = level.indexOf(from) + (key === "ArrowRight" ? 1 : -1);
  return level[(place + level.length) % level.length];
}

function Legend({ graph }: { graph: Graph }) {
  return (
    <p class="key">
      <span><i class="dot up" />pushes the behaviour up</span>
      <span><i class="dot down" />pushes it down</span>
      <span><i class="dot error" />error: what the dictionary misses</span>
      <span><i class="square" />token</span>
      {graph.nodes.kind.includes("supernode") && <span><i class="dot group" />several latents</span>}
      <span>size: |attribution|; edge: its contribution to the behaviour</span>
      <span>click selects, double click opens, shift-click pins, wheel zooms, drag moves</span>
    </p>
  );
}

function Panel({ graph, kept, node, state, go, fit }: { graph: Graph; kept: Kept; node: number | null; state: State; go: Go; fit: () => void }) {
  const [name, setName] = useState("");
  const [find, setFind] = useState("");
  const { pins } = state;
  const group = () => {
    const members = pins.filter((key) => parseKey(key)?.kind === "latent");
    if (members.length > 1) go({ mine: [...state.mine, { label: name.trim() || `group ${state.mine.length + 1}`, members }], group: "mine", pins: [] });
    setName("");
  };
  const text = find.toLowerCase();
  const size = useMemo(() => strength(graph), [graph]);
  const found = text ? graph.key.map((_, k) => k).filter((k) => `${graph.label[k]} ${graph.key[k]}`.toLowerCase().includes(text)).sort((a, b) => size[b] - size[a]).slice(0, LISTED) : [];
  return (
    <aside aria-label="Selected node">
      <div class="tools tight">
        <input type="search" placeholder="Find a node" aria-label="Find a node" value={find} onInput={(event) => setFind(event.currentTarget.value)} />
        <button type="button" onClick={fit} title="Show the whole graph (0)">Fit</button>
      </div>
      {text && (
        <ul class="list">
          {found.map((each) => (
            <li><button type="button" onClick={() => { setFind(""); go({ node: graph.key[each], pins: kept.nodes.includes(each) ? state.pins : [...state.pins, graph.key[each]] }); }}>{graph.label[each]} <small>{place(graph, each)}{kept.nodes.includes(each) ? "" : " · below the threshold, will be pinned"}</small></button></li>
          ))}
          {!found.length && <li class="soft">No node is called so.</li>}
        </ul>
      )}
      {node !== null ? (
        <Selected graph={graph} kept={kept} node={node} state={state} go={go} />
      ) : (
        <Strongest graph={graph} kept={kept} size={size} go={go} />
      )}
      {(pins.length > 0 || state.mine.length > 0) && (
        <section class="pins">
          <h3>Pinned</h3>
          <ul class="list">{pins.map((key) => <li><span>{graph.at.has(key) ? graph.label[graph.at.get(key)!] : key}</span><button type="button" class="small" aria-label={`Unpin ${key}`} onClick={() => go({ pins: toggled(state.pins, key) })}>×</button></li>)}</ul>
          {pins.length > 1 && (
            <form class="tools tight" onSubmit={(event) => { event.preventDefault(); group(); }}>
              <input placeholder="Name of the group" aria-label="Name of the group" value={name} onInput={(event) => setName(event.currentTarget.value)} />
              <button type="submit">Group</button>
            </form>
          )}
          {state.mine.length > 0 && (
            <>
              <h3>My groups</h3>
              <ul class="list">{state.mine.map((each, k) => <li><span>{each.label} ({each.members.length})</span><button type="button" class="small" aria-label={`Dissolve ${each.label}`} onClick={() => go({ mine: state.mine.filter((_, at) => at !== k), group: state.mine.length > 1 ? state.group : "none" })}>×</button></li>)}</ul>
            </>
          )}
        </section>
      )}
    </aside>
  );
}

export function place(graph: Graph, node: number): string {
  const { nodes } = graph;
  if (nodes.kind[node] === "target") return "";
  const column = graph.columns.find((each) => each.key === String(nodes.position[node]))?.title ?? nodes.position[node];
  return nodes.kind[node] === "embedding" ? `${column}` : `${column}, ${data.sites[nodes.site[node] ?? 0].title}`;
}

function Strongest({ graph, kept, size, go }: { graph: Graph; kept: Kept; size: Float64Array; go: Go }) {
  const best = [...kept.nodes].filter((node) => graph.nodes.kind[node] !== "target").sort((a, b) => size[b] - size[a]).slice(0, 14);
  const scale = Math.max(1e-12, ...best.map((node) => size[node]));
  return (
    <section>
      <h3>Strongest nodes</h3>
      <ul class="list">
        {best.map((node) => (
          <li><button type="button" onClick={() => go({ node: graph.key[node] })}><span>{graph.label[node]} <small>{place(graph, node)}</small></span><Bar value={graph.nodes.attribution[node] ?? size[node]} scale={scale} /><b>{signed(graph.nodes.attribution[node] ?? null)}</b></button></li>
        ))}
      </ul>
    </section>
  );
}

function Selected({ graph, kept, node, state, go }: { graph: Graph; kept: Kept; node: number; state: State; go: Go }) {
  const { nodes } = graph;
  const kind = nodes.kind[node];
  const known = kind === "latent" ? dossierOf(nodes.site[node] ?? 0, nodes.latent[node] ?? 0) : undefined;
  const facts: [string, string][] = [["attribution", signed(nodes.attribution[node])]];
  if (graph.mode === "contrast") {
    const q = data.contrast!.nodes.q[node];
    facts[0] = ["difference", `${signed(nodes.attribution[node])}, q ${plain(q)}`];
  } else {
    if (nodes.held_out?.[node] != null) facts.push(["held-out mean", `${signed(nodes.held_out[node])} ${interval(nodes.low?.[node], nodes.high?.[node])}`]);
    if (nodes.tier?.[node]) facts.push(["tier", `${nodes.tier[node]}, kept in ${percent(nodes.frequency?.[node])} of prompts`]);
    if (nodes.activation?.[node] != null) facts.push(["activation", plain(nodes.activation[node])]);
    facts.push(["influence", percent(nodes.influence[node])]);
    if (known?.score != null) facts.push(["label's score", plain(known.score)]);
  }
  return (
    <section>
      <h3 aria-live="polite">{graph.label[node]}</h3>
      <p class="soft">{place(graph, node)}</p>
      <dl class="facts">{facts.map(([term, text]) => <div><dt>{term}</dt><dd>{text}</dd></div>)}</dl>
      {kind === "supernode" && <ul class="list">{graph.members[node].map((member) => { const whole = graphOf(graph.mode, graph.prompt)!; return <li><button type="button" onClick={() => openNode(whole, member, go)}><span>{whole.label[member]}</span><b>{signed(whole.nodes.attribution[member])}</b></button></li>; })}</ul>}
      <div class="tools tight">
        {(kind === "latent" || kind === "error" || kind === "supernode") && <button type="button" class="primary" onClick={() => openNode(graph, node, go)}>Open node</button>}
        {kind !== "target" && <button type="button" aria-pressed={state.pins.includes(graph.key[node])} onClick={() => go({ pins: toggled(state.pins, graph.key[node]) })}>{state.pins.includes(graph.key[node]) ? "Unpin" : "Pin"}</button>}
      </div>
      <Edges graph={graph} kept={kept} node={node} into go={go} />
      <Edges graph={graph} kept={kept} node={node} into={false} go={go} />
    </section>
  );
}

/** The strongest edges into or out of a node, of all that the page holds. */
export function Edges({ graph, kept, node, into, go, view }: { graph: Graph; kept?: Kept; node: number; into: boolean; go: Go; view?: boolean }) {
  const { source, target, contribution, weight } = graph.edges;
  const [mine, other] = into ? [target, source] : [source, target];
  const edges = [...mine.keys()].filter((edge) => mine[edge] === node).sort((a, b) => Math.abs(contribution[b]) - Math.abs(contribution[a]));
  if (!edges.length) return <p class="soft">{into ? (graph.nodes.kind[node] === "latent" ? "What feeds it was not computed: it is not one of the set's latents." : "Nothing feeds it.") : ""}</p>;
  const all = edges.reduce((sum, edge) => sum + Math.abs(contribution[edge]), 0);
  const shown = edges.slice(0, LISTED);
  const scale = Math.abs(contribution[shown[0]]);
  const listed = shown.reduce((sum, edge) => sum + Math.abs(contribution[edge]), 0);
  const drawn = new Set(kept?.edges);
  return (
    <>
      <h4>{into ? "Fed by" : "Feeds"} <small>{shown.length} of {edges.length}, {percent(listed / all)} of the flow</small></h4>
      <ul class="list">
        {shown.map((edge) => (
          <li class={kept && !drawn.has(edge) ? "faint" : ""} title={`contribution ${signed(contribution[edge])}, weight ${signed(weight[edge])}${kept && !drawn.has(edge) ? ", below the threshold" : ""}`}>
            <button type="button" onClick={() => go({ node: graph.key[other[edge]], ...(view && parseKey(graph.key[other[edge]])?.kind !== "latent" ? { view: "graph" } : {}) })}>
              <span>{graph.label[other[edge]]} <small>{place(graph, other[edge])}</small></span><Bar value={contribution[edge]} scale={scale} /><b>{signed(contribution[edge])}</b>
            </button>
          </li>
        ))}
      </ul>
    </>
  );
}

function sheet(graph: Graph, kept: Kept) {
  const { nodes, edges } = graph;
  const nodeRows = [...kept.nodes].map((k) => ["node", graph.key[k], graph.label[k], nodes.kind[k], place(graph, k), nodes.attribution[k], nodes.low?.[k], nodes.high?.[k], nodes.held_out?.[k], nodes.frequency?.[k], nodes.tier?.[k], nodes.influence[k], null, null, null]);
  const edgeRows = [...kept.edges].map((k) => ["edge", null, null, null, null, null, null, null, null, null, edges.tier?.[k], edges.influence[k], graph.key[edges.source[k]], graph.key[edges.target[k]], edges.contribution[k]]);
  return {
    name: graph.mode === "prompt" ? `graph-${data.prompts.id[graph.prompt]}` : `graph-${graph.mode}`,
    columns: ["row", "key", "label", "kind", "place", "attribution", "low", "high", "held_out", "frequency", "tier", "influence", "source", "target", "contribution"],
    rows: [...nodeRows, ...edgeRows],
  };
}
