"""Scores the method on an organism, where the fact behind every opinion is known by construction.

1. Name meta-latents from people who are *not* scored: run their bare names, and give each meta-latent the
   attribute=value it is most enriched for (mediation.labels).
2. On opinion prompts of held-out people, rank the parts of the latents' effect by their Shapley values, in the
   direction of the total effect. Right at top 1: the first part is named by the attribute the claim depends on
   (`attribute_top1`); the first part that the clean prompt has more of than the corrupt one is named by the
   person's own value (`value_top1`). A prompt without a named part counts as wrong.
3. The same with other parts: the latents themselves, orthogonal matching pursuit over the dictionary's own
   rows, the nearest own row, and a meta-SAE trained on randomly rotated rows.
4. Flags: discovery and evaluation halves, removal tests against controls; `flag_rate` is the share of
   evaluation prompts with at least one hidden fact flagged. In a null organism every flag is false.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.facts import FactSettings, find_hidden_facts, split_prompt
from mediation.labels import LEAST_SCORE, enrichment, meta_scores
from mediation.metalatents import Decomposition, MatchingPursuit, MetaDictionary, rotated
from mediation.organisms.world import World, opinion_rows
from mediation.prompts import Baseline, PromptSet, collate, tokenize
from mediation.subject import SubjectModel

LAST_NAME = 2  # tokens of a bare name: BOS, first, last
BASELINE_PROMPTS = 100  # prompts on which the baselines are scored


class Latents(Decomposition):
    """No decomposition: every latent is its own part. What a latent-level graph has to go by."""

    def __init__(self, rows: Tensor) -> None:
        self.directions, self.bias = rows, torch.zeros_like(rows[0])

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        assert own is not None  # rows are the dictionary's own
        return torch.nn.functional.one_hot(own, len(self.directions)).to(rows)


@dataclass
class Organism:
    """An organism's folder, opened: model, world, the dictionary that was decomposed, and its meta-dictionary."""

    folder: Path
    model: SubjectModel
    world: World
    dictionary: Dictionary
    meta: MetaDictionary

    @classmethod
    def load(cls, folder: str | Path) -> Organism:
        folder = Path(folder)
        if not (folder / "world.json").exists():
            raise MediationError(
                f"{folder} is not an organism: it has no world.json; make one with mediation organism."
            )
        metas = sorted(cfg.parent for cfg in folder.glob("meta/*/cfg.json"))
        if len(metas) != 1:
            raise MediationError(f"{folder} holds {len(metas)} meta-SAEs and must hold one; make the organism anew.")
        (meta,) = metas
        return cls(
            folder,
            SubjectModel.load(folder / "model", device="cpu"),
            World.load(folder),
            Dictionary.load(folder / "saes" / meta.name),
            MetaDictionary.load(meta),
        )


def label_parts(
    model: SubjectModel,
    dictionary: Dictionary,
    decomposition: Decomposition,
    world: World,
    least_score: float = LEAST_SCORE,
) -> pl.DataFrame:
    """Step 1: labels of a decomposition's parts, from the people whose opinions are not scored."""
    people = [world.people[index] for index in world.label_people]
    tokens = torch.tensor([model.encode(person.name) for person in people])
    where = torch.zeros_like(tokens)
    where[:, LAST_NAME] = 1
    scores = meta_scores(model, dictionary, decomposition, tokens, where)
    return enrichment(scores, [person.facts for person in people], least_score=least_score)


