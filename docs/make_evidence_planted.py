"""Writes docs/evidence-planted.md and its plots from docs/evidence/planted.json.

python docs/make_evidence_planted.py [RESULT.json ...]: results of `mediation bench planted ... --json` are joined into
docs/evidence/planted.json first, over what it had: family by family, and organism by organism. The area under the ROC
curve of all families together is that of the file with the most families, since it cannot be made from its parts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

DOCS = Path(__file__).parent
STORE = DOCS / "evidence" / "planted.json"
PLANNED = 10  # seeds
TEXT = """# Planted facts: is the fact that a flag names the fact that was used?

Small models are trained in worlds where it is known which fact decides a reply. The method is shown prompts and a
dictionary in which every subject has one latent; it has to name the fact, flag it as hidden, and prove it.
Definitions: `mediation/planted/worlds.py` (families), `organisms.py` (models, causal check, dictionaries),
`scores.py` (every figure), `mediation/removal.py` (the test). Reported: seeds {seeds}; seeds below 10 were
developed on. The method was not changed after any reported seed had been seen (code of {commit}). How far removals of
the null family move the behaviour is recorded since the p-values of five null models were seen, and the readings turned
at random were added when the readings' own result was. Seeds run: {n_seeds}; planned were {planned}. Families without
any result yet: {missing}. Seeds beyond 110 were run because organisms failed the causal check.
Training was made cheaper (half the batch) after the causal check, and nothing else, of `correlated` at seed 100 had
been seen; that organism was discarded. Of `flatterer` at seed 100 a training had been begun and stopped, and no
figure seen. Figures are means over seeds [95 % bootstrap interval over seeds]. Made by, and more seeds and families
come from,

```bash
mediation bench planted --families FAMILIES --seeds FIRST-LAST --work WORK --json > RESULT.json
python -m tests.mediation.test_removal {simulated_runs} > docs/evidence/planted-simulation.json
python docs/make_evidence_planted.py RESULT.json ...
```

{families}

## How easy this is

All worlds but `names` are easier than a language model, in four ways that their figures inherit. A subject is one
token, and its facts are *made* nearly linear: its embedding begins as a sum of one direction for each fact and 20 %
noise. Dictionaries sit at the embeddings, where all that the model knows of the subject passes: one block later the
model has taken facts to the claim's token and made a reply of them there, and no part of the subject's latent, not
even with the facts known, is the reply's (attribute named: .25 of 20 prompts, one development organism, seed 0). The
narrow dictionary is begun at one latent a subject. And shaped, null, two and overt are one model with other claims or
another dictionary.

{names}

## Is the planted truth true?

Held-out subjects: exchanging one for another that differs in one attribute must flip the reply in 95 % of the cases
where the rule says so, and in at most 5 % where the rule does not name the attribute. An organism that fails is not
scored.

{made}

## Naming

Held-out subjects, whose names no label was made from. *attribute*: the strongest part is named by the attribute
that decides; *value*: the strongest part that the subject has more of is named by its own value; *1 / rank* of the
first part named by the attribute; *no name*: the strongest part has none. In `two` any of the two attributes counts
as right, and *both* are the two strongest kinds in {both}. In `twins`, the verdict for a model and a claim, by the
kind that is strongest in most prompts, is right in {twins}.

{naming}

## Against other parts of the same latents

On the prompts of 4 subjects an organism; weak names count for all but the meta-latents. *facts known* is least
squares of decoder rows on the true facts, the upper bound; *directions turned* are the meta-dictionary's own,
turned as a whole.

{ways}

![Attribute and value named right](evidence-planted-parts.svg)

Same subject, two claims that turn on different attributes: does the strongest own part change, both named right,
while the strongest own latent stays?

{switch}

## Flags and their proof

Nominated on one half of the subjects, tested on the other ({simulated_controls} controls, false discovery rate
.05). *removal takes*: of prompts flagged for the fact used, the share of the total effect; *swap*: the partner's
fact stands in; *other replies stay*: the same patch under claims that turn on something else.

{flags}

"Hidden fact used", by hidden share times Shapley value: every evaluation prompt and attribute; in the first row,
null prompts and the overt facts are among those not used as hidden. Precision and recall at 5 % false positives.

{roc}

## Is the test valid?

{null}

