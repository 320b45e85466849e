"""Influence against enumeration of all paths; what pruning keeps against its promises."""

from __future__ import annotations

import itertools
import random

import networkx as nx
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.graph import TARGET, AttributionGraph, NodeKind
from circuits.pruning import SOURCES, Keep, influence, prune
from mediation.errors import MediationError
from tests.circuits.random_graphs import random_graph, random_tables
from tests.circuits.test_graph import every_path

seeds = st.integers(0, 10_000)
shares = st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.9, 0.98, 1.0])


@settings(max_examples=40, deadline=None)
@given(seed=seeds, density=st.floats(0.2, 1), layers=st.integers(1, 4))
def test_influence_is_what_all_paths_through_a_node_or_an_edge_carry(seed: int, density: float, layers: int) -> None:
    graph = random_graph(seed, density=density, layers=layers, width=3)
    paths = every_path(graph)
    flow = sum(paths.values())
    found = influence(graph)
    for name in graph.digraph:
        through = sum(carried for path, carried in paths.items() if name in path)
        assert found.nodes[name] == pytest.approx(through / flow, abs=1e-12)
    for edge in graph.digraph.edges:
        through = sum(carried for path, carried in paths.items() if edge in itertools.pairwise(path))
        assert found.edges[edge] == pytest.approx(through / flow, abs=1e-12)


def test_influence_by_hand() -> None:
    """target = 3 a - 1 b, a = 2 e + 2 f, b = 5 f: a .75, b .25, e .375, f .375 + .25; c reaches nothing."""
    digraph = nx.DiGraph()
    blank = AttributionGraph.from_tables(*(table.clear() for table in random_tables(0))).digraph.nodes[TARGET]
    for name, kind in zip("abcef", ["latent"] * 3 + ["embedding"] * 2, strict=True):
        digraph.add_node(name, **{**blank, "kind": kind, "site": "s", "position": 0})
    digraph.add_node(TARGET, **blank)
    for source, target, value in [("a", TARGET, 3), ("b", TARGET, -1), ("e", "a", 2), ("f", "a", 2), ("f", "b", 5)]:
        digraph.add_edge(source, target, weight=value, contribution=value)
    digraph.add_edge("e", "c", weight=1, contribution=9)
    digraph.add_edge("c", "b", weight=0, contribution=0)
    graph = AttributionGraph(digraph)
    found = influence(graph)
    assert found.nodes == {"a": 0.75, "b": 0.25, "c": 0.0, "e": 0.375, "f": 0.625, TARGET: 1.0}
    assert found.edges["f", "a"] == 0.375
    assert found.edges["e", "c"] == found.edges["c", "b"] == 0.0
    kept = prune(graph, Keep(nodes=0.7)).digraph
    assert set(kept) == {"a", "e", "f", TARGET}
    assert kept.nodes["f"]["influence"] == 0.625  # as it was, not what is left of it
    assert set(prune(graph, Keep(nodes=0.76)).digraph) == {"a", "b", "e", "f", TARGET}
    assert set(prune(graph, Keep(nodes=1)).digraph) == {"a", "b", "c", "e", "f", TARGET}
    assert set(prune(graph, Keep(nodes=1, top=1)).digraph) == {"a", "e", "f", TARGET}


@settings(max_examples=30, deadline=None)
@given(seed=seeds, keep=st.builds(Keep, nodes=shares, edges=shares, top=st.none() | st.integers(1, 12)))
def test_the_order_of_nodes_and_edges_does_not_matter(seed: int, keep: Keep) -> None:
    graph = random_graph(seed, layers=4)
    rng = random.Random(seed)
    digraph = nx.DiGraph()
    digraph.add_nodes_from(rng.sample(list(graph.digraph.nodes(data=True)), len(graph.digraph)))
    digraph.add_edges_from(rng.sample(list(graph.digraph.edges(data=True)), graph.digraph.number_of_edges()))
    again = AttributionGraph(digraph, graph.meta)
    assert influence(again) == influence(graph)  # to the last bit
    one, other = prune(graph, keep), prune(again, keep)
    assert set(one.digraph) == set(other.digraph)
    assert set(one.digraph.edges) == set(other.digraph.edges)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds, density=st.floats(0.1, 1), less=st.tuples(shares, shares),
    more=st.tuples(shares, shares), top=st.integers(1, 12), further=st.none() | st.integers(0, 9),
)  # fmt: skip
def test_larger_shares_keep_more(
    seed: int, density: float, less: tuple[float, float], more: tuple[float, float], top: int,
    further: int | None,
) -> None:  # fmt: skip
    graph = random_graph(seed, density=density, layers=4)
    low = Keep(min(less[0], more[0]), min(less[1], more[1]), top)
    high = Keep(max(less[0], more[0]), max(less[1], more[1]), None if further is None else top + further)
    assert set(prune(graph, low).digraph) <= set(prune(graph, high).digraph)
    of_nodes = Keep(low.nodes, high.edges, low.top)  # at the same nodes, edges are nested too
    assert set(prune(graph, low).digraph.edges) <= set(prune(graph, of_nodes).digraph.edges)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds, density=st.floats(0.1, 1), keep=st.builds(Keep, nodes=shares, edges=shares),
)  # fmt: skip
def test_nothing_dangles(seed: int, density: float, keep: Keep) -> None:
    graph = random_graph(seed, density=density, layers=4)
    part = prune(graph, keep)
    digraph = part.digraph
    assert nx.ancestors(digraph, TARGET) == set(digraph) - {TARGET}
    for name, data in digraph.nodes(data=True):
        if data["kind"] == NodeKind.LATENT and graph.digraph.in_degree(name):
            assert digraph.in_degree(name), name
    for name in graph.ranked(SOURCES):
        reached = set(graph.digraph.successors(name)) & set(digraph)
        assert (name in digraph) == bool(reached), name
    assert part.meta["pruned"]["edges"] == digraph.number_of_edges()
    assert graph.digraph.number_of_edges() == part.meta["pruned"]["of_edges"]


