"""Reverse check of anomalies: a latent that matters for a task and looks unrelated to it, is a shared part the reason?

1. Task: capitals of countries, in one wording; the behaviour is the logit of the right capital less that of another
   country's, the other country being the contrast. Countries are split in halves, of discovery and of evaluation. All
   is done at one place at a time, the country's token or the last one.
2. Discovery pairs: attribution of latent i, A_i = (f_i - f'_i) (g . w_i), g the mean gradient on the path between both
   residuals. *Large*: the `TOP` latents with the largest mean |A_i|.
3. On a text, each large latent's area under the ROC curve for tokens that are task words (one-word names of countries,
   capitals, languages), or that stand before one, whichever is larger. *Anomalous*: below `UNRELATED`; *related*: at
   least `RELATED`. No latent is picked by hand.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mediation.absorbed.coordination import PLACES, WORDINGS, Worded, ask_wording
from mediation.absorbed.scores import rank_areas, share
from mediation.contexts import judged, text_windows, window_length
from mediation.dictionaries import Dictionary
from mediation.metalatents import Decomposition
from mediation.realfacts.bench import of_length
from mediation.realfacts.questions import Entities, countries, topics
from mediation.sites import Site
from mediation.statistics import permutation_p
from mediation.subject import SubjectModel

TOP, UNRELATED, RELATED = 32, 0.55, 0.6
DISCOVERY_PAIRS, EVALUATION_PAIRS, CONTROLS, STEPS = 32, 5, 19, 3
SHORT = 3  # letters of a word that is not taken for a task word
HALF, ALPHA = 0.5, 0.05


@dataclass
class Pairs:
    """Countries `clean` and `other` [m], rows of a `Worded`."""

    clean: Tensor
    other: Tensor


@dataclass
class Text:
    """x [n, d] by site on tokens of a text; which tokens are task words, and which stand before one [n]."""

    x: dict[Site, Tensor]
    is_word: np.ndarray
    is_next: np.ndarray


def ask_task(model: SubjectModel, sites: Sequence[Site], seed: int = 0) -> tuple[Entities, Worded, Pairs, Pairs]:
    """Step 1: the task and its pairs of discovery and of evaluation."""
    entities = of_length(topics()["countries"], countries(), model)
    task = ask_wording(model, entities, "capital", WORDINGS["capital"][0], sites)
    generator = torch.Generator().manual_seed(seed)
    known = task.right.nonzero()[:, 0]
    known = known[torch.randperm(len(known), generator=generator)]
    half = len(known) // 2
    return entities, task, _draw(task, known[:half], DISCOVERY_PAIRS), _draw(task, known[half:], EVALUATION_PAIRS * 3)


def _draw(task: Worded, known: Tensor, most: int) -> Pairs:
    pairs = [
        (int(a), int(b))
        for step in range(1, len(known))
        for a, b in zip(known, known.roll(step), strict=True)
        if task.answers[a] != task.answers[b]
    ][:most]
    clean, other = torch.tensor(pairs).view(-1, 2).T
    return Pairs(clean, other)


@torch.no_grad()
def read_text(model: SubjectModel, sites: Sequence[Site], paths: Sequence[Path], entities: Entities, n: int) -> Text:
    """Step 3: `n` tokens of text files, first tokens and attention sinks left out."""
    names = {*entities.names, *(v for q in ("capital", "language") for v in entities.values[q] if v is not None)}
    words = {name for name in names if len(name) > SHORT and " " not in name}
    is_task = torch.tensor([model.tokenizer.decode([t]).strip() in words for t in range(model.vocab_size)])
    x: dict[Site, list[Tensor]] = {site: [] for site in sites}
    here, after, seen = [], [], 0
    held: list[list[int]] = []
    for window in text_windows(model, paths, 0):
        held.append(window)
        seen += window_length(model)
        if len(held) == 16 or seen >= n:
            tokens = torch.tensor(held)
            values = model.forward(tokens.to(model.device), read=sites, logits=False).sites
            kept = torch.stack([judged(values[site], tokens, model.bos_id).cpu() for site in sites]).all(0)
            kept[:, -1] = False  # what comes next is not known
            for site in sites:
                x[site].append(values[site][kept].cpu())
            here.append(is_task[tokens][kept])
            after.append(is_task[tokens.roll(-1, 1)][kept])
            held = []
        if seen >= n:
            break
    return Text(
        {site: torch.cat(parts) for site, parts in x.items()}, torch.cat(here).numpy(), torch.cat(after).numpy()
    )


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
    dictionary: Dictionary,
    meta: Decomposition,
    task: Worded,
    discovery: Pairs,
    evaluation: Pairs,
    text: Text,
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Steps 2 to 5 at one site and both places."""
    result: dict[str, Any] = {"site": dictionary.site.name, "text_tokens": len(text.is_word)}
    result["task_words"] = int(text.is_word.sum())
    for place in PLACES:
        progress(place)
        result[place] = _at(dictionary, meta, task, discovery, evaluation, text, place, seed)
    return result