In simulated linear models (`tests/mediation/test_removal.py`, {simulated_controls} controls,
{simulated_runs} runs) the p-values of {simulated_tests} tests of facts that are not used, without nomination:
{simulated_shares}. They are conservative rather than uniform (Kolmogorov p =
{simulated_uniform}). With nomination, runs of {simulated_groups} questions: false discovery rate
{simulated_none_used} where no question reads a fact, {simulated_false} (standard error
{simulated_false_error}) where half of them do, and {simulated_found} of the facts read are found.

Tried before, in such simulations: the sign of the total effect as direction, with controls drawn for each prompt:
.11 to .15 of null tests at p at most .05. Half of the controls from the span of the dictionary's rows, which hold
the tested fact too: with 199 controls .26 of used facts were found (60 runs), with 999 .78 to .87 (12 runs).
"""
NAMES = """### A family in which nothing is made linear

In `names` a person is a first and a last name, 24 of each. All embeddings begin at random, and facts are drawn for the
pair, so that the model has to look them up. A token attends to itself and the one before it only: what a claim's token
learns of the first name it learns from the last name's, where the dictionary sits, between blocks 0 and 1. The
dictionary is begun at one latent a person, as in the other families.

*Held out* means less here: nobody whose prompts are scored is among the rows that the meta-dictionary was trained on,
or among the persons that names were made from, but the model was trained on claims about everybody, for nothing about a
pair can be inferred. So the causal check says that the model knows the facts, not that reply and recall use one fact.

{measured}

What was seen in development, on one organism (seed 1; 480 rows; 10 prompts about 2 persons, 40 controls). The residual
at the last name carries .99 of the total effect of exchanging one person for another. Ridge regression reads .83 of
held-out persons' values off it and .10 off the embeddings of both names together (chance is .12): facts are looked up
before other tokens read them, and are there to be read linearly. The factored search finds no fact; a sparse meta-SAE
(60 meta-latents, 6 a row) stands in, of which 1 gets a name. The strongest part had no name in all 10 prompts: the
method abstains. With weak names counted, another sparse meta-SAE (90 meta-latents) named the attribute in 4 of 10, one
of turned rows in 4, least squares on the true facts in 10. So what fails is finding the parts, not site or dictionary.

Why: facts alone explain .48 of the rows' variance (.39 on held-out persons), names alone .27 (.11), both .66 (.51); the
rest belongs to the pair. Directions fitted on the facts tell those who have a value from others with an area under the
ROC curve of .98 (median over 40 values, held-out persons). But the factored search looks for sets on which a linear
function of the row takes two levels, and the values' sets are linear to R^2 .39 only (median, held-out persons), which
is just what the tail of a normal distribution has; for most values it is less than the same search finds in random
rows, as many and as wide. Tried: sparse meta-SAEs of 60 meta-latents, 6 or 10 a row, of which the best for each value
has an area of .61 and .67 (median, held-out persons); independent components (FastICA, 36, 50 and 70 of them), .75 at
best; the same after taking the names' means out of the rows, .74 at best. More rows, wider meta-SAEs and a model
trained for longer have not been tried.

How the model came about (seed 0): without a window, and with claims about the persons trained on only, the model
recalled the facts of the others, and turned its replies with them in .48 to .68 of the cases (six settings of steps,
blocks, claims and order of training, one of them cut short): it learned replies by heart. With claims about everybody,
the residual at the last name carried .63; hence the window."""
MEASURED = """Reported seeds: {passed} of {organisms} organisms passed. Off the embeddings of both names ridge
regression reads {before} of held-out persons' values, off the residual at the last name {decoded}; that residual
carries {carried} of the total effect. The factored search found facts in {factored} of them; {labels} meta-latents got
a name. The strongest part was named by the attribute that decides in {attribute} of the prompts, by another kind in
{misnamed}, and had no name in {abstained}. Flagged for the fact used: {right}; for another: {wrong}. With the facts
known, parts of the same latents name the attribute in {bound}.

