"""The graph against enumeration of its paths, its round trips, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math

import networkx as nx
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.graph import AttributionGraph, NodeKind
from mediation.errors import MediationError
from tests.circuits.random_graphs import EDGE_SCHEMA, NODE_SCHEMA, random_graph, random_tables

seeds = st.integers(0, 10_000)


def every_path(graph: AttributionGraph) -> dict[tuple[str, ...], float]:
    """What each simple path into the target carries, by the definition."""
    digraph = graph.digraph
    inflow = {
        node: sum(abs(data["contribution"]) for _, _, data in digraph.in_edges(node, data=True)) for node in digraph
    }
    paths: dict[tuple[str, ...], float] = {}
    for start in [node for node in digraph if digraph.in_degree(node) == 0 and node != "target"]:
        for path in nx.all_simple_paths(digraph, start, "target"):
            carried = abs(digraph.edges[path[-2], "target"]["contribution"])
            for source, target in itertools.pairwise(path[:-1]):
                carried *= abs(digraph.edges[source, target]["contribution"]) / inflow[target]
            paths[tuple(path)] = carried
    return paths


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(0, 30), density=st.floats(0.2, 1))
def test_strongest_paths_are_those_of_enumeration(seed: int, n: int, density: float) -> None:
    graph = random_graph(seed, density=density)
    expected = every_path(graph)
    found = graph.strongest_paths(n)
    assert len(found) == min(n, len(expected))
    assert [path.carried for path in found] == pytest.approx(sorted(expected.values(), reverse=True)[:n])
    assert len({path.nodes for path in found}) == len(found)
    for path in found:
        assert path.carried == pytest.approx(expected[path.nodes])


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_all_paths_together_carry_the_flow_into_the_target(seed: int) -> None:
    graph = random_graph(seed)
    inflow = sum(abs(data["contribution"]) for _, _, data in graph.digraph.in_edges("target", data=True))
    assert sum(path.carried for path in graph.strongest_paths(10**6)) == pytest.approx(inflow)


def test_a_dead_edge_carries_no_path() -> None:
    graph = random_graph(0, layers=1, width=1, positions=1, density=1)
    graph.digraph.edges["embed/0", next(graph.digraph.successors("embed/0"))]["contribution"] = 0.0
    assert all("embed/0" not in path.nodes for path in graph.strongest_paths(10))


@given(seed=seeds, positions=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_json_round_trip(seed: int, positions: int) -> None:
    graph = random_graph(seed, positions=positions)
    again = AttributionGraph.from_json(graph.to_json())
    assert dict(again.digraph.nodes(data=True)) == dict(graph.digraph.nodes(data=True))
    assert list(again.digraph.edges(data=True)) == list(graph.digraph.edges(data=True))
    assert again.meta == graph.meta
    assert again.to_json() == graph.to_json()


@given(seed=seeds, top=st.integers(0, 14), density=st.floats(0.1, 1))
@settings(max_examples=40, deadline=None)
def test_prune_leaves_nothing_dangling_and_only_the_strongest(seed: int, top: int, density: float) -> None:
    graph = random_graph(seed, density=density)
    pruned = graph.prune(top)
    kept = set(pruned.digraph) - {"target"}
    strongest = set(graph.ranked([NodeKind.LATENT, NodeKind.EMBEDDING])[:top])
    errors = set(graph.ranked([NodeKind.ERROR]))
    assert kept <= strongest | errors
    assert nx.ancestors(pruned.digraph, "target") == kept
    for dropped in (strongest | errors) - kept:
        allowed = graph.digraph.subgraph(strongest | errors | {"target"})
        assert not nx.has_path(allowed, dropped, "target")
    assert set(pruned.digraph.edges) == set(graph.digraph.subgraph(kept | {"target"}).edges)
    everything = sum(graph.strength(node) for node in graph.ranked())
    held = sum(graph.strength(node) for node in kept)
    assert pruned.meta["pruned"]["share"] == pytest.approx(held / everything)


def test_pruning_does_not_touch_the_original() -> None:
    graph = random_graph(1)
    before = graph.to_json()
    graph.prune(3).digraph.nodes["target"]["label"] = "changed"
    assert graph.to_json() == before


def test_error_share_per_site() -> None:
    nodes, edges = random_tables(5)
    graph = AttributionGraph.from_tables(nodes, edges)
    for (site,), part in nodes.filter(pl.col("kind").is_in(["latent", "error"])).group_by("site"):
        sizes = dict(part.group_by("kind").agg(pl.col("attribution").abs().sum()).iter_rows())
        share = sizes["error"] / sum(sizes.values())
        assert graph.error_share()[str(site)] == pytest.approx(share)
    assert graph.prune(2).error_share() == graph.error_share()


def test_ranked_by_absolute_attribution() -> None:
    nodes, edges = random_tables(7)
    ranked = AttributionGraph.from_tables(nodes, edges).ranked([NodeKind.LATENT])
    latents = nodes.filter(pl.col("kind") == "latent").sort(pl.col("attribution").abs(), descending=True)
    assert ranked == latents["id"].to_list()


def test_an_embedding_without_attribution_counts_by_what_it_sends_on() -> None:
    graph = random_graph(9, density=1)
    graph.digraph.nodes["embed/1"]["attribution"] = None
    sent = sum(data["contribution"] for _, _, data in graph.digraph.out_edges("embed/1", data=True))
    assert graph.strength("embed/1") == pytest.approx(abs(sent))


def test_target_is_added_from_meta_and_kept_when_given() -> None:
    nodes, edges = random_tables(2)
    graph = AttributionGraph.from_tables(nodes, edges, meta={"behaviour": "b", "total_effect": 0.25})
    assert graph.digraph.nodes["target"]["label"] == "b"
    assert graph.digraph.nodes["target"]["attribution"] == 0.25
    row = ("target", "target", None, None, None, 7.0, None, None, "mine")
    given = pl.concat([nodes, pl.DataFrame([row], schema=NODE_SCHEMA, orient="row")])
    target = AttributionGraph.from_tables(given, edges).digraph.nodes["target"]
    assert (target["label"], target["attribution"]) == ("mine", 7.0)


def test_roles_and_activation_ride_along_and_nan_becomes_none() -> None:
    nodes, edges = random_tables(3)
    nodes = nodes.with_columns(
        pl.lit("claim").alias("position"), pl.lit(2.5).alias("activation"), pl.lit(math.nan).alias("low")
    )
    graph = AttributionGraph.from_tables(nodes, edges)
    data = graph.digraph.nodes[graph.ranked()[0]]
    assert (data["position"], data["activation"], data["low"]) == ("claim", 2.5, None)
    assert "NaN" not in graph.to_json()


def test_refusals() -> None:
    nodes, edges = random_tables(4)
    build = AttributionGraph.from_tables
    with pytest.raises(MediationError, match=r"nodes lacks the column\(s\) kind, label"):
        build(nodes.drop("kind", "label"), edges)
    with pytest.raises(MediationError, match=r"edges lacks the column\(s\) weight"):
        build(nodes, edges.drop("weight"))
    with pytest.raises(MediationError, match="twice"):
        build(pl.concat([nodes, nodes[:1]]), edges)
    with pytest.raises(MediationError, match="use one of latent, error, embedding, target"):
        build(nodes.with_columns(pl.lit("neuron").alias("kind")), edges)
    with pytest.raises(MediationError, match="which the table of nodes lacks"):
        build(nodes[1:], edges)
    back = pl.DataFrame([("target", "embed/0", 1.0, 1.0)], schema=EDGE_SCHEMA, orient="row")
    with pytest.raises(MediationError, match="cycle"):
        build(nodes, pl.concat([edges, back]))


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"graph": {}}', '{"graph": {}, "nodes": [], "edges": []}'])
def test_text_that_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises(MediationError):
        AttributionGraph.from_json(text)


def test_values_json_cannot_express_are_refused() -> None:
    graph = random_graph(6)
    graph.meta["x"] = math.inf
    with pytest.raises(MediationError, match="finite"):
        graph.to_json()


def test_json_is_networkx_node_link() -> None:
    graph = random_graph(8)
    data = json.loads(graph.to_json())
    plain = nx.node_link_graph(data, edges="edges")
    assert plain.is_directed()
    assert set(plain.edges) == set(graph.digraph.edges)


def test_a_missing_file_is_one_sentence(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MediationError, match="Cannot read"):
        AttributionGraph.load(tmp_path / "graph.json")


def test_columns_of_a_set_pass_through_json() -> None:
    nodes, edges = random_tables(4)
    nodes = nodes.with_columns(held_out=pl.lit(0.5), frequency=pl.lit(0.25), tier=pl.lit("noise"))
    edges = edges.with_columns(low=pl.lit(-1.0), high=pl.lit(None, dtype=pl.Float64), tier=pl.lit("consensus"))
    graph = AttributionGraph.from_json(AttributionGraph.from_tables(nodes, edges).prune(5).to_json())
    source, _, data = next(iter(graph.digraph.edges(data=True)))
    assert set(data) == {"weight", "contribution", "low", "high", "tier"}
    assert (data["low"], data["high"], data["tier"]) == (-1.0, None, "consensus")
    assert graph.digraph.nodes[source]["frequency"] == 0.25
    assert graph.digraph.nodes["target"]["tier"] is None
