"""Writes docs/evidence-facts.md and its plots: mediation bench facts ... --json | python docs/make_evidence_facts.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
TEXT = """# Real facts: which part of a country's latents answers which question?

{model} is asked for a country's {questions}, with the country first ("In {{}}, the capital city is"), so that the
residual at the country's token, and every latent there, is the same for all questions. A latent-level graph cannot tell
which fact was used; parts of the latents might. Everything that is learned or named comes from {development} countries
and other wordings; all figures are of pairs among {held_out} other countries, by intervention at the country's token.
`mediation/realfacts/bench.py` defines every figure and `mediation/realfacts/ways.py` every way to take latents apart.
Made by

```bash
mediation bench facts --model smollm2 --saes SAES --meta METAS --data DATA --json | python docs/make_evidence_facts.py
```

in {seconds:.0f} s on {cores} CPU cores, {threads} thread(s); seed {seed}; brackets: 95 % bootstrap intervals over
countries.

## How far can facts be apart?

Mean cosine of the gradients, at the country's token, of two questions about the same pair of countries:

{cosines}

Where it is high, the model answers both questions from much the same directions, and tells them apart later, at the
end of the prompt. No way to divide the latents can separate what is read alike; a part that seems to is worth a doubt.

{sites}
"""
SITE = """## {site}

The country's token carries, of the total effect, {whole}. Of that, latents carry {latents}; the rest is the
dictionary's error. Held-out countries whose answer the model knows: {known}; pairs asked: {pairs}.

{main}

*carry*: the {measured} strongest parts of a pair together, of the latents' effect; *all parts*: all of them;
*correlation* and *same top*: of the effects of these parts between two questions about the same pair; *top named*: the
strongest part is named, by its use on development countries, after the question asked (chance {chance:.2f});
*pool named*: with all parts shared out among questions by their use, the question's own pool has the largest effect;
*follows*: when one question's pool is exchanged for that of the other country, its answer follows; *stay*: the other
answers stay.

![Named right]({plot})

Other names of the same parts, top 1 and share of top parts without a name:

{names}

Share of the latents' effect in every question's pool, `readings`; a row is a question asked:

{shares}

{wordings}
"""
COLUMNS = {
    "carry": lambda way: way["carry"]["strongest"],
    "all parts": lambda way: way["carry"]["parts"],
    "correlation": lambda way: way["correlation"],
    "same top": lambda way: way["same_top"],
    "top named": lambda way: way["named"]["use"]["top_1"],
    "pool named": lambda way: way["pools"]["top_1"],
    "follows": lambda way: way["swap"]["follows"],
    "stay": lambda way: way["swap"]["others_stay"],
}


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def shown(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "-"
    return f"{number(figure['value'])} ({number(figure['low'])} to {number(figure['high'])})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def words(figures: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{number(figure['value'])} ({question})" for question, figure in figures.items())


def plot(site: dict[str, Any], chance: float, path: Path) -> None:
    ways = list(site["ways"])
    fig, axis = plt.subplots(figsize=(7, 0.32 * len(ways) + 1.2))
    for offset, (label, figure) in enumerate(
        (("top named", COLUMNS["top named"]), ("pool named", COLUMNS["pool named"]))
    ):
        for place, name in enumerate(reversed(ways)):
            value = figure(site["ways"][name])
            if value["value"] is None:
                continue
            y = place + 0.15 - 0.3 * offset
            axis.plot([value["low"], value["high"]], [y, y], color=f"C{offset}", linewidth=1)
            axis.plot(value["value"], y, "os"[offset], color=f"C{offset}", label=label if place == 0 else None)
    axis.axvline(chance, color="grey", linestyle=":", label="chance")
    axis.set_yticks(range(len(ways)), list(reversed(ways)))
    axis.set_xlim(0, 1)
    axis.set_xlabel(f"named after the question asked, {site['site']}")
    axis.legend(loc="lower right", fontsize="small")
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def wordings(site: dict[str, Any]) -> str:
    kept = {name: way["other_words"] for name, way in site["ways"].items() if "other_words" in way}
    if not kept:
        return ""
    rows = []
    for number_, one in enumerate(next(iter(kept.values()))):
        if "named" not in one:
            continue
        cells = []
        for found in kept.values():
            cells += [number(found[number_]["same_part"]["value"]), number(found[number_]["pool"]["value"])]
        rows.append([one["question"], f"`{one['wording']}`", str(one["pairs"]), *cells])
    head = ["question", "wording", "pairs"]
    for name in kept:
        head += [f"{name}: same top part", f"{name}: pool named"]
    return "The same pairs in other words, against the wording above:\n\n" + table(head, rows)


def section(site: dict[str, Any], result: dict[str, Any], chance: float) -> str:
    name = f"evidence-facts-{site['site'].replace('.', '-')}.svg"
    plot(site, chance, DOCS / name)
    questions = result["questions"]
    names = [
        [way, *(f"{shown(each['top_1'])}, {number(each['unnamed']['value'])}" for each in figures["named"].values())]
        for way, figures in site["ways"].items()
    ]
    readings = site["ways"].get("readings", next(iter(site["ways"].values())))
    shares = [[asked, *(number(readings["pools"]["shares"][asked][pool]) for pool in questions)] for asked in questions]
    main = [[way, *(shown(column(figures)) for column in COLUMNS.values())] for way, figures in site["ways"].items()]
    return SITE.format(
        site=site["site"],
        whole=words(site["carry"]["whole"]),
        latents=words(site["carry"]["latents"]),
        known=", ".join(f"{n} ({q})" for q, n in site["known"].items()),
        pairs=", ".join(f"{n} ({q})" for q, n in site["pairs"].items()),
        main=table(["parts", *COLUMNS], main),
        measured=result["measured"],
        chance=chance,
        plot=name,
        names=table(["parts", *next(iter(site["ways"].values()))["named"]], names),
        shares=table(["asked", *(f"{each}'s pool" for each in questions)], shares),
        wordings=wordings(site),
    )


def main() -> None:
    result = json.load(sys.stdin)
    plt.rcParams["svg.hashsalt"] = "latent-mediation"
    chance = 1 / len(result["questions"])
    couples = list(result["sites"][0]["gradient_cosine"])
    cosines = [[s["site"], *(number(s["gradient_cosine"].get(couple)) for couple in couples)] for s in result["sites"]]
    text = TEXT.format(
        model=result["model"],
        questions=", ".join(result["questions"]),
        development=result["entities"]["development"],
        held_out=result["entities"]["held_out"],
        seconds=result["seconds"],
        cores=result["cores"],
        threads=result["threads"],
        seed=result["settings"]["seed"],
        cosines=table(["site", *couples], cosines),
        sites="\n".join(section(site, result, chance) for site in result["sites"]),
    )
    (DOCS / "evidence-facts.md").write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
