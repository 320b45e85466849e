"""Writes docs/evidence-absorption.md and its plots from docs/evidence/absorption.json.

    python docs/make_evidence_absorption.py [RESULT.json ...]

Results of `mediation bench absorption ... --json`, whole or part by part (`--part`, or some of the sites), are joined
into docs/evidence/absorption.json first, over what it had.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
STORE = DOCS / "evidence" / "absorption.json"
PARTS = ("letters", "concepts", "wordings", "anomalies")
PACK_K = 48
LEAST_USED = 20  # words and contexts under which no share of those used is given
HEAD = """# Absorption: on first letters, beyond spelling, under other wordings, and behind anomalies

{model}, dictionaries of `examples/packs/smollm2` (8,192 latents, L0 48 in training) unless another is named. Made by

```bash
mediation bench absorption --model smollm2 --saes examples/packs/smollm2 --meta examples/packs/smollm2/meta \\
  --data DATA --text DATA/text/squad_contexts.txt --text DATA/text/books-19mb.txt --json > result.json
python docs/make_evidence_absorption.py result.json
```

part by part and site by site (`--part`, `--saes`), {seconds:.0f} s in all on one thread, shared; seed {seed}.
Brackets: 95 % bootstrap intervals, over words (letters), members (concepts) or countries (wordings). Every definition
is in the docstrings of `mediation/absorbed/`; the tests plant a dictionary with known absorption, and one without, for
each measure.

## In short

{summary}
"""
LETTERS = """## 1. First letters, where the field began

" word has the first letter:" after ten such lines; the model is right on {right} of {test} test words. Nothing below is
measured on a word, or in a context, that probes, main latents or names were made from.

{rates}

*Carried at the word*: of the effect of exchanging the word for one with another letter, what the residual at the word
carries; the figure says whether the site is early enough. *Main silent*: none of the letter's main latents is on though
the probe reads the letter. *v1*: Chanin et al. 2024, with the ablation by integrated gradients; *v2*: SAEBench.
{refused}
Absorbed words with the largest attribution of one latent: {examples}.

### The label-free flag against both definitions

The flag asks of every word whether the meta-latents *named* after its letter act through latents that are not theirs,
while theirs are silent; it knows neither probe nor main latents. Area under the ROC curve of the hidden share, and
precision and recall of the flag, for each definition as the truth. Three rules say which latents are a meta-latent's
own (its carriers); none was fitted, but two of them, cosine .5 and nearest, were added when the first rule had been
seen to fail, and so are not blind.

{flags}

{verdict}
"""
CONCEPTS = """## 2. Beyond spelling: how often is a concept's own latent silent while the concept is used?

{members}. Each half of a concept's members is judged with probe and own latents from the other half, in other
contexts. *Present*: the probe reads the concept at the held-out word; under .6 of members no figure is given (a
bound set when the figures of languages had been seen). *Used*:
moving the word's residual to where the probe reads no concept halves the logit margin of the right answer, of words
that are answered right (a move of the same length between two other words: {control}). *Silent*: all own latents off,
of the words where the concept is present (and used). *Absorbed*: v2 full.

| site | latents | k | VE, words | {families} |
|---|---|---|---|{dashes}
{silent}

Share of words with all own latents silent, of the words at which the concept is present and used; "-" where that are
fewer than {least} words and contexts, or the probe does not read the concept. The last {trained} rows are dictionaries
of other widths and sparsities, trained with the repository's trainer from one set of {tokens:,} activations ({epochs}
epochs): small and undertrained beside the pack's (10 million tokens), as the variance explained (VE) says, and an
undertrained dictionary may look free of absorption. The k of the pack's is that of its training.

![Own latents silent while the concept is used]({plot})

{verdict}

### In detail

*Fraction*: v2's absorbed fraction. *No own latent*: share of halves of concepts for which no latent speaks, left out of
*silent*. Own latents with a low F1 on held-out members do not stand for the concept well in the first place.

