"""How sure a number is: intervals, p-values, q-values, agreement of an estimator with exact interventions.

1. Interval of a mean over prompts: percentile bootstrap, prompts resampled whole (Efron and Tibshirani 1993,
   ch. 13).
2. p-value from n controls: (1 + number of controls that reach the observed value) / (1 + n), which is valid
   at any n and never zero (Phipson and Smyth 2010). Over several tests at once: against the largest of the
   controls (Westfall and Young 1993), which bounds the family-wise error.
3. q-values over a run: Benjamini and Hochberg 1995, from scipy.
4. Agreement with `exact` is measured on a sample that is stratified by size, so that small effects are in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mediation.errors import MediationError

Floats = NDArray[np.float64]

_CHUNK_VALUES = 8_000_000  # resampled means held at a time: 64 MB


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, n: int = 2000, seed: int = 0
) -> tuple[Floats, Floats]:
    """Lower and upper end of the percentile bootstrap interval of the mean over axis 0.

    values [n_prompts, ...] -> two arrays [...]. All columns share their resamples and are worked through in
    chunks of bounded size. One prompt gives an interval of no width, which says nothing about doubt.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim == 0 or len(table) == 0:
        raise MediationError("A bootstrap interval needs at least one prompt.")
    n_prompts, shape = len(table), table.shape[1:]
    columns = table.reshape(n_prompts, -1)
    draws = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=n)
    weights = draws / n_prompts
    tails = [(1 - level) / 2, (1 + level) / 2]
    ends = np.empty((2, columns.shape[1]))
    width = max(1, _CHUNK_VALUES // n)
    for start in range(0, columns.shape[1], width):
        chunk = slice(start, start + width)
        ends[:, chunk] = np.quantile(weights @ columns[:, chunk], tails, axis=0)
    return ends[0].reshape(shape), ends[1].reshape(shape)


def permutation_p(observed: ArrayLike, controls: ArrayLike) -> Floats:
    """One-sided p-value of `observed` [...] against `controls` [n, ...]: large is extreme. Returns [...].

    A value that is not a number counts against the claim.
    """
    reference = np.asarray(controls, dtype=np.float64)
    reached = ~(reference < np.asarray(observed, dtype=np.float64))
    return (1 + reached.sum(axis=0)) / (1 + len(reference))


def max_statistic_p(observed: ArrayLike, controls: ArrayLike) -> Floats:
    """p-values of m tests at once, family-wise: `observed` [m], `controls` [n, m], all on one scale.

    Each observed value meets the largest control of each row, so that the chance of any false claim among the
    m at p <= alpha is at most alpha. Returns [m].
    """
    largest = np.asarray(controls, dtype=np.float64).max(axis=1)
    return permutation_p(observed, largest[:, np.newaxis])


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """q-values [m] of p-values [m]: claiming all with q <= alpha has a false discovery rate <= alpha."""
    values = np.asarray(p, dtype=np.float64)
    return np.asarray(stats.false_discovery_control(values)) if values.size else values


@dataclass(frozen=True)
class Agreement:
    """How well an estimate follows the exact effects.

    Correlations are nan where either side is constant or there are fewer than two pairs; `sign` is the share
    of pairs of the same sign, among those where one side is not zero (nan if there are none). `n` counts the
    finite pairs used.
    """

    pearson: float
    spearman: float
    sign: float
    n: int


def agreement(estimate: ArrayLike, exact: ArrayLike) -> Agreement:
    """Agreement of `estimate` with `exact`, both of one shape; pairs with a nan or inf are left out."""
    a, b = (np.asarray(side, dtype=np.float64).ravel() for side in (estimate, exact))
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    moved = (a != 0) | (b != 0)
    sign = float(np.mean(np.sign(a[moved]) == np.sign(b[moved]))) if moved.any() else float("nan")
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Agreement(float("nan"), float("nan"), sign, len(a))
    # Scaled to a range of one, because the squares of very small effects would vanish.
    pearson = np.corrcoef(a / np.ptp(a), b / np.ptp(b))[0, 1]
    return Agreement(float(pearson), float(stats.spearmanr(a, b).statistic), sign, len(a))


def stratified_sample(scores: ArrayLike, n: int, *, strata: int = 4, seed: int = 0) -> NDArray[np.int64]:
    """Sorted indices of min(n, m) of the `scores` [m], equally many from each quantile of |score|.

    A plain sample would hold almost nothing but small effects, and one from the top nothing but large ones.
    """
    sizes = np.abs(np.asarray(scores, dtype=np.float64))
    if n >= len(sizes):
        return np.arange(len(sizes))
    descending = np.argsort(-sizes, kind="stable")
    generator = np.random.default_rng(seed)
    # Both are cut by the same rule, so no stratum is asked for more than it has.
    quotas = (len(part) for part in np.array_split(np.arange(n), strata))
    chosen = [
        generator.choice(stratum, size=quota, replace=False)
        for stratum, quota in zip(np.array_split(descending, strata), quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
