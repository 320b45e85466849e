// The payload that circuits/viewer/payload.py writes into the page. Tables are stored by column.

export type Maybe = number | null;
export type Kind = "latent" | "error" | "embedding" | "target" | "supernode";

export interface NodeTable {
  id?: string[];
  kind: Kind[];
  site: Maybe[];
  position: (string | number | null)[];
  latent: Maybe[];
  label?: (string | null)[];
  attribution: Maybe[];
  influence: number[];
  low?: Maybe[];
  high?: Maybe[];
  held_out?: Maybe[];
  frequency?: Maybe[];
  tier?: (string | null)[];
  activation?: Maybe[];
}

export interface EdgeTable {
  source: number[];
  target: number[];
  weight: number[];
  contribution: number[];
  influence: number[];
  tier?: (string | null)[];
}

export interface Group {
  label: string;
  members: number[];
}

export interface SetGraph {
  nodes: NodeTable;
  edges: EdgeTable;
  of: { nodes: number; edges: number };
  positions: string[];
  groups: Group[];
}

export interface OwnGraph {
  nodes: NodeTable;
  edges: EdgeTable;
  of: { nodes: number; edges: number; influence: number };
}

export interface Context {
  tokens: string[];
  values: number[];
  position: number;
}

export interface Evidence {
  label?: string | null;
  score?: Maybe;
  source?: string | null;
  density?: Maybe;
  histogram?: { from: number; count: number }[] | null;
  contexts?: Context[] | null;
  logits_up?: string[] | null;
  logits_down?: string[] | null;
}

export interface Where {
  at: number;
  position: number[];
  value: number[];
}

export interface Parts {
  meta: number[];
  value: number[];
}

export interface Dossier extends Evidence {
  site: number;
  latent: number;
  nodes: number[];
  by_prompt: Record<string, { at: number[]; value: number[] } | null>;
  where: Where[];
  exact: { at: number; position: number; exact: Maybe; ig: Maybe; atp: Maybe }[];
  effects: { te: Maybe; tie: Maybe; nie: Maybe; nde: Maybe } | null;
  split: Record<string, Parts | null> | null;
}

export interface Meta extends Evidence {
  meta: number;
  mean: number;
  p?: Maybe;
  members?: { latent: number; code: number; label: string | null }[] | null;
  shared?: string[] | null;
  through: { latent: number[]; value: number[]; others: number; more: number } | [];
  where: Where[];
}

export interface PromptSplit extends Parts {
  position: number;
  latent: number;
  on: boolean; // in the clean prompt, not only at the baseline
}

export interface FactRows {
  at: number[];
  group: string[];
  expected: (string | null)[];
  role: string[];
  meta: number[];
  label: string[];
  kind: string[];
  shapley: Maybe[];
  stderr: Maybe[];
  rank: Maybe[];
  present: boolean[];
  linear: number[];
  hidden_share: number[];
  carriers_silent: boolean[];
  total_effect: number[];
  behaviour: number[];
  removal: Maybe[];
  swap: Maybe[];
  swap_follows: (boolean | null)[];
  counterpart?: Maybe[];
  p: Maybe[];
  q: Maybe[];
  flagged: boolean[];
  controls: (number[] | null)[];
}

export interface Agreement {
  pearson: Maybe;
  spearman: Maybe;
  sign: Maybe;
  n: number;
}

export interface Contrast {
  other: string;
  nodes: {
    id: string[];
    kind: Kind[];
    site: number[];
    role: string[];
    latent: Maybe[];
    label: string[];
    graphs: string[];
    first: number[];
    second: number[];
    difference: number[];
    p: Maybe[];
    q: Maybe[];
  };
  rest: string[];
  edges: {
    source: number[];
    target: number[];
    first: number[];
    second: number[];
    difference: number[];
    p: Maybe[];
    q: Maybe[];
  };
  prompts: number[];
  paired: boolean;
  smallest_p: number;
  notes: string[];
}

