"""Figures of one way to take rows apart, on held-out pairs; see `bench` for what each means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mediation.realfacts.asking import Asking, spread
from mediation.realfacts.parts import CLEAR, PairParts, effects, screen, strongest
from mediation.statistics import pair_draws

MEASURED = 24  # parts of each pair measured one by one
FIRST = 5  # ranks of the "top 5"
RESAMPLES = 2000
FEW = 5  # pairs below which two questions are not compared

Figure = dict[str, Any]  # value; low and high, 95 %; n; draws [RESAMPLES]: the value in every bootstrap resample


@dataclass
class Measured:
    """Effects on n pairs, by question, all NaN where it is not asked.

    chosen [n, k]: the parts measured one by one, `single` [n, k] their effects; `together` [n]: all of them at once;
    `parts`, `rest` (bias and residual), `latents`, `error`, `whole` [n]; `shared` [n, n_questions]: all parts shared
    out among the questions, `pools` [n, n_questions]: the parts that are clearly one's; `margin` [n] of the clean
    entity.
    """

    chosen: Tensor
    single: dict[str, Tensor]
    together: dict[str, Tensor]
    parts: dict[str, Tensor]
    rest: dict[str, Tensor]
    latents: dict[str, Tensor]
    error: dict[str, Tensor]
    whole: dict[str, Tensor]
    shared: dict[str, Tensor]
    pools: dict[str, Tensor]
    margin: dict[str, Tensor]

    def top(self, question: str) -> Tensor:
        """The part with the largest effect, [n]."""
        return self.chosen.gather(1, largest(self.single[question])[:, None])[:, 0]


def measure(asking: Asking, split: PairParts, use: Tensor) -> Measured:
    """Measure a split of the pairs; use [m, n_questions]: each question's share in a part."""
    screens = {q: screen(split, gradient) for q, gradient in asking.gradients.items()}
    chosen = strongest(screens, asking.totals, MEASURED)
    single = split.parts(chosen)
    every = torch.ones(len(use), device=use.device)
    sums = [single.sum(1), split.only(every), split.bias + split.residual, split.latents, split.error, split.whole]
    shared = torch.stack([split.only(share) for share in use.T], dim=1)
    patches = torch.cat([single, torch.stack(sums, dim=1), shared, pool_patches(split, use)], dim=1)
    k, names = single.shape[1], ("together", "parts", "rest", "latents", "error", "whole")
    found: dict[str, dict[str, Tensor]] = {name: {} for name in ("single", *names, "shared", "pools", "margin")}
    for q, effect in effects_by_question(asking, patches).items():
        found["single"][q] = effect[:, :k]
        for place, name in enumerate(names):
            found[name][q] = effect[:, k + place]
        found["shared"][q], found["pools"][q] = effect[:, k + len(names) :].chunk(2, dim=1)
    found["margin"] = margins(asking)
    return Measured(chosen, **found)


def pool_patches(split: PairParts, use: Tensor, clear: float = CLEAR) -> Tensor:
    """Questions' pools: the parts in whose use [m, n_questions] its share is above `clear` times the fair one,
    [n, n_questions, d].
    """
    return torch.stack([split.only((share > clear / use.shape[1]).float()) for share in use.T], dim=1)


def effects_by_question(asking: Asking, patches: Tensor) -> dict[str, Tensor]:
    """Effects [n, k] of patches [n, k, d] on every question."""
    return {q: effects(asked, asking.pairs, q, patches) for q, asked in asking.by_question.items()}


def margins(asking: Asking) -> dict[str, Tensor]:
    """The clean entities' margins, [n] by question."""
    clean, found = asking.pairs.clean, {}
    for q, asked in asking.by_question.items():
        found[q] = asked.margin(clean, asked.x[clean], asking.pairs.right[q], asking.pairs.wrong[q])
    return found


class Scorer:
    """Turns values of (pair, question) rows into figures: every question counts alike, intervals over entities."""

    def __init__(self, asking: Asking, seed: int) -> None:
        self.asking = asking
        self.questions = list(asking.by_question)
        clean, other = asking.pairs.clean.cpu().numpy(), asking.pairs.other.cpu().numpy()
        # One set of resamples for all figures, so that any two of them can be compared pair by pair.
        self.draws = pair_draws(clean, other, n=RESAMPLES, seed=seed).astype(float)

    def mean(
        self,
        values: Mapping[Any, Tensor],
        over: Mapping[Any, Tensor] | None = None,
        weights: Mapping[Any, float] | None = None,
    ) -> Figure:
        """Mean of `values` by group (a question, or two), [n] each with NaN left out, groups alike or by `weights`;
        with `over` the ratio of sums in each group.
        """
        top, bottom = np.zeros(len(self.asking.pairs)), np.zeros(len(self.asking.pairs))
        n = 0
        for group, value in values.items():
            base = torch.ones_like(value) if over is None else over[group]
            kept = ~(value.isnan() | base.isnan())
            if not kept.any():
                continue
            size = base[kept].sum().double() / (1.0 if weights is None else weights[group])
            top += (torch.where(kept, value, 0.0).double() / size).cpu().numpy()
            bottom += (torch.where(kept, base, 0.0).double() / size).cpu().numpy()
            n += int(kept.sum())
        value_of_all = float(_ratio(top.sum(), bottom.sum()))
        return _figure(value_of_all, _ratio(self.draws @ top, self.draws @ bottom), n)

    def each(self, values: Mapping[str, Tensor], over: Mapping[str, Tensor] | None = None) -> dict[str, Figure]:
        """The same by question."""
        return {q: self.mean({q: values[q]}, over) for q in values}


