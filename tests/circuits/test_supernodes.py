"""Supernodes: planted groups are found, sums are conserved, nothing is lost on the way there and back."""

from __future__ import annotations

import math
import random
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.graph import TARGET, AttributionGraph, NodeKind
from circuits.pruning import influence, prune
from circuits.supernodes import Supernode, by_edges, by_meta, quotient
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.labels import load_labels
from mediation.metalatents import MatchingPursuit, MetaDictionary
from tests.circuits.random_graphs import random_graph
from tests.setups import random_dictionary

DEFAULT = Path(__file__).parents[2] / "mediation" / "organisms" / "default"
SITE = "blocks.1.hook_resid_pre"
seeds = st.integers(0, 10_000)


def random_groups(graph: AttributionGraph, seed: int) -> list[Supernode]:
    """Every latent of a site and position in one of two random groups, or in none."""
    rng, groups = random.Random(seed), {}
    for name, data in graph.digraph.nodes(data=True):
        if data["kind"] == NodeKind.LATENT and (which := rng.randrange(3)):
            groups.setdefault((data["site"], data["position"], which), []).append(name)
    return [Supernode(f"{k[0]}/{k[1]}/g{k[2]}", f"group {k}", tuple(names)) for k, names in groups.items()]


def profile(graph: AttributionGraph, name: str) -> np.ndarray:
    """In- and out-contributions over all nodes, each side at length 1: the definition."""
    everything = list(graph.digraph)
    sides = []
    for ends in ([(other, name) for other in everything], [(name, other) for other in everything]):
        side = np.array([graph.digraph.edges[e]["contribution"] if e in graph.digraph.edges else 0.0 for e in ends])
        sides.append(side / (np.linalg.norm(side) or 1))
    return np.concatenate(sides) / math.sqrt(2)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, density=st.floats(0.3, 1))
def test_sums_are_conserved_and_the_mapping_goes_back(seed: int, density: float) -> None:
    graph = prune(random_graph(seed, width=8, density=density))
    groups = random_groups(graph, seed)
    drawn = quotient(graph, groups)
    members = {name: each["members"] for name, each in drawn.meta["supernodes"].items()}
    back = [member for name in drawn.digraph for member in members.get(name, [name])]
    assert sorted(back) == sorted(graph.digraph)
    home = {member: name for name in drawn.digraph for member in members.get(name, [name])}
    for name, data in drawn.digraph.nodes(data=True):
        of = [graph.digraph.nodes[member] for member in members.get(name, [name])]
        for key in ("attribution", "influence"):
            parts = [each[key] for each in of if each[key] is not None]
            assert data[key] == (math.fsum(parts) if parts else None)
        assert {each["site"] for each in of} == {data["site"]}
        assert {each["position"] for each in of} == {data["position"]}
    for key in ("weight", "contribution"):
        for (source, target), amount in nx.get_edge_attributes(drawn.digraph, key).items():
            parts = [
                value
                for s, t, value in graph.digraph.edges(data=key)
                if (home[s], home[t]) == (source, target)
            ]  # fmt: skip
            assert amount == math.fsum(parts)
    assert set(drawn.digraph.edges) == {(home[s], home[t]) for s, t in graph.digraph.edges}
    assert nx.is_directed_acyclic_graph(drawn.digraph)
    assert drawn.error_share() == graph.error_share()
    assert AttributionGraph.from_json(drawn.to_json()).to_json() == drawn.to_json()


def test_no_groups_no_change() -> None:
    graph = random_graph(1)
    drawn = quotient(graph, [])
    assert dict(drawn.digraph.nodes(data=True)) == dict(graph.digraph.nodes(data=True))
    assert list(drawn.digraph.edges(data=True)) == list(graph.digraph.edges(data=True))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, alike=st.sampled_from([0.1, 0.3, 0.6, 0.9]))
