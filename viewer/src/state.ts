// What is shown is in the URL's hash, so that a link or a reload shows the same.
import { data } from "./data";

export type View = "prompts" | "graph" | "node" | "meta" | "facts";
export const VIEWS: { id: View; title: string; key: string }[] = [
  { id: "prompts", title: "Prompt set", key: "1" },
  { id: "graph", title: "Graph", key: "2" },
  { id: "node", title: "Node", key: "3" },
  { id: "meta", title: "Meta-latent", key: "4" },
  { id: "facts", title: "Hidden facts", key: "5" },
];
export type Mode = "set" | "prompt" | "contrast";
export type Grouping = "none" | "meta" | "given" | "mine";

export interface State {
  view: View;
  mode: Mode;
  prompt: number;
  node: string; // key of a node in the graph, "" for none
  meta: number; // -1 for none
  keep: number; // share of the latents' influence
  links: number; // share of the edges' influence
  tier: string; // least tier shown in the set's graph: "", "contingent" or "consensus"
  group: Grouping;
  pins: string[];
  mine: { label: string; members: string[] }[];
  sort: string;
  find: string;
  filter: string;
  theme: "" | "dark" | "light";
}

const start: State = {
  view: data.first == null ? "prompts" : "graph",
  mode: data.first == null ? (data.contrast ? "contrast" : "set") : "prompt",
  prompt: data.first ?? 0,
  node: "",
  meta: -1,
  keep: data.keep.nodes,
  links: data.keep.edges,
  tier: "",
  group: data.graph.groups.length ? "given" : "none",
  pins: [],
  mine: [],
  sort: "",
  find: "",
  filter: "",
  theme: "",
};

const LISTS = ["pins", "mine"] as const;

export function read(): State {
  const found = new URLSearchParams(location.hash.slice(1));
  const state: Record<string, unknown> = { ...start };
  for (const [name, text] of found) {
    if (!(name in start)) continue;
    const like = start[name as keyof State];
    if (typeof like === "number") state[name] = Number.isFinite(Number(text)) ? Number(text) : like;
    else if (typeof like === "string") state[name] = text;
    else state[name] = list(text) ?? like;
  }
  const state_ = state as unknown as State;
  if (!VIEWS.some((each) => each.id === state_.view)) state_.view = start.view;
  if (!(state_.prompt in data.prompts.id)) state_.prompt = 0;
  if (state_.mode === "contrast" && !data.contrast) state_.mode = "set";
  state_.mine = state_.mine.filter((each) => typeof each?.label === "string" && Array.isArray(each.members));
  state_.pins = state_.pins.filter((each) => typeof each === "string");
  return state_;
}

function list(text: string): unknown[] | null {
  try {
    const value: unknown = JSON.parse(text);
    return Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}

export function hash(state: State): string {
  const changed = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    const before = start[name as keyof State];
    const text = (LISTS as readonly string[]).includes(name) ? JSON.stringify(value) : String(value);
    const same = Array.isArray(before) ? JSON.stringify(before) === text : String(before) === text;
    if (!same || name === "view") changed.set(name, text);
  }
  return `#${changed.toString()}`;
}

export type Go = (change: Partial<State>, options?: { replace?: boolean }) => void;
