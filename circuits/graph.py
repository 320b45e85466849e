"""The attribution graph: which mediators feed which, and what each link is worth to the behaviour.

A thin layer over `networkx.DiGraph`: typed nodes with unique ids, one `target` node (the behaviour),
edges that carry the direct effect E and its contribution E * dm/df_d.

Algorithm of `strongest_paths`
1. An edge's share is |contribution| over the sum of |contribution| of all edges into the same node.
2. A path s -> ... -> u -> target carries |contribution(u, target)| times the shares of its earlier
   edges: what it carries of the behaviour, in the behaviour's units. Over all paths from nodes without
   in-edges these amounts sum to the absolute flow into the target.
3. The best completion of every node back to a source is found once, in topological order.
4. Paths are grown backwards from the target, always the one with the largest carried amount times
   best completion first (A* with an exact bound), so they come out in order and nothing is enumerated.
   Source: Hart, Nilsson & Raphael 1968; the shares are the row normalisation of Anthropic's
   attribution graphs (Ameisen et al. 2025).
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import networkx as nx
import polars as pl

from mediation.errors import MediationError

TARGET = "target"
NODE_COLUMNS = ("id", "kind", "site", "position", "latent", "attribution", "low", "high", "label")
OPTIONAL_NODE_COLUMNS = ("activation", "influence", "held_out", "frequency", "tier")
EDGE_COLUMNS = ("source", "target", "weight", "contribution")
OPTIONAL_EDGE_COLUMNS = ("held_out", "low", "high", "frequency", "tier")


class NodeKind(StrEnum):
    """What a node stands for."""

    LATENT = "latent"
    ERROR = "error"  # what the dictionary misses at a site and position
    EMBEDDING = "embedding"  # the token's embedding, at blocks.0.hook_resid_pre
    TARGET = "target"  # the behaviour
    SUPERNODE = "supernode"  # several latents of one site and position, drawn as one (circuits.supernodes)


def latent_id(site: str, position: int | str, latent: int) -> str:
    """Id of a latent node; `position` is a token position or the name of a role."""
    return f"{site}/{position}/{latent}"


def error_id(site: str, position: int | str) -> str:
    """Id of an error node."""
    return f"{site}/{position}/error"


def embedding_id(position: int | str) -> str:
    """Id of a token-embedding node."""
    return f"embed/{position}"


def node_label(data: Mapping[str, Any], identity: str) -> str:
    """What to call a node: its label, or what it is in one word, or its id."""
    if data["label"]:
        return str(data["label"])
    if data["kind"] in (NodeKind.ERROR, NodeKind.EMBEDDING):
        return str(data["kind"])
    return identity if data["latent"] is None else f"latent {data['latent']}"


@dataclass(frozen=True)
class GraphPath:
    """A source-to-target path and what it carries of the behaviour (absolute, behaviour's units)."""

    nodes: tuple[str, ...]
    carried: float


class AttributionGraph:
    """A directed acyclic graph of mediators.

    `digraph`: nodes carry kind, site, position, latent, attribution, low, high, activation, influence
    (circuits.pruning), label (None where it does not apply); edges carry weight (E) and contribution (E * dm/df_d).
    The graph of a set of prompts adds held_out, frequency and tier to nodes, and these and the interval low, high to
    edges (circuits.consensus); there, an embedding's attribution is what its edges carry.
    `meta`: JSON values that describe the graph (behaviour, tokens, roles, total_effect, ...).
    """

    def __init__(self, digraph: nx.DiGraph, meta: Mapping[str, Any] | None = None) -> None:
        """Raises MediationError when the graph has a cycle or no `target` node."""
        if TARGET not in digraph:
            raise MediationError("The graph has no node 'target': add the behaviour as a node with that id.")
        if not nx.is_directed_acyclic_graph(digraph):
            raise MediationError(
                "The edges form a cycle: each must run from an earlier site or position to a later one."
            )
        self.digraph = digraph
        self.meta: dict[str, Any] = dict(meta or {})

    # -- construction ------------------------------------------------------------------------------

    @classmethod
    def from_tables(
        cls, nodes: pl.DataFrame, edges: pl.DataFrame, *, meta: Mapping[str, Any] | None = None
    ) -> AttributionGraph:
        """Build a graph from the tables of a run.

        nodes: NODE_COLUMNS, and any of OPTIONAL_NODE_COLUMNS. edges: EDGE_COLUMNS, and any of
        OPTIONAL_EDGE_COLUMNS. A missing `target` row is added, with
        `meta["behaviour"]` as label and `meta["total_effect"]` as attribution. NaN becomes None.
        Raises MediationError for missing columns, repeated ids, unknown kinds or end points, cycles.
        """
        _require(nodes, NODE_COLUMNS, "nodes")
        _require(edges, EDGE_COLUMNS, "edges")
        meta = dict(meta or {})
        digraph = nx.DiGraph()
        names = (*NODE_COLUMNS, *(name for name in OPTIONAL_NODE_COLUMNS if name in nodes.columns))
        for row in nodes.select(names).iter_rows(named=True):
            identity = row.pop("id")
            if identity in digraph:
                raise MediationError(f"The table of nodes holds '{identity}' twice: ids must be unique.")
            if row["kind"] not in set(NodeKind):
                raise MediationError(
                    f"Node '{identity}' has the kind '{row['kind']}': use one of {', '.join(NodeKind)}."
                )
            digraph.add_node(identity, **_node(**{key: _plain(value) for key, value in row.items()}))
        if TARGET not in digraph:
            label, total = meta.get("behaviour"), meta.get("total_effect")
            digraph.add_node(TARGET, **_node(kind=NodeKind.TARGET.value, label=label, attribution=total))
        names = (*EDGE_COLUMNS, *(name for name in OPTIONAL_EDGE_COLUMNS if name in edges.columns))
        for row in edges.select(names).iter_rows(named=True):
            source, target = row.pop("source"), row.pop("target")
            for end in (source, target):
                if end not in digraph:
                    raise MediationError(f"An edge names the node '{end}', which the table of nodes lacks.")
            digraph.add_edge(source, target, **row)
        return cls(digraph, meta)

    # -- reading -----------------------------------------------------------------------------------

    def ranked(self, kinds: Iterable[NodeKind] = tuple(NodeKind)) -> list[str]:
        """Ids of the nodes of these kinds, but never the target, strongest |attribution| first."""
        wanted = set(kinds) - {NodeKind.TARGET}
        chosen = [name for name, data in self.digraph.nodes(data=True) if data["kind"] in wanted]
        return sorted(chosen, key=lambda name: (-self.strength(name), name))

    def strength(self, node: str) -> float:
        """|attribution| of a node; one without (an embedding) counts by the sum of what its edges carry."""
        attribution = self.digraph.nodes[node]["attribution"]
        if attribution is None:
            attribution = sum(value for _, _, value in self.digraph.out_edges(node, data="contribution"))
        return abs(attribution)

    def positions(self) -> list[int | str]:
        """Positions of nodes from left to right: as `meta["positions"]` has them, then integers in order, or roles
        as they appear."""
        used = [data["position"] for _, data in self.digraph.nodes(data=True) if data["kind"] != NodeKind.TARGET]
        given = [position for position in self.meta.get("positions") or () if position in set(used)]
        rest = [position for position in dict.fromkeys(used) if position not in given]
        return given + (sorted(rest) if all(isinstance(position, int) for position in rest) else rest)

    def error_share(self) -> dict[str, float]:
        """Per site, |attribution| on error nodes over |attribution| on all its nodes.

        After pruning, and wherever `meta["error_share"]` is given, the share among all nodes of the run.
        """
        if "error_share" in self.meta:
            return dict(self.meta["error_share"])
        errors: dict[str, float] = {}
        total: dict[str, float] = {}
        for name, data in self.digraph.nodes(data=True):
            if data["kind"] in (NodeKind.LATENT, NodeKind.ERROR):
                amount = self.strength(name)
                total[data["site"]] = total.get(data["site"], 0.0) + amount
                error = amount if data["kind"] == NodeKind.ERROR else 0.0
                errors[data["site"]] = errors.get(data["site"], 0.0) + error
        return {site: errors[site] / amount if amount else 0.0 for site, amount in total.items()}

    def strongest_paths(self, n: int) -> list[GraphPath]:
        """The n paths into the target that carry most, strongest first (fewer when there are fewer).

        A path begins at a node without in-edges. Paths that carry nothing are left out.
        """
        share = self._shares()
        best = self._best_completion(share)
        flow = sum(abs(data["contribution"]) for _, _, data in self.digraph.in_edges(TARGET, data=True))
        order = itertools.count()  # ties leave the queue in the order they entered it
        queue: list[tuple[float, int, float, tuple[str, ...]]] = [(-flow * best[TARGET], next(order), flow, (TARGET,))]
        found: list[GraphPath] = []
        while queue and len(found) < n:
            _, _, carried, nodes = heapq.heappop(queue)
            sources = sorted(self.digraph.predecessors(nodes[0]))
            if not sources and len(nodes) > 1:
                found.append(GraphPath(nodes, carried))
            for source in sources:
                amount = carried * share[source, nodes[0]]
                if amount * best[source] > 0:
                    heapq.heappush(queue, (-amount * best[source], next(order), amount, (source, *nodes)))
        return found

    def _shares(self) -> dict[tuple[str, str], float]:
        shares: dict[tuple[str, str], float] = {}
        for node in self.digraph:
            edges = list(self.digraph.in_edges(node, data="contribution"))
            total = sum(abs(value) for _, _, value in edges)
            shares.update({(s, t): abs(value) / total if total else 0.0 for s, t, value in edges})
        return shares

    def _best_completion(self, share: Mapping[tuple[str, str], float]) -> dict[str, float]:
        best: dict[str, float] = {}
        for node in nx.topological_sort(self.digraph):
            sources = list(self.digraph.predecessors(node))
            best[node] = max((best[s] * share[s, node] for s in sources), default=1.0)
        return best

    # -- pruning -----------------------------------------------------------------------------------

    def prune(self, top: int) -> AttributionGraph:
        """The graph of the `top` nodes of the largest |attribution|, all error nodes and the target.

        Nodes that no longer reach the target are dropped, so nothing dangles; error nodes are not
        counted in `top`, because what the dictionaries miss must stay visible. `meta["pruned"]` tells
        how many nodes were kept of how many and which share of the absolute attribution they hold;
        `meta["error_share"]` keeps what `error_share` said before.
        """
        chosen = {TARGET, *self.ranked([NodeKind.ERROR])}
        chosen.update(self.ranked(set(NodeKind) - {NodeKind.ERROR})[:top])
        part = self.digraph.subgraph(chosen)
        kept = nx.ancestors(part, TARGET) | {TARGET}
        everything = sum(map(self.strength, self.ranked()))
        share = sum(map(self.strength, kept - {TARGET})) / everything if everything else 0.0
        pruned = {"kept": len(kept), "of": len(self.digraph), "share": share}
        meta = self.meta | {"pruned": pruned, "error_share": self.error_share()}
        return self.restricted(kept, self.digraph.subgraph(kept).edges, meta)

    def restricted(
        self, nodes: Container[str], edges: Container[tuple[str, str]], meta: Mapping[str, Any]
    ) -> AttributionGraph:
        """A copy with these nodes and edges only, in the order of the original, so that no set order shows."""
        digraph = nx.DiGraph()
        digraph.add_nodes_from((name, dict(data)) for name, data in self.digraph.nodes(data=True) if name in nodes)
        digraph.add_edges_from((s, t, dict(data)) for s, t, data in self.digraph.edges(data=True) if (s, t) in edges)
        return AttributionGraph(digraph, meta)

    # -- disk --------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Node-link JSON (networkx's layout, `edges` for the edges, `graph` for the meta data)."""
        data = nx.node_link_data(self.digraph, edges="edges") | {"graph": self.meta}
        try:
            return json.dumps(data, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise MediationError(
                f"The graph holds a value JSON cannot express ({error}): use finite numbers, texts and lists."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> AttributionGraph:
        """The inverse of `to_json`. Raises MediationError when `text` is not such a graph."""
        try:
            data = json.loads(text)
            meta = data.pop("graph")
            digraph = nx.node_link_graph(data | {"graph": {}}, directed=True, multigraph=False, edges="edges")
        except (AttributeError, KeyError, TypeError, ValueError, nx.NetworkXError) as error:
            raise MediationError(
                f"This is not an attribution graph in node-link JSON ({error}): give a graph.json of a run."
            ) from error
        return cls(digraph, meta)

    @classmethod
    def load(cls, path: str | Path) -> AttributionGraph:
        """Read a `graph.json`."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise MediationError(f"Cannot read '{path}' ({error.strerror}): give a graph.json of a run.") from error


def _require(table: pl.DataFrame, columns: Iterable[str], name: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise MediationError(f"The table of {name} lacks the column(s) {', '.join(missing)}: add them.")


def _node(**values: Any) -> dict[str, Any]:
    names = (*NODE_COLUMNS[1:], *OPTIONAL_NODE_COLUMNS)
    return {name: values.get(name) for name in names}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
