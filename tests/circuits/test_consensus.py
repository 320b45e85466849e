"""The graph of a set: influence against path enumeration, selection against its definition, tiers as planted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from circuits.consensus import FEWEST, Tier, consensus_tables, doubt
from circuits.graph import TARGET, AttributionGraph
from circuits.pruning import fewest, flow
from mediation.statistics import bootstrap_interval
from tests.circuits.planted_runs import graph_nodes, node_id, planted_run

RNG = np.random.default_rng


def random_dag(seed: int, nodes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    pairs = [pair for pair in combinations(range(nodes), 2) if RNG([seed, *pair]).random() < 0.6]
    source, target = np.array(pairs).T
    order = RNG(seed).permutation(len(pairs))
    return source[order], target[order]


def paths_to(last: int, source: np.ndarray, target: np.ndarray) -> Iterator[list[int]]:
    """Every path into `last`, as lists of edge numbers, the edge into it last; the empty path too."""
    stack: list[list[int]] = [[]]
    while stack:
        path = stack.pop()
        yield path
        first = source[path[0]] if path else last
        stack += [[edge, *path] for edge in np.flatnonzero(target == first).tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_influence_is_the_sum_over_all_paths(seed: int) -> None:
    """Shares multiplied along every path from a node, or through an edge, to the behaviour."""
    n = 7
    source, target = random_dag(seed, n)
    contributions = RNG(seed).normal(size=(3, len(source)))
    contributions[1, ::3] = 0.0  # edges that a prompt does not have
    nodes, edges = flow(contributions, source, target, n)
    for prompt, values in enumerate(np.abs(contributions)):
        into = np.array([values[target == target[e]].sum() for e in range(len(source))])
        share = np.divide(values, into, out=np.zeros_like(values), where=into > 0)
        by_node, by_edge = np.zeros(n), np.zeros(len(source))
        for path in paths_to(n - 1, source, target):
            passed = np.prod(share[path])
            by_node[source[path[0]] if path else n - 1] += passed
            if path:
                by_edge[path[0]] += passed
        np.testing.assert_allclose(nodes[prompt], by_node, atol=1e-12)
        np.testing.assert_allclose(edges[prompt], by_edge, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, (2, 6), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])), st.floats(0.1, 1.0))
def test_kept_are_the_fewest_that_hold_the_share(amounts: np.ndarray, share: float) -> None:
    for row, chosen in zip(amounts, fewest(amounts, share), strict=True):
        need = share * row.sum() - 1e-9
        smallest = next(
            size for size in range(7) if any(row[list(c)].sum() >= need for c in combinations(range(6), size))
        )
        assert chosen.sum() == (smallest if row.any() else 0)
        assert row[chosen].sum() >= need
        assert not (chosen & (row == 0)).any()


def test_tiers_of_planted_behaviour() -> None:
    """30 prompts: always on; on in six; on in all with a sign of its own; too small to tell from nothing."""
    rng = RNG(0)
    always = rng.normal(1.0, 0.3, 30)
    sometimes = np.where(np.arange(30) % 5 == 0, 3.0, 0.0)
    either = rng.choice([-1.0, 1.0], 30)
    nothing = rng.normal(0, 0.01, 30)
    values = np.stack([always, sometimes, either, nothing], axis=1)
    found = doubt(values, fewest(np.abs(values), 0.8))
    assert found.tier == [Tier.CONSENSUS, Tier.CONTINGENT, Tier.CONTINGENT, Tier.NOISE]
    assert found.frequency[1] == pytest.approx(0.2)
    assert found.low[0] < found.held_out[0] == pytest.approx(always.mean())
    assert found.low[2] < 0 < found.high[2]


def test_what_is_worth_nothing_is_rarely_more_than_noise() -> None:
    """2,000 nodes of no worth over 40 prompts; one in twenty by the interval's level, a little more by its width."""
    values = RNG(1).normal(size=(40, 2000))
    found = doubt(values, fewest(np.abs(values), 0.8))
    assert found.tier is not None
    false = np.mean([tier is Tier.CONSENSUS for tier in found.tier])
    shown = np.mean((found.low > 0) | (found.high < 0))
    assert false <= shown <= 0.08


def test_few_prompts_bear_no_tier() -> None:
    values = RNG(2).normal(3, 0.1, size=(FEWEST, 4))
    selected = np.ones(values.shape, dtype=bool)
    assert doubt(values, selected).tier == [Tier.CONSENSUS] * 4
    for few in (doubt(values[1:], selected[1:]), doubt(values, selected, judged=False)):
        assert few.tier is None
        assert np.isnan(few.low).all()
        assert few.columns()[1].null_count() == 4
        assert (few.frequency == 1).all()


