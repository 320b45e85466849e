"""Writes docs/evidence-facts.md and its plots from docs/evidence/facts.json.

python docs/make_evidence_facts.py [RESULT.json ...]: results of `mediation bench facts ... --json`, which take the
place of those in docs/evidence/facts.json first; that file may be one of them, for what it holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
RESULTS = DOCS / "evidence" / "facts.json"
COMMAND = """mediation bench facts --model smollm2 --saes SAES --meta METAS --data DATA --entities '{topic}' \\
  --pairs {pairs} {ways} --json > RESULT.json"""
TEXT = """# Real facts: which part of an entity's latents answers which question?

{model} is asked about an entity that the prompt names first
("In {{}}, the capital city is"), so that the residual at the entity's last token, and every latent there, is the same
for all questions. A latent-level graph cannot tell which fact was used; parts of the latents might. Everything that
is learned or named comes from development entities and
other wordings; all figures are of pairs of held-out entities whose answers the model knows, by intervention at the
entity's last token. Dictionaries: the pack's (8,192 latents). `mediation/realfacts/bench.py` defines every figure,
`ways.py` and `subspaces.py` beside it every way to take latents apart. Brackets: 95 % bootstrap intervals over
entities. Made by

```bash
{commands}
python docs/make_evidence_facts.py RESULT.json ...
```

{runs}

## In short

{short}

Countries at block 16 (48 pairs, 130 questions asked of them):

- **Three targets are met by their point estimates, and meeting them shows nothing.** The 24 strongest readings carry
  .71 [.66, .76], their effects correlate by .09 between questions, the top part is the same in .16 [.05, .37].
  Readings turned at random have .68, .10 and .08. The latents have .73, .46 and .45; the pack's meta-latents carry
  .17.
- **Readings name the fact asked for, often wrongly.** The top part is of the question asked in .57 [.42, .71]; turned
  at random .30 [.16, .46], latents .41 [.26, .58], chance .25. By question: continent 1.00, currency .64, language
  .34, capital .31. Named right for two questions by two parts under one and the same top latent: .17 [.03, .41]. A
  first run (16 pairs, 150 readings) had .74; this one does not bear it out.
- **Whole pools exchange one fact where latents do not, in a minority of cases.** With a question's pool of readings
  exchanged, the answer follows in .29 [.14, .44] and the others stay in .98 [.95, 1.00]. Latents .05, meta-latents,
  matching pursuit and nearest rows .00, as many random axes .06. By question: continent .58, currency .36 (11 pairs),
  capital .17, language .05. The strongest part alone: .03. Turned readings share every question alike, so that their
  pools are almost empty at 1.2 times the fair share; at 1.0 times .36 follow, but others stay in .66 only, where
  readings have .34 and .98.
- **Removal**: without its pool of readings the answer is lost in .29 [.22, .36] and others are kept in .91 [.88,
  .95]; random axes .17 and .87; all latents removed, .70.
