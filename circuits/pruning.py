"""What to keep of a graph: the nodes and edges that matter to the behaviour, with nothing left dangling.

Algorithm
1. An edge's share is |contribution| over the sum of |contribution| of all edges into the same node.
2. A node's influence is the sum over all its paths to the target of the product of their shares: I(target) = 1,
   I(u) = sum_d share(u, d) I(d), in one pass over the graph's generations from the target back. An edge's influence is
   share(u, d) I(d). So the out-edges of a node sum to its own influence, and all nodes without in-edges sum to 1: it
   is the fraction of the absolute flow into the target that passes through.
3. Of the latents, keep the fewest whose influences sum to `nodes` of the sum over all latents. Error nodes and
   embeddings do not compete: what dictionaries miss must stay visible.
4. Drop what dangles: a latent that had in-edges and has none from kept nodes, and any node that no longer
   reaches the target.
5. Of the edges between kept nodes, keep the fewest whose influences sum to `edges` of their sum, and the strongest
   edge out of every node and into every node that has one, so that cutting edges never costs a node.

More is kept as either share grows, and the order of nodes and edges in the graph does not matter.
Source: the influence of Anthropic's attribution graphs (Ameisen et al. 2025) and circuit-tracer, whose thresholds
.8 and .98 are the defaults. Unlike there, error nodes stay, edges keep the influence they have in the whole graph,
and step 5 replaces cutting in turns until nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import networkx as nx
import numpy as np
from scipy import sparse

from circuits.graph import TARGET, AttributionGraph, NodeKind
from mediation.errors import MediationError
from mediation.statistics import Floats

Key = TypeVar("Key", str, tuple[str, str])
SOURCES = (NodeKind.ERROR, NodeKind.EMBEDDING)


@dataclass(frozen=True)
class Keep:
    """How much to keep: shares of the influence of latents and of edges, and at most `top` latents."""

    nodes: float = 0.8
    edges: float = 0.98
    top: int | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "edges"):
            if not 0 < getattr(self, name) <= 1:
                raise MediationError(
                    f"The share of influence of {name} is {getattr(self, name)}: give more than 0, at most 1 (all)."
                )
        if self.top is not None and self.top < 1:
            raise MediationError(f"The number of latents to keep is {self.top}: give 1 or more.")


@dataclass(frozen=True)
class Influence:
    """Fractions of the absolute flow into the target that pass through each node and each edge."""

    nodes: dict[str, float]
    edges: dict[tuple[str, str], float]


def influence(graph: AttributionGraph) -> Influence:
    """Steps 1 and 2 for one graph; the same to the last bit whatever the order of its nodes and edges."""
    digraph = graph.digraph
    order = [name for name in sorted(digraph) if name != TARGET] + [TARGET]
    index = {name: k for k, name in enumerate(order)}
    ends = sorted((index[s], index[t], value) for s, t, value in digraph.edges(data="contribution"))
    columns = np.array(ends, dtype=np.float64).reshape(-1, 3)
    source, target = columns[:, :2].T.astype(np.int64)
    (nodes,), (edges,) = flow(columns[None, :, 2], source, target, len(order))
    named = [(order[s], order[t]) for s, t, _ in ends]
    return Influence(dict(zip(order, nodes.tolist(), strict=True)), dict(zip(named, edges.tolist(), strict=True)))


def flow(contributions: Floats, source: np.ndarray, target: np.ndarray, n_nodes: int) -> tuple[Floats, Floats]:
    """Steps 1 and 2 for P graphs of the same edges at once: influence of nodes [P, n_nodes] and edges [P, m].

    contributions [P, m]; source, target: long [m], node numbers, without cycles; node n_nodes - 1 is the target.
    """
    size = np.abs(contributions)
    into = (size @ one_hot(target, n_nodes))[:, target]
    share = np.divide(size, into, out=np.zeros_like(size), where=into > 0)
    nodes, edges = np.zeros((len(size), n_nodes)), np.zeros_like(size)
    nodes[:, -1] = 1.0
    backwards: nx.DiGraph = nx.DiGraph()
    backwards.add_nodes_from(range(n_nodes))
    backwards.add_edges_from(zip(target.tolist(), source.tolist(), strict=True))
    for generation in nx.topological_generations(backwards):
        here = np.flatnonzero(np.isin(target, generation))
        edges[:, here] = nodes[:, target[here]] * share[:, here]
        nodes += edges[:, here] @ one_hot(source[here], n_nodes)
    return nodes, edges


def one_hot(column: np.ndarray, width: int) -> sparse.csr_array:
    """[m, width] with a one in each row's column."""
    ones = np.ones(len(column))
    return sparse.csr_array((ones, column, np.arange(len(column) + 1)), shape=(len(column), width))