**Parts by what is read.** The same latents, prompts, names and test, with readings (`mediation/readings.py`) in place
of the meta-dictionary: directions learned from the gradients of the replies at the site, claim by claim, on persons of
the first kind, as many as there are values. The strongest part is named by the attribute that decides in {r_attribute},
by its value in {r_value}; flagged for the fact used: {r_right}, for another: {r_wrong}; of those flagged, removal takes
{r_removal} of the effect, the reply follows the swap in {r_swap}, and replies to other claims stay in {r_stays}.
Turned at random within the space that is read, the same name the attribute in {t_attribute} and flag {t_right}.
Readings were tried on seed 1 (widths 20 and 40, gradients of claims and of recall, all of which named the attribute in
.96 or more), and fixed before the reported seeds were scored. **Where the model makes its facts itself, what latents
share does not show them, and what is read of them does**: which attribute, not which value, since a claim reads half of
the values alike."""
NULL = """In the null family, every attribute under every claim, without nomination: {p_tests} p-values of {models}
models, {p_small} of them at most .05 (by model: {by_model}); Kolmogorov's test of uniformity p = {p_uniform}. **So in
trained models p-values are not uniform: small ones come {excess} times as often as they should.** With nomination,
{null_flagged} of {null_tests} tests had q at most .05. No prompt was flagged, because a flag also asks that the
removal moves the reply by a tenth of the behaviour: removals of these unused facts move it by {size_median} of it
(median; {size_small} where p is at most .05, {size_most} at most). The hypothesis that a model which uses an attribute
under other claims does not respond to it here *at all* is false by a little, and the test notices: it asks whether a
response is special, not whether it matters. Read q with the size of the effect beside it, never alone.