def values_of(seed: int, prompts: int) -> tuple[dict, dict]:
    rng = RNG(seed)
    nodes, edges = {}, {}
    for k in range(prompts):
        on = {name: float(rng.normal(1, 0.5)) for name in ("a", "c", "e")}
        if k % 3 == 0:
            on["b"] = float(rng.normal(0, 0.5))
        nodes[f"p{k:02d}"] = on
        edges[f"p{k:02d}"] = {
            (source, target): float(rng.normal(0.5, 0.5))
            for source, target in (("embed", "a"), ("a", "c"), ("a", "target"), ("c", "target"), ("e", "target"))
        }
    return nodes, edges


def tables(folder: Path, *args: object, **kwargs: object) -> tuple[pl.DataFrame, ...]:
    run = planted_run(folder, *args, **kwargs)  # type: ignore[arg-type]
    return consensus_tables(run, graph_nodes(), estimator="ig")


def test_roles_align_positions_and_held_out_figures_are_of_the_evaluation_prompts(tmp_path: Path) -> None:
    nodes, edges = values_of(0, 20)
    table, links = tables(tmp_path / "run", nodes, edges)
    held_out = [p for p in sorted(nodes) if int(p[-1]) % 2]
    for name in ("a", "b", "c", "e"):
        row = table.row(by_predicate=pl.col("id") == node_id(name), named=True)
        values = np.array([nodes[p].get(name, 0.0) for p in held_out])
        assert row["held_out"] == pytest.approx(values.mean())
        low, high = bootstrap_interval(values)
        assert (row["low"], row["high"]) == pytest.approx((float(low), float(high)))
    link = links.row(by_predicate=(pl.col("source") == node_id("a")) & (pl.col("target") == node_id("c")), named=True)
    assert link["contribution"] == pytest.approx(np.mean([edges[p]["a", "c"] for p in nodes]))
    assert link["weight"] == pytest.approx(2 * link["contribution"])
    assert link["held_out"] == pytest.approx(np.mean([edges[p]["a", "c"] for p in held_out]))
    root = table.row(by_predicate=pl.col("id") == "embed/subject", named=True)
    assert root["attribution"] == pytest.approx(np.mean([edges[p]["embed", "a"] for p in nodes]))
    assert root["held_out"] == pytest.approx(np.mean([edges[p]["embed", "a"] for p in held_out]))
    assert AttributionGraph.from_tables(table, links).digraph.edges[node_id("c"), TARGET]["tier"] in set(Tier)


def test_a_prompt_keeps_what_its_own_influence_says(tmp_path: Path) -> None:
    """c and e carry nine and one tenth of the behaviour; a feeds c alone: .9, .9 and .1, of which .8 takes a and c."""
    prompts = [f"p{k}" for k in range(12)]
    nodes = {p: {"a": 1.0, "c": 9.0, "e": 1.0} for p in prompts}
    edges = {p: {("a", "c"): -0.2, ("c", "target"): 9.0, ("e", "target"): 1.0} for p in prompts}
    table, links = tables(tmp_path, nodes, edges)
    assert dict(table.select("id", "frequency").iter_rows()) == {
        node_id("a"): 1.0, node_id("b"): 0.0, node_id("c"): 1.0, node_id("e"): 0.0
    }  # fmt: skip
    assert links["frequency"].to_list() == [1.0, 1.0, 1.0]  # 98 % of the edges' influence needs the last tenth


def test_discovery_prompts_do_not_touch_held_out_figures_and_order_touches_nothing(tmp_path: Path) -> None:
    nodes, edges = values_of(1, 20)
    before = tables(tmp_path / "before", nodes, edges)
    poisoned = {p: v if int(p[-1]) % 2 else {name: 99.0 for name in v} for p, v in nodes.items()}
    loud = {p: v if int(p[-1]) % 2 else {ends: -99.0 for ends in v} for p, v in edges.items()}
    after = tables(tmp_path / "after", poisoned, loud)
    claims = ["held_out", "low", "high", "frequency", "tier"]
    for one, other in zip(before, after, strict=True):
        keys = ["id"] if "id" in one.columns else ["source", "target"]
        assert one.sort(keys).select(keys + claims).equals(other.sort(keys).select(keys + claims))
    assert not before[1]["contribution"].equals(after[1]["contribution"])
    turned = tables(tmp_path / "turned", dict(reversed(nodes.items())), edges, shards=5)
    for one, other in zip(before, turned, strict=True):
        keys = ["id"] if "id" in one.columns else ["source", "target"]
        assert one.sort(keys).select(keys + claims).equals(other.sort(keys).select(keys + claims))


def test_a_set_that_cannot_be_split_has_no_tiers(tmp_path: Path) -> None:
    nodes, edges = values_of(2, 8)
    table, links = tables(tmp_path, nodes, edges, halves=dict.fromkeys(nodes))
    assert table["tier"].null_count() == len(table)
    assert links["low"].null_count() == len(links)
    assert table["frequency"].null_count() == 0