def test_members_are_alike_and_groups_that_could_merge_have(seed: int, alike: float) -> None:
    graph = random_graph(seed, width=10, density=0.9)
    groups = by_edges(graph, alike=alike)
    rows = {name: profile(graph, name) for name in graph.ranked([NodeKind.LATENT])}
    for group in groups:
        assert len(group.members) > 1
        assert len({(graph.digraph.nodes[m]["site"], graph.digraph.nodes[m]["position"]) for m in group.members}) == 1
        for one in group.members:
            assert all(rows[one] @ rows[other] >= alike - 1e-9 for other in group.members)
        strengths = [graph.strength(member) for member in group.members]
        assert strengths == sorted(strengths, reverse=True)
    grouped = [member for group in groups for member in group.members]
    assert len(grouped) == len(set(grouped))
    alone = [name for name in rows if name not in grouped]
    for name in alone:  # two that are left over are not alike
        for other in alone:
            data, that = graph.digraph.nodes[name], graph.digraph.nodes[other]
            if name < other and (data["site"], data["position"]) == (that["site"], that["position"]):
                assert rows[name] @ rows[other] < alike + 1e-9
    quotient(graph, groups)


def planted() -> tuple[AttributionGraph, list[set[str]]]:
    """A latent split in three, another in two: copies with all edges scaled; and one with its opposite."""
    graph = random_graph(4, layers=3, width=4, positions=1, density=1)
    first, second, third = graph.ranked([NodeKind.LATENT])[:3]
    families = []
    for name, scales in ((first, (0.5, 2.0)), (second, (3.0,)), (third, (-1.0,))):
        family = {name}
        for k, scale in enumerate(scales):
            copy = f"{name}{k}"
            graph.digraph.add_node(copy, **graph.digraph.nodes[name] | {"label": "copy"})
            for source, _, data in list(graph.digraph.in_edges(name, data=True)):
                graph.digraph.add_edge(source, copy, **{key: value * scale for key, value in data.items()})
            for _, target, data in list(graph.digraph.out_edges(name, data=True)):
                graph.digraph.add_edge(copy, target, **{key: value * scale for key, value in data.items()})
            family.add(copy)
        families.append(family)
    return graph, families


def test_copies_are_grouped_and_an_opposite_is_not() -> None:
    graph, families = planted()
    found = [set(group.members) for group in by_edges(graph, alike=0.95)]
    assert families[0] in found
    assert not any(families[2] <= group for group in found)
    assert all(len({name in family for name in group}) == 1 for group in found for family in families[:2])


def test_the_order_of_nodes_does_not_matter() -> None:
    graph, _ = planted()
    digraph = nx.DiGraph()
    digraph.add_nodes_from(reversed(list(graph.digraph.nodes(data=True))))
    digraph.add_edges_from(reversed(list(graph.digraph.edges(data=True))))
    assert by_edges(AttributionGraph(digraph, graph.meta)) == by_edges(graph)


def test_a_group_is_called_by_what_its_strongest_members_are_called() -> None:
    graph, _ = planted()
    first = graph.ranked([NodeKind.LATENT])[0]
    names = {name for name in graph.digraph if name.startswith(first)}
    for name in names:
        graph.digraph.nodes[name]["label"] = "12 on Paris" if name == first else "3 on Paris"
    (group,) = (each for each in by_edges(graph, alike=0.95) if set(each.members) == names)
    assert group.label == "on Paris"
    assert quotient(graph, [group]).digraph.nodes[group.id]["label"] == "3 × on Paris"
    graph.digraph.nodes[first]["label"] = "12 a city"
    graph.digraph.nodes[first]["attribution"] = 100.0
    (group,) = (each for each in by_edges(graph, alike=0.95) if set(each.members) == names)
    assert group.label == "a city and others"
    assert group.members[0] == first


def test_the_influence_of_copies_passes_through_their_supernode() -> None:
    """Copies do not cancel, so the group carries the flow they carried."""
    graph, families = planted()
    groups = [each for each in by_edges(graph, alike=0.95) if set(each.members) == families[0]]
    before, after = influence(graph).nodes, influence(quotient(graph, groups)).nodes
    assert after[groups[0].id] == pytest.approx(sum(before[name] for name in families[0]))


@pytest.fixture(scope="module")
def organism() -> tuple[Dictionary, MetaDictionary, dict[int, str]]:
    meta = DEFAULT / "meta" / SITE
    return Dictionary.load(DEFAULT / "saes" / SITE), MetaDictionary.load(meta), load_labels(meta)