{sites}

The trained dictionaries at {grid_site}; what is present and used is as above.

{grid}

By concept, at the first four sites:

{concepts}
"""
WORDINGS = """## 3. Sensitivity and coordination

A country's capital or language asked in {n} wordings; only facts that the model gets right in both wordings of a pair.
Of the latents on in one wording, *stay on*: the share on in the other. The rest are missing; of their values, *others*
and *error* are what other latents and the error node put back along the missing latents' directions, *kept* both
together. *By one*: missing latents of which a single other latent puts back .4 or more. Baseline: another country in
the same words, where the latents ought to go missing.

{table}

{verdict}
"""
ANOMALIES = """## 4. Reverse check of anomalies

Task: the capital of a country against another's. Which of the {top} latents with the largest attribution (discovery
pairs) are about the task is judged by the contexts in which they fire most strongly, {contexts} at most and one from a
window, in {tokens:,} tokens of text of which half the windows hold one of {words} task words (names of countries,
capitals and languages, "capital", "city"): *near* is the share of them within {near} tokens of a task word, {base} for
tokens at random. *Related*: .5 or more, p <= .05 against random contexts. *Anomalous*: p > .05. A latent that is on in
fewer than {least} windows is not judged. This was settled before its result was seen; that an earlier screen, an area
under the ROC curve over all task words of less than .55, had left 0 of 97 anomalous latents explained was known.

*Shared*: the latent's strongest part is one that a related latent has as well (*by chance*: the mean share of its other
parts that are). *Beyond controls*: taking that part out exactly, on other countries, moves the answer as the latent
does, p <= .05 against 19 directions of the same amount. *Explained*: shared, beyond controls, and at least half of the
latent's own effect.

{table}

Of all latents that could be judged, whatever their attribution: {everyone}.

The anomalous latents of largest attribution, and the tokens at which their strongest contexts peak:

{examples}

{verdict}
"""
SHORT = {
    "letters": """1. First letters are absorbed early in this model by both published definitions, and less with
   depth. The label-free flag does not find the absorbed words: its area under the curve is about chance.""",
    "concepts": """2. Beyond spelling, a whole kind of word (countries, months ...) is hardly ever silent while
   used. Finer concepts (gender, continent) are silent in a sixth to a third of uses at block 3; of the continent,
   in .28 at block 8 and about a tenth later. Few latents and sparse codes silence more. About half of it or less
   is absorption by the published definition.""",
    "wordings": "3. What another wording silences is not taken over by other latents.",
    "anomalies": """4. Of latents that matter for a task and look unrelated to it, {anomalous} are explained by a part
   that they share with related latents; of those themselves, {related}.""",
}
SIZES = """

Sizes differ: blocks 3 and 8 were measured with 400 words and three rules, blocks 12 and 16 in an earlier run with
160 words and the default rule alone, without a meta-dictionary of the rows in use and its null."""
EARLIER = """
The check of anomalies is built and tested on a planted dictionary, and has not been run with its present screen of what
is related to a task (`mediation/absorbed/relatedness.py`). Under an earlier, coarser screen, an area under the ROC
curve of less than .55 for task words, 0 of 97 anomalous latents at blocks 8 and 16 were explained by a shared part, and
0 of 16 related ones: strongest parts of 512 meta-latents were hardly ever shared, and carried little of a latent's
effect.
"""
VERDICTS = {
    "letters": """**The flag does not find absorbed letters.** With meta-latents, of any dictionary and under any rule,
the area under the curve is .28 to .61, about chance, and most words it flags are not absorbed. With the default rule
hardly any named meta-latent has a carrier: nothing can then fall silent, the hidden share is 1 wherever the part's
effect is positive, and the flag says "used", not "hidden". With the nearest rows as carriers the probes' own
directions, which know the letters, reach .63 to .87 for v2 (14 and 11 absorbed words at blocks 12 and 16), still with
a recall of .12 to .27. So the rule can work, and the parts do not: the meta-latents, which explain a quarter to a third
of the rows' variance, likely leave the small letter part of an absorbing latent to the residual. Absorption itself is
there by both definitions, early, and fades with depth; shares are over words, not averaged over letters.""",
    "concepts": """**By site.** Kinds of words (countries, months, numbers, professions, feelings) are hardly ever
