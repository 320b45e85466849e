"""Exports read back by the programs they are for, and the terminal tree against the paths it shows."""

from __future__ import annotations

import io
import json

import networkx as nx
import pytest
from rich.console import Console
from rich.tree import Tree

from circuits.export import path_tree, to_graphml
from tests.circuits.random_graphs import random_graph


def shown(branch: Tree) -> str:
    console = Console(file=io.StringIO(), width=200, color_system="truecolor", force_terminal=True)
    console.print(branch)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_graphml_reads_back_with_numbers_and_without_empty_attributes() -> None:
    graph = random_graph(1)
    graph.digraph.nodes["embed/0"]["label"] = 'a <b> & "c" ☃'
    again = nx.parse_graphml(to_graphml(graph))
    assert set(again.edges) == set(graph.digraph.edges)
    for name, data in graph.digraph.nodes(data=True):
        expected = {key: value for key, value in data.items() if value is not None}
        if "position" in expected:
            expected["position"] = str(expected["position"])
        assert again.nodes[name] == expected
    for source, target, data in graph.digraph.edges(data=True):
        assert again.edges[source, target]["contribution"] == pytest.approx(data["contribution"])


def test_graphml_of_any_text_and_meta_data_is_well_formed() -> None:
    graph = random_graph(1)
    graph.digraph.nodes["embed/0"]["label"] = "\x00 a\x1b[31m \ud800"
    graph.meta |= {"tokens": ["\x01<script>", None], "nothing": None, "flag": True}
    again = nx.parse_graphml(to_graphml(graph))
    assert again.nodes["embed/0"]["label"] == "\ufffd a\ufffd[31m \ufffd"
    assert json.loads(again.graph["tokens"]) == ["\x01<script>", None]
    assert again.graph["flag"] is True
    assert "nothing" not in again.graph


def test_tree_has_one_leaf_per_path_and_shares_tails() -> None:
    graph = random_graph(2)
    paths = graph.strongest_paths(9)
    root = path_tree(graph, 9)

    def count(branch: Tree) -> tuple[int, int]:
        if not branch.children:
            return 1, 1
        below = [count(child) for child in branch.children]
        return sum(leaves for leaves, _ in below), 1 + sum(nodes for _, nodes in below)

    tails = {path.nodes[start:] for path in paths for start in range(len(path.nodes))}
    assert count(root) == (9, len(tails))
    text = shown(root)
    for path in paths:
        assert path.nodes[0] in text


def test_tree_colours_by_sign_and_prints_labels_as_they_are() -> None:
    graph = random_graph(3, layers=1, width=1, positions=1, density=1)
    (latent,) = (name for name, data in graph.digraph.nodes(data=True) if data["kind"] == "latent")
    graph.digraph.nodes[latent]["label"] = "[/red] [bold]x"
    graph.digraph.edges[latent, "target"]["contribution"] = -0.5
    graph.digraph.edges["embed/0", latent]["contribution"] = 0.25
    text = shown(path_tree(graph))
    assert "[/red] [bold]x" in text
    assert "\x1b[31m-0.500" in text
    assert "\x1b[32m+0.250" in text


def test_what_recurs_stands_in_the_tree_and_in_graphml() -> None:
    graph = random_graph(3, layers=1, width=1, positions=1, density=1)
    (latent,) = (name for name, data in graph.digraph.nodes(data=True) if data["kind"] == "latent")
    graph.digraph.edges[latent, "target"].update(tier="consensus", frequency=0.75, low=0.1, high=None)
    graph.digraph.edges["embed/0", latent].update(tier=None, frequency=0.5)
    text = shown(path_tree(graph))
    assert "consensus 75%" in text
    assert "kept in 50%" in text
    again = nx.parse_graphml(to_graphml(graph))
    edge = again.edges[latent, "target"]
    assert (edge["tier"], edge["frequency"], edge["low"]) == ("consensus", 0.75, 0.1)
    assert "high" not in edge
    assert "tier" not in again.edges["embed/0", latent]