export interface Payload {
  title: string;
  run: {
    model: string;
    saes: string[];
    behaviour: string;
    baseline: string;
    estimator: string;
    seed: number;
    path: string;
    created: string;
    versions: Record<string, string | null>;
    seconds: number;
    effect: { mean: number; low: number; high: number; clean: number; baseline: number; prompts: number };
    held_out: number;
    trust: {
      conservation_gap: Record<string, number>;
      error_share: Record<string, number>;
      estimator_vs_exact: Record<string, Agreement>;
      edges_vs_exact?: Agreement;
      important_missed?: { left_out: number; missed: number; kept: number; median: Maybe; at_most: Maybe };
      warnings: string[];
    };
    fidelity: {
      site: string;
      name?: string;
      folder?: string | null;
      variance_explained?: Maybe;
      l0?: Maybe;
      cross_entropy_recovered?: Maybe;
      labels: boolean;
    }[];
    groups: { group: string; prompts: number; mean: number; low: Maybe; high: Maybe }[];
    calibration: {
      nodes: { site: string[]; latent: Maybe[]; role: string[]; ig: Maybe[]; atp: Maybe[]; exact: Maybe[] };
      edges: { weight: Maybe[]; exact: Maybe[] } | null;
    };
    proof: {
      kind: string[];
      ranking: string[];
      size: number[];
      of: number[];
      faithfulness: Maybe[];
      completeness: Maybe[];
    } | null;
  };
  sites: { name: string; title: string }[];
  prompts: {
    id: string[];
    text: (string | null)[];
    half: (string | null)[];
    group: string[];
    answer: (string | null)[];
    wrong: (string | null)[];
    fact: (string | null)[];
    tokens: string[][];
    roles: string[];
    role: number[][];
    clean: number[];
    baseline: number[];
    sites: Record<string, { shown: number[]; errors: number[]; others: number[]; gap: number[] }>;
    heat: number[][][];
  };
  first: Maybe;
  keep: { nodes: number; edges: number };
  graph: SetGraph;
  own: Record<string, OwnGraph>;
  latents: Dossier[];
  metas: {
    folder: string;
    site: number;
    width: Maybe;
    contexts: boolean;
    list: Meta[];
    prompts: PromptSplit[][];
    names: Record<string, string>;
  } | null;
  facts: {
    settings: { carrier_cosine: number; alpha: number; controls: number; least_effect: number } | null;
    split_error: Maybe;
    rows: FactRows;
    carriers: { meta: number; latent: number; cosine: number; carrier: boolean; on: number[] }[] | null;
  } | null;
  contrast: Contrast | null;
}

export const data = JSON.parse(document.getElementById("payload")?.textContent ?? "null") as Payload;

export const BIAS = -1;
export const RESIDUAL = -2;
export const OTHERS = -3; // all other meta-latents
export const SUMMED = -4; // all other latents

const metas = new Map((data.metas?.list ?? []).map((each) => [each.meta, each]));
const dossiers = new Map(data.latents.map((each) => [`${each.site}/${each.latent}`, each]));

export const metaOf = (meta: number): Meta | undefined => metas.get(meta);
export const dossierOf = (site: number, latent: number): Dossier | undefined => dossiers.get(`${site}/${latent}`);

export function metaName(meta: number): string {
  if (meta === BIAS) return "bias";
  if (meta === RESIDUAL) return "residual";
  if (meta === OTHERS) return "other meta-latents";
  return metas.get(meta)?.label ?? data.metas?.names[meta] ?? `meta-latent ${meta}`;
}

/** What to call a latent: its label where the dictionary has one, else the token it is most on at. */
export function latentName(site: number, latent: number): string {
  if (latent === SUMMED) return "other latents";
  const found = dossierOf(site, latent);
  if (found?.label) return `${latent} ${found.label}`;
  const peak = found?.where[0];
  if (!peak) return `latent ${latent}`;
  const best = peak.value.indexOf(Math.max(...peak.value));
  return `${latent} on '${data.prompts.tokens[peak.at][peak.position[best]].trim()}'`;
}

/** Tokens carry their own spaces, but for tokenizers of whole words. */
export const GAP = data.prompts.tokens.some((row) => row.slice(1).some((text) => /^\s/.test(text))) ? "" : " ";
export const promptText = (at: number): string => data.prompts.text[at] ?? data.prompts.tokens[at].join(GAP);
export const effectOf = (at: number): number => data.prompts.clean[at] - data.prompts.baseline[at];
export const isTested = (row: number): boolean => data.facts?.rows.removal[row] != null;