def prune(graph: AttributionGraph, keep: Keep | None = None) -> AttributionGraph:
    """Steps 1 to 5: the part of the graph that `keep` (by default `Keep()`) asks for; the graph itself is not touched.

    Nodes carry the `influence` they have in the whole graph. `meta["pruned"]` says how many nodes and edges were
    kept of how many, the summed influence of kept latents and of all, and the part of the flow that begins at error
    nodes; `meta["error_share"]` keeps what `error_share` said before.
    """
    keep = keep or Keep()
    digraph, found = graph.digraph, influence(graph)
    kinds = dict(digraph.nodes(data="kind"))
    fixed = {name for name, kind in kinds.items() if kind in (NodeKind.TARGET, *SOURCES)}
    competing = {name: value for name, value in found.nodes.items() if name not in fixed}
    kept = _connected(digraph, fixed | set(_strongest(competing, keep.nodes)[: keep.top]))
    between = {(s, t): value for (s, t), value in found.edges.items() if s in kept and t in kept}
    links = set(_strongest(between, keep.edges)) | _lifelines(between)
    meta = graph.meta | {
        "pruned": {
            "kept": len(kept),
            "of": len(digraph),
            "edges": len(links),
            "of_edges": digraph.number_of_edges(),
            "influence": sum(value for name, value in competing.items() if name in kept),
            "of_influence": sum(competing.values()),
            "from_errors": sum(value for name, value in found.nodes.items() if kinds[name] == NodeKind.ERROR),
            "shares": {"nodes": keep.nodes, "edges": keep.edges},
        },
        "error_share": graph.error_share(),
    }
    part = graph.restricted(kept, links, meta)
    for name, data in part.digraph.nodes(data=True):
        data["influence"] = found.nodes[name]
    return part


def _strongest(values: Mapping[Key, float], share: float) -> list[Key]:
    """Steps 3 and 5: the fewest whose values sum to `share` of all, strongest first; ties go by name."""
    ranked: list[Key] = sorted(values, key=lambda name: (-values[name], name))
    if share == 1:
        return ranked  # those of no influence too, which a sum cannot tell
    (chosen,) = fewest(np.array([[values[name] for name in ranked]]), share)
    return [name for name, each in zip(ranked, chosen, strict=True) if each]


def fewest(amounts: Floats, share: float) -> np.ndarray:
    """Bool [P, m]: in each row, the fewest of the `amounts` (not negative) that hold `share` of their sum."""
    order = np.argsort(-amounts, axis=1, kind="stable")
    ranked = np.take_along_axis(amounts, order, axis=1)
    running = ranked.cumsum(axis=1)
    # A sum that reaches the share but for rounding has reached it.
    enough = (share - 1e-12) * running[:, -1:]
    chosen = np.empty(amounts.shape, dtype=bool)
    np.put_along_axis(chosen, order, (running - ranked < enough) & (ranked > 0), axis=1)
    return chosen


def _connected(digraph: nx.DiGraph, chosen: set[str]) -> set[str]:
    """Step 4. A latent is fed when it never had in-edges, or one comes from a chosen node that is fed itself."""
    fed: set[str] = set()
    for name in nx.topological_sort(digraph):
        if name in chosen and (not digraph.pred[name] or any(source in fed for source in digraph.pred[name])):
            fed.add(name)
    part = digraph.subgraph(fed | {TARGET})
    return nx.ancestors(part, TARGET) | {TARGET}


def _lifelines(edges: Mapping[tuple[str, str], float]) -> set[tuple[str, str]]:
    """Step 5: the strongest edge out of every node, and into every node."""
    best: dict[tuple[int, str], tuple[str, str]] = {}
    for edge in sorted(edges, key=lambda edge: (-edges[edge], edge)):
        for end in (0, 1):
            best.setdefault((end, edge[end]), edge)
    return set(best.values())