silent while used: .06 at block 3, .01 or less from block 8 on. Finer concepts are another matter early: at block 3 own
latents are silent at a sixth of names and a third of nouns whose gender is used, and at a third of countries whose
continent is (Asia .56, Africa .05). Continents are silent in .28 at block 8 still, and in .05 to .12 later: at blocks
12 and 16 those of countries of Asia (.28 and .43), hardly any others. From block 8 on gender is hardly ever silent
where it has a latent, but up to block 20 male names and nouns mostly have none that speaks for them (*no own latent*):
likely "male" is there read off a silent "female", which this measure leaves out. At block 25 a word's kind and
continent have been read already, and neither is used there. Silent while used differs little from silent.

**By width and sparsity**, at block 16. Continents are silent in .32 with 1,024 latents and in .29 with k 16, and in .10
to .12 with the three larger codes, which is what the pack's own dictionary has. Gender of nouns is silent less often
the larger k is (.21, .16, .07), but 39 nouns leave wide intervals. Kinds and names hardly change. So here too small a
dictionary and too sparse a code silence a concept; that a wider dictionary silences more, as absorption would have it,
is not seen from 1,024 to 8,192 latents.

**Is it absorption?** Partly, and early: v2 full finds a fifth to a half of the silence at block 3 and little of it
later; in the grid half of that of nouns with k 16 or 64, and next to nothing else. Where latents are silent they
are poor to middling on held-out members in the first place (own F1), so that silence is as much the lack of a
latent as a latent taken over. The languages of countries cannot be read well enough for a figure over all of them.""",
    "wordings": """**What a wording silences is not taken over by other latents.** At the country's token, where the
fact is the same and only words before it differ, .54 to .85 of the latents stay on. Of what is missing, other
latents put back nothing on balance: those along the same directions fall with it. The error node keeps a quarter to
a half (another country: about none, but at the last sites), as it does where a latent has just sunk under its
threshold. A single latent takes over in 2 to 12 % of cases, at all but the last site less often than when the
country itself is another one, so even those are no sign of coordination. At the last token "another country" is a
weak baseline up to block 20: the country has hardly arrived there, and little changes.""",
    "anomalies": """**Explained by a shared part: {anomalous} anomalous latents, and {related} related ones.** The parts
are those of 512 meta-latents, which explain a quarter of the rows' variance. Five evaluation pairs a latent.""",
}


def number(figure: Any) -> str:
    value = figure["value"] if isinstance(figure, dict) else figure
    if value is None:
        return "-"
    if isinstance(figure, dict) and figure["low"] is not None:
        return f"{value:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"
    return f"{value:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def joined(paths: list[Path]) -> dict[str, Any]:
    """What is stored, with the given results over it; sites are joined by name, in the order of their blocks."""
    stored = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        stored["model"] = result["model"]
        for part in PARTS:
            if part not in result:
                continue
            old = {site["site"]: site for site in stored.get(part, {}).get("sites", [])}
            new = {site["site"]: site | {"seconds": result[part]["seconds"] / len(result[part]["sites"])}
                   for site in result[part]["sites"]}  # fmt: skip
            sites = sorted((old | new).values(), key=lambda site: int(site["site"].split(".")[1]))
            stored[part] = result[part] | {"sites": sites}
    STORE.parent.mkdir(exist_ok=True)
    STORE.write_text(json.dumps(rounded(stored), indent=1) + "\n", encoding="utf-8")
    return stored


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def short(site: str) -> str:
    return f"block {site.split('.')[1]}"