def score_organism(
    folder: Path,
    *,
    prompts: int = 300,
    seed: int = 0,
    settings: FactSettings | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Steps 1 to 4. Returns attribute_top1, value_top1, chance, flag_rate, decodability, baselines and more."""
    organism = Organism.load(folder)
    world, model = organism.world, organism.model
    settings = settings or FactSettings(seed=seed)
    rows = opinion_rows(world, world.held_out, partners=world.held_out, limit=prompts, seed=seed)
    facts = {row["id"]: _truth(world, row) for row in rows}
    asked = PromptSet.from_rows(rows)
    labels = _label_map(label_parts(model, organism.dictionary, organism.meta, world))
    discovery, evaluation = asked.split(0.5, seed)
    done = iter(range(1, len(asked) + 1))
    table = find_hidden_facts(
        model,
        organism.dictionary,
        organism.meta,
        (discovery, tokenize(discovery, model)),
        (evaluation, tokenize(evaluation, model)),
        Baseline.CORRUPT,
        settings,
        labels=labels,
        progress=lambda _: progress(next(done), len(asked)),
    )
    ranked = table.drop_nulls("rank").sort("rank")
    tops = ranked.unique("prompt", keep="first", maintain_order=True)
    own = ranked.filter("present").unique("prompt", keep="first", maintain_order=True)
    named = dict(zip(tops["prompt"], tops["label"], strict=True))
    values = dict(zip(own["prompt"], own["label"], strict=True))
    flagged = table.filter(pl.col("flagged"))["prompt"].n_unique()
    measured = json.loads((folder / "organism.json").read_text(encoding="utf-8"))
    return {
        "attribute_top1": _share(truth[0] == _attribute(named, prompt) for prompt, truth in facts.items()),
        "value_top1": _share(truth[1] == values.get(prompt) for prompt, truth in facts.items()),
        "chance": 1 / len(world.attributes),
        "flag_rate": flagged / len(evaluation),
        "decodability": measured["decodability"],
        "baselines": baselines(organism, asked[:BASELINE_PROMPTS], facts, settings),
        "prompts": len(asked),
        "family": world.family,
        "seed": world.seed,
        "opinion_accuracy": measured["opinion_accuracy_held_out"],
    }


def baselines(
    organism: Organism, asked: PromptSet, facts: dict[str, tuple[str, str]], settings: FactSettings
) -> dict[str, float]:
    """Step 3: attribute_top1 with other parts of the same latents."""
    rows = organism.dictionary.decoder
    n_facts = len(organism.world.attributes)
    others: dict[str, Decomposition] = {
        "top latent": Latents(rows),
        "matching pursuit": MatchingPursuit(rows, k=n_facts),
        "nearest row": MatchingPursuit(rows, k=1),
        "random meta-SAE": MetaDictionary.train(rotated(rows, seed=0), width=organism.meta.d_meta, k=n_facts),
    }
    scores = {}
    for name, decomposition in others.items():
        named = _named(organism, decomposition, asked, settings)
        scores[name] = _share(facts[prompt.id][0] == _attribute(named, prompt.id) for prompt in asked)
    return scores


def _named(
    organism: Organism, decomposition: Decomposition, asked: PromptSet, settings: FactSettings
) -> dict[str, str]:
    """The label of each prompt's top part. Weak names count: parts that are people have no others."""
    model, dictionary = organism.model, organism.dictionary
    labels = _label_map(label_parts(model, dictionary, decomposition, organism.world, least_score=0.0))
    named = {}
    for prompt, example in zip(asked, tokenize(asked, model), strict=True):
        split = split_prompt(model, collate([example]), dictionary, decomposition, Baseline.CORRUPT, settings)
        if split.top is not None and split.top in labels:
            named[prompt.id] = labels[split.top]
    return named


def _truth(world: World, row: dict[str, Any]) -> tuple[str, str]:
    """The attribute a prompt's claim depends on (in a null world: would depend on), and the person's fact."""
    value = world.people[row["person"]].facts[row["attribute"]]
    return row["attribute"], f"{row['attribute']}={value}"


def _attribute(named: dict[str, str], prompt: str) -> str:
    return named.get(prompt, "").split("=")[0]


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


def _label_map(table: pl.DataFrame) -> dict[int, str]:
    return dict(zip(table["meta"].to_list(), table["label"].to_list(), strict=True))
