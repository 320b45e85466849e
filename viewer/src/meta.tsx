// One meta-latent: what its members share, where it acts and through which latents, and the proof that it is used.
import { data, latentName, metaName, metaOf, promptText, type Meta } from "./data";
import { current } from "./download";
import { Contexts, Histogram, InPrompts, labelCommand, LogitLens } from "./evidence";
import { Absent, Bar, Chips } from "./parts";
import { Proof } from "./proof";
import { Flow } from "./split";
import type { Go, State } from "./state";
import { count, plain, probability, signed } from "./text";

export function MetaView({ state, go }: { state: State; go: Go }) {
  if (!data.metas) {
    return <Absent command={`mediation flag ${data.run.path} --meta META`}>No latent of this run was split into meta-latents.</Absent>;
  }
  const found = metaOf(state.meta) ?? first();
  return (
    <div class="columns">
      <Choices state={state} go={go} chosen={found?.meta ?? -1} />
      <div>{found ? <Described found={found} state={state} go={go} /> : <p class="absent">No meta-latent carries anything in this run.</p>}</div>
    </div>
  );
}

/** The meta-latent of the strongest flag, else the one that carries most. */
function first(): Meta | undefined {
  const rows = data.facts?.rows;
  const flagged = rows ? [...rows.at.keys()].filter((k) => rows.flagged[k]).sort((a, b) => Math.abs(rows.removal[b]!) - Math.abs(rows.removal[a]!)) : [];
  return flagged.length ? metaOf(rows!.meta[flagged[0]]) : data.metas!.list[0];
}

function rowsOf(meta: number): number[] {
  const rows = data.facts?.rows;
  return rows ? [...rows.at.keys()].filter((k) => rows.meta[k] === meta) : [];
}

function Choices({ state, go, chosen }: { state: State; go: Go; chosen: number }) {
  const text = state.find.toLowerCase();
  const rows = data.facts?.rows;
  const flags = new Map<number, number>();
  rows?.flagged.forEach((flagged, k) => flagged && flags.set(rows.meta[k], (flags.get(rows.meta[k]) ?? 0) + 1));
  const list = [...data.metas!.list].sort((a, b) => (flags.get(b.meta) ?? 0) - (flags.get(a.meta) ?? 0) || Math.abs(b.mean) - Math.abs(a.mean));
  const scale = Math.max(1e-12, ...list.map((each) => Math.abs(each.mean)));
  const found = list.filter((each) => `${metaName(each.meta)} ${each.meta}`.toLowerCase().includes(text));
  return (
    <nav class="choices" aria-label="Meta-latents">
      <input type="search" placeholder="Search meta-latents" aria-label="Search meta-latents" value={state.find} onInput={(event) => go({ find: event.currentTarget.value }, { replace: true })} />
      <ul class="list">
        {found.slice(0, 200).map((each) => (
          <li><button type="button" aria-current={each.meta === chosen} onClick={() => go({ meta: each.meta })}><span>{metaName(each.meta)} <small>{flags.has(each.meta) ? <span class="badge">{flags.get(each.meta)} hidden</span> : `meta-latent ${each.meta}`}</small></span><Bar value={each.mean} scale={scale} /></button></li>
        ))}
        {!found.length && <li class="soft">No meta-latent is called so.</li>}
      </ul>
    </nav>
  );
}

