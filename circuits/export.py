"""An attribution graph for other programs and for the terminal: GraphML, DOT, tables for Parquet, and a rich tree.

Node-link JSON, which networkx reads too, is the graph's own format: `AttributionGraph.to_json`; in Python
`graph.digraph` is a `networkx.DiGraph`. Neuronpedia's JSON is in `circuits.neuronpedia`. Groups of latents
(circuits.supernodes) become a column `supernode`, or a cluster in DOT; the latents themselves stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import networkx as nx
import polars as pl
from rich.text import Text
from rich.tree import Tree

from circuits.graph import EDGE_COLUMNS, NODE_COLUMNS, TARGET, AttributionGraph, GraphPath, NodeKind, node_label
from circuits.neuronpedia import Origin, to_neuronpedia
from circuits.supernodes import Supernode
from mediation.runs import Run

POSITIVE, NEGATIVE = "green", "red"
TYPES = {"latent": pl.Int64} | dict.fromkeys(
    ("id", "kind", "site", "label", "supernode", "source", "target"), pl.String
)
TIER_STYLES = {"consensus": "cyan", "contingent": "yellow"}  # noise is dim, as what is said beside it
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Format(StrEnum):
    """Files that `mediation inspect --export` writes."""

    GRAPHML = "graphml"  # Gephi, Cytoscape, yEd, networkx
    DOT = "dot"  # Graphviz
    PARQUET = "parquet"  # polars, pandas, DuckDB: nodes and edges
    CSV = "csv"  # spreadsheets and everything else: the same two tables
    NEURONPEDIA = "neuronpedia"  # the graph page of Neuronpedia and circuit-tracer


def to_graphml(graph: AttributionGraph, supernodes: Sequence[Supernode] = ()) -> str:
    """GraphML for Gephi, Cytoscape, yEd.

    Attributes that do not apply to a node are left out, positions are texts, meta data that is no plain
    value becomes JSON, and characters that XML forbids are replaced.
    """
    copy, group = nx.DiGraph(), _group_of(supernodes)
    for key, value in graph.meta.items():
        if value is not None:
            copy.graph[key] = _plain(value if isinstance(value, str | int | float) else json.dumps(value))
    for name, data in graph.digraph.nodes(data=True):
        # positions are integers or names of roles: as texts they share one GraphML column
        values = data | {"position": None if data["position"] is None else str(data["position"])}
        values |= {"supernode": group.get(name)}
        plain = {key: _plain(value) for key, value in values.items() if value is not None}
        copy.add_node(_plain(name), **plain)
    for source, target, data in graph.digraph.edges(data=True):
        copy.add_edge(
            _plain(source), _plain(target), **{key: value for key, value in data.items() if value is not None}
        )
    return "\n".join(nx.generate_graphml(copy)) + "\n"


def to_dot(graph: AttributionGraph, supernodes: Sequence[Supernode] = ()) -> str:
    """DOT for Graphviz: the target on top, edges as wide as their contribution, red ones push down.

    Ids and labels are quoted and escaped; labels are never HTML.
    """
    group, digraph = _group_of(supernodes), graph.digraph
    largest = max((abs(value) for _, _, value in digraph.edges(data="contribution")), default=0.0) or 1.0
    inside: dict[str | None, list[str]] = {None: [], **{each.id: [] for each in supernodes}}
    for name, data in digraph.nodes(data=True):
        values = {
            "label": node_label(data, name),
            "tooltip": name,
            "style": "dashed" if data["kind"] == NodeKind.ERROR else "rounded",
        }
        inside[group.get(name)].append(f"{_quoted(name)} [{_attributes(values)}];")
    lines = ["digraph attribution {", '  rankdir="BT"; node [shape="box"];', *(f"  {line}" for line in inside[None])]
    for number, each in enumerate(supernodes):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(each.label)};"]
        lines += [*(f"    {line}" for line in inside[each.id]), "  }"]
    for source, target, data in digraph.edges(data=True):
        amount = data["contribution"]
        values = {
            "penwidth": f"{0.5 + 4.5 * abs(amount) / largest:.2f}",
            "color": "red" if amount < 0 else "blue",
            "tooltip": f"contribution {amount:+.4g}, weight {data['weight']:+.4g}",
        }
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [{_attributes(values)}];")
    return "\n".join([*lines, "}"]) + "\n"


def to_tables(graph: AttributionGraph, supernodes: Sequence[Supernode] = ()) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Nodes and edges as tables, which `AttributionGraph.from_tables` reads; nodes have a column `supernode`."""
    group = _group_of(supernodes)
    rows = [{"id": name, **data, "supernode": group.get(name)} for name, data in graph.digraph.nodes(data=True)]
    if not all(isinstance(row["position"], int) for row in rows if row["position"] is not None):
        rows = [row | {"position": None if row["position"] is None else str(row["position"])} for row in rows]
    links = [{"source": s, "target": t, **data} for s, t, data in graph.digraph.edges(data=True)]
    return _table(rows, NODE_COLUMNS), _table(links, EDGE_COLUMNS)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pl.DataFrame:
    """Columns are `columns` and whatever else the rows have; one that holds nothing is of its usual type."""
    names = dict.fromkeys([*columns, *(key for row in rows for key in row)])
    table = pl.DataFrame([pl.Series(name, [row.get(name) for row in rows], strict=False) for name in names])
    empty = [name for name, dtype in table.schema.items() if dtype == pl.Null]
    return table.with_columns(pl.col(name).cast(TYPES.get(name, pl.Float64)) for name in empty)


def _group_of(supernodes: Sequence[Supernode]) -> dict[str, str]:
    return {member: group.id for group in supernodes for member in group.members}


def _quoted(text: object) -> str:
    """A DOT string: in one, a backslash starts an escape and a quotation mark ends it."""
    escaped = xml_text(str(text)).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'.replace("\r", " ").replace("\n", "\\n")


def _attributes(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={_quoted(value)}" for key, value in values.items())


def xml_text(text: str) -> str:
    """The text with every character that XML 1.0 forbids replaced by U+FFFD. It still has to be escaped."""
    return _FORBIDDEN.sub("\ufffd", text)


def _plain(value: Any) -> Any:
    return xml_text(value) if isinstance(value, str) else value


def write_exports(
    run: Run,
    graph: AttributionGraph,
    formats: Iterable[Format],
    *,
    origin: Origin,
    supernodes: Sequence[Supernode] = (),
    name: str = "graph",
) -> dict[str, Path]:
    """Write the graph into the run's folder, `name` first in each file's name; Parquet and CSV are two tables in a
    folder."""
    written: dict[str, Path] = {}
    for each in dict.fromkeys(formats):
        if each is Format.GRAPHML:
            written[each.value] = run.write_text(f"{name}.graphml", to_graphml(graph, supernodes))
        elif each is Format.DOT:
            written[each.value] = run.write_text(f"{name}.dot", to_dot(graph, supernodes))
        elif each is Format.PARQUET:
            for table, frame in zip(("nodes", "edges"), to_tables(graph, supernodes), strict=True):
                written[each.value] = run.write_shard(name, table, frame).parent
        elif each is Format.CSV:
            for table, frame in zip(("nodes", "edges"), to_tables(graph, supernodes), strict=True):
                written[each.value] = run.write_text(f"{table}.csv", frame.write_csv(), folder=name).parent
        else:
            data = to_neuronpedia(graph, f"{run.path.name}-{name}", origin, supernodes)
            written[each.value] = run.write_text(f"{name}.neuronpedia.json", json.dumps(data, allow_nan=False))
    return written


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