def at_site(dictionary: Dictionary, latents: list[int]) -> AttributionGraph:
    """Latents of the dictionary at two positions, each feeding the target."""
    graph = random_graph(0)
    digraph = nx.DiGraph()
    digraph.add_node(TARGET, **graph.digraph.nodes[TARGET])
    blank = dict.fromkeys(graph.digraph.nodes[TARGET])
    for position in (0, 1):
        for latent in latents:
            name = f"{dictionary.site.name}/{position}/{latent}"
            place = {"kind": "latent", "site": dictionary.site.name, "position": position, "latent": latent}
            digraph.add_node(name, **blank | place | {"attribution": float(latent)})
            digraph.add_edge(name, TARGET, weight=1.0, contribution=1.0)
    return AttributionGraph(digraph)


def test_latents_with_the_same_strongest_meta_latent(
    organism: tuple[Dictionary, MetaDictionary, dict[int, str]],
) -> None:
    dictionary, meta, labels = organism
    latents = list(range(60))
    graph = at_site(dictionary, latents)
    codes = meta.codes(dictionary.decoder[latents])
    expected = {}
    for latent in latents:
        if codes[latent].max() > 0:
            expected.setdefault(int(codes[latent].argmax()), set()).add(latent)
    groups = by_meta(graph, dictionary, meta, labels)
    assert len(groups) > 10
    for position in (0, 1):
        here = [each for each in groups if f"/{position}/" in each.id]
        found = {frozenset(int(name.rsplit("/", 1)[1]) for name in each.members): each.label for each in here}
        assert set(found) == {frozenset(members) for members in expected.values() if len(members) > 1}
        for index, members in expected.items():
            if len(members) > 1:
                assert found[frozenset(members)] == labels.get(index, f"meta-latent {index}")
    assert len({each.id for each in groups}) == len(groups)


def test_other_sites_and_rows_of_no_meta_latent_stay_alone(tmp_path: Path) -> None:
    dictionary = random_dictionary(tmp_path / "sae", SITE)
    graph = at_site(dictionary, [0, 1, 2, 3])
    one = torch.zeros_like(dictionary.decoder)
    one[0] = dictionary.decoder[1]  # a single direction: row 1, and what leans its way, has a code
    toward = MatchingPursuit(one, 1)
    leaning = {k for k in (1, 2, 3) if dictionary.decoder[k] @ dictionary.decoder[1] > 0}
    groups = by_meta(graph, dictionary, toward, {0: "mine"})
    assert 1 < len(leaning) < 3
    assert [{int(name.rsplit("/", 1)[1]) for name in group.members} for group in groups] == [leaning] * 2
    for name in graph.digraph:
        if name != TARGET:
            graph.digraph.nodes[name]["site"] = "blocks.2.hook_resid_pre"
    assert by_meta(graph, dictionary, toward, {}) == []


def test_refusals() -> None:
    graph = random_graph(2, width=6, positions=1)
    one = graph.ranked([NodeKind.LATENT])[0]
    site = graph.digraph.nodes[one]["site"]
    same = [n for n in graph.ranked([NodeKind.LATENT]) if graph.digraph.nodes[n]["site"] == site]
    other = next(n for n in graph.ranked([NodeKind.LATENT]) if graph.digraph.nodes[n]["site"] != site)
    with pytest.raises(MediationError, match="not in the graph"):
        quotient(graph, [Supernode("g", "g", (one, "nobody"))])
    with pytest.raises(MediationError, match="in two groups"):
        quotient(graph, [Supernode("g", "g", (same[0], same[1])), Supernode("h", "h", (same[1], same[2]))])
    with pytest.raises(MediationError, match="one site and position"):
        quotient(graph, [Supernode("g", "g", (one, other))])
    with pytest.raises(MediationError, match="one site and position"):
        quotient(graph, [Supernode("g", "g", tuple(graph.ranked([NodeKind.ERROR])[:1]))])
    graph.digraph.add_edge(same[0], same[1], weight=1.0, contribution=1.0)
    with pytest.raises(MediationError, match="of its own group"):
        quotient(graph, [Supernode("g", "g", (same[0], same[1]))])
    with pytest.raises(MediationError, match="alike"):
        by_edges(graph, alike=0.0)
