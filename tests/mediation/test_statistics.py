"""Closed forms, brute force, and simulations of the error rates that the intervals and q-values promise."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from mediation import statistics
from mediation.errors import MediationError
from mediation.statistics import (
    agreement,
    benjamini_hochberg,
    bootstrap_interval,
    max_statistic_p,
    mean_difference,
    permutation_p,
    share_at_most,
    stratified_sample,
)

# Bootstrap -------------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=40)
    ours = bootstrap_interval(values, n=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert ours[0] == pytest.approx(theirs.low, abs=0.01)
    assert ours[1] == pytest.approx(theirs.high, abs=0.01)


def test_bootstrap_covers_the_mean_at_nearly_its_level() -> None:
    """400 experiments of 40 prompts at level .90; the percentile interval is known to be a little narrow."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(40, 400))
    low, high = bootstrap_interval(values, level=0.9)
    coverage = np.mean((low <= 3.0) & (high >= 3.0))
    assert 0.84 <= coverage <= 0.94


def test_bootstrap_columns_do_not_depend_on_chunks_or_company(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=(7, 3, 5))
    low, high = bootstrap_interval(values, n=200, seed=4)
    assert low.shape == high.shape == (3, 5)
    assert np.all(low <= high)
    monkeypatch.setattr(statistics, "_CHUNK_VALUES", 400)
    for ends, chunked in zip((low, high), bootstrap_interval(values, n=200, seed=4), strict=True):
        np.testing.assert_allclose(ends, chunked, rtol=1e-12)
    alone = bootstrap_interval(values[:, 1, 2], n=200, seed=4)
    assert alone[0] == pytest.approx(low[1, 2])
    assert not np.allclose(low, bootstrap_interval(values, n=200, seed=5)[0])


def test_bootstrap_of_equal_values_is_that_value_and_of_none_an_error() -> None:
    low, high = bootstrap_interval(np.full(5, 2.5))
    assert low == pytest.approx(2.5)
    assert high == pytest.approx(2.5)
    with pytest.raises(MediationError, match="at least one prompt"):
        bootstrap_interval(np.empty((0, 3)))


# Permutation -----------------------------------------------------------------------------------------------


def test_permutation_p_counts_ties_and_nan_against_the_claim() -> None:
    controls = [0.0, 1.0, 2.0, 3.0]
    assert permutation_p(2.5, controls) == pytest.approx(2 / 5)
    assert permutation_p(2.0, controls) == pytest.approx(3 / 5)
    assert permutation_p(9.0, controls) == pytest.approx(1 / 5)
    assert permutation_p(9.0, [*controls, np.nan]) == pytest.approx(2 / 6)
    assert permutation_p(np.nan, controls) == 1.0
    assert permutation_p(1.0, []) == 1.0
    np.testing.assert_allclose(permutation_p([9.0, -1.0], np.zeros((3, 2))), [1 / 4, 1.0])


def test_permutation_p_is_valid_under_the_null() -> None:
    draws = np.random.default_rng(3).normal(size=(20, 5000))
    p = permutation_p(draws[0], draws[1:])
    for alpha in (0.05, 0.1, 0.5):
        assert np.mean(p <= alpha) == pytest.approx(alpha, abs=0.02)


@given(arrays(float, (4,), elements=st.floats(-3, 3)), arrays(float, (6, 4), elements=st.floats(-3, 3)))
def test_max_statistic_p_is_the_brute_force_count_and_no_smaller_than_each_test(
    observed: np.ndarray, controls: np.ndarray
) -> None:
    found = max_statistic_p(observed, controls)
    expected = [(1 + sum(max(row) >= value for row in controls)) / 7 for value in observed]
    np.testing.assert_allclose(found, expected)
    assert np.all(found >= permutation_p(observed, controls))


def test_max_statistic_bounds_the_family_wise_error() -> None:
    generator = np.random.default_rng(4)
    false_claims = [
        max_statistic_p(generator.normal(size=10), generator.normal(size=(39, 10))).min() <= 0.05 for _ in range(1500)
    ]
    assert np.mean(false_claims) == pytest.approx(0.05, abs=0.02)


# False discovery rate --------------------------------------------------------------------------------------


