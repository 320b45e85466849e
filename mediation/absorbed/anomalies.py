"""Reverse check of anomalies: a latent that matters for a task and looks unrelated to it, is a shared part the reason?

1. Task: capitals of countries, in one wording; the behaviour is the logit of the right capital less that of another
   country's, the other country being the contrast. Countries are split in halves, of discovery and of evaluation. All
   is done at one place at a time, the country's token or the last one.
2. Discovery pairs: attribution of latent i, A_i = (f_i - f'_i) (g . w_i), g the mean gradient on the path between both
   residuals. *Large*: the latents with the largest mean |A_i|.
3. *Related* and *anomalous* (unrelated) large latents: by the contexts in which they fire on a text
   (`mediation.absorbed.relatedness`). Task words: one-word names of countries, capitals and languages, and the
   question's own words. No latent is picked by hand.
4. Parts: w_i = b + sum_j z_ij u_j + r_i. Latent i's strongest part is the j with the largest |sum over pairs of
   (f_i - f'_i) z_ij (g . u_j)|, on discovery pairs. *Shared*: at least one related large latent has it too. By chance:
   the share of the latent's other parts that are shared.
5. Evaluation pairs on which the latent changes: (f_i - f'_i) z_ij u_j is taken out of x, and measured. Controls: the
   same amount along `CONTROLS` rows of latents drawn at random. p as in `mediation.statistics`, in the direction of
   what taking out the whole latent does. *Explained*: shared, p <= .05, and at least half of the whole latent's effect.
The same for related latents is the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mediation.absorbed.coordination import PLACES, WORDINGS, Worded, ask_wording
from mediation.absorbed.relatedness import WORD, Relation
from mediation.absorbed.scores import share
from mediation.dictionaries import Dictionary
from mediation.metalatents import Decomposition
from mediation.realfacts.bench import of_length
from mediation.realfacts.questions import countries, topics
from mediation.sites import Site
from mediation.statistics import permutation_p
from mediation.subject import SubjectModel

DISCOVERY_PAIRS, EVALUATION_PAIRS, CONTROLS, STEPS = 32, 5, 19, 3
SHORT = 3  # letters of a word that is not taken for a task word
HALF, ALPHA = 0.5, 0.05
SHOWN = 5  # peaks of a latent that are given


@dataclass
class Pairs:
    """Countries `clean` and `other` [m], rows of a `Worded`."""

    clean: Tensor
    other: Tensor


@dataclass
class Task:
    """Step 1, and the task words of step 3."""

    worded: Worded
    discovery: Pairs
    evaluation: Pairs
    words: frozenset[str]


def ask_task(model: SubjectModel, sites: Sequence[Site], seed: int = 0) -> Task:
    """The task, with x at the sites and pairs of discovery and of evaluation."""
    entities = of_length(topics()["countries"], countries(), model)
    wording = WORDINGS["capital"][0]
    worded = ask_wording(model, entities, "capital", wording, sites)
    generator = torch.Generator().manual_seed(seed)
    known = worded.right.nonzero()[:, 0]
    known = known[torch.randperm(len(known), generator=generator)]
    half = len(known) // 2
    names = [*entities.names, *(v for q in ("capital", "language") for v in entities.values[q] if v is not None)]
    words = [*names, *WORD.findall(wording)]
    return Task(
        worded,
        _draw(worded, known[:half], DISCOVERY_PAIRS),
        _draw(worded, known[half:], EVALUATION_PAIRS * 3),
        frozenset(word for word in words if len(word) > SHORT and WORD.fullmatch(word)),
    )


def _draw(worded: Worded, known: Tensor, most: int) -> Pairs:
    pairs = [
        (int(a), int(b))
        for step in range(1, len(known))
        for a, b in zip(known, known.roll(step), strict=True)
        if worded.answers[a] != worded.answers[b]
    ][:most]
    clean, other = torch.tensor(pairs).view(-1, 2).T
    return Pairs(clean, other)


@dataclass
class Part:
    """Step 4 for one latent: its strongest part, in how many related latents it is, and the share of its others' that
    are."""

    meta: int
    code: float
    sharers: int
    chance: float


def strongest_part(latent: int, codes: Tensor, effects: Tensor, related: Sequence[int]) -> Part | None:
    """codes [d_large, m] of the large latents, effects [m] of the parts of `latent` (a row of codes); None without
    parts."""
    mine = codes[latent] > 0
    if not bool(mine.any()):
        return None
    meta = int(torch.where(mine, effects.abs(), -1.0).argmax())
    others = [row for row in related if row != latent]
    sharers = (codes[others] > 0).sum(0) if others else torch.zeros(codes.shape[1])
    rest = mine.clone()
    rest[meta] = False
    chance = float((sharers[rest] > 0).float().mean()) if bool(rest.any()) else 0.0
    return Part(meta, float(codes[latent, meta]), int(sharers[meta]), chance)


def measure_anomalies(
    model: SubjectModel,
    dictionary: Dictionary,
    meta: Decomposition,
    task: Task,
    relation: Relation,
    *,
    large: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Steps 2 to 5 at one site and both places, for the `large` latents of largest attribution at each."""
    result: dict[str, Any] = {
        "site": dictionary.site.name,
        "all_latents": {
            "judged": int(relation.judged.sum()),
            "related": share(relation.related[relation.judged]),
            "unrelated": share(relation.unrelated[relation.judged]),
        },
    }
    for place in PLACES:
        progress(place)
        found = _at(dictionary, meta, task, relation, place, large, seed)
        for case in found["cases"]:
            case["peaks"] = [model.tokenizer.decode([token]) for token in case["peaks"]]
        result[place] = found
    return result


