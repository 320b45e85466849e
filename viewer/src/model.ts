// The graphs a reader can look at - of the set, of one prompt, of a contrast - in one form, and groups drawn as one.
import { data, dossierOf, effectOf, latentName, metaName, type EdgeTable, type Kind, type NodeTable } from "./data";
import { token } from "./text";
import type { Grouping, Mode, State } from "./state";

export interface Graph {
  mode: Mode;
  prompt: number;
  nodes: NodeTable;
  edges: EdgeTable;
  total: number; // influence of all latents of the whole graph
  of: { nodes: number; edges: number };
  columns: { key: string; title: string }[];
  rows: string[]; // titles, embeddings first, the behaviour last
  members: number[][]; // of every node; itself alone where it is no group
  key: string[]; // what a node is called in the URL
  label: string[];
  at: Map<string, number>; // by key
}

const siteRows = (sites: { title: string }[]) => ["token", ...sites.map((each) => each.title), "behaviour"];

export function row(graph: Graph, node: number): number {
  const kind = graph.nodes.kind[node];
  if (kind === "embedding") return 0;
  return kind === "target" ? graph.rows.length - 1 : (graph.nodes.site[node] ?? 0) + 1;
}

export function keyOf(kind: Kind, site: number | null, position: string | number | null, latent: number | null): string {
  if (kind === "target") return "target";
  return `${kind === "embedding" ? "embed" : site}/${position}/${kind === "latent" ? latent : kind}`;
}

export interface NodeKey {
  kind: Kind;
  site: number;
  position: string;
  latent: number;
}

export function parseKey(key: string): NodeKey | null {
  if (key === "target") return { kind: "target", site: -1, position: "", latent: -1 };
  const [first, last] = [key.indexOf("/"), key.lastIndexOf("/")];
  if (first < 0 || first === last) return null;
  const [site, position, end] = [key.slice(0, first), key.slice(first + 1, last), key.slice(last + 1)];
  if (site === "embed") return { kind: "embedding", site: -1, position, latent: -1 };
  if (!(Number(site) in data.sites)) return null;
  if (end === "error") return { kind: "error", site: Number(site), position, latent: -1 };
  return /^\d+$/.test(end) ? { kind: "latent", site: Number(site), position, latent: Number(end) } : null;
}

function finish(base: Omit<Graph, "key" | "label" | "at" | "members">): Graph {
  const { nodes } = base;
  const key = nodes.kind.map((kind, k) => keyOf(kind, nodes.site[k], nodes.position[k], nodes.latent[k]));
  const label = nodes.kind.map((_, k) => nameOf(base, k));
  return { ...base, key, label, members: key.map((_, k) => [k]), at: new Map(key.map((each, k) => [each, k])) };
}

function nameOf(graph: Pick<Graph, "nodes" | "mode" | "prompt">, k: number): string {
  const { nodes } = graph;
  if (nodes.kind[k] === "target") return data.run.behaviour.replace("_", " ");
  if (nodes.kind[k] === "error") return "error";
  if (nodes.kind[k] === "embedding") {
    return graph.mode === "prompt" ? `'${token(data.prompts.tokens[graph.prompt][Number(nodes.position[k])])}'` : "tokens";
  }
  if (nodes.label?.[k]) return nodes.label[k];
  const known = dossierOf(nodes.site[k] ?? 0, nodes.latent[k] ?? 0);
  if (known?.label || graph.mode !== "prompt") return latentName(nodes.site[k] ?? 0, nodes.latent[k] ?? 0);
  return `${nodes.latent[k]} on '${token(data.prompts.tokens[graph.prompt][Number(nodes.position[k])])}'`;
}

const latentInfluence = (nodes: NodeTable) =>
  nodes.influence.reduce((sum, value, k) => sum + (nodes.kind[k] === "latent" ? value : 0), 0);

let setGraph: Graph | null = null;
function ofSet(): Graph {
  setGraph ??= finish({
    mode: "set",
    prompt: -1,
    nodes: data.graph.nodes,
    edges: data.graph.edges,
    total: latentInfluence(data.graph.nodes),
    of: data.graph.of,
    columns: data.graph.positions.map((each) => ({ key: each, title: each })),
    rows: siteRows(data.sites),
  });
  return setGraph;
}

