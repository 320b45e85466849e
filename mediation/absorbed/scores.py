"""Figures with intervals: shares, ratios and areas under the ROC curve, resampled over whatever is independent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Figure = dict[str, float | int | None]
FEW = 5  # positives or negatives below which no area under the curve is given
RESAMPLES = 1000


def share(numerator: ArrayLike, denominator: ArrayLike | None = None, groups: ArrayLike | None = None) -> Figure:
    """sum(numerator) / sum(denominator) [n] (of ones by default: the mean), 95 % interval by bootstrap over `groups`
    [n].

    n is the sum of the denominator where that counts, else the number of values; value is None where it is zero.
    """
    top = np.asarray(numerator, dtype=np.float64)
    below = np.ones_like(top) if denominator is None else np.asarray(denominator, dtype=np.float64)
    _, places = np.unique(np.arange(len(top)) if groups is None else np.asarray(groups), return_inverse=True)
    size = int(places.max()) + 1 if len(places) else 0
    tops, belows = np.bincount(places, top, size), np.bincount(places, below, size)

    def ratio(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = weights @ belows
        return (weights @ tops)[sums != 0] / sums[sums != 0]

    return _figure(ratio, size, int(below.sum()) if denominator is not None else len(top))


def auc(score: ArrayLike, truth: ArrayLike) -> Figure:
    """Area under the ROC curve of `score` [n] for `truth` [n], ties counted half; interval over the n."""
    values, is_true = np.asarray(score, dtype=np.float64), np.asarray(truth, dtype=bool)
    positives = int(is_true.sum())
    if min(positives, len(values) - positives) < FEW:
        return {"value": None, "low": None, "high": None, "n": len(values), "positives": positives}

    def area(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        found = (_area(values, is_true, row) for row in weights)
        return np.array([each for each in found if not math.isnan(each)])

    return _figure(area, len(values), len(values)) | {"positives": positives}


def _area(values: NDArray[np.float64], is_true: NDArray[np.bool_], weights: NDArray[np.float64]) -> float:
    """Share of pairs of a true and a false value that are in order, each value counted `weights` times."""
    levels, places = np.unique(values, return_inverse=True)
    inside = np.bincount(places, weights * is_true, len(levels))
    outside = np.bincount(places, weights * ~is_true, len(levels))
    below = np.cumsum(outside) - outside
    pairs = inside.sum() * outside.sum()
    return float((inside * (below + outside / 2)).sum() / pairs) if pairs else math.nan


def _figure(statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]], size: int, n: int) -> Figure:
    whole = statistic(np.ones((1, size)))
    if not len(whole):
        return {"value": None, "low": None, "high": None, "n": n}
    draws = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(np.float64)
    resampled = statistic(draws)
    low, high = np.quantile(resampled, [0.025, 0.975]) if len(resampled) else (math.nan, math.nan)
    return {"value": float(whole[0]), "low": float(low), "high": float(high), "n": n}


def precision_recall(flagged: ArrayLike, truth: ArrayLike) -> dict[str, Figure]:
    """Precision and recall of `flagged` [n] for `truth` [n], with intervals over the n."""
    flags, is_true = np.asarray(flagged, dtype=bool), np.asarray(truth, dtype=bool)
    return {"precision": share(flags & is_true, flags), "recall": share(flags & is_true, is_true)}


def plain(value: Any) -> Any:
    """The same with None for what is no finite number, as JSON wants it."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