def _at(
    dictionary: Dictionary, meta: Decomposition, task: Task, relation: Relation, place: str, large: int, seed: int
) -> dict[str, Any]:
    site, worded, discovery = dictionary.site, task.worded, task.discovery
    x = worded.x[place][site].cpu()
    tokens = worded.answers[worded.answers >= 0].unique()
    latents = dictionary.encode(x)
    gradient = torch.zeros(len(discovery.clean), x.shape[1])
    for step in range(STEPS):
        at = x[discovery.other] + (step + 0.5) / STEPS * (x[discovery.clean] - x[discovery.other])
        weights = _margin(worded, discovery, tokens)
        gradient += worded.context.gradient(site, discovery.clean, at, weights, tokens, PLACES[place]).cpu() / STEPS
    delta = latents[discovery.clean] - latents[discovery.other]
    attribution = delta * (gradient @ dictionary.decoder.T)
    chosen = attribution.abs().mean(0).topk(large).indices
    here = relation.of(chosen)
    kinds = {"anomalous": here.unrelated.nonzero()[0].tolist(), "related": here.related.nonzero()[0].tolist()}
    codes = meta.codes(dictionary.decoder[chosen], chosen)
    pulls = gradient @ meta.directions.T
    generator = torch.Generator().manual_seed(seed)
    cases: list[dict[str, Any]] = []
    for kind, rows in kinds.items():
        for row in rows:
            latent = int(chosen[row])
            effects = (delta[:, latent, None] * codes[row] * pulls).sum(0)
            part = strongest_part(row, codes, effects, kinds["related"])
            case: dict[str, Any] = {
                "kind": kind,
                "latent": latent,
                "attribution": float(attribution[:, latent].abs().mean()),
                "contexts": int(here.contexts[row]),
                "near": float(here.share[row]),
                "p_near": float(here.p[row]),
                "peaks": [token for token in here.peaks[:SHOWN, row].tolist() if token >= 0],
            }
            if part is not None:
                case |= {"meta": part.meta, "sharers": part.sharers, "chance": part.chance}
                moves = task.evaluation, latents[:, latent], part.code
                case |= _removal(dictionary, meta, worded, moves, (latent, part.meta), place, tokens, generator)
            cases.append(case)
    return {
        "total_attribution_of_large": float(attribution[:, chosen].abs().sum() / attribution.abs().sum()),
        "large": len(chosen),
        "not_judged": int((~here.judged).sum()),
        **{kind: _summary([case for case in cases if case["kind"] == kind]) for kind in kinds},
        "cases": cases,
    }


def _margin(worded: Worded, pairs: Pairs, tokens: Tensor) -> Tensor:
    right, wrong = (worded.answers[side][:, None] == tokens for side in (pairs.clean, pairs.other))
    return right.float() - wrong.float()


def _removal(
    dictionary: Dictionary,
    meta: Decomposition,
    worded: Worded,
    moves: tuple[Pairs, Tensor, float],
    which: tuple[int, int],
    place: str,
    tokens: Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Step 5 for one latent and its part: mean effects of taking out the latent, the part and each control."""
    pairs, values, code = moves
    change = values[pairs.clean] - values[pairs.other]
    rows = change.nonzero()[:, 0][:EVALUATION_PAIRS]
    if not len(rows):
        return {"pairs": 0}
    here = Pairs(pairs.clean[rows], pairs.other[rows])
    x, delta = worded.x[place][dictionary.site].cpu()[here.clean], change[rows][:, None]
    drawn = torch.randint(dictionary.d_sae, (CONTROLS,), generator=generator)
    taken = [torch.zeros_like(x), delta * dictionary.decoder[which[0]], delta * code * meta.directions[which[1]]]
    taken += [delta * code * dictionary.decoder[latent] for latent in drawn.tolist()]
    changed = torch.cat([x - each for each in taken])
    logits = worded.context.logits(dictionary.site, here.clean.repeat(len(taken)), changed, tokens, PLACES[place]).cpu()
    margins = (logits * _margin(worded, here, tokens).repeat(len(taken), 1)).sum(1).view(len(taken), -1)
    falls = (margins[0] - margins[1:]).mean(1)
    whole, own, controls = float(falls[0]), float(falls[1]), falls[2:].numpy()
    sign = np.sign(whole) or 1.0
    return {
        "pairs": len(rows),
        "latent_effect": whole,
        "part_effect": own,
        "p": float(permutation_p(sign * own, sign * controls)),
    }


def _summary(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of step 5."""
    decomposed = [case for case in cases if case.get("pairs")]
    shared = [case for case in decomposed if case["sharers"] > 0]
    moved = [case for case in shared if case["p"] <= ALPHA]
    explained = [case for case in moved if case["part_effect"] / case["latent_effect"] >= HALF]
    return {
        "latents": len(cases),
        "decomposed": len(decomposed),
        "shared": len(shared),
        "shared_by_chance": float(np.mean([case["chance"] for case in decomposed])) if decomposed else None,
        "beyond_controls": len(moved),
        "explained": share([case in explained for case in cases]) if cases else None,
    }
