// What the slider keeps of a graph: steps 3 to 5 of circuits/pruning.py, on the influences it has measured.
import type { EdgeTable, NodeTable } from "./data";

export interface Kept {
  nodes: Int32Array; // indices, strongest first
  edges: Int32Array;
  held: number; // share of the latents' influence
  carried: number; // share of the influence of the edges between kept nodes
}

export interface Options {
  allowed?: (node: number) => boolean;
  pinned?: Set<number>;
  loose?: boolean;
}

/**
 * The part of a graph that holds `share` of its latents' influence and `links` of that of the edges between them.
 * Error nodes and embeddings do not compete. `total` is the influence of all latents, also of those not in `nodes`.
 * `allowed` says which latents may be shown at all, `pinned` which nodes are in any case; in a `loose` graph nodes need
 * not lead to the behaviour.
 */
export function prune(
  nodes: NodeTable,
  edges: EdgeTable,
  share: number,
  links: number,
  total: number,
  { allowed = () => true, pinned = new Set(), loose = false }: Options = {},
): Kept {
  const n = nodes.kind.length;
  const competes = (node: number) => nodes.kind[node] === "latent" || nodes.kind[node] === "supernode";
  const ranked = [...nodes.influence.keys()].filter(competes).sort((a, b) => nodes.influence[b] - nodes.influence[a]);
  const chosen = new Uint8Array(n);
  for (let node = 0; node < n; node++) chosen[node] = competes(node) ? 0 : 1;
  let running = 0;
  for (const node of ranked) {
    if (share < 1 && (running >= (share - 1e-9) * total || nodes.influence[node] <= 0)) break;
    chosen[node] = allowed(node) ? 1 : 0;
    running += nodes.influence[node];
  }
  for (const node of pinned) chosen[node] = 1;
  const kept = loose ? chosen : connected(nodes, edges, chosen);
  for (const node of pinned) kept[node] = 1;
  let held = 0;
  for (const node of ranked) if (kept[node]) held += nodes.influence[node];
  const between: number[] = []; // edges come strongest first
  let flow = 0;
  for (let edge = 0; edge < edges.source.length; edge++) {
    if (!kept[edges.source[edge]] || !kept[edges.target[edge]]) continue;
    between.push(edge);
    flow += edges.influence[edge];
  }
  const out = new Uint8Array(n);
  const into = new Uint8Array(n);
  const strong: number[] = [];
  let carried = 0;
  let before = 0;
  for (const edge of between) {
    const lifeline = !out[edges.source[edge]] || !into[edges.target[edge]];
    const wanted = links >= 1 || (before < (links - 1e-9) * flow && edges.influence[edge] > 0);
    before += edges.influence[edge];
    if (!wanted && !lifeline) continue;
    out[edges.source[edge]] = into[edges.target[edge]] = 1;
    strong.push(edge);
    carried += edges.influence[edge];
  }
  const order = [...kept.keys()].filter((node) => kept[node]);
  order.sort((a, b) => nodes.influence[b] - nodes.influence[a]);
  return {
    nodes: Int32Array.from(order),
    edges: Int32Array.from(strong),
    held: total > 0 ? held / total : 1,
    carried: flow > 0 ? carried / flow : 1,
  };
}

/** Of the chosen nodes, those that are fed (or never had in-edges) and reach the behaviour. */
function connected(nodes: NodeTable, edges: EdgeTable, chosen: Uint8Array): Uint8Array {
  const n = nodes.kind.length;
  const { forward, backward } = byDepth(nodes, edges);
  const fed = new Uint8Array(n).fill(1);
  for (const target of edges.target) fed[target] = 0;
  for (let node = 0; node < n; node++) if (!chosen[node]) fed[node] = 0;
  for (const edge of forward) if (fed[edges.source[edge]] && chosen[edges.target[edge]]) fed[edges.target[edge]] = 1;
  const reaches = new Uint8Array(n);
  for (let node = 0; node < n; node++) if (nodes.kind[node] === "target") reaches[node] = fed[node] = 1;
  for (const edge of backward) {
    if (reaches[edges.target[edge]] && fed[edges.source[edge]]) reaches[edges.source[edge]] = 1;
  }
  return reaches;
}

const orders = new WeakMap<EdgeTable, { forward: number[]; backward: number[] }>();

/** Edges by the depth of their source, shallow first, and by that of their target, deep first. */
function byDepth(nodes: NodeTable, edges: EdgeTable): { forward: number[]; backward: number[] } {
  let found = orders.get(edges);
  if (!found) {
    const depth = nodes.kind.map((kind, node) =>
      kind === "target" ? 1e9 : kind === "embedding" ? -1 : (nodes.site[node] ?? 0),
    );
    const every = [...edges.source.keys()];
    found = {
      forward: [...every].sort((a, b) => depth[edges.source[a]] - depth[edges.source[b]]),
      backward: [...every].sort((a, b) => depth[edges.target[b]] - depth[edges.target[a]]),
    };
    orders.set(edges, found);
  }
  return found;
}