![p-values of facts that are not used](evidence-planted-p.svg)"""
FAMILIES = {
    "shaped": "attributes of 8 to 16 values",
    "mixed": "2, 2, 4, 8 and 16 values",
    "correlated": "8 values each; an attribute copies the one before it with probability .5",
    "twins": "two models, alike on the prompts, each using another attribute",
    "null": "the claim's word alone decides",
    "overt": "a dictionary in which each fact has a latent that fires",
    "two": "two facts decide together",
    "flatterer": "an assistant; two things the user owns imply what is never said",
    "names": "first and last name; facts are looked up for the pair, nothing is made linear",
}
WAYS = ("meta-latents", "top latent", "nearest row", "matching pursuit", "meta-SAE of turned rows", "directions turned",
        "sparse meta-SAE", "facts known (bound)")  # fmt: skip


def joined(files: list[Path]) -> dict[str, Any]:
    """What is stored, with `files` over it; stored again if there are any."""
    stored: dict[str, Any] = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    stored.setdefault("pooled", list(stored.get("families", {})))
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        worlds = {each["world"] for each in result["organisms"]}
        kept = [each for each in stored.get("organisms", []) if each["world"] not in worlds]
        families = stored.get("families", {}) | result["families"]
        pooled = {"evidence": result["evidence"], "pooled": list(result["families"])}
        if len(pooled["pooled"]) < len(stored["pooled"]):
            pooled = {name: stored[name] for name in pooled}
        stored = {
            "families": {name: families[name] for name in FAMILIES if name in families},
            "organisms": kept + result["organisms"],
        } | pooled
    if files:
        STORE.write_text(json.dumps(stored) + "\n", encoding="utf-8")
    return stored


def seeds_run(result: dict[str, Any]) -> tuple[str, str]:
    """Seeds that were run, passed or not, and how many: of most worlds, and of those that had others."""
    seeds: dict[str, list[int]] = {}
    for each in result["organisms"]:
        seeds.setdefault(each["world"], []).append(each["seed"])
    sets = {world: tuple(sorted(each)) for world, each in seeds.items()}
    most = max(sets.values(), key=list(sets.values()).count)
    other = {world: each for world, each in sets.items() if each != most}
    spelled = ranged(most) + "".join(f"; of `{world}` {ranged(each)}" for world, each in other.items())
    return spelled, str(len(most)) + "".join(f", of `{world}` {len(each)}" for world, each in other.items())


def ranged(seeds: tuple[int, ...]) -> str:
    """Sorted seeds as "first to last" where none is left out, else one by one."""
    whole = len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def names(result: dict[str, Any]) -> str:
    """The section on the hard family: what was measured, if it was run, and what was seen in development."""
    family = result["families"].get("names", {})
    if not family.get("figures"):
        return NAMES.format(measured="**Not scored yet on any reported seed.**")
    checks = [each["check"] for each in result["organisms"] if each["world"] == "names"]
    named, unnamed = (family["figures"][f"naming.{key}"]["value"] for key in ("attribute", "abstained"))
    measured = MEASURED.format(
        passed=family["passed"],
        organisms=family["organisms"],
        before=span([each["decoded_from_embeddings"] for each in checks]),
        decoded=span([each["decoded"] for each in checks]),
        carried=span([each["carried"] for each in checks]),
        factored=int(sum(family["figures"]["factored"]["by_seed"])),
        labels=span(family["figures"]["labels"]["by_seed"], 0),
        attribute=shown(family, "naming.attribute"),
        misnamed=number(1 - named - unnamed),
        abstained=shown(family, "naming.abstained"),
        right=shown(family, "flags.right"),
        wrong=shown(family, "flags.wrong"),
        bound=shown(family, "compared.facts known (bound).attribute"),
        r_attribute=shown(family, "readings.naming.attribute"),
        r_value=shown(family, "readings.naming.value"),
        **{f"r_{key}": shown(family, f"readings.flags.{key}") for key in ("right", "wrong", "removal", "stays")},
        r_swap=shown(family, "readings.flags.swap_follows"),
        t_attribute=shown(family, "readings turned.naming.attribute"),
        t_right=shown(family, "readings turned.flags.right"),
    )
    return NAMES.format(measured=measured)


def span(values: list[float], digits: int = 2) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def shown(family: dict[str, Any], key: str) -> str:
    """Mean over seeds and its interval."""
    figure = family.get("figures", {}).get(key)
    if figure is None or figure["value"] is None:
        return "-"
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def made(result: dict[str, Any]) -> str:
    """Causal check, world by world."""
    rows = []
    for world in dict.fromkeys(each["world"] for each in result["organisms"]):
        mine = [each for each in result["organisms"] if each["world"] == world]
        passed = [each for each in mine if each["check"]["passed"]]

        def of(key: str, mine: list[dict[str, Any]] = mine) -> str:
            return span([each["check"][key] for each in mine], 3)

        seconds = np.mean([each["seconds"] for each in mine])
        rows.append(
            [world, f"{len(passed)} of {len(mine)}", of("replies_right"), of("follows"), of("moves"),
             f"{seconds:.0f}"]
        )  # fmt: skip
    return table(
        ["organism", "passed", "replies right", "flips with the fact", "flips with another", "seconds of training"],
        rows,
    )


def compare_plot(result: dict[str, Any], families: list[str], path: Path) -> None:
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, key in zip(axes, ("attribute", "value"), strict=True):
        for place, way in enumerate(reversed(WAYS)):
            for offset, family in enumerate(families):
                figure = result["families"][family]["figures"].get(f"compared.{way}.{key}")
                if figure is None:
                    continue
                y = place + 0.35 - 0.14 * offset
                axis.plot([figure["low"], figure["high"]], [y, y], color=f"C{offset}", linewidth=1)
                axis.plot(
                    figure["value"], y, "o", markersize=4, color=f"C{offset}", label=family if place == 0 else None
                )
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel(f"{key} named right")
    axes[0].set_yticks(range(len(WAYS)), list(reversed(WAYS)))
    axes[1].legend(fontsize=7, loc="lower right")
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def p_plot(p: list[float], path: Path) -> None:
    fig, axis = plt.subplots(figsize=(3.6, 3.4))
    n = len(p)
    at = (np.arange(n) + 0.5) / n
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    low, high = stats.beta.interval(0.95, np.arange(1, n + 1), np.arange(n, 0, -1))
    axis.fill_between(at, low, high, color="grey", alpha=0.2, label="95 % of each, if uniform")
    axis.plot(at, sorted(p), ".", markersize=3, label=f"{n} tests of facts that are not used")
    axis.set_xlabel("expected p")
    axis.set_ylabel("p")
    axis.legend(fontsize=7, loc="upper left")
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def rows(families: dict[str, Any], names: list[str], *keys: str) -> list[list[str]]:
    return [[name, *(shown(families[name], key) for key in keys)] for name in names]


def with_readings(families: dict[str, Any], table: list[list[str]], count: str, *keys: str) -> list[list[str]]:
    """A table's rows, with a second column of prompts, and `names` once more by its readings."""
    every = [[each[0], str(families[each[0]][count]), *each[1:]] for each in table]
    hard = families.get("names", {})
    if "readings.chance" in hard.get("figures", {}):
        read = [shown(hard, key if key == "chance" else f"readings.{key}") for key in keys]
        every.append(["names, by readings", str(hard[count]), *read])
    return every