function Described({ found, state, go }: { found: Meta; state: State; go: Go }) {
  const rows = data.facts?.rows;
  const mine = rowsOf(found.meta);
  const site = data.metas!.site;
  const acts = [...new Set([...mine.filter((k) => rows!.removal[k] != null).sort((a, b) => Number(rows!.flagged[b]) - Number(rows!.flagged[a]) || Math.abs(rows!.removal[b]!) - Math.abs(rows!.removal[a]!)).map((k) => rows!.at[k]), ...found.where.map((each) => each.at), ...mine.map((k) => rows!.at[k])])];
  const at = acts.includes(state.prompt) ? state.prompt : (acts[0] ?? state.prompt);
  const row = mine.find((k) => rows!.at[k] === at);
  const split = data.metas!.prompts[at] ?? [];
  const carriers = data.facts?.carriers?.filter((each) => each.meta === found.meta) ?? [];
  current.svg = null;
  current.sheet = () => sheet(found, at);
  const stepTo = (by: number) => go({ prompt: acts[(acts.indexOf(at) + by + acts.length) % acts.length], meta: found.meta });
  return (
    <>
      <header class="title">
        <h2>{metaName(found.meta)}</h2>
        <p class="soft">meta-latent {found.meta} of {data.sites[site].title}{found.score == null ? "" : `; the label's score ${plain(found.score)} (.5 is chance), from ${found.source ?? "enrichment in tagged texts"}${found.p != null ? `, p ${probability(found.p)}` : ""}`}</p>
      </header>
      {!found.label && <Absent command={labelCommand(site, data.metas!.folder)}>It has no label.</Absent>}
      <div class="tools">
        <span class="picker">
          <button type="button" aria-label="Previous prompt in which it acts" onClick={() => stepTo(-1)}>‹</button>
          <select aria-label="Prompt in which it acts" value={at} onChange={(event) => go({ prompt: Number(event.currentTarget.value), meta: found.meta })}>
            {acts.map((each) => <option value={each}>{flaggedIn(found.meta, each) ? "⚑ " : ""}{promptText(each)}{data.prompts.answer[each] ?? ""}</option>)}
          </select>
          <button type="button" aria-label="Next prompt in which it acts" onClick={() => stepTo(1)}>›</button>
        </span>
        <span class="soft">{count(acts.length, "prompt")} in which it was tested, split or strongest</span>
        <button type="button" onClick={() => go({ view: "graph", mode: data.own[at] ? "prompt" : "set", prompt: at, group: "meta" })}>Its graph</button>
      </div>
      <h3>What the latents of this prompt were carrying</h3>
      {split.length ? <Flow rows={split} at={at} site={site} marked={found.meta} theme={state.theme} onMeta={(meta) => go({ meta, prompt: at })} onLatent={(each) => go({ view: "node", node: `${site}/${each.position}/${each.latent}`, prompt: at })} /> : <p class="soft">Nothing of this prompt was split.</p>}
      <h3>{row !== undefined && rows!.flagged[row] ? "Proof: a hidden fact" : "Proof"}</h3>
      {row !== undefined && rows!.removal[row] != null ? <Proof row={row} theme={state.theme} /> : <p class="soft">{rows ? `It was not tested on this prompt: ${data.prompts.half[at] === "discovery" ? "discovery prompts only nominate kinds of fact" : "no discovery prompt of this question nominated its kind, or the prompt has none of it"}.${row !== undefined && rows.shapley[row] != null ? ` Its Shapley value here is ${signed(rows.shapley[row])} ± ${plain(rows.stderr[row], 2)}.` : ""}` : ""}</p>}
      {!rows && <Absent command={`mediation flag ${data.run.path} --meta ${data.metas!.folder}`}>No fact was tested in this run.</Absent>}
      <div class="grid two">
        <section>
          <h3>Where it acts in the prompts</h3>
          <InPrompts where={found.where} go={go} unit="attribution" />
          <h3>Through which latents <small>mean over prompts {signed(found.mean)}</small></h3>
          <Through found={found} site={site} go={go} />
          <h3>Carriers <small>latents that are the fact</small></h3>
          <Carriers found={carriers} at={at} tested={mine.some((k) => rows!.removal[k] != null)} site={site} go={go} />
        </section>
        <section>
          <h3>What its members share</h3>
          <Members found={found} site={site} go={go} />
          <h3>Strongest contexts</h3>
          <Contexts found={found} command={labelCommand(site, data.metas!.folder)} what="This meta-latent" />
          <Histogram found={found} theme={state.theme} />
          <LogitLens found={found} />
        </section>
      </div>
    </>
  );
}

const flaggedIn = (meta: number, at: number) => rowsOf(meta).some((k) => data.facts!.rows.at[k] === at && data.facts!.rows.flagged[k]);