- **Most swaps fail, and training on the answers does no better.** Subspaces trained on the answers of the development
  countries: .20 [.09, .35], others stay in .95 (.31 and .93 with the dictionary's error); contrasts of gradients,
  without answers: .33 [.20, .49] and .95. On pairs of the countries they were trained on, trained subspaces reached
  .99 and .81 (below). Either facts at this token do not lie in linear subspaces of their own, or tens of countries
  are too few to find them: these figures cannot tell.
- **Other words**: the top reading stays the same in .42 to .79 of pairs, the top latent in .50 to .88. Parts are not
  steadier than latents, and under the fact-first wording exchanges follow in .08 to .54.

{findings}These intervals are not corrected for how many there are. Turned readings share every question alike, so that
their pools at 1.2 times the fair share are almost empty: *follows* and *stay* against them compare an exchange with
none, and *both* is the fairer figure. For cities of one token readings follow in .45 [.28, .62], others stay in .84
[.74, .95]; at 1.0 times the fair share .51 and .81, turned readings .55 and .63, latents .50 and .66. No difference is
shown between readings and contrasts of gradients, or subspaces trained on the answers of 128 development cities; of
whole differences, the dictionary's error with them, trained subspaces exchange .59 [.44, .78] and leave .83. What more
entities would give (852 development cities of two tokens) was not found out. Pairs and ways are fewer than for
countries for want of time, and were set before any result.

What SmolLM2 knows of RAVEL's **Nobel laureates** (names of four tokens; the entity first, no examples),
counted on 110 development laureates: the field of 33, the country of birth of 32, the pronoun of 105 (6 of 9 women);
two facts of 53, which makes 48 pairs of 26 laureates. With the answers dealt out at random it would be right about 16
fields, 5 countries and 95 pronouns. The country of birth is known of 8 in 81 with names of three tokens and of 6 in 106
with five; two other laureates' facts before the prompt help little (34 fields, 39 countries). Wordings and length were
chosen by such counts, on half of the names by a split that is not quite the benchmark's, so that some of those names
are among its held-out ones.

Not measured: other blocks on held-out entities; one seed, one model.{gaps}

{sections}

## How far can facts be apart?

Mean cosine of the path gradients, at the entity's token, of two questions about the same held-out pair:

{cosines}

Where it is high, the model answers both questions from much the same directions, and tells them apart later, at the
end of the prompt. No way to divide the latents can separate what is read alike.

## What was tried, on development countries

41 of the 61 development countries to learn from, 64 pairs of the other 20 (capital asked of 62 of them, language 22,
currency 2, continent 59), one development wording, whole differences, seed 0. *follows*, *stay*, *both*:

| exchanged | block 16 | block 20 |
|---|---|---|
| everything | .85, .12, .48 | .85, .12, .48 |
| contrasts in 150 dimensions, all shared out by share | .24, .94, .59 | .26, .94, .60 |
| contrasts above the fair share | .58, .74, .66 | .45, .75, .60 |
| contrasts above 1.2 times that | .54, .76, .65 | .39, .76, .58 |
| contrasts above 1.6 times that | .34, .91, .63 | .33, .90, .62 |
| contrasts in 300 dimensions, 1.2 times | .36, .71, .54 | .35, .70, .53 |
| readings, 150 wide, above the fair share | .51, .78, .65 | .37, .78, .57 |
| readings, 1.2 times | .35, .90, .62 | .35, .88, .62 |
| readings turned at random, above the fair share | .35, .60, .48 | .36, .53, .45 |
| trained subspaces, 64 dimensions: pairs of the 41 | .99, .81, .90 | |
| the same: pairs of the 20 | .30, .93, .61 | |
| trained subspaces, 160 dimensions: pairs of the 41 | .97, .77, .87 | |
| the same: pairs of the 20 | .38, .88, .63 | |

From these come the bound of 1.2, the 150 dimensions and the sites. First-order figures mislead here: gradients at the
two ends of a path make up only .38 to .67 of the total effect (blocks 8 to 20), since half an exchange moves less than
half of the answer; so pools of whole parts exchange more than all parts shared out. At block 25 the token carries
nothing any more (first-order .00 to .06). A ridge regression of effects on products of gradients and differences did
not generalise (first-order, block 16: follows .17, stay .96).
"""
SITE = """## {topic}, {site}

Of the total effect, the entity's last token carries {whole}.
Of that, latents carry {latents};
the rest is the dictionary's error. Held-out entities ({held_out}) whose answer the model knows: {known};
pairs asked: {pairs}.{known_two}

{parts}

*carry*: the {measured} strongest parts of a pair together, of the latents' effect; *all parts*: all of them;
*correlation* and *same top*: of the effects of these parts between two questions about the same pair; *top named*: the
strongest part is named, by its use on development entities, after the question asked (chance {chance:.2f}); *share
named*: with all parts shared out among questions by their use, the question's own share has the largest effect.

{exchange}

*follows*: when one question's pool of the pair's difference is exchanged, its answer follows; *stay*: answers to other
questions stay; *both*: the mean of the two, .50 for exchanging all or nothing; *own*, *others*: effect on the question
and on the others, of the total effect; *forgotten*, *kept*: when the pool is set to the average development entity's,
this answer is no longer the best of all, others still are. A pool: parts of whose use the question has more than
{clear} times its fair share. Subspaces: *contrasts* of gradients, without answers; *random* axes of the same reading
space, as many;{trained}*(whole)* exchanges also what the dictionary misses.

![Naming and exchanging]({plot})

{paired}{bounds}{names}{wordings}"""
TRAINED = """ *trained* on the answers of development entities ({steps} steps, {rank} dimensions);
"""
Number = Callable[[dict[str, Any]], dict[str, Any]]
PARTS: dict[str, Number] = {
    "carry": lambda way: way["carry"]["strongest"],
    "all parts": lambda way: way["carry"]["parts"],
    "correlation": lambda way: way["correlation"],
    "same top": lambda way: way["same_top"],
    "top named": lambda way: way["named"]["use"]["top_1"],
    "share named": lambda way: way["pools"]["top_1"],
}
SWAP = ("follows", "others_stay", "both", "own", "others")
LESS_IS_BETTER = ("correlation", "same_top")
TOPICS = ("countries", "countries of two tokens", "cities", "cities of two tokens", "laureates")  # of `--entities`
LESS = {
    "top_named": "top named",
    "share_named": "share named",
    "follows": "follows",
    "others_stay": "stay",
    "both": "both",
    "forgotten": "forgotten",
    "others_kept": "kept",
    "correlation": "correlation",
    "same_top": "same top",
}


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def shown(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "-"
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def words(figures: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{number(figure['value'])} ({question})" for question, figure in figures.items())


def plot(site: dict[str, Any], clear: float, chance: float, path: Path) -> None:
    ways = list(site["ways"])
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 0.26 * len(ways) + 2.4))
    for offset, label in enumerate(("top named", "share named")):
        for place, name in enumerate(reversed(ways)):
            figure = PARTS[label](site["ways"][name])
            if figure["value"] is None:
                continue
            y = place + 0.15 - 0.3 * offset
            left.plot([figure["low"], figure["high"]], [y, y], color=f"C{offset}", linewidth=1)
            left.plot(figure["value"], y, "os"[offset], color=f"C{offset}", label=label if place == 0 else None)
    left.axvline(chance, color="grey", linestyle=":", label="chance")
    left.set_yticks(range(len(ways)), list(reversed(ways)))
    left.set_xlim(0, 1)
    left.set_xlabel("named after the question asked")
    left.legend(loc="lower right", fontsize="small")
    curves = {name: way for name, way in site["ways"].items() if "swap_by_bound" in way}
    for color, (name, way) in enumerate(curves.items()):
        by_bound = {**{float(bound): each for bound, each in way["swap_by_bound"].items()}, clear: way["swap"]}
        points = [by_bound[bound] for bound in sorted(by_bound)]
        x, y = ([point[key]["value"] for point in points] for key in ("others_stay", "follows"))
        right.plot(x, y, "o-", color=f"C{color}", label=name, markersize=4)
    for mark, (name, each) in zip("*xDP", site["subspaces"].items(), strict=False):
        swap = each["swap"]
        right.plot(swap["others_stay"]["value"], swap["follows"]["value"], mark, color="black", label=name)
    right.plot([0, 1], [1, 0], color="grey", linestyle=":", label="all or nothing")
    right.set_xlim(-0.03, 1.03)
    right.set_ylim(-0.03, 1.03)
    right.set_xlabel("other answers stay")
    right.set_ylabel("this answer follows")
    right.legend(loc="lower left", fontsize="x-small")
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def exchange(site: dict[str, Any]) -> str:
    rows = []
    for name, way in site["ways"].items():
        rows.append([name, *swapped(way["swap"]), *removed(way["removal"])])
    for name, each in site["subspaces"].items():
        rows.append([f"subspaces: {name}", *swapped(each["swap"]), *removed(each["removal"])])
        if name != "random":
            rows.append([f"subspaces: {name} (whole)", *swapped(each["swap_of_whole"]), "", ""])
    return table(["exchanged", "follows", "stay", "both", "own", "others", "forgotten", "kept"], rows)


def swapped(swap: dict[str, Any]) -> list[str]:
    return [shown(swap[key]) if key in SWAP[:3] else number(swap[key]["value"]) for key in SWAP]


def removed(removal: dict[str, Any]) -> list[str]:
    return [shown(removal["forgotten"]), shown(removal["others_kept"])]


def paired(site: dict[str, Any]) -> str:
    """Differences of readings and every other way, in the same resamples; nothing where a result has none."""
    found = site.get("readings_less")
    if not found:
        return ""
    rows = [[other, *(shown(each[key]) if key in each else "" for key in LESS)] for other, each in found.items()]
    return (
        "Readings less each other way, on the same pairs (of removal, the same entities) in the same resamples; an "
        "interval\nwithout 0 is a difference beyond chance. Of *correlation* and *same top* less is better:\n\n"
        + table(["readings less", *LESS.values()], rows)
        + "\n\n"
    )


def findings(run: dict[str, Any], site: dict[str, Any]) -> str:
    """In words, for a result with paired differences: where readings are ahead of latents and of their random turn."""
    lines = [
        f"{run['topic'].capitalize()} at block {site['site'].split('.')[1]} "
        f"({site['ways']['readings']['swap']['follows']['n']} questions asked of pairs):\n"
    ]
    for other in ("latents", "rotated readings"):
        found = site["readings_less"].get(other, {})
        sides: dict[str, list[str]] = {"ahead in": [], "behind in": [], "no difference shown in": []}
        for key, label in LESS.items():
            if key not in found or found[key]["value"] is None:
                continue
            above, below = found[key]["low"] > 0, found[key]["high"] < 0
            ahead, behind = (below, above) if key in LESS_IS_BETTER else (above, below)
            side = "ahead in" if ahead else "behind in" if behind else "no difference shown in"
            sides[side].append(f"*{label}* ({shown(found[key])})")
        told = "; ".join(f"{side} {', '.join(labels)}" for side, labels in sides.items() if labels)
        lines.append(f"- **Readings less {other}**: {told}.")
    return "\n".join(lines) + "\n\n"


def gaps(runs: list[dict[str, Any]]) -> str:
    """What the results do not have, in words."""
    measured = {run["topic"] for run in runs}
    missing = [topic for topic in TOPICS if topic not in measured]
    unpaired = [run["topic"] for run in runs if any("readings_less" not in site for site in run["sites"])]
    told = f"\nNo run was made of: {', '.join(missing)} (`--entities` has them)." if missing else ""
    return told + (f"\nNo paired differences: {', '.join(unpaired)} (the result is older)." if unpaired else "")


def bounds(site: dict[str, Any], clear: float) -> str:
    kept = {name: way for name, way in site["ways"].items() if "swap_by_bound" in way}
    if not kept:
        return ""
    rows = []
    for name, way in kept.items():
        by_bound = {**{float(bound): each for bound, each in way["swap_by_bound"].items()}, clear: way["swap"]}
        cells = [
            f"{number(each['follows']['value'])}, {number(each['others_stay']['value'])}"
            for _, each in sorted(by_bound.items())
        ]
        rows.append([name, *cells])
    head = ["follows, stay at a share above fair, times", *(f"{bound:g}" for bound in sorted(by_bound))]
    return (
        "The same exchange with other bounds on the pools, none chosen by these figures:\n\n"
        + table(head, rows)
        + "\n\n"
    )


def wordings(site: dict[str, Any]) -> str:
    kept = {name: way["other_words"] for name, way in site["ways"].items() if "other_words" in way}
    if not kept:
        return ""
    rows = []
    for place, one in enumerate(next(iter(kept.values()))):
        if "named" not in one:
            continue
        cells = []
        for found in kept.values():
            cells += [number(found[place][key]["value"]) for key in ("same_part", "named", "follows")]
        rows.append([one["question"], f"`{one['wording']}`", str(one["pairs"]), *cells])
    head = ["question", "wording", "pairs"]
    for name in kept:
        head += [f"{name}: same top part", "named", "follows"]
    return "The same pairs in other words (the fact first), against the wording above:\n\n" + table(head, rows) + "\n"


def names(site: dict[str, Any]) -> str:
    rows = [
        [way, *(f"{shown(each['top_1'])}, {number(each['unnamed']['value'])}" for each in figures["named"].values())]
        for way, figures in site["ways"].items()
    ]
    head = ["top part named; share without a name", *next(iter(site["ways"].values()))["named"]]
    return "Other names of the same parts:\n\n" + table(head, rows) + "\n\n"


def section(run: dict[str, Any], site: dict[str, Any], path: Path) -> str:
    chance = 1 / len(run["questions"])
    plot(site, run["clear"], chance, path)
    rows = [[way, *(shown(column(figures)) for column in PARTS.values())] for way, figures in site["ways"].items()]
    return SITE.format(
        topic=run["topic"].capitalize(),
        site=site["site"],
        whole=words(site["carry"]["whole"]),
        latents=words(site["carry"]["latents"]),
        held_out=run["entities"]["held_out"],
        known=", ".join(f"{n} ({q})" for q, n in site["known"].items()),
        pairs=", ".join(f"{n} ({q})" for q, n in site["pairs"].items()),
        known_two=f" Two facts or more are known of {site['known_two']}." if "known_two" in site else "",
        parts=table(["parts", *PARTS], rows),
        measured=run["measured"],
        chance=chance,
        exchange=exchange(site),
        clear=run["clear"],
        trained=TRAINED.format(**run["settings"]) if run["settings"]["steps"] else " none was trained here;\n",
        plot=path.name,
        paired=paired(site),
        bounds=bounds(site, run["clear"]),
        names=names(site),
        wordings=wordings(site),
    )


def short(runs: list[dict[str, Any]]) -> str:
    """The issue's targets against readings, their random turn and the latents."""
    rows = []
    for run in runs:
        for site in run["sites"]:
            for name in ("readings", "rotated readings", "meta-SAE", "latents"):
                if (way := site["ways"].get(name)) is not None:
                    cells = [shown(PARTS[key](way)) for key in ("carry", "correlation", "same top", "top named")]
                    swap = way["swap"]
                    cells += [shown(swap[key]) for key in ("follows", "others_stay")]
                    rows.append([run["topic"], site["site"].split(".")[1], name, *cells])
    head = ["entities", "block", "parts", "carry (>= .70)", "correlation (<= .30)", "same top (<= .20)", "top named"]
    return table([*head, "answer follows", "others stay"], rows)


def main() -> None:
    if sys.argv[1:]:
        given = [json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:]]
        runs = [run for each in given for run in (each if isinstance(each, list) else [each])]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rounded(runs), indent=None) + "\n", encoding="utf-8")
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    plt.rcParams["svg.hashsalt"] = "latent-mediation"
    sections, cosines = [], []
    for run in runs:
        for site in run["sites"]:
            slug = f"{run['topic']}-{site['site']}".replace(".", "-").replace(" ", "-")
            sections.append(section(run, site, DOCS / f"evidence-facts-{slug}.svg"))
            cells = ", ".join(f"{couple}: {number(cosine)}" for couple, cosine in site["gradient_cosine"].items())
            cosines.append([run["topic"], site["site"], cells])
    commands = []
    for run in runs:
        ways = " ".join(f"--way '{way}'" for way in run["settings"]["only"] or ())
        commands.append(COMMAND.format(topic=run["topic"], pairs=run["settings"]["pairs"], ways=ways))
    text = TEXT.format(
        findings="".join(findings(r, site) for r in runs for site in r["sites"] if site.get("readings_less")),
        gaps=gaps(runs),
        model=runs[0]["model"],
        commands="\n".join(commands),
        runs="\n".join(
            f"- {run['topic']}: {run['entities']['development']} development and {run['entities']['held_out']} "
            f"held-out entities, {', '.join(site['site'] for site in run['sites'])}, seed {run['settings']['seed']}, "
            f"{run['seconds']:.0f} s with {run['threads']} thread(s) of {run['cores']} shared cores"
            + (
                ""
                if run["settings"]["steps"]
                else ", from Python with `FactsSettings(steps=0)`: no subspace is trained"
            )
            for run in runs
        ),
        short=short(runs),
        sections="\n".join(sections),
        cosines=table(["entities", "site", "cosines"], cosines),
    )
    (DOCS / "evidence-facts.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
