// Hidden facts: every test of the run, from the claim to its proof in one click.
import { data, promptText } from "./data";
import { current } from "./download";
import { Absent, Bar, Meter, Table, type Column } from "./parts";
import type { Go, State } from "./state";
import { count, plain, probability, signed } from "./text";

export function Facts({ state, go }: { state: State; go: Go }) {
  current.svg = null;
  if (!data.facts) {
    current.sheet = null;
    return <Absent command={`mediation flag ${data.run.path} --meta META`}>No fact was tested in this run.</Absent>;
  }
  const { rows: t, settings } = data.facts;
  const all = [...t.at.keys()].filter((k) => t.removal[k] != null);
  const text = state.find.toLowerCase();
  const shown = all.filter((k) => (state.filter !== "flagged" || t.flagged[k]) && (!text || `${t.label[k]} ${t.expected[k] ?? ""} ${t.group[k]} ${data.prompts.id[t.at[k]]} ${promptText(t.at[k])}`.toLowerCase().includes(text)));
  const scale = Math.max(1e-12, ...all.map((k) => Math.abs(t.removal[k]!)));
  const positive = all.every((k) => t.removal[k]! >= 0);
  const columns: Column<number>[] = [
    { title: "Fact", key: "fact", value: (k) => t.label[k], cell: (k) => <b>{t.label[k]}{t.flagged[k] && <span class="badge">hidden</span>}</b> },
    { title: "Expected", key: "expected", value: (k) => t.expected[k], cell: (k) => <span class="soft">{t.expected[k] ?? "–"}</span>, hint: "the fact the prompt's author expects, used in evaluation only" },
    { title: "Prompt", key: "prompt", value: (k) => data.prompts.id[t.at[k]], cell: (k) => <span>{promptText(t.at[k])}<span class="answer">{data.prompts.answer[t.at[k]] ?? ""}</span></span> },
    { title: "Removal", key: "removal", number: true, value: (k) => Math.abs(t.removal[k]!), cell: (k) => <span class="both"><b>{signed(t.removal[k])}</b><Bar value={t.removal[k]} scale={scale} positive={positive} /></span>, hint: "what the behaviour loses without the fact's part, measured" },
    { title: "of", key: "of", number: true, value: (k) => t.total_effect[k], cell: (k) => signed(t.total_effect[k]), hint: "total effect of the prompt" },
    { title: "Hidden share", key: "hidden", number: true, value: (k) => t.hidden_share[k], cell: (k) => <Meter share={t.hidden_share[k]} />, hint: "through latents that are not the fact" },
    { title: "Carriers", key: "carriers", value: (k) => (t.carriers_silent[k] ? 0 : 1), cell: (k) => (t.carriers_silent[k] ? "silent" : "fired") },
    { title: "Swap", key: "swap", value: (k) => (t.swap_follows[k] ? 1 : 0), cell: (k) => (t.swap_follows[k] ? "follows" : "stays"), hint: "with the counterpart's fact, does the answer follow?" },
    { title: "p", key: "p", number: true, value: (k) => t.p[k], cell: (k) => probability(t.p[k]) },
    { title: "q", key: "q", number: true, value: (k) => t.q[k], cell: (k) => probability(t.q[k]) },
  ];
  current.sheet = () => ({
    name: "hidden-facts",
    columns: ["fact", "kind", "expected", "flagged", "prompt", "text", "group", "removal", "total_effect", "hidden_share", "carriers_silent", "swap", "swap_follows", "shapley", "stderr", "linear", "p", "q"],
    rows: shown.map((k) => [t.label[k], t.kind[k], t.expected[k], t.flagged[k], data.prompts.id[t.at[k]], promptText(t.at[k]), t.group[k], t.removal[k], t.total_effect[k], t.hidden_share[k], t.carriers_silent[k], t.swap[k], t.swap_follows[k], t.shapley[k], t.stderr[k], t.linear[k], t.p[k], t.q[k]]),
  });
  const flagged = all.filter((k) => t.flagged[k]);
  const tests = new Set(all.map((k) => `${t.group[k]}\n${t.kind[k]}`)).size;
  const prompts = new Set(flagged.map((k) => t.at[k])).size;
  return (
    <>
      <h2>Hidden facts</h2>
      <p>
        <b>{flagged.length}</b> of {count(all.length, "tested fact")} are flagged, on {count(prompts, "prompt")}: they act on the answer through latents that are not about them, while the latents that are stay silent.
        <span class="soft"> {count(tests, "test")}, one for each question and kind of fact, on prompts that were not used to choose them; q by Benjamini and Hochberg{settings ? `, flagged at q ≤ ${settings.alpha} with hidden share ≥ 50 %, all carriers (cosine ≥ ${settings.carrier_cosine}) silent and removal ≥ ${plain(100 * settings.least_effect)} % of the behaviour; ${settings.controls} controls each` : ""}. Click a row for its proof.</span>
      </p>
      <div class="tools">
        <input type="search" placeholder="Search facts and prompts" aria-label="Search facts and prompts" value={state.find} onInput={(event) => go({ find: event.currentTarget.value }, { replace: true })} />
        <label>Show <select value={state.filter === "flagged" ? "flagged" : ""} onChange={(event) => go({ filter: event.currentTarget.value })}><option value="">all tests</option><option value="flagged">flagged only</option></select></label>
        <span class="soft">{shown.length} of {all.length}</span>
      </div>
      <Table rows={shown} columns={columns} sort={state.sort || "q"} onSort={(sort) => go({ sort }, { replace: true })} caption="Tested facts" onPick={(k) => go({ view: "meta", meta: t.meta[k], prompt: t.at[k], find: "" })} picked={(k) => t.meta[k] === state.meta && t.at[k] === state.prompt} />
    </>
  );
}