function Through({ found, site, go }: { found: Meta; site: number; go: Go }) {
  if (Array.isArray(found.through)) return <p class="soft">Through none.</p>;
  const { latent, value, others, more } = found.through;
  const scale = Math.max(...value.map(Math.abs), 1e-12);
  const role = (index: number) => data.graph.nodes.position[data.graph.nodes.latent.findIndex((each, k) => each === index && data.graph.nodes.site[k] === site)];
  return (
    <ul class="list">
      {latent.map((index, k) => (
        <li><button type="button" disabled={role(index) === undefined} title={role(index) === undefined ? "not among the set's strongest latents" : undefined} onClick={() => go({ view: "node", node: `${site}/${role(index)}/${index}` })}><span>{latentName(site, index)}</span><Bar value={value[k]} scale={scale} /><b>{signed(value[k])}</b></button></li>
      ))}
      {more > 0 && <li class="soft">{count(more, "other latent")}: {signed(others)}</li>}
    </ul>
  );
}

function Carriers({ found, at, tested, site, go }: { found: { latent: number; cosine: number; carrier: boolean; on: number[] }[]; at: number; tested: boolean; site: number; go: Go }) {
  const tau = data.facts?.settings?.carrier_cosine ?? 0.7;
  if (!found.length) return <p class="soft">{tested ? "Which latents are nearest was not kept in this run." : "Its carriers were not looked for: it was not tested."}</p>;
  const real = found.filter((each) => each.carrier);
  return (
    <>
      <p>{real.length ? `${count(real.length, "latent")} with cosine ≥ ${tau}.` : `None: no latent of the dictionary has cosine ≥ ${tau} with it, so the fact has no latent of its own. The nearest:`}</p>
      <table>
        <thead><tr><th scope="col">Latent</th><th scope="col" class="number">Cosine</th><th scope="col">In this prompt</th><th scope="col">In the set</th></tr></thead>
        <tbody>{found.map((each) => <tr><td><button type="button" class="plain" onClick={() => go({ view: "node", node: `${site}/${data.prompts.roles[data.prompts.role[at].length - 1]}/${each.latent}` })}>{latentName(site, each.latent)}</button>{each.carrier && <span class="badge">carrier</span>}</td><td class="number">{plain(each.cosine)}</td><td>{each.on.includes(at) ? "fired" : "silent"}</td><td>fired in {each.on.length} of {data.prompts.id.length}</td></tr>)}</tbody>
      </table>
    </>
  );
}

function Members({ found, site, go }: { found: Meta; site: number; go: Go }) {
  if (!found.members) return <Absent command={labelCommand(site, data.metas!.folder)}>Its members, the latents with the largest codes, are not listed.</Absent>;
  return (
    <>
      {found.shared?.length ? <p class="lens"><span class="soft">among their contexts</span> <Chips words={found.shared} kind="" /></p> : <p class="soft">No word stands in the strongest contexts of several of them.</p>}
      <ul class="list">
        {found.members.map((each) => (
          <li><button type="button" onClick={() => go({ view: "node", node: `${site}/${data.prompts.roles[0]}/${each.latent}` })}><span>{each.label ? `${each.latent} ${each.label}` : latentName(site, each.latent)}</span><small>code {plain(each.code)}</small></button></li>
        ))}
      </ul>
    </>
  );
}

function sheet(found: Meta, at: number) {
  const rows = data.facts?.rows;
  const through = Array.isArray(found.through) ? null : found.through;
  return {
    name: `meta-latent-${found.meta}`,
    columns: ["row", "name", "value", "part", "prompt"],
    rows: [
      ...(through?.latent.map((latent, k) => ["through", latentName(data.metas!.site, latent), through.value[k], null, null]) ?? []),
      ...(data.metas!.prompts[at] ?? []).flatMap((row) => row.meta.map((meta, k) => ["split", row.position < 0 ? "other latents" : `${latentName(data.metas!.site, row.latent)} @${row.position}`, row.value[k], metaName(meta), data.prompts.id[at]])),
      ...rowsOf(found.meta).flatMap((k) => [
        ["removal", rows!.kind[k], rows!.removal[k], null, data.prompts.id[rows!.at[k]]],
        ["swap", rows!.kind[k], rows!.swap[k], null, data.prompts.id[rows!.at[k]]],
        ["shapley", rows!.kind[k], rows!.shapley[k], null, data.prompts.id[rows!.at[k]]],
        ...(rows!.controls[k] ?? []).map((value) => ["control", rows!.kind[k], value, null, data.prompts.id[rows!.at[k]]]),
      ]),
    ] as (string | number | null)[][],
  };
}

