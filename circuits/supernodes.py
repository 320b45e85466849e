"""Supernodes: latents that do the same thing, read and drawn as one node.

Algorithm
1. Only latents of one site and one position (or role) are grouped. Edges run from earlier sites to later ones, so
   members have no edges among themselves and the grouped graph has no cycle.
2. `by_meta`: latents whose decoder rows have the same strongest meta-latent (mediation.metalatents): they say the
   same thing. The group is called by that meta-latent's label.
3. `by_edges`: latents that are fed alike and act alike. A latent's profile is its signed contributions by source,
   scaled to length 1, beside those by target, scaled to length 1; the cosine of two profiles is the mean of the
   cosine of what feeds them and that of what they feed. Complete linkage (scipy) merges groups as long as every
   two members have at least the cosine asked for. The group is called by its strongest members' labels.
4. `quotient` draws each group as one node: attributions, weights and contributions of its members are summed, so
   nothing is gained or lost; `meta["supernodes"]` names the members, and `graph` itself stays as it was.

Sources: Ameisen et al. 2025 for supernodes, which people make by hand there; Sørensen 1948 for complete linkage.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import networkx as nx
import numpy as np
import torch
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from circuits.graph import AttributionGraph, NodeKind, node_label
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.metalatents import Decomposition

ALIKE = 0.8  # cosine of two profiles in one group
Cell = tuple[str, int | str]  # a site and a position or role


class Grouping(StrEnum):
    """What makes latents alike."""

    META = "meta"  # the same strongest meta-latent
    EDGES = "edges"  # similar in- and out-edges


@dataclass(frozen=True)
class Supernode:
    """Two latents or more of one site and position, with a name for all of them; strongest member first."""

    id: str
    label: str
    members: tuple[str, ...]


def by_meta(
    graph: AttributionGraph, dictionary: Dictionary, decomposition: Decomposition, labels: Mapping[int, str]
) -> list[Supernode]:
    """Step 2 for the latents of one dictionary; `labels` names meta-latents by index.

    A latent whose decoder row has no meta-latent stays alone.
    """
    groups: dict[tuple[Cell, int], list[str]] = defaultdict(list)
    for cell, names in _cells(graph).items():
        if cell[0] == dictionary.site.name:
            latents = torch.tensor([graph.digraph.nodes[name]["latent"] for name in names])
            codes = decomposition.codes(dictionary.decoder[latents], latents)
            best = codes.max(dim=1)
            for name, value, meta in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
                if value > 0:
                    groups[cell, meta].append(name)
    return _supernodes(
        graph, [(labels.get(meta, f"meta-latent {meta}"), cell, names) for (cell, meta), names in groups.items()]
    )


def by_edges(graph: AttributionGraph, *, alike: float = ALIKE) -> list[Supernode]:
    """Step 3: groups in which every two latents' profiles have a cosine of `alike` or more."""
    if not 0 < alike <= 1:
        raise MediationError(f"Latents are alike at a cosine above 0, at most 1, not {alike}.")
    groups: list[tuple[str, Cell, list[str]]] = []
    for cell, names in _cells(graph).items():
        if len(names) > 1:
            distances = np.clip(1 - _cosines(graph, names), 0, 2)
            np.fill_diagonal(distances, 0)
            tree = linkage(squareform(distances, checks=False), method="complete")
            of_group: dict[int, list[str]] = defaultdict(list)
            for name, group in zip(names, fcluster(tree, 1 - alike, criterion="distance").tolist(), strict=True):
                of_group[group].append(name)
            groups += [(_common_label(graph, members), cell, members) for members in of_group.values()]
    return _supernodes(graph, groups)