def letters(part: dict[str, Any]) -> str:
    measured = [site for site in part["sites"] if "absorbed" in site]
    refused = [f"{short(site['site'])}: {site['reason']}" for site in part["sites"] if "absorbed" not in site]
    rates = table(
        ["site", "carried at the word", "letters with a probe of F1 >= .6", "probe F1", "words",
         "main latents a letter", "main silent", "v1", "v2 full", "v2 fraction"],
        [[short(site["site"]), number(site["carried_at_word"]), str(site["valid_letters"]), number(site["probe_f1"]),
          str(site["judged"]), number(site["main_latents"]), number(site["main_silent"]),
          *(number(each) for each in site["absorbed"].values())] for site in measured],
    )  # fmt: skip
    rows = []
    for site in measured:
        for name, flag in site["flags"].items():
            for rule, judged in flag["rules"].items():
                truths = judged["against"]
                cells = [number(truths[truth]["auc"]) for truth in ("v1", "v2 full")]
                cells += [number(truths["v2 full"][key]) for key in ("precision", "recall")]
                about = [str(flag.get("named_letters", "-")), str(judged["letters_with_carrier"])]
                rows.append([short(site["site"]), name, rule, *about, number(judged["flagged"]), *cells])
    flags = table(
        ["site", "parts", "carriers", "letters named", "with carriers", "flagged", "AUC, v1", "AUC, v2 full",
         "precision, v2 full", "recall, v2 full"], rows,
    )  # fmt: skip
    examples = ", ".join(
        f"*{each['word']}* (latent {each['latent']}, {each['attribution']:.1f} logits, {short(site['site'])})"
        for site in measured[:2]
        for each in site["examples"][:4]
    )
    return LETTERS.format(
        right=number(part["sites"][0]["spelt_right"]),
        test=part["sites"][0]["words"]["test"],
        rates=rates,
        refused="".join(f"\nNo figure at {each}.\n" for each in refused),
        examples=examples,
        flags=flags,
        verdict=VERDICTS["letters"] + (SIZES if len({site["judged"] for site in measured}) > 1 else ""),
    )


def family_rows(one: dict[str, Any], label: list[str]) -> list[list[str]]:
    keys = ("present", "used", "silent", "silent_while_used", "absorbed_full", "absorbed_fraction")
    return [
        [*label, name, *(number(each["all"][key]) for key in keys), number(each["all"]["own_f1"]),
         number(each["all"]["without_own"])] for name, each in one["families"].items()
    ]  # fmt: skip


FAMILY_HEAD = [
    "family", "present", "used", "silent", "silent while used", "absorbed", "fraction", "own F1", "no own latent",
]  # fmt: skip