@given(arrays(float, st.integers(1, 12), elements=st.floats(0, 1)))
def test_q_values_are_benjamini_hochberg_by_hand(p: np.ndarray) -> None:
    m = len(p)
    for q, value in zip(benjamini_hochberg(p), p, strict=True):
        # q_i: the smallest level at which the step-up procedure rejects i.
        step_up = min(m * other / np.sum(p <= other) for other in p if other >= value)
        assert q == pytest.approx(min(1.0, step_up))


def test_no_tests_have_no_q_values() -> None:
    assert benjamini_hochberg([]).shape == (0,)


def test_false_discovery_rate_is_at_its_nominal_level() -> None:
    """BH at .10 with 80 true nulls in 100 tests has a rate of .10 * .8 = .08 exactly; 600 experiments."""
    generator = np.random.default_rng(5)
    shares, power = [], []
    for _ in range(600):
        z = generator.normal(size=100)
        z[80:] += 3.0
        claimed = benjamini_hochberg(stats.norm.sf(z)) <= 0.10
        shares.append(claimed[:80].sum() / max(1, claimed.sum()))
        power.append(claimed[80:].mean())
    assert np.mean(shares) == pytest.approx(0.08, abs=0.015)
    assert np.mean(power) > 0.5


# Agreement -------------------------------------------------------------------------------------------------


def test_agreement_agrees_with_scipy() -> None:
    generator = np.random.default_rng(6)
    exact = generator.normal(size=50)
    estimate = exact**3 + generator.normal(size=50)
    found = agreement(estimate, exact)
    assert found.pearson == pytest.approx(stats.pearsonr(estimate, exact).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(estimate, exact).statistic)
    assert found.sign == pytest.approx(np.mean(estimate * exact > 0))
    assert found.n == 50


def test_agreement_of_very_small_effects_is_that_of_large_ones() -> None:
    exact = np.random.default_rng(7).normal(size=20)
    found = agreement(exact * 1e-200, exact * 1e-200)
    assert found.pearson == pytest.approx(1.0)
    assert found.spearman == pytest.approx(1.0)


def test_degenerate_agreement_is_nan_where_it_is_undefined() -> None:
    constant = agreement([1.0, 1.0, 1.0], [1.0, 2.0, -3.0])
    assert np.isnan(constant.pearson)
    assert np.isnan(constant.spearman)
    assert (constant.sign, constant.n) == (pytest.approx(2 / 3), 3)
    holes = agreement([1.0, np.nan, 2.0, np.inf, 3.0], [2.0, 1.0, 4.0, 1.0, np.nan])
    assert (holes.pearson, holes.n) == (pytest.approx(1.0), 2)
    empty = agreement([], [])
    assert (empty.n, np.isnan(empty.pearson), np.isnan(empty.sign)) == (0, True, True)
    zeros = agreement([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    assert zeros.sign == pytest.approx(1 / 2)


# Sampling --------------------------------------------------------------------------------------------------


@given(arrays(float, st.integers(0, 60), elements=st.floats(-5, 5)), st.integers(0, 70), st.integers(0, 3))
def test_a_stratified_sample_draws_evenly_from_every_quantile(scores: np.ndarray, n: int, seed: int) -> None:
    chosen = stratified_sample(scores, n, seed=seed)
    assert len(chosen) == len(set(chosen)) == min(n, len(scores))
    assert list(chosen) == sorted(chosen)
    strata = np.array_split(np.argsort(-np.abs(scores), kind="stable"), 4)
    counts = [len(np.intersect1d(stratum, chosen)) for stratum in strata]
    assert max(counts) - min(counts) <= 1
    assert list(chosen) == list(stratified_sample(scores, n, seed=seed))


def test_a_stratified_sample_has_small_effects_and_large_ones() -> None:
    scores = np.r_[np.full(90, 1e-6), np.full(10, -1.0)]
    assert np.sum(stratified_sample(scores, 20, strata=10) >= 90) == 2
    assert not np.array_equal(stratified_sample(scores, 20, seed=0), stratified_sample(scores, 20, seed=1))


# Difference of two means -----------------------------------------------------------------------------------


def brute_force_p(a: np.ndarray, b: np.ndarray, paired: bool) -> float:
    """Share of all rearrangements whose |difference of means| reaches the data's, counted one by one."""
    observed = abs(a.mean() - b.mean())
    if paired:
        found = [abs(np.mean(np.array(signs) * (a - b))) for signs in product([1, -1], repeat=len(a))]
    else:
        pooled, rows = np.concatenate([a, b]), range(len(a) + len(b))
        first = [list(chosen) for chosen in combinations(rows, len(a))]
        found = [abs(pooled[c].mean() - np.delete(pooled, c).mean()) for c in first]
    return float(np.mean(np.array(found) >= observed - 1e-9))


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float64, (5, 3), elements=st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3, 2.0])),
    arrays(np.float64, (5, 3), elements=st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3, 2.0])),
    st.integers(2, 5),
)
def test_exact_p_is_that_of_every_rearrangement_counted(a: np.ndarray, b: np.ndarray, n: int) -> None:
    """With ties, which rounding must not break."""
    for paired, second in ((True, b), (False, b[:n])):
        found = mean_difference(a, second, paired=paired)
        assert found.exact
        np.testing.assert_allclose(found.difference, a.mean(axis=0) - second.mean(axis=0), atol=1e-12)
        expected = [brute_force_p(a[:, k], second[:, k], paired) for k in range(3)]
        np.testing.assert_allclose(found.p, expected, atol=1e-12)
        assert (found.p >= found.smallest - 1e-12).all()