const prompts = new Map<number, Graph>();
function ofPrompt(at: number): Graph | null {
  const own = data.own[at];
  if (!own) return null;
  let found = prompts.get(at);
  if (!found) {
    const attribution = own.nodes.attribution.map((value, k) => (own.nodes.kind[k] === "target" ? effectOf(at) : value));
    found = finish({
      mode: "prompt",
      prompt: at,
      nodes: { ...own.nodes, attribution },
      edges: own.edges,
      total: own.of.influence,
      of: own.of,
      columns: data.prompts.tokens[at].map((text, k) => ({ key: String(k), title: token(text) })),
      rows: siteRows(data.sites),
    });
    prompts.set(at, found);
  }
  return found;
}

let contrastGraph: Graph | null = null;
function ofContrast(): Graph | null {
  const found = data.contrast;
  if (!found || contrastGraph) return contrastGraph;
  const { nodes: table } = found;
  const size = table.difference.reduce((sum, each) => sum + Math.abs(each), 0) || 1;
  const rest = found.rest.map((id) => id.split("/"));
  const nodes: NodeTable = {
    kind: [...table.kind, ...rest.map(([first]): Kind => (first === "target" ? "target" : "embedding"))],
    site: [...table.site, ...rest.map(() => null)],
    position: [...table.role, ...rest.map((parts) => parts[1] ?? null)],
    latent: [...table.latent, ...rest.map(() => null)],
    label: [...table.label, ...rest.map(() => null)],
    attribution: [...table.difference, ...rest.map(() => null)],
    influence: [...table.difference.map((each) => Math.abs(each) / size), ...rest.map(() => 0)],
    // What is surely different is shown as what is surely in a set's graph.
    tier: [...table.q.map((q) => (q != null && q <= 0.05 ? "consensus" : "noise")), ...rest.map(() => null)],
  };
  const all = found.edges.difference.reduce((sum, each) => sum + Math.abs(each), 0) || 1;
  const edges: EdgeTable = {
    source: found.edges.source,
    target: found.edges.target,
    weight: found.edges.first,
    contribution: found.edges.difference,
    influence: found.edges.difference.map((each) => Math.abs(each) / all),
  };
  const columns = [...new Set(nodes.position.filter((each): each is string => each != null))];
  columns.sort((a, b) => data.graph.positions.indexOf(a) - data.graph.positions.indexOf(b));
  contrastGraph = finish({
    mode: "contrast",
    prompt: -1,
    nodes,
    edges,
    total: latentInfluence(nodes),
    of: { nodes: nodes.kind.length, edges: edges.source.length },
    columns: columns.map((each) => ({ key: each, title: each })),
    rows: siteRows(data.sites),
  });
  return contrastGraph;
}

export function graphOf(mode: Mode, prompt: number): Graph | null {
  return mode === "set" ? ofSet() : mode === "prompt" ? ofPrompt(prompt) : ofContrast();
}

// -- groups ----------------------------------------------------------------------------------------------------------

/** Groups of a graph's nodes: what each is called, and its members; latents of one site and position only. */
export function groupsOf(graph: Graph, state: Pick<State, "group" | "mine">): { label: string; members: number[] }[] {
  const found = state.group === "mine" ? own(graph, state) : state.group === "meta" ? byMeta(graph) : given(graph, state.group);
  const taken = new Set<number>();
  return found
    .flatMap((group) => {
      const cells = new Map<string, number[]>();
      for (const node of group.members) {
        if (graph.nodes.kind[node] !== "latent" || taken.has(node)) continue;
        taken.add(node);
        const cell = `${graph.nodes.site[node]}/${graph.nodes.position[node]}`;
        cells.set(cell, [...(cells.get(cell) ?? []), node]);
      }
      return [...cells.values()].map((members) => ({ label: group.label, members }));
    })
    .filter((group) => group.members.length > 1);
}

const own = (graph: Graph, state: Pick<State, "mine">) =>
  state.mine.map((group) => ({
    label: group.label,
    members: group.members.map((key) => graph.at.get(key)).filter((node): node is number => node !== undefined),
  }));

const given = (graph: Graph, group: Grouping) => (group === "given" && graph.mode === "set" ? data.graph.groups : []);

