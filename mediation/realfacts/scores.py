"""Figures of one way to take rows apart, on held-out pairs; see `bench` for what each means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mediation.realfacts.asking import Asking
from mediation.realfacts.parts import PairParts, effects, screen, strongest
from mediation.statistics import pair_interval

MEASURED = 16  # parts of each pair measured one by one
FIRST = 5  # ranks of the "top 5"
FEW = 5  # pairs below which two questions are not compared

Figure = dict[str, float]


@dataclass
class Measured:
    """Effects on n pairs, by question, all NaN where it is not asked.

    chosen [n, k]: the parts measured one by one, `single` [n, k] their effects; `together` [n]: all of them at once;
    `parts`, `rest` (bias and residual), `latents`, `error`, `whole` [n]; `pools` [n, n_questions]: each question's
    pool; `margin` [n] of the clean entity.
    """

    chosen: Tensor
    single: dict[str, Tensor]
    together: dict[str, Tensor]
    parts: dict[str, Tensor]
    rest: dict[str, Tensor]
    latents: dict[str, Tensor]
    error: dict[str, Tensor]
    whole: dict[str, Tensor]
    pools: dict[str, Tensor]
    margin: dict[str, Tensor]

    def top(self, question: str) -> Tensor:
        """The part with the largest effect, [n]."""
        return self.chosen.gather(1, largest(self.single[question])[:, None])[:, 0]


def measure(asking: Asking, split: PairParts, use: Tensor) -> Measured:
    """Measure a split of the pairs; use [m, n_questions] shares parts out among pools."""
    screens = {q: screen(split, gradient) for q, gradient in asking.gradients.items()}
    chosen = strongest(screens, asking.totals, MEASURED)
    single = split.parts(chosen)
    pools = torch.stack([split.only(share) for share in use.T], dim=1)
    everything = torch.ones(len(use), device=use.device)
    sums = [single.sum(1), split.only(everything), split.bias + split.residual, split.latents, split.error, split.whole]
    patches = torch.cat([single, torch.stack(sums, dim=1), pools], dim=1)
    k, names = single.shape[1], ("together", "parts", "rest", "latents", "error", "whole")
    found: dict[str, dict[str, Tensor]] = {name: {} for name in ("single", *names, "pools", "margin")}
    for q, asked in asking.by_question.items():
        effect = effects(asked, asking.pairs, q, patches)
        found["single"][q] = effect[:, :k]
        for place, name in enumerate(names):
            found[name][q] = effect[:, k + place]
        found["pools"][q] = effect[:, k + len(names) :]
        clean = asking.pairs.clean
        found["margin"][q] = asked.margin(clean, asked.x[clean], asking.pairs.right[q], asking.pairs.wrong[q])
    return Measured(chosen, **found)


class Scorer:
    """Turns values of (pair, question) rows into figures: every question counts alike, intervals over entities."""

    def __init__(self, asking: Asking, seed: int) -> None:
        self.asking, self.seed = asking, seed
        self.questions = list(asking.by_question)

    def mean(self, values: Mapping[Any, Tensor], over: Mapping[Any, Tensor] | None = None) -> Figure:
        """Mean of `values` by group (a question, or two), [n] each with NaN left out, groups alike; with `over` the
        ratio of sums in each group.
        """
        top, bottom, clean, other = [], [], [], []
        for group, value in values.items():
            base = torch.ones_like(value) if over is None else over[group]
            kept = ~(value.isnan() | base.isnan())
            if not kept.any():
                continue
            size = base[kept].sum().double()
            top.append(value[kept].double() / size)
            bottom.append(base[kept].double() / size)
            clean.append(self.asking.pairs.clean[kept])
            other.append(self.asking.pairs.other[kept])
        if not top:
            return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
        t, b, c, o = (torch.cat(each).cpu().numpy() for each in (top, bottom, clean, other))
        low, high = pair_interval(t, b, c, o, seed=self.seed)
        return {"value": float(t.sum() / b.sum()), "low": low, "high": high, "n": len(t)}

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
        "swap": swap(scorer, measured),
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
    """Which question's pool has the largest effect, and every pool's share of the latents' effect."""
    asked = scorer.asking.pairs.asked
    right = {q: masked(largest(measured.pools[q]) == number, asked[q]) for number, q in enumerate(scorer.questions)}
    shares = {
        q: {
            pool: scorer.mean({q: measured.pools[q][:, number]}, {q: measured.latents[q]})["value"]
            for number, pool in enumerate(scorer.questions)
        }
        for q in scorer.questions
    }
    return {
        "top_1": scorer.mean(right),
        "by_question": means(right),
        "shares": shares,
    }


def swap(scorer: Scorer, measured: Measured) -> dict[str, Any]:
    """After one question's pool of the pair's difference is taken out: its answer follows, the others stay."""
    asked = scorer.asking.pairs.asked
    follows, stays = {}, {}
    for number, q in enumerate(scorer.questions):
        follows[q] = masked(measured.margin[q] < measured.pools[q][:, number], asked[q])
        for r in scorer.questions:
            if r != q:
                kept = measured.margin[r] > measured.pools[r][:, number]
                stays[q, r] = masked(kept, asked[q] & asked[r])
    return {
        "follows": scorer.mean(follows),
        "others_stay": scorer.mean(stays),
        "follows_by_question": means(follows),
    }


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
