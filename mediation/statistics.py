"""How sure a number is: intervals, p-values, q-values, agreement of an estimator with exact interventions.

1. Interval of a mean over prompts: percentile bootstrap, prompts resampled whole (Efron and Tibshirani 1993,
   ch. 13).
2. p-value from n controls: (1 + number of controls that reach the observed value) / (1 + n), which is valid
   at any n and never zero (Phipson and Smyth 2010). Over several tests at once: against the largest of the
   controls (Westfall and Young 1993), which bounds the family-wise error.
3. q-values over a run: Benjamini and Hochberg 1995, from scipy.
4. Agreement with `exact` is measured on a sample that is stratified by size, so that small effects are in it.
5. Difference of two means: permutation test (Fisher 1935; Pitman 1937), all rearrangements where they are few.
6. Share of a kind in a sample, at most: the exact binomial bound (Clopper and Pearson 1934), from scipy.
7. Interval of a ratio of sums over pairs of entities: entities are resampled, and a pair counts as often as both of its
   entities come up (Owen 2007, "The pigeonhole bootstrap"), since pairs that share an entity are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

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


def pair_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    *,
    level: float = 0.95,
    n: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of sum(numerator) / sum(denominator) over pairs [m] of the entities `first` and `second` [m].

    The mean is the ratio with a denominator of ones. nan where no resample has a pair left.
    """
    top, bottom = (np.asarray(side, dtype=np.float64) for side in (numerator, denominator))
    weights = pair_draws(first, second, n=n, seed=seed)
    below = weights @ bottom
    ratios = (weights @ top)[below != 0] / below[below != 0]
    if len(ratios) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pair_draws(first: ArrayLike, second: ArrayLike, *, n: int = 2000, seed: int = 0) -> NDArray[np.int64]:
    """How often each pair [m] of the entities `first` and `second` [m] comes up in n resamples of entities, [n, m].

    Two figures of the same pairs are compared in the same resamples: the interval of their difference is paired.
    """
    a, b = np.asarray(first), np.asarray(second)
    entities, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    if len(entities) == 0:
        raise MediationError("A bootstrap interval needs at least one pair.")
    size = len(entities)
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=n)
    return counts[:, places[: len(a)]] * counts[:, places[len(a) :]]


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


@dataclass(frozen=True)
class Difference:
    """Difference of two means of m columns, and how often chance reaches it.

    difference, p: [m], p two-sided. `smallest` is the least p that so few prompts allow; `exact` says whether all
    rearrangements were tried.
    """

    difference: Floats
    p: Floats
    smallest: float
    exact: bool


def mean_difference(a: ArrayLike, b: ArrayLike, *, paired: bool, n: int = 9999, seed: int = 0) -> Difference:
    """Mean of `a` [n_a, m] minus mean of `b` [n_b, m], column by column, with its permutation p-value.

    Paired (row k of both is the same prompt): each pair's two values may change sides; the null says that its
    difference is as likely to be of either sign. Otherwise prompts change sets; the null says that both sets are
    drawn alike. All rearrangements where there are at most n + 1, which gives the exact p; else n drawn at random,
    with p = (1 + reached) / (1 + n). All columns share the rearrangements. MediationError without prompts.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (a, b))
    if len(first) == 0 or len(second) == 0:
        raise MediationError("A difference of means needs at least one prompt in both sets.")
    if paired:
        values, (weights, exact) = first - second, _flips(len(first), n, seed)
    else:
        values, (weights, exact) = np.concatenate([first, second]), _exchanges(len(first), len(second), n, seed)
    observed = weights[0] @ values  # the first rearrangement is the data's own
    # Rearrangements that are equal but for the order of their sums must count as equal.
    reach = np.abs(observed) - 1e-10 * np.abs(values).max(axis=0, initial=0.0)
    reached = np.empty(values.shape[1])
    width = max(1, _CHUNK_VALUES // len(weights))
    for start in range(0, values.shape[1], width):
        chunk = slice(start, start + width)
        reached[chunk] = (np.abs(weights @ values[:, chunk]) >= reach[chunk]).sum(axis=0)
    # The data's own arrangement is one of all, and the "1 +" of a random draw. Among all, its mirror is as extreme.
    mirrored = exact and (paired or len(first) == len(second))
    return Difference(observed, reached / len(weights), (1 + mirrored) / len(weights), exact)


def _flips(pairs: int, n: int, seed: int) -> tuple[Floats, bool]:
    """Signs of the pairs over their number, [k, pairs], the data's own first; whether these are all."""
    exact = pairs < 63 and 2**pairs <= n + 1
    if exact:
        negative = np.arange(2**pairs)[:, np.newaxis] >> np.arange(pairs) & 1
    else:
        negative = np.random.default_rng(seed).integers(0, 2, size=(n + 1, pairs))
        negative[0] = 0
    return (1.0 - 2.0 * negative) / pairs, exact


def _exchanges(first: int, second: int, n: int, seed: int) -> tuple[Floats, bool]:
    """1 / first for the prompts put into the first set, -1 / second for the others; [k, first + second]."""
    every = first + second
    exact = comb(every, first) <= n + 1
    if exact:
        chosen = np.array(list(combinations(range(every), first)))
    else:
        ranks = np.random.default_rng(seed).random((n + 1, every)).argsort(axis=1)
        chosen = ranks[:, :first]
        chosen[0] = np.arange(first)
    weights = np.full((len(chosen), every), -1.0 / second)
    np.put_along_axis(weights, chosen, 1.0 / first, axis=1)
    return weights, exact


def share_at_most(found: int, of: int, *, level: float = 0.95) -> float:
    """Upper confidence bound of a share of which `found` of `of` independent draws are; 1 without draws."""
    if of == 0:
        return 1.0
    return float(stats.binomtest(found, of, alternative="less").proportion_ci(level, method="exact").high)


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