def carries(scorer: Scorer, measured: Measured) -> dict[str, Any]:
    """What the token carries of the total effect, and latents and error of what it carries."""
    return {
        "whole": scorer.each(measured.whole, scorer.asking.totals),
        "latents": scorer.each(measured.latents, measured.whole),
        "error": scorer.each(measured.error, measured.whole),
        "total_effect": scorer.each(scorer.asking.totals),
    }


def score(
    scorer: Scorer, measured: Measured, names: Mapping[str, Tensor], top_latent: Mapping[str, Tensor]
) -> dict[str, Any]:
    """All figures of one way; names [m] by kind of name; top_latent [n] by question."""
    asked = scorer.asking.pairs.asked
    couples = [
        pair for pair in combinations(scorer.questions, 2) if int((asked[pair[0]] & asked[pair[1]]).sum()) >= FEW
    ]
    correlation = {f"{q}, {r}": correlations(measured.single[q], measured.single[r]) for q, r in couples}
    tops = {q: measured.top(q) for q in scorer.questions}
    same = {f"{q}, {r}": masked(tops[q] == tops[r], asked[q] & asked[r]) for q, r in couples}
    switch = {}
    for q, r in couples:
        right = [names["use"][tops[each]] == scorer.questions.index(each) for each in (q, r)]
        moved = right[0] & right[1] & (top_latent[q] == top_latent[r])
        switch[f"{q}, {r}"] = masked(moved, asked[q] & asked[r] & (top_latent[q] == top_latent[r]))
    return {
        "carry": {
            "parts": scorer.mean(measured.parts, measured.latents),
            "strongest": scorer.mean(measured.together, measured.latents),
            "rest": scorer.mean(measured.rest, measured.latents),
            "strongest_by_question": scorer.each(measured.together, measured.latents),
        },
        "correlation": scorer.mean(correlation) | {"by_questions": means(correlation)},
        "same_top": scorer.mean(same) | {"by_questions": means(same)},
        "switch": scorer.mean(switch),
        "named": {kind: named(scorer, measured, each) for kind, each in names.items()},
        "pools": pools(scorer, measured),
        "swap": swap(scorer, measured.pools, measured.margin),
        "swap_of_one_part": scorer.mean(
            {q: masked(measured.single[q].max(1).values > measured.margin[q], asked[q]) for q in scorer.questions}
        ),
    }


def named(scorer: Scorer, measured: Measured, names: Tensor) -> dict[str, Any]:
    """Rank of the first part that is named by the question asked, among those measured."""
    hits = {}
    for number, q in enumerate(scorer.questions):
        order = measured.single[q].nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True)
        hits[q] = names[measured.chosen.gather(1, order)] == number
    asked = scorer.asking.pairs.asked
    first = {q: masked(hit[:, 0], asked[q]) for q, hit in hits.items()}
    among = {q: masked(hit[:, :FIRST].any(1), asked[q]) for q, hit in hits.items()}
    rank = {q: masked(hit.any(1) / (1 + hit.float().argmax(1)), asked[q]) for q, hit in hits.items()}
    unnamed = {q: masked(names[measured.top(q)] < 0, asked[q]) for q in scorer.questions}
    return {
        "top_1": scorer.mean(first),
        "top_5": scorer.mean(among),
        "reciprocal_rank": scorer.mean(rank),
        "unnamed": scorer.mean(unnamed),
        "by_question": means(first),
    }


def pools(scorer: Scorer, measured: Measured) -> dict[str, Any]:
    """With all parts shared out: which question's share has the largest effect, and its part of the latents' effect."""
    asked = scorer.asking.pairs.asked
    right = {q: masked(largest(measured.shared[q]) == number, asked[q]) for number, q in enumerate(scorer.questions)}
    shares = {
        q: {
            pool: scorer.mean({q: measured.shared[q][:, number]}, {q: measured.latents[q]})["value"]
            for number, pool in enumerate(scorer.questions)
        }
        for q in scorer.questions
    }
    return {"top_1": scorer.mean(right), "by_question": means(right), "shares": shares}


