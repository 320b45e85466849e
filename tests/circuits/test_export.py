"""Exports read back by the programs they are for, and the terminal tree against the paths it shows."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import networkx as nx
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.tree import Tree

from circuits.export import Format, path_tree, to_dot, to_graphml, to_tables, write_exports, xml_text
from circuits.graph import TARGET, AttributionGraph, node_label
from circuits.neuronpedia import Origin
from circuits.pruning import prune
from mediation.runs import Run
from tests.circuits.random_graphs import random_graph
from tests.circuits.test_supernodes import random_groups

QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


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


def unquoted(text: str) -> str:
    """A DOT label as Graphviz shows it."""
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def read_dot(text: str) -> tuple[dict[str, dict[str, str]], dict[tuple[str, str], dict[str, str]], dict[str, set[str]]]:
    """Nodes, edges and clusters; whatever is not of the grammar we write fails."""
    nodes, edges, clusters, cluster = {}, {}, {}, None
    quoted, attributes = QUOTED.pattern, rf"\[((?:\w+={QUOTED.pattern}(?:, )?)*)\];"
    lines = text.split("\n")
    assert lines[:2] == ["digraph attribution {", '  rankdir="BT"; node [shape="box"];']
    assert lines[-2:] == ["}", ""]
    for line in lines[2:-2]:
        if re.fullmatch(r"  subgraph cluster_\d+ {", line):
            cluster = ""
        elif named := re.fullmatch(rf"    label={quoted};", line):
            cluster = unquoted(named[1])
            clusters[cluster] = set()
        elif line == "  }":
            cluster = None
        elif found := re.fullmatch(rf" +{quoted} -> {quoted} {attributes}", line):
            values = {key: unquoted(value) for key, value in re.findall(rf"(\w+)={quoted}", found[3])}
            edges[unquoted(found[1]), unquoted(found[2])] = values
        else:
            found = re.fullmatch(rf" +{quoted} {attributes}", line)
            assert found is not None, line
            name = unquoted(found[1])
            nodes[name] = {key: unquoted(value) for key, value in re.findall(rf"(\w+)={quoted}", found[2])}
            if cluster is not None:
                clusters[cluster].add(name)
    return nodes, edges, clusters


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), label=st.text(max_size=30), role=st.text(max_size=10))
def test_dot_holds_the_graph_whatever_its_texts(seed: int, label: str, role: str) -> None:
    graph = random_graph(seed, width=6)
    hostile = f'{label}"]; evil [label=<b>] \\" \\N \\'
    digraph = nx.relabel_nodes(graph.digraph, {name: f"{name}{role}\\" for name in graph.digraph if name != TARGET})
    for _, data in digraph.nodes(data=True):
        data["label"] = hostile
    graph = AttributionGraph(digraph, graph.meta)
    groups = random_groups(graph, seed)
    nodes, edges, clusters = read_dot(to_dot(graph, groups))

    def text(value: str) -> str:
        return xml_text(value).replace("\r", " ")

    assert set(nodes) == {text(name) for name in digraph}
    assert {values["label"] for values in nodes.values()} == {text(hostile)}
    assert set(edges) == {(text(source), text(target)) for source, target in digraph.edges}
    assert clusters == {text(group.label): {text(name) for name in group.members} for group in groups}
    for source, target, data in digraph.edges(data=True):
        assert edges[text(source), text(target)]["color"] == ("red" if data["contribution"] < 0 else "blue")


def test_widths_of_dot_edges_follow_their_contribution() -> None:
    graph = random_graph(3)
    _, edges, _ = read_dot(to_dot(graph))
    amounts = {(s, t): abs(value) for s, t, value in graph.digraph.edges(data="contribution")}
    largest = max(amounts.values())
    for edge, amount in amounts.items():
        assert float(edges[edge]["penwidth"]) == pytest.approx(0.5 + 4.5 * amount / largest, abs=0.006)


@pytest.mark.parametrize("roles", [False, True])
def test_tables_make_the_same_graph_again(roles: bool, tmp_path: Path) -> None:
    graph = prune(random_graph(5, width=8))
    for _, data in graph.digraph.nodes(data=True):
        if roles and data["position"] is not None:
            data["position"] = ("claim", "end")[data["position"]]
    groups = random_groups(graph, 1)
    for table, name in zip(to_tables(graph, groups), ("nodes", "edges"), strict=True):
        table.write_parquet(tmp_path / f"{name}.parquet")
    nodes, edges = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("nodes", "edges"))
    again = AttributionGraph.from_tables(nodes, edges, meta=graph.meta)
    assert again.to_json() == graph.to_json()
    assert nodes.schema["position"] == (pl.String if roles else pl.Int64)
    assert nodes.schema["latent"] == pl.Int64
    assert nodes.schema["activation"] == pl.Float64  # though it holds nothing
    grouped = nodes.drop_nulls("supernode").group_by("supernode").agg("id").iter_rows()
    assert {name: set(ids) for name, ids in grouped} == {group.id: set(group.members) for group in groups}


def test_graphml_names_the_supernode_of_each_latent() -> None:
    graph = prune(random_graph(5, width=8))
    groups = random_groups(graph, 1)
    again = nx.parse_graphml(to_graphml(graph, groups))
    found = dict(again.nodes(data="supernode"))
    expected = {name: group.id for group in groups for name in group.members}
    assert {name: group for name, group in found.items() if group is not None} == expected


def test_a_graph_of_nothing_is_exported() -> None:
    graph = random_graph(1)
    alone = graph.restricted({TARGET}, set(), graph.meta)
    nodes, edges = to_tables(alone)
    assert (nodes["id"].to_list(), edges.columns, len(edges)) == (
        [TARGET],
        ["source", "target", "weight", "contribution"],
        0,
    )
    assert read_dot(to_dot(alone))[1] == {}
    assert AttributionGraph.from_tables(nodes, edges, meta=graph.meta).to_json() == alone.to_json()


def test_files_of_a_run(tmp_path: Path) -> None:
    run, graph = Run.create(tmp_path / "a run", {}), prune(random_graph(2, width=8))
    groups = [group for group in random_groups(graph, 2) if len(group.members) > 1]
    written = write_exports(
        run, graph, [Format.DOT, *Format], origin=Origin("m", 0.5), supernodes=groups, name="prompt-1"
    )
    assert {name: path.relative_to(run.path).as_posix() for name, path in written.items()} == {
        "dot": "prompt-1.dot", "graphml": "prompt-1.graphml", "parquet": "prompt-1",
        "neuronpedia": "prompt-1.neuronpedia.json", "csv": "prompt-1",
    }  # fmt: skip
    assert written["dot"].read_text() == to_dot(graph, groups)
    assert written["graphml"].read_text() == to_graphml(graph, groups)
    tables = [pl.read_parquet(written["parquet"] / f"{name}.parquet") for name in ("nodes", "edges")]
    assert AttributionGraph.from_tables(*tables, meta=graph.meta).to_json() == graph.to_json()
    data = json.loads(written["neuronpedia"].read_text())
    assert data["metadata"]["slug"] == "a-run-prompt-1"
    assert len(data["qParams"]["supernodes"]) == len(groups) > 0
    assert {node["clerp"] for node in data["nodes"] if node["feature_type"].startswith("cross")} == {
        node_label(values, name) for name, values in graph.digraph.nodes(data=True) if values["kind"] == "latent"
    }


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), label=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_csv_holds_the_graph_whatever_its_texts(
    tmp_path_factory: pytest.TempPathFactory, seed: int, label: str
) -> None:
    run, graph = Run.create(tmp_path_factory.mktemp("csv") / "run", {}), random_graph(seed)
    for _, data in graph.digraph.nodes(data=True):
        data["label"] = f'={label}"; a,\nb'
    folder = write_exports(run, graph, [Format.CSV], origin=Origin("m", 0.5))["csv"]
    kept = to_tables(graph)
    for name, table in zip(("nodes", "edges"), kept, strict=True):
        assert pl.read_csv(folder / f"{name}.csv", schema=table.schema).equals(table)
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["source" if name == "edges" else "label"] for row in rows] == table[
            "source" if name == "edges" else "label"
        ].to_list()


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
