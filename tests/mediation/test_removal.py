"""The removal test: its controls, and how often it errs and finds, by simulation."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import normalize

from mediation.removal import least_q, q_values, removal_p, turned

SIZES = (2, 4, 8, 12, 16)
LEVELS = (0.01, 0.05, 0.1, 0.2, 0.5)
RUNS, GROUPS, PROMPTS, CONTROLS, D = 32, 8, 6, 399, 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_control_is_the_whole_kind_turned_within_other_facts() -> None:
    own, others, rows = (normalize(random(n, 20, seed=n), dim=1) for n in (4, 9, 30))
    found = turned(own, others, rows, 25, torch.Generator().manual_seed(0))
    assert found.shape == (25, 4, 20)
    torch.testing.assert_close(found @ found.mT, (own @ own.T).expand(25, 4, 4), atol=1e-5, rtol=0)
    inside = torch.linalg.pinv(others) @ others  # projection on their span
    torch.testing.assert_close(found @ inside, found, atol=1e-4, rtol=0)
    assert torch.linalg.matrix_rank(found[:, 0]) == 9  # and they fill it
    # Two other facts cannot hold four values of full rank: then controls are mixtures of rows.
    wider = turned(own, others[:2], rows, 25, torch.Generator().manual_seed(0))
    torch.testing.assert_close(wider @ wider.mT, found @ found.mT, atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(wider[:, 0]) == 20


def test_opposite_values_stay_opposite() -> None:
    """Two directions of rank one: were they drawn apart, two prompts would average out in controls alone."""
    own = torch.stack([random(20), -random(20)])
    found = turned(own, random(9, 20, seed=1), random(30, 20, seed=2), 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[:, 0], -found[:, 1])


def test_p_counts_sizes_and_q_counts_what_could_have_been_tested() -> None:
    controls = np.array([[1.0, -3.0, 0.5], [1.0, 3.0, -0.5]])  # mean sizes 1, 3, .5
    assert removal_p([2.0, -2.0], controls) == 2 / 4
    assert q_values([0.01, 0.04], 2) == pytest.approx([0.02, 0.04])
    assert q_values([0.01, 0.04], 10) == pytest.approx([0.1, 0.2])
    assert q_values([], 3).size == 0
    assert least_q(2, 10, 99) == pytest.approx(q_values([0.01, 0.01], 10)[0])


class World:
    """People who are sums of facts and noise, meta-latents that are the facts up to an error, linear questions."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.values = [self.draw(n, D) / D**0.5 * (0.3 * self.draw(1)).exp() for n in SIZES]
        self.values = [each - each.mean(0) for each in self.values]
        self.people = torch.stack([torch.randint(n, (200,), generator=self.rng) for n in SIZES], dim=1)
        noise = 0.3 * self.draw(200, D) / D**0.5
        self.x = sum(each[self.people[:, k]] for k, each in enumerate(self.values)) + noise
        self.directions = [
            normalize(each + 0.15 * each.norm(dim=1, keepdim=True) * normalize(self.draw(*each.shape), dim=1), dim=1)
            for each in self.values
        ]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)

    def question(self, kind: int | None) -> Tensor:
        """The gradient of a question that reads one kind of fact and little else, or nothing: a random direction."""
        noise = self.draw(D) / D**0.5
        if kind is None:
            return noise
        reads = torch.linalg.pinv(torch.cat(self.values))[:, sum(SIZES[:kind]) : sum(SIZES[: kind + 1])]
        sides = torch.ones(SIZES[kind])
        sides[torch.randperm(SIZES[kind], generator=self.rng)[: SIZES[kind] // 2]] = -1
        return normalize(reads @ sides, dim=0) + 0.2 * noise

    def tests(self, gradient: Tensor, kinds: list[int] | None = None) -> dict[int, float]:
        """p of the kinds that discovery prompts nominate for a question (or of those given), by evaluation prompts."""
        pick = torch.randperm(200, generator=self.rng)[: 4 * PROMPTS].view(2, 2, PROMPTS)  # half, side, prompt
        effects = torch.stack(
            [(u @ gradient)[self.people[:, k]] * v.norm(dim=1)[self.people[:, k]]
             for k, (u, v) in enumerate(zip(self.directions, self.values, strict=True))], dim=1,
        )  # fmt: skip
        if kinds is None:
            clean, corrupt = pick[0]
            along = (self.x[clean] - self.x[corrupt]) @ gradient
            kinds = (effects[clean] * along.sign()[:, None]).argmax(dim=1).unique().tolist()
        found, clean = {}, pick[1, 0]
        for kind in kinds:
            others = torch.cat([each for k, each in enumerate(self.directions) if k != kind])
            turns = turned(self.directions[kind], others, normalize(self.x, dim=1), CONTROLS, self.rng)
            own = self.people[clean, kind]
            null = self.values[kind].norm(dim=1)[own, None] * (turns @ gradient).T[own]
            found[kind] = removal_p(effects[clean, kind], null)
        return found


def null_p(runs: int) -> list[float]:
    """p of every kind under a question that reads none, in many worlds, without nomination."""
    found = []
    for seed in range(runs):
        world = World(seed)
        found += [world.tests(world.question(None), [kind])[kind] for kind in range(len(SIZES))]
    return found


def runs_of_questions(runs: int, used: int) -> tuple[list[float], list[float]]:
    """Of each run: the share of discoveries that are false, and the share found of the facts that `used` questions of
    GROUPS read. With the nomination."""
    false, found = [], []
    for seed in range(runs):
        world, truth, tests = World(1000 + seed), {}, {}
        for group in range(GROUPS):
            truth[group] = group % len(SIZES) if group < used else None
            tests |= {(group, kind): p for kind, p in world.tests(world.question(truth[group])).items()}
        q = q_values(list(tests.values()), GROUPS * len(SIZES))
        flagged = [test for test, each in zip(tests, q, strict=True) if each <= 0.05]
        wrong = sum(kind != truth[group] for group, kind in flagged)
        false.append(wrong / max(len(flagged), 1))
        found.append((len(flagged) - wrong) / max(used, 1))
    return false, found


def test_p_is_small_no_more_often_than_it_says_where_no_fact_is_used() -> None:
    p = np.array(null_p(RUNS))
    for level in LEVELS:
        assert np.mean(p <= level) < level + 3 * (level * (1 - level) / len(p)) ** 0.5, level
    assert np.mean(p <= 0.5) > 0.3  # and it is not so by being large always


def test_false_discoveries_stay_at_their_rate_and_facts_that_decide_are_found() -> None:
    """Runs of many questions, half of which use a fact; and runs in which none does."""
    for used in (0, GROUPS // 2):
        false, found = runs_of_questions(RUNS, used)
        assert np.mean(false) <= 0.05 + 2 * np.std(false) / RUNS**0.5, used
        if used:
            assert np.mean(found) >= 0.9


def figures(runs: int) -> dict[str, float | str]:
    """What docs/evidence/planted-simulation.json holds."""
    p, (nothing, _), (false, found) = null_p(runs), runs_of_questions(runs, 0), runs_of_questions(runs, GROUPS // 2)
    return {
        "simulated_runs": runs, "simulated_tests": len(p),
        "simulated_shares": ", ".join(f"{np.mean(np.array(p) <= level):.3f} at most {level}" for level in LEVELS),
        "simulated_uniform": float(stats.kstest(p, "uniform").pvalue), "simulated_none_used": float(np.mean(nothing)),
        "simulated_false": float(np.mean(false)), "simulated_false_error": float(np.std(false) / runs**0.5),
        "simulated_found": float(np.mean(found)), "simulated_groups": GROUPS, "simulated_controls": CONTROLS,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(figures(int(sys.argv[1])), indent=1))