def null_text(null: dict[str, Any]) -> str:
    p, size = np.array(null["p"]), np.array(null["size"])
    small = p <= 0.05
    by_model = (p.reshape(len(null["seeds"]), -1) <= 0.05).sum(1)
    return NULL.format(
        p_tests=len(p),
        models=len(null["seeds"]),
        p_small=number(float(small.mean())),
        by_model=", ".join(map(str, by_model)),
        excess=f"{small.mean() / 0.05:.1f}",
        p_uniform=f"{stats.kstest(p, 'uniform').pvalue:.2g}",
        null_tests=null["tests"],
        null_flagged=null["q_flagged"],
        size_median=f"{np.median(size):.3f}",
        size_small=f"{np.median(size[small]):.3f}",
        size_most=f"{size.max():.3f}",
    )


def main() -> None:
    folder = DOCS / "evidence"
    result = joined([Path(each) for each in sys.argv[1:]])
    simulated = json.loads((folder / "planted-simulation.json").read_text(encoding="utf-8"))
    plt.rcParams["svg.hashsalt"] = "latent-mediation"
    families = result["families"]
    scored = [name for name in families if families[name].get("figures")]
    compared = [name for name in scored if "switch.pairs" in families[name]["figures"]]
    compare_plot(result, compared, DOCS / "evidence-planted-parts.svg")
    null = families.get("null", {"p": [], "tests": 0, "q_flagged": 0})
    p = np.array(null["p"])
    if len(p):
        p_plot(sorted(p), DOCS / "evidence-planted-p.svg")
    keys = ("chance", "naming.attribute", "naming.value", "naming.rank", "naming.abstained")
    naming = rows(families, [name for name in scored if name != "null"], *keys)
    naming = with_readings(families, naming, "prompts", *keys)
    keys = tuple(f"flags.{key}" for key in ("flagged", "right", "wrong", "removal", "swap_follows", "stays"))
    flags = with_readings(families, rows(families, scored, *keys), "evaluation_prompts", *keys)
    ways = [
        [way, *(shown(families[name], f"compared.{way}.{key}") for name in compared for key in ("attribute", "value"))]
        for way in WAYS
    ]
    apart = [name for name in families if name not in result["pooled"]]
    together = f"all but {', '.join(apart)}" if apart else "all together"
    curves = {together: result["evidence"]} | {name: families[name]["roc"] for name in scored}
    roc = [
        [name, str(each["used"]), str(each["unused"]), *(number(each[key]) for key in ("area", "precision", "recall"))]
        for name, each in curves.items()
        if each["area"] is not None
    ]
    seeds, n_seeds = seeds_run(result)
    filled = TEXT.format(
        commit=", ".join(sorted({str(each["commit"])[:7] for each in result["organisms"]})),
        seeds=seeds,
        n_seeds=n_seeds,
        planned=PLANNED,
        families=table(["family", "what it is", "organisms that passed"],
                       [[n, FAMILIES[n], f"{f['passed']} of {f['organisms']}"] for n, f in families.items()]),
        made=made(result),
        naming=table(["family", "prompts", "chance", "attribute", "value", "1 / rank", "no name"], naming),
        flags=table(["family", "prompts", "flagged", "for the fact used", "for another",
                     "removal takes, of the total effect", "swap: reply follows", "other replies stay"], flags),
        ways=table(["parts", *(f"{name}, {key}" for name in compared for key in ("attribute", "value"))], ways),
        switch=table(["family", "part changes, both right", "top latent the same"],
                     rows(families, compared, "switch.parts_switch", "switch.latent_stays")),
        roc=table(["family", "used", "not used", "area", "precision", "recall"], roc),
        twins=shown(families.get("twins", {}), "naming.claims").replace("-", "(not run)", 1),
        both=shown(families.get("two", {}), "naming.both").replace("-", "(not run)", 1),
        names=names(result),
        null=null_text(null)
        if len(p)
        else "The null family has not been run yet: there is no figure from a trained model.",
        missing=", ".join(name for name in FAMILIES if name not in scored) or "none",
        **{name: f"{value:.2g}" if isinstance(value, float) else value for name, value in simulated.items()},
    )  # fmt: skip
    (DOCS / "evidence-planted.md").write_text(filled.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