def swap(scorer: Scorer, effects: Mapping[str, Tensor], margin: Mapping[str, Tensor]) -> dict[str, Any]:
    """After one question's part of the pair's difference is exchanged: does its answer follow, do the others stay?

    effects [n, n_questions]: of every question's exchange on the question; margin [n]: before. `both` is the mean of
    the two, .5 for exchanging all or nothing; `own` and `others` are the effects as shares of the total effect.
    """
    asked, totals = scorer.asking.pairs.asked, scorer.asking.totals
    follows, stays, own, others, total = {}, {}, {}, {}, {}
    for number, q in enumerate(scorer.questions):
        follows[q] = masked(margin[q] < effects[q][:, number], asked[q])
        own[q] = effects[q][:, number]
        for r in scorer.questions:
            if r != q:
                where = asked[q] & asked[r]
                stays[q, r] = masked(margin[r] > effects[r][:, number], where)
                others[q, r] = torch.where(where, effects[r][:, number], torch.nan)
                total[q, r] = totals[r]
    weights = dict.fromkeys(follows, 1 / len(follows)) | dict.fromkeys(stays, 1 / max(1, len(stays)))
    return {
        "follows": scorer.mean(follows),
        "others_stay": scorer.mean(stays),
        "both": scorer.mean(follows | stays, weights=weights),
        "own": scorer.mean(own, totals),
        "others": scorer.mean(others, total),
        "follows_by_question": means(follows),
    }


def removal(asking: Asking, patches: Tensor, seed: int) -> dict[str, Figure]:
    """After one question's part of an entity is set to the average entity's: is its answer no longer the best of all
    answers, and are the others still? patches [entities, n_questions, d]; only answers that were known count.
    """
    questions = list(asking.by_question)
    gone: dict[Any, Tensor] = {}
    kept: dict[Any, Tensor] = {}
    for q, asked in asking.by_question.items():
        rows, answers = asking.knows[q].nonzero()[:, 0], asking.answers[q]
        candidates = answers[answers >= 0].unique()
        for number, pool in enumerate(questions):
            best = candidates[asked.logits(rows, asked.x[rows] - patches[rows, number])[:, candidates].argmax(1)]
            lost = spread((best != answers[rows]).float(), asking.knows[q])
            (gone if pool == q else kept)[q, pool] = lost if pool == q else 1 - lost
    return {"forgotten": entity_mean(gone, seed), "others_kept": entity_mean(kept, seed)}


def entity_mean(values: Mapping[Any, Tensor], seed: int) -> Figure:
    """Mean of values [entities] by group, groups alike, NaN left out; bootstrap interval over entities."""
    table = torch.stack(list(values.values()), dim=1).double().numpy()  # [entities, groups]
    there = ~np.isnan(table)
    draws = np.random.default_rng(seed).multinomial(len(table), np.full(len(table), 1 / len(table)), size=RESAMPLES)

    def figure(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        means = _ratio(weights @ np.where(there, table, 0.0), weights @ there)
        return np.nansum(means, axis=1) / np.maximum(1, (~np.isnan(means)).sum(axis=1))

    if not there.any():
        return _figure(np.nan, np.full(RESAMPLES, np.nan), 0)
    return _figure(figure(np.ones((1, len(table))))[0], figure(draws.astype(float)), int(there.any(1).sum()))


def less(first: Figure, second: Figure) -> Figure:
    """`first` less `second`, both of the same entities and resamples: a paired difference with its interval."""
    return _figure(first["value"] - second["value"], first["draws"] - second["draws"], min(first["n"], second["n"]))


def compared(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a way that others are compared in: those of `score` where it has them, swap and removal."""
    found = {
        "follows": figures["swap"]["follows"],
        "others_stay": figures["swap"]["others_stay"],
        "both": figures["swap"]["both"],
        "forgotten": figures["removal"]["forgotten"],
        "others_kept": figures["removal"]["others_kept"],
    }
    if "named" not in figures:
        return found
    named = {"top_named": figures["named"]["use"]["top_1"], "share_named": figures["pools"]["top_1"]}
    return named | found | {key: figures[key] for key in ("correlation", "same_top")}


def _figure(value: float, draws: NDArray[np.float64], n: int) -> Figure:
    there = draws[~np.isnan(draws)]
    low, high = np.quantile(there, [0.025, 0.975]) if len(there) else (np.nan, np.nan)
    return {"value": float(value), "low": float(low), "high": float(high), "n": n, "draws": draws}


def _ratio(top: ArrayLike, bottom: ArrayLike) -> NDArray[np.float64]:
    above, below = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def largest(effects: Tensor) -> Tensor:
    """Place of the largest in every row [n, k], [n]; where rows are NaN it means nothing."""
    return effects.nan_to_num(nan=-torch.inf).argmax(1)


def means(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of each, NaN left out."""
    return {name: float(value.nanmean()) for name, value in values.items()}


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation of each row of two [n, k], [n]; NaN where a row is, or does not vary."""
    a, b = (each - each.mean(1, keepdim=True) for each in (first.double(), second.double()))
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).float()


def masked(values: Tensor, where: Tensor) -> Tensor:
    """values [n] as numbers, NaN where not `where`."""
    return torch.where(where, values.float(), torch.nan)