@pytest.mark.parametrize("paired", [True, False])
def test_drawn_p_is_near_scipys_and_the_smallest_p_is_reached(paired: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 24), rng.normal(0, 1, 24)
    found = mean_difference(a[:, None], b[:, None], paired=paired)
    theirs = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples" if paired else "independent",
        n_resamples=9999, rng=1,
    )  # fmt: skip
    assert not found.exact
    assert found.p[0] == pytest.approx(theirs.pvalue, abs=0.02)
    assert mean_difference(a[:, None] + 50, b[:, None], paired=paired).p[0] == found.smallest == 1e-4
    few = mean_difference(a[:6, None] + 50, b[:6, None], paired=paired)
    assert few.p[0] == few.smallest == (2 / 2**6 if paired else 2 / 924)
    uneven = mean_difference(a[:6, None] + 50, b[:5, None], paired=False)
    assert uneven.p[0] == uneven.smallest == 1 / 462


@pytest.mark.parametrize("paired", [True, False])
def test_p_is_uniform_where_there_is_no_difference(paired: bool) -> None:
    """2,000 columns of 16 prompts a side, far from normal; a shift of half a deviation would fail by far."""
    rng = np.random.default_rng(3)
    a, b = rng.exponential(size=(2, 16, 2000))
    p = mean_difference(a, b, paired=paired, seed=1).p
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert stats.kstest(mean_difference(a + 0.5, b, paired=paired, seed=1).p, "uniform").pvalue < 1e-6


def test_chunks_do_not_change_p_and_no_prompts_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(4).normal(size=(2, 20, 7))
    whole = mean_difference(a, b, paired=False).p
    monkeypatch.setattr(statistics, "_CHUNK_VALUES", 20_000)
    np.testing.assert_allclose(mean_difference(a, b, paired=False).p, whole)
    with pytest.raises(MediationError, match="at least one prompt"):
        mean_difference(a[:0], b, paired=False)


@pytest.mark.parametrize("paired", [True, False])
def test_few_false_discoveries_where_there_is_no_difference(paired: bool) -> None:
    """100 pairs of sets without a difference in 40 columns: any claim at q <= .05 in about 5 of them, without
    correction in nearly all."""
    claimed = naive = 0
    for seed in range(100):
        a, b = np.random.default_rng(seed).standard_t(4, size=(2, 14, 40))
        p = mean_difference(a, b, paired=paired, n=1999, seed=seed).p
        claimed += (benjamini_hochberg(p) <= 0.05).any()
        naive += (p <= 0.05).any()
    assert claimed <= 12  # five expected; more than this in 1 case of 700
    assert naive >= 70


# Bound of a share ------------------------------------------------------------------------------------------


def test_bound_of_a_share_has_its_closed_forms_and_covers() -> None:
    assert share_at_most(0, 30) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert share_at_most(3, 20) == pytest.approx(stats.beta.ppf(0.95, 4, 17))
    assert share_at_most(5, 5) == share_at_most(0, 0) == 1.0
    for share in (0.05, 0.3, 0.7):
        draws = np.random.default_rng(0).binomial(25, share, size=2000)
        covered = np.mean([share_at_most(int(k), 25) >= share for k in draws])
        assert 0.94 <= covered <= 1.0