def concepts(part: dict[str, Any]) -> str:
    name = "evidence-absorption-concepts.svg"
    plot(part, DOCS / name)
    sites, grid = part["sites"], part["grid"]
    keys = ("present", "absorbed_full", "own_f1", "without_own")
    by_concept = [
        [
            family,
            concept,
            short(site["site"]),
            number(used(site["families"][family]["concepts"][concept])),
            *(number(site["families"][family]["concepts"][concept][k]) for k in keys),
        ]
        for family, each in sites[0]["families"].items()
        for concept in each["concepts"]
        for site in sites[:4]
        if family != "kinds, in sentences"
    ]
    members = "; ".join(
        f"{family}: {', '.join(f'{n} {concept}' for concept, n in each.items())}"
        for family, each in part["members"].items()
    )
    controls = [
        figures["all"]["control"]["value"]
        for site in sites
        for figures in site["families"].values()
        if figures["all"]["control"]["value"] is not None
    ]
    families = [
        name
        for name in sites[0]["families"]
        if any(used(one["families"][name]["all"])["value"] is not None for one in [*sites, *grid])
    ]
    silent = [
        [short(one["site"]), f"{one['width']:,}", str(one.get("k", PACK_K)),
         number(one["on_these_words"]["variance_explained"]),
         *(number(used(one["families"][family]["all"])) for family in families)]
        for one in [*sites, *sorted(grid, key=lambda one: (one["width"], one["k"]))]
    ]  # fmt: skip
    detail = ["silent", "silent_while_used", "absorbed_full", "absorbed_fraction", "own_f1", "without_own"]
    grid_rows = [
        [f"{one['width']:,}", str(one["k"]), number(one["on_text"]["variance_explained"]),
         f"{one['on_these_words']['l0']:.0f}", family, *(number(each["all"][key]) for key in detail)]
        for one in grid for family, each in one["families"].items()
    ]  # fmt: skip
    return CONCEPTS.format(
        members=members[:1].upper() + members[1:],
        control=f"{min(controls):.2f} to {max(controls):.2f}",
        families=" | ".join(families),
        dashes="---|" * len(families),
        silent="\n".join(f"| {' | '.join(row)} |" for row in silent),
        least=LEAST_USED,
        trained=len(grid),
        tokens=part["settings"]["grid_tokens"],
        epochs=part["settings"]["grid_epochs"],
        plot=name,
        verdict=VERDICTS["concepts"],
        sites=table(
            ["site", *FAMILY_HEAD], [row for site in sites for row in family_rows(site, [short(site["site"])])]
        ),
        grid_site=short(grid[0]["site"]),
        grid=table(
            ["latents", "k", "VE, text", "L0, words", "family", "silent", "silent while used", "absorbed", "fraction",
             "own F1", "no own latent"], grid_rows,
        ),
        concepts=table(
            ["family", "concept", "site", "silent while used", "present", "absorbed", "own F1", "no own latent"],
            by_concept,
        ),
    )  # fmt: skip


def used(figures: dict[str, Any]) -> dict[str, Any]:
    """Silent while used; without a value where the concept is hardly ever used."""
    figure: dict[str, Any] = figures["silent_while_used"]
    return figure if figure["n"] >= LEAST_USED else figure | {"value": None}