def _at(
    dictionary: Dictionary,
    meta: Decomposition,
    task: Worded,
    discovery: Pairs,
    evaluation: Pairs,
    text: Text,
    place: str,
    seed: int,
) -> dict[str, Any]:
    site = dictionary.site
    x = task.x[place][site].cpu()
    tokens = task.answers[task.answers >= 0].unique()
    latents = dictionary.encode(x)
    gradient = torch.zeros(len(discovery.clean), x.shape[1])
    for step in range(STEPS):
        at = x[discovery.other] + (step + 0.5) / STEPS * (x[discovery.clean] - x[discovery.other])
        weights = _margin(task, discovery, tokens)
        gradient += task.context.gradient(site, discovery.clean, at, weights, tokens, PLACES[place]).cpu() / STEPS
    delta = latents[discovery.clean] - latents[discovery.other]
    attribution = delta * (gradient @ dictionary.decoder.T)
    large = attribution.abs().mean(0).topk(TOP).indices
    relation = np.maximum(*(_areas(dictionary, large, text, site, mark) for mark in (text.is_word, text.is_next)))
    anomalous = [row for row in range(TOP) if relation[row] < UNRELATED]
    related = [row for row in range(TOP) if relation[row] >= RELATED]
    codes = meta.codes(dictionary.decoder[large], large)
    pulls = gradient @ meta.directions.T
    generator = torch.Generator().manual_seed(seed)
    cases: dict[str, list[dict[str, Any]]] = {"anomalous": [], "related": []}
    for kind, rows in (("anomalous", anomalous), ("related", related)):
        for row in rows:
            effects = (delta[:, large[row], None] * codes[row] * pulls).sum(0)
            part = strongest_part(row, codes, effects, related)
            case: dict[str, Any] = {
                "latent": int(large[row]),
                "attribution": float(attribution[:, large[row]].abs().mean()),
                "relation": float(relation[row]),
            }
            if part is not None:
                case |= {"meta": part.meta, "sharers": part.sharers, "chance": part.chance}
                moves = evaluation, latents[:, large[row]], part.code
                case |= _removal(dictionary, meta, task, moves, (int(large[row]), part.meta), place, tokens, generator)
            cases[kind].append(case)
    return {
        "total_attribution_of_large": float(attribution[:, large].abs().sum() / attribution.abs().sum()),
        **{kind: _summary(found) for kind, found in cases.items()},
        "cases": cases["anomalous"],
    }


def _margin(task: Worded, pairs: Pairs, tokens: Tensor) -> Tensor:
    right, wrong = (task.answers[side][:, None] == tokens for side in (pairs.clean, pairs.other))
    return right.float() - wrong.float()


@torch.no_grad()
def _areas(dictionary: Dictionary, large: Tensor, text: Text, site: Site, mark: np.ndarray) -> np.ndarray:
    values = torch.cat([dictionary.encode(part)[:, large] for part in text.x[site].split(1024)])
    return rank_areas(values.double().numpy(), mark)


def _removal(
    dictionary: Dictionary,
    meta: Decomposition,
    task: Worded,
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
    x, delta = task.x[place][dictionary.site].cpu()[here.clean], change[rows][:, None]
    drawn = torch.randint(dictionary.d_sae, (CONTROLS,), generator=generator)
    taken = [torch.zeros_like(x), delta * dictionary.decoder[which[0]], delta * code * meta.directions[which[1]]]
    taken += [delta * code * dictionary.decoder[latent] for latent in drawn.tolist()]
    changed = torch.cat([x - each for each in taken])
    logits = task.context.logits(dictionary.site, here.clean.repeat(len(taken)), changed, tokens, PLACES[place]).cpu()
    margins = (logits * _margin(task, here, tokens).repeat(len(taken), 1)).sum(1).view(len(taken), -1)
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
