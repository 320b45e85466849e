"""Sensitivity and coordination: latents that fire for one wording of a fact and not for another, and what has taken
over.

1. The same fact, a country's capital or language, in several wordings (own ones, and ParaRel's where its folder is
   given); only facts that the model gets right in both wordings of a pair: the right answer's first token has the
   largest logit among all countries' answers. x is the residual at the country's token, or at the last token.
2. Latents on in wording A and off in B, at the same place for the same fact, are *missing*; sensitivity is the share of
   A's latents that stay on.
3. For a missing latent i with value a_i, unit row w_i and x = sum_k f_k w_k + b + e, the projection of x on w_i changes
   from A to B by -a_i + (others' change) + (e's change), exactly. Over missing latents: of sum a_i, how much do others
   make up for, how much the error node, and how much of the direction is kept (both together)? A missing latent is
   *absorbed by one* when a single other latent's projection grows by at least .4 a_i (the share that v2 of absorption
   asks for).
4. Baseline: B is the same wording for another country, where the latent ought to be missing. A latent is picked for
   being on in A, so part of its value is chance and comes back in any B: only what exceeds the baseline speaks of
   coordination.
Intervals over countries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mediation.absorbed.contexts import END, WORD, Context, InContext
from mediation.absorbed.scores import share
from mediation.dictionaries import Dictionary
from mediation.realfacts.bench import of_length
from mediation.realfacts.questions import Entities, countries, paraphrases, topics
from mediation.sites import Site
from mediation.subject import SubjectModel

TAKEN_OVER = 0.4
WORDINGS: Mapping[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {} is the city of",
        "In {}, the capital city is",
        "As everyone knows, the capital of {} is called",
        "The government of {} sits in the city of",
    ),
    "language": (
        "The official language of {} is",
        "In {}, the official language is",
        "The language spoken by most people in {} is",
        "People who live in {} mostly speak",
    ),
}
PLACES = {"country": WORD, "last token": END}


@dataclass
class Worded:
    """One wording of one question for every country: right [n]; x [n, d] by place and site."""

    question: str
    wording: str
    context: InContext
    answers: Tensor
    right: Tensor
    x: dict[str, dict[Site, Tensor]]


def ask_wordings(
    model: SubjectModel, sites: Sequence[Site], data: Path | None, most: int
) -> tuple[Entities, list[Worded]]:
    """Step 1; at most `most` wordings of a question."""
    entities = of_length(topics()["countries"], countries(), model)
    found = []
    for question, own in WORDINGS.items():
        more = paraphrases(data, question) if data is not None else []
        for wording in list(dict.fromkeys([*own, *more]))[:most]:
            found.append(ask_wording(model, entities, question, wording, sites))
    return entities, found


def ask_wording(model: SubjectModel, entities: Entities, question: str, wording: str, sites: Sequence[Site]) -> Worded:
    """One wording, asked of all entities, whose names are one token."""
    before, after = wording.split(" {}")
    ids = [model.tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in entities.names]
    context = InContext(model, Context(before, after), torch.tensor(ids))
    values = entities.values[question]
    first = [
        -1 if value is None else model.tokenizer(f" {value}", add_special_tokens=False)["input_ids"][0]
        for value in values
    ]
    answers = torch.tensor(first)
    among = answers[answers >= 0].unique()
    right = among[context.asked()[:, among].argmax(1).cpu()] == answers
    x = {place: context.x(sites, position) for place, position in PLACES.items()}
    return Worded(question, wording, context, answers, right, x)


@dataclass
class Missing:
    """Step 3 for missing latents [m]: row is which x they were missing from; value a_i; what others and the error node
    gain; the largest gain of one other latent."""

    row: Tensor
    latent: Tensor
    value: Tensor
    others: Tensor
    error: Tensor
    one: Tensor
    on: Tensor  # latents on in A, [n]


def missing_latents(dictionary: Dictionary, a: Tensor, b: Tensor) -> Missing:
    """Step 3 for pairs of residuals a and b [n, d]."""
    first, second = dictionary.split(a), dictionary.split(b)
    row, latent = ((first.latents > 0) & (second.latents <= 0)).nonzero(as_tuple=True)
    w = dictionary.decoder[latent]
    value = first.latents[row, latent]
    error = ((second.error - first.error)[row] * w).sum(1)
    constant = ((second.constant - first.constant)[row] * w).sum(1)
    others = ((b - a)[row] * w).sum(1) + value - error - constant
    gain = second.latents - first.latents
    one = torch.zeros_like(value)
    for number in row.unique().tolist():
        mine = row == number
        changed = (gain[number] != 0).nonzero()[:, 0]
        projections = gain[number, changed] * (w[mine] @ dictionary.decoder[changed].T)
        projections[changed[None] == latent[mine][:, None]] = 0.0
        one[mine] = projections.max(1).values.clamp_min(0)
    return Missing(row, latent, value, others, error, one, (first.latents > 0).sum(1))


@torch.no_grad()
def measure_coordination(
    dictionary: Dictionary,
    worded: Sequence[Worded],
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Steps 2 to 4 at one site, by place: the same fact in other words, and another country in the same words."""
    found: dict[str, Any] = {"site": dictionary.site.name}
    generator = torch.Generator().manual_seed(seed)
    for place in PLACES:
        same: list[tuple[np.ndarray, Missing]] = []
        other: list[tuple[np.ndarray, Missing]] = []
        for one, two in permutations(worded, 2):
            if one.question != two.question:
                continue
            both = (one.right & two.right).nonzero()[:, 0]
            a, b = one.x[place][dictionary.site][both], two.x[place][dictionary.site][both]
            if len(both) and not torch.equal(a, b):  # two wordings with the same text before the country read the same
                same.append((both.numpy(), missing_latents(dictionary, a, b)))
        for one in worded:
            known = one.right.nonzero()[:, 0]
            if len(known) < 2:
                continue
            known = known[torch.randperm(len(known), generator=generator)]
            x = one.x[place][dictionary.site][known]
            other.append((known.numpy(), missing_latents(dictionary, x, x.roll(1, 0))))
        progress()
        found[place] = {"same fact": _figures(same), "another country": _figures(other)}
    return found


def _figures(pairs: Sequence[tuple[np.ndarray, Missing]]) -> dict[str, Any]:
    if not pairs:
        return {"pairs": 0}
    entity = np.concatenate([who[each.row.numpy()] for who, each in pairs])
    value, others, error, one = (
        np.concatenate([getattr(each, name).double().numpy() for _, each in pairs])
        for name in ("value", "others", "error", "one")
    )
    everyone = np.concatenate([who for who, _ in pairs])
    on = np.concatenate([each.on.numpy() for _, each in pairs])
    lost = np.concatenate([np.bincount(each.row.numpy(), minlength=len(who)) for who, each in pairs])
    return {
        "pairs": len(everyone),
        "countries": len(np.unique(everyone)),
        "missing_per_pair": float(lost.mean()),
        "sensitivity": share(on - lost, on, everyone),
        "kept": share(others + error, value, entity),
        "by_others": share(others, value, entity),
        "by_error": share(error, value, entity),
        "absorbed_by_one": share(one >= TAKEN_OVER * value, groups=entity),
    }