def plot(part: dict[str, Any], path: Path) -> None:
    """Silent while present and used, by site; and by width and by sparsity."""
    sites, grid = part["sites"], part["grid"]
    grid_site = short(grid[0]["site"])
    wide = sorted((one for one in grid if one["k"] == 32), key=lambda one: one["width"])
    sparse = sorted((one for one in grid if one["width"] == 2048), key=lambda one: one["k"])
    panels = (
        ([int(site["site"].split(".")[1]) for site in sites], sites, "block, pack's dictionaries"),
        ([one["width"] for one in wide], wide, f"latents, k 32, {grid_site}"),
        ([one["k"] for one in sparse], sparse, f"k, 2,048 latents, {grid_site}"),
    )
    fig, axes = plt.subplots(1, len(panels), figsize=(3.5 + 3.5 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, (places, found, label) in zip(axes[0], panels, strict=True):
        for color, family in enumerate(sites[0]["families"]):
            figures = [used(one["families"][family]["all"]) for one in found]
            kept = [(x, f) for x, f in zip(places, figures, strict=True) if f["value"] is not None]
            if not kept:
                continue
            axis.errorbar(
                [x for x, _ in kept],
                [f["value"] for _, f in kept],
                yerr=[[f["value"] - f["low"] for _, f in kept], [f["high"] - f["value"] for _, f in kept]],
                color=f"C{color}", marker="o", markersize=3, linewidth=1, capsize=2, label=family,
            )  # fmt: skip
        axis.set_xlabel(label)
        if label.startswith(("latents", "k")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(places, [f"{place:,}" for place in places])
    axes[0, 0].set_ylabel("own latents silent while the concept is used")
    axes[0, 0].set_ylim(-0.02, 0.6)
    axes[0, -1].legend(fontsize="x-small")
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def wordings(part: dict[str, Any]) -> str:
    rows = []
    for site in part["sites"]:
        for place in ("country", "last token"):
            for other, figures in site[place].items():
                if figures["pairs"]:
                    keys = ("sensitivity", "by_others", "by_error", "kept", "absorbed_by_one")
                    cells = [number(figures[key]) for key in keys]
                    counts = [str(figures["pairs"]), str(figures["countries"]), f"{figures['missing_per_pair']:.1f}"]
                    rows.append([short(site["site"]), place, other, *counts, *cells])
    head = ["site", "at", "B", "pairs", "countries", "missing a pair", "stay on", "others", "error", "kept", "by one"]
    return WORDINGS.format(n=len(part["wordings"]), table=table(head, rows), verdict=VERDICTS["wordings"])


def anomalies(part: dict[str, Any]) -> str:
    rows, examples = [], []
    for site in part["sites"]:
        for place in ("country", "last token"):
            whole = site[place]
            for kind in ("related", "anomalous"):
                found = whole[kind]
                counts = [f"{found['latents']} of {whole['large'] - whole['not_judged']}", str(found["decomposed"])]
                cells = [str(found["shared"]), number(found["shared_by_chance"]), str(found["beyond_controls"])]
                rows.append([short(site["site"]), place, kind, *counts, *cells, number(found["explained"])])
            odd = [case for case in whole["cases"] if case["kind"] == "anomalous"]
            for case in sorted(odd, key=lambda case: -case["attribution"])[:3]:
                peaks = ", ".join(f"`{peak.strip() or '(space)'}`" for peak in case["peaks"]).replace("|", "\\|")
                about = [f"{case['attribution']:.2f}", f"{case['near']:.2f}", peaks]
                examples.append([short(site["site"]), place, str(case["latent"]), *about])
    head = ["site", "at", "kind", "latents, of those judged", "decomposed", "shared", "by chance", "beyond controls",
            "explained"]  # fmt: skip
    everyone = "; ".join(
        f"{short(site['site'])}: {site['all_latents']['judged']:,}, related {number(site['all_latents']['related'])}, "
        f"anomalous {number(site['all_latents']['unrelated'])}"
        for site in part["sites"]
    )
    text = part["text"]
    return ANOMALIES.format(
        top=part["settings"]["large"], tokens=text["tokens"], words=text["task_words"], base=number(text["near"]),
        contexts=20, least=5, near=3, table=table(head, rows), everyone=everyone,
        examples=table(["site", "at", "latent", "mean attribution", "near", "peaks"], examples),
        verdict=VERDICTS["anomalies"].format(**explained(part)),
    )  # fmt: skip


def explained(part: dict[str, Any]) -> dict[str, str]:
    """How many latents of each kind are explained, over sites and places, as words."""
    found = {}
    for kind in ("anomalous", "related"):
        shares = [site[place][kind]["explained"] for site in part["sites"] for place in ("country", "last token")]
        shares = [each for each in shares if each is not None]
        count = sum(round(each["value"] * each["n"]) for each in shares)
        found[kind] = f"{count} of {sum(each['n'] for each in shares)}"
    return found


def main() -> None:
    result = joined([Path(each) for each in sys.argv[1:]])
    plt.rcParams["svg.hashsalt"] = "latent-mediation"
    sections = {"letters": letters, "concepts": concepts, "wordings": wordings, "anomalies": anomalies}
    measured = [part for part in PARTS if part in result]
    seconds = sum(site["seconds"] for part in measured for site in result[part]["sites"])
    counts = explained(result["anomalies"]) if "anomalies" in result else {}
    text = HEAD.format(
        model=result["model"],
        seconds=seconds,
        seed=result[measured[0]]["settings"]["seed"],
        summary="\n".join(SHORT[part].format(**counts) for part in measured),
    )
    text += "".join("\n" + sections[part](result[part]) for part in measured)
    missing = [f"`{part}`" for part in PARTS if part not in result]
    if missing:
        text += f"\n## Not measured yet\n\nOf the benchmark: {' and '.join(missing)}.\n"
        text += EARLIER if "anomalies" not in result else ""
    (DOCS / "evidence-absorption.md").write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
