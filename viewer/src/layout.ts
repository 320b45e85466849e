// Where a graph's nodes stand: columns are tokens or roles, rows are sites from bottom to top. What nodes mean gives
// both coordinates; the nodes of a cell fill a small grid, strongest first.
import { row, type Graph } from "./model";

export interface Band {
  title: string;
  start: number;
  size: number;
}

export interface Layout {
  x: Float64Array; // by node of the graph; only those laid out are set
  y: Float64Array;
  columns: Band[];
  rows: Band[];
  width: number;
  height: number;
  labelled: boolean; // cells are wide enough for names
}

const NAMED = 170; // nodes, at most, that are laid out with room for their names
const SLOT = 56; // pixels that a node needs with its name
const STACK = 6; // nodes above each other before a named cell widens
const BARE = 0.5; // width of a column without latents, whose nodes need no name
const EMPTY = 0.3; // of one without nodes
const LANE = { named: 1.6, dense: 2.5 }; // between rows, for the edges

/** Nodes with room for their names, if that is to be had on a drawing `room` pixels wide; else close together. */
export function layOut(graph: Graph, nodes: Int32Array, room: number): Layout {
  const named = nodes.length <= NAMED ? arrange(graph, nodes, true) : null;
  return named && room / named.width >= SLOT ? named : arrange(graph, nodes, false);
}

function arrange(graph: Graph, nodes: Int32Array, labelled: boolean): Layout {
  const column = new Map(graph.columns.map((each, k) => [each.key, k]));
  const cells = new Map<string, number[]>();
  for (const node of nodes) {
    if (graph.nodes.kind[node] === "target") continue;
    const cell = `${column.get(String(graph.nodes.position[node])) ?? 0}/${row(graph, node)}`;
    cells.set(cell, [...(cells.get(cell) ?? []), node]);
  }
  const abreast = (n: number) => (labelled ? Math.ceil(n / STACK) : Math.ceil(Math.sqrt(n * 1.5)));
  const bare = (node: number) => graph.nodes.kind[node] === "error" || graph.nodes.kind[node] === "embedding";
  const wide = graph.columns.map(() => 0);
  const named = graph.columns.map(() => false);
  for (const [cell, here] of cells) {
    const at = Number(cell.split("/")[0]);
    wide[at] = Math.max(wide[at], abreast(here.length));
    named[at] ||= !here.every(bare);
  }
  const high = graph.rows.map(() => 0);
  high[high.length - 1] = 1;
  for (const [cell, here] of cells) {
    const [at, up] = cell.split("/").map(Number);
    high[up] = Math.max(high[up], Math.ceil(here.length / Math.max(wide[at], 1)));
  }
  const lane = labelled ? LANE.named : LANE.dense;
  const columns = bands(graph.columns.map((each) => each.title), wide.map((size, k) => (named[k] || size > 1 ? size : size ? BARE : EMPTY)), labelled ? 0.12 : 0.8);
  const rows = bands(graph.rows, high, lane);
  const [x, y] = [new Float64Array(graph.key.length), new Float64Array(graph.key.length)];
  for (const [cell, here] of cells) {
    const [at, up] = cell.split("/").map(Number);
    const n = Math.max(wide[at], 1);
    here.forEach((node, k) => {
      x[node] = columns[at].start + (k % n) + (labelled ? 0.14 : 0.5);
      const levels = Math.ceil(here.length / n);
      y[node] = rows[up].start + (rows[up].size + levels) / 2 - Math.floor(k / n) - 0.5;
    });
  }
  const last = rows[rows.length - 1];
  const end = columns[columns.length - 1];
  const width = end.start + end.size;
  for (const node of nodes) {
    if (graph.nodes.kind[node] !== "target") continue;
    x[node] = labelled ? Math.max(width - 1, width / 2) : width - 1;
    y[node] = last.start + last.size / 2;
  }
  return { x, y, columns, rows, width, height: last.start + last.size, labelled };
}

/** Bands of the given sizes, with a gap after each that has nodes. */
function bands(titles: string[], sizes: number[], gap: number): Band[] {
  let start = 0;
  return titles.map((title, k) => {
    const band = { title, start, size: sizes[k] };
    start += sizes[k] > EMPTY ? sizes[k] + gap : sizes[k];
    return band;
  });
}