@settings(max_examples=40, deadline=None)
@given(seed=seeds, share=st.floats(0.05, 0.99))
def test_the_fewest_latents_that_hold_the_share(seed: int, share: float) -> None:
    """In one layer nothing is dropped after the choice."""
    graph = random_graph(seed, layers=1, width=12, density=1)
    found = influence(graph).nodes
    part = prune(graph, Keep(nodes=share))
    kept = sorted(found[name] for name in part.ranked([NodeKind.LATENT]))
    total = sum(found[name] for name in graph.ranked([NodeKind.LATENT]))
    assert sum(kept) >= share * total - 1e-12
    assert sum(kept[1:]) < share * total
    rest = [found[name] for name in graph.ranked([NodeKind.LATENT]) if name not in part.digraph]
    assert all(value <= kept[0] for value in rest)
    assert part.meta["pruned"]["influence"] == pytest.approx(sum(kept))
    assert part.meta["pruned"]["of_influence"] == pytest.approx(total)
    assert part.digraph.nodes[TARGET]["influence"] == 1.0


@settings(max_examples=30, deadline=None)
@given(seed=seeds, share=st.floats(0.05, 0.99))
def test_the_fewest_edges_that_hold_the_share_and_every_nodes_strongest(seed: int, share: float) -> None:
    graph = random_graph(seed, density=0.7)
    whole, part = prune(graph, Keep(nodes=1, edges=1)), prune(graph, Keep(nodes=1, edges=share))
    of = influence(graph).edges
    ranked = sorted(whole.digraph.edges, key=lambda edge: -of[edge])
    total, held, needed = sum(of[edge] for edge in ranked), 0.0, set()
    for edge in ranked:
        if held < share * total - 1e-12:
            needed.add(edge)
        held += of[edge]
    extra = set(part.digraph.edges) - needed
    assert needed <= set(part.digraph.edges)
    for edge in extra:
        out = max(whole.digraph.out_edges(edge[0]), key=lambda each: of[each])
        into = max(whole.digraph.in_edges(edge[1]), key=lambda each: of[each])
        assert edge in (out, into)


def test_shares_of_one_keep_every_path_and_the_graph_is_not_touched() -> None:
    graph = random_graph(3, layers=4, density=0.4)
    before = graph.to_json()
    part = prune(graph, Keep(nodes=1, edges=1))
    part.digraph.nodes[TARGET]["label"] = "changed"
    assert graph.to_json() == before
    reaching = nx.ancestors(graph.digraph, TARGET) | {TARGET}
    assert set(part.digraph) == reaching
    assert set(part.digraph.edges) == set(graph.digraph.subgraph(reaching).edges)
    assert part.error_share() == graph.error_share()
    assert [path.carried for path in part.strongest_paths(50)] == pytest.approx(
        [path.carried for path in graph.strongest_paths(50)]
    )


def test_the_flow_from_errors_and_from_all_sources() -> None:
    graph = random_graph(5)
    found = influence(graph).nodes
    assert sum(found[name] for name in graph.digraph if not graph.digraph.in_degree(name)) == pytest.approx(1)
    errors = sum(carried for path, carried in every_path(graph).items() if path[0].endswith("error"))
    flow = sum(every_path(graph).values())
    assert prune(graph).meta["pruned"]["from_errors"] == pytest.approx(errors / flow)
    assert prune(graph, Keep(nodes=0.1)).meta["pruned"]["from_errors"] == pytest.approx(errors / flow)


def test_influence_survives_tables_and_json() -> None:
    part = prune(random_graph(6))
    again = AttributionGraph.from_json(part.to_json())
    assert again.digraph.nodes == part.digraph.nodes
    nodes = pl.DataFrame([{"id": name, **data} for name, data in part.digraph.nodes(data=True)])
    edges = pl.DataFrame([{"source": s, "target": t, **data} for s, t, data in part.digraph.edges(data=True)])
    again = AttributionGraph.from_tables(nodes, edges)
    assert dict(again.digraph.nodes(data="influence")) == dict(part.digraph.nodes(data="influence"))


@pytest.mark.parametrize("wrong", [{"nodes": 0.0}, {"nodes": 1.1}, {"edges": -0.5}, {"edges": 2}, {"top": 0}])
def test_refusals(wrong: dict[str, float]) -> None:
    with pytest.raises(MediationError, match="give"):
        Keep(**wrong)  # type: ignore[arg-type]