/** Latents whose attribution goes mostly through one meta-latent. */
function byMeta(graph: Graph): { label: string; members: number[] }[] {
  const site = data.metas?.site;
  const strongest = (parts: { meta: number[]; value: number[] } | null | undefined) => {
    const best = parts?.meta.findIndex((meta) => meta >= 0) ?? -1; // parts come largest first
    return best < 0 ? null : parts!.meta[best];
  };
  const groups = new Map<number, number[]>();
  graph.key.forEach((_, node) => {
    if (graph.nodes.kind[node] !== "latent" || graph.nodes.site[node] !== site || graph.mode === "contrast") return;
    const [position, latent] = [graph.nodes.position[node], graph.nodes.latent[node] ?? -1];
    const parts =
      graph.mode === "set"
        ? dossierOf(site, latent)?.split?.[String(position)]
        : data.metas?.prompts[graph.prompt].find((each) => each.latent === latent && each.position === position);
    const meta = strongest(parts);
    if (meta != null) groups.set(meta, [...(groups.get(meta) ?? []), node]);
  });
  return [...groups].map(([meta, members]) => ({ label: metaName(meta), members }));
}

/** The graph with each group as one node: attributions, influences and contributions of its members are summed. */
export function grouped(graph: Graph, groups: { label: string; members: number[] }[]): Graph {
  if (!groups.length) return graph;
  const home = new Map<number, number>();
  groups.forEach((group, k) => group.members.forEach((node) => home.set(node, k)));
  const single = graph.key.map((_, node) => node).filter((node) => !home.has(node));
  const place = new Map(single.map((node, k) => [node, k]));
  const target = (node: number) => place.get(node) ?? single.length + (home.get(node) ?? 0);
  const pick = <T>(column: T[] | undefined, of: (members: number[]) => T): T[] | undefined =>
    column && [...single.map((node) => column[node]), ...groups.map((group) => of(group.members))];
  const sum = (column: (number | null)[] | undefined) => (members: number[]) =>
    members.reduce((total, node) => total + (column?.[node] ?? 0), 0);
  const { nodes, edges } = graph;
  const first = <T>(column: T[]) => (members: number[]) => column[members[0]];
  const merged: NodeTable = {
    kind: pick<Kind>(nodes.kind, () => "supernode")!,
    site: pick(nodes.site, first(nodes.site))!,
    position: pick(nodes.position, first(nodes.position))!,
    latent: pick<number | null>(nodes.latent, () => null)!,
    attribution: pick<number | null>(nodes.attribution, sum(nodes.attribution))!,
    influence: pick(nodes.influence, sum(nodes.influence))!,
    held_out: pick<number | null>(nodes.held_out, sum(nodes.held_out)),
    low: pick<number | null>(nodes.low, () => null),
    high: pick<number | null>(nodes.high, () => null),
    frequency: pick<number | null>(nodes.frequency, () => null),
    tier: pick(nodes.tier, (members) => strongestTier(members.map((node) => nodes.tier?.[node] ?? null))),
  };
  const sums = new Map<string, [number, number, number, number, number]>();
  edges.source.forEach((source, k) => {
    const ends: [number, number] = [target(source), target(edges.target[k])];
    const found = sums.get(ends.join()) ?? [...ends, 0, 0, 0];
    found[2] += edges.weight[k];
    found[3] += edges.contribution[k];
    found[4] += edges.influence[k];
    sums.set(ends.join(), found);
  });
  const links = [...sums.values()].sort((a, b) => b[4] - a[4]);
  const key = [...single.map((node) => graph.key[node]), ...groups.map((group) => `group:${graph.key[group.members[0]]}`)];
  return {
    ...graph,
    nodes: merged,
    edges: {
      source: links.map((each) => each[0]),
      target: links.map((each) => each[1]),
      weight: links.map((each) => each[2]),
      contribution: links.map((each) => each[3]),
      influence: links.map((each) => each[4]),
    },
    key,
    label: [...single.map((node) => graph.label[node]), ...groups.map((group) => `${group.members.length} × ${group.label}`)],
    members: [...single.map((node) => [node]), ...groups.map((group) => group.members)],
    at: new Map(key.map((each, k) => [each, k])),
  };
}

const TIERS = ["noise", "contingent", "consensus"];
const strongestTier = (tiers: (string | null)[]): string | null =>
  tiers.reduce<string | null>((best, each) => (TIERS.indexOf(each ?? "") > TIERS.indexOf(best ?? "") ? each : best), null);

/** Whether a latent's tier is at least the one asked for. */
export function atLeast(tier: string | null | undefined, least: string): boolean {
  return least === "" || TIERS.indexOf(tier ?? "") >= TIERS.indexOf(least);
}