def quotient(graph: AttributionGraph, supernodes: Sequence[Supernode]) -> AttributionGraph:
    """Step 4: the graph with every group as one node of kind `supernode`.

    Intervals and activations do not add up and are None. Weights into a supernode sum direct effects on several
    pre-activations. Raises MediationError for members that are unknown, in two groups, not latents of one site and
    position, or linked among themselves.
    """
    digraph = graph.digraph
    home = {name: name for name in digraph}
    for group in supernodes:
        for member in group.members:
            if home.get(member) != member:
                reason = "is in two groups" if member in home else "is not in the graph"
                raise MediationError(f"'{member}' of the group '{group.label}' {reason}: give each latent to one.")
            home[member] = group.id
        shared = {tuple(digraph.nodes[member][key] for key in ("kind", "site", "position")) for member in group.members}
        if len(shared) != 1 or next(iter(shared))[0] != NodeKind.LATENT:
            raise MediationError(f"The group '{group.label}' is not of latents of one site and position: split it.")
    of = {group.id: group for group in supernodes}
    drawn = nx.DiGraph()
    for name, data in digraph.nodes(data=True):
        if home[name] not in drawn:
            drawn.add_node(home[name], **(_merged(graph, of[home[name]]) if home[name] in of else dict(data)))
    sums: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for source, target, data in digraph.edges(data=True):
        if home[source] == home[target]:
            raise MediationError(f"'{source}' feeds '{target}' of its own group: group latents that do not.")
        sums[home[source], home[target]].append(data)
    for (source, target), parts in sums.items():
        added = {key: math.fsum(part[key] for part in parts) for key in ("weight", "contribution")}
        drawn.add_edge(source, target, **added)
    members = {group.id: {"label": group.label, "members": list(group.members)} for group in supernodes}
    meta = graph.meta | {"supernodes": graph.meta.get("supernodes", {}) | members, "error_share": graph.error_share()}
    return AttributionGraph(drawn, meta)


def within(supernodes: Sequence[Supernode], graph: AttributionGraph) -> list[Supernode]:
    """The groups of what is left of them in a smaller graph: of two members or more."""
    left = [(each, tuple(name for name in each.members if name in graph.digraph)) for each in supernodes]
    return [replace(each, members=members) for each, members in left if len(members) > 1]


def _cells(graph: AttributionGraph) -> dict[Cell, list[str]]:
    """Latents by site and position, each list in the order of names."""
    cells: dict[Cell, list[str]] = defaultdict(list)
    for name in sorted(graph.ranked([NodeKind.LATENT])):
        data = graph.digraph.nodes[name]
        cells[data["site"], data["position"]].append(name)
    return cells


def _cosines(graph: AttributionGraph, names: Sequence[str]) -> np.ndarray:
    """Mean of the cosines of in-edges and of out-edges, [n, n]; 0 where a side is missing."""
    total = np.zeros((len(names), len(names)))
    for neighbours in (graph.digraph.pred, graph.digraph.succ):
        column: dict[str, int] = {}
        entries = [
            (row, column.setdefault(other, len(column)), data["contribution"])
            for row, name in enumerate(names)
            for other, data in sorted(neighbours[name].items())
        ]
        table = np.array(entries, dtype=np.float64).reshape(-1, 3)
        shape = (len(names), max(len(column), 1))
        profile = sparse.csr_array((table[:, 2], table[:, :2].T.astype(np.int64)), shape=shape)
        length = np.sqrt(profile.multiply(profile).sum(axis=1))
        scale = np.divide(1, length, out=np.zeros_like(length), where=length > 0)
        unit = sparse.diags_array(scale) @ profile
        total += (unit @ unit.T).toarray() / 2
    return total


def _supernodes(graph: AttributionGraph, groups: Iterable[tuple[str, Cell, list[str]]]) -> list[Supernode]:
    """Groups of two members or more, strongest first, with unique ids."""
    ranked = {name: place for place, name in enumerate(graph.ranked([NodeKind.LATENT]))}
    real = [(label, cell, sorted(names, key=ranked.__getitem__)) for label, cell, names in groups if len(names) > 1]
    real.sort(key=lambda each: (-sum(map(graph.strength, each[2])), each[2]))
    number: dict[Cell, int] = defaultdict(int)
    found = []
    for label, cell, names in real:
        number[cell] += 1
        identity = f"{cell[0]}/{cell[1]}/group-{number[cell]}"
        found.append(Supernode(identity, label, tuple(names)))
    return found


def _common_label(graph: AttributionGraph, names: Sequence[str]) -> str:
    """The label that most of the members' |attribution| goes by, without the latents' numbers."""
    weight: dict[str, float] = defaultdict(float)
    for name in names:
        label = node_label(graph.digraph.nodes[name], name)
        weight[re.sub(r"^\d+ ", "", label)] += graph.strength(name)
    label = max(weight, key=lambda each: (weight[each], each))
    return label if len(weight) == 1 else f"{label} and others"


def _merged(graph: AttributionGraph, group: Supernode) -> dict[str, Any]:
    """A supernode's data: what its members share, and the sums of what they have."""
    parts = [graph.digraph.nodes[name] for name in group.members]
    data = dict.fromkeys(parts[0]) | {"kind": NodeKind.SUPERNODE.value, "label": f"{len(parts)} × {group.label}"}
    data |= {key: parts[0][key] for key in ("site", "position")}
    for key in ("attribution", "influence", "held_out"):
        values = [part[key] for part in parts if part.get(key) is not None]
        data[key] = math.fsum(values) if values else None
    return data
