"""Ratios and areas against sums done by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.faithfulness import MIB_SHARES, Curve, interval, prompt_weights, sizes
from mediation.errors import MediationError


def curve(steps: list[int], of: int, faithful: list[float], effect: float = 4.0) -> Curve:
    """A curve of two prompts with these faithfulness values; the complement lacks what the circuit does."""
    part = effect * np.array(faithful)[:, None] * np.array([0.5, 1.5])
    clean, empty = np.array([1.0, 2.0]) + effect * np.array([0.5, 1.5]), np.array([1.0, 2.0])
    return Curve("test", steps, of, empty + part, clean - part, clean, empty)


def test_ratios_are_of_means_over_prompts() -> None:
    found = curve([0, 1, 2], 2, [0.0, 0.25, 1.5])
    assert found.faithfulness() == pytest.approx([0.0, 0.25, 1.5])
    assert found.completeness() == pytest.approx([1.0, 0.75, -0.5])


def test_areas_by_hand() -> None:
    """MIB's own shares of 1,000 edges: the trapezoid rule over shares, and over their logarithms."""
    steps = [0, *(round(1000 * share) for share in MIB_SHARES)]
    values = [0.3, 0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.2, 1.1, 1.0]
    found = curve(steps, 1000, values)
    by_hand = by_hand_off = by_hand_log = 0.0
    for (a, b), (x, y) in zip(pairwise(MIB_SHARES), pairwise(values[1:]), strict=True):
        by_hand += (b - a) * (x + y) / 2
        by_hand_off += (b - a) * (abs(1 - x) + abs(1 - y)) / 2
        by_hand_log += math.log(b / a) * (x + y) / 2
    assert found.cpr() == pytest.approx(by_hand)
    assert found.cmd() == pytest.approx(by_hand_off)
    assert found.cpr(log=True) == pytest.approx(by_hand_log / math.log(1000))
    assert by_hand == pytest.approx(1.05, abs=0.05)  # half of it lies between one half and all


def test_a_perfect_circuit_has_areas_one_and_zero() -> None:
    found = curve(sizes(5000), 5000, [1.0] * len(sizes(5000)))
    assert found.cpr(log=True) == pytest.approx(1.0)
    assert found.cmd(log=True) == pytest.approx(0.0)
    assert found.cpr() == pytest.approx(0.999)
    assert found.cmd() == pytest.approx(0.0)
    assert curve([0, 1], 1, [0.0, 0.8]).cpr(log=True) == pytest.approx(0.8)


@given(st.integers(1, 10**6))
def test_sizes_go_from_none_to_all_and_hold_mibs(n: int) -> None:
    found = sizes(n)
    assert found[:2] == [0, 1]
    assert found[-1] == n
    assert found == sorted(set(found))
    assert {round(share * n) for share in MIB_SHARES} <= set(found)
    assert all(b <= 3.01 * a + 1 for a, b in pairwise(found[1:]))  # no gap is wide on a log scale


def test_no_sizes_of_nothing() -> None:
    with pytest.raises(MediationError, match="nothing to make a circuit of"):
        sizes(0)


def test_resampled_prompts_are_paired() -> None:
    """The same resamples for every curve: two equal curves never differ; a mean's interval is the bootstrap's."""
    rng = np.random.default_rng(0)
    clean = rng.normal(3.0, 1.0, 40)
    part = clean[None] * np.array([[0.0], [0.5], [1.0]]) + rng.normal(0, 0.1, (3, 40))
    found = Curve("a", [0, 1, 2], 2, part, part, clean, np.zeros(40))
    weights = prompt_weights(40, seed=1)
    assert weights.sum(axis=1) == pytest.approx(np.ones(len(weights)))
    draws = found.faithfulness(weights)
    assert draws[7] == pytest.approx([(weights[7] * row).sum() / (weights[7] * clean).sum() for row in part])
    low, high = interval(draws)
    assert (low < found.faithfulness()).all()
    assert (found.faithfulness() < high).all()
    assert (high - low < 0.1).all()
    assert found.cpr(weights, log=True).shape == (len(weights),)
