"""An attribution graph for other programs and for the terminal: GraphML and a rich tree.

Node-link JSON, which networkx reads too, is the graph's own format: `AttributionGraph.to_json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import networkx as nx
from rich.text import Text
from rich.tree import Tree

from circuits.graph import TARGET, AttributionGraph, GraphPath, node_label

POSITIVE, NEGATIVE = "green", "red"
TIER_STYLES = {"consensus": "cyan", "contingent": "yellow"}  # noise is dim, as what is said beside it
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_graphml(graph: AttributionGraph) -> str:
    """GraphML for Gephi, Cytoscape, yEd.

    Attributes that do not apply to a node are left out, positions are texts, meta data that is no plain
    value becomes JSON, and characters that XML forbids are replaced.
    """
    copy = nx.DiGraph()
    for key, value in graph.meta.items():
        if value is not None:
            copy.graph[key] = _plain(value if isinstance(value, str | int | float) else json.dumps(value))
    for name, data in graph.digraph.nodes(data=True):
        # positions are integers or names of roles: as texts they share one GraphML column
        values = data | {"position": None if data["position"] is None else str(data["position"])}
        plain = {key: _plain(value) for key, value in values.items() if value is not None}
        copy.add_node(_plain(name), **plain)
    for source, target, data in graph.digraph.edges(data=True):
        copy.add_edge(
            _plain(source), _plain(target), **{key: value for key, value in data.items() if value is not None}
        )
    return "\n".join(nx.generate_graphml(copy)) + "\n"


def xml_text(text: str) -> str:
    """The text with every character that XML 1.0 forbids replaced by U+FFFD. It still has to be escaped."""
    return _FORBIDDEN.sub("\ufffd", text)


def _plain(value: Any) -> Any:
    return xml_text(value) if isinstance(value, str) else value


def path_tree(graph: AttributionGraph, paths: list[GraphPath] | int = 12) -> Tree:
    """The strongest paths as a terminal tree: the target is the root, its mediators hang below it.

    Paths (given, or the n strongest) that end alike share their branch. The number before a node is what
    its edge contributes to the behaviour, green when it pushes up and red when it pushes down; behind it, in the
    graph of a set, stands the edge's tier and how often it is kept (circuits.consensus).
    """
    if isinstance(paths, int):
        paths = graph.strongest_paths(paths)
    root = Tree(_line(graph, TARGET, graph.digraph.nodes[TARGET]["attribution"]))
    branches: dict[tuple[str, ...], Tree] = {(TARGET,): root}
    for path in paths:
        for start in range(len(path.nodes) - 2, -1, -1):
            tail = path.nodes[start:]
            if tail not in branches:
                edge = graph.digraph.edges[tail[0], tail[1]]
                branches[tail] = branches[tail[1:]].add(_line(graph, tail[0], edge["contribution"], tier_text(edge)))
    return root


def tier_text(data: Mapping[str, Any]) -> str:
    """How often a node or edge is kept, and its tier: "consensus 93%"; empty where a graph does not say."""
    if data.get("frequency") is None:
        return ""
    return f"{data['tier'] or 'kept in'} {data['frequency']:.0%}"


def _line(graph: AttributionGraph, name: str, amount: float | None, kept: str = "") -> Text:
    """Text objects, not markup: a label such as "[/red]" must stay a label."""
    label = node_label(graph.digraph.nodes[name], name)
    line = Text()
    if amount is not None:
        line.append(f"{amount:+.3f} ", style=POSITIVE if amount >= 0 else NEGATIVE)
    line.append(label, style="bold")
    if kept:
        line.append(f"  {kept}", style=TIER_STYLES.get(kept.split()[0], "dim"))
    if label != name:
        line.append(f"  {name}", style="dim")
    return line
