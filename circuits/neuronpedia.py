"""An attribution graph as the JSON that Neuronpedia and circuit-tracer's own page open.

Field by field, where the format leaves room:
* prompt_tokens: `meta["tokens"]` for a graph of one prompt; a graph of a set has its roles in their place.
* node_id: `{layer}_{stream}_{latent}_{position}`, which no two nodes share, mixed sites or not.
* feature: Cantor's pairing of layer and latent, as schema_version 1 wants it; -1 for error nodes.
* layer: the dictionary's; the target stands above all others.
* influence: the format's is the cumulative share, strongest first, of the node's influence (circuits.pruning): the
  page shows nodes up to a threshold. Embeddings and the target have none and are always shown.
* The target is a "logit" node. Its reader needs a quoted text and a probability: the answer, or the behaviour's
  name, and what `probability` makes of the behaviour.
* weight: the direct effect E. What this package knows beyond the format (site, role, attribution and interval,
  contribution) rides along under its own names, which readers skip.

Format: graph-schema.json of hijohnnylin/neuronpedia, and what its reader demands besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate
from typing import Any

from scipy.special import expit

from circuits.graph import TARGET, AttributionGraph, NodeKind, node_label
from circuits.pruning import Keep, prune
from circuits.supernodes import Supernode
from mediation.behaviours import Behaviour
from mediation.errors import MediationError
from mediation.sites import Site

FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"  # the names its page knows
OURS = ("site", "latent", "attribution", "low", "high")


@dataclass(frozen=True)
class Origin:
    """What a graph is of, for readers of the file.

    model: its name on Neuronpedia, such as gemma-2-2b. probability: of what the target stands for, `answer`, or by
    default the behaviour. prompt: its text; by default the tokens in a row.
    """

    model: str
    probability: float
    prompt: str | None = None
    answer: str | None = None


def to_neuronpedia(
    graph: AttributionGraph, slug: str, origin: Origin, supernodes: Sequence[Supernode] = ()
) -> dict[str, Any]:
    """The graph as a JSON object; of a graph that was not pruned, every node that reaches the target.

    slug: the graph's name. Members of `supernodes` are pinned. Raises MediationError for a graph without a site
    after layer 0, which the page cannot open, and for sites that are no `blocks.L.hook_...`.
    """
    if "of_influence" not in graph.meta.get("pruned", {}):
        graph = prune(graph, Keep(nodes=1, edges=1))
    writer = _Writer.of(graph, origin)
    nodes = graph.digraph.nodes(data=True)
    ids = {name: writer.node_id(name, data) for name, data in nodes}
    shown, shares = _cumulative(graph), graph.meta["pruned"]["shares"]
    links = [
        {"source": ids[source], "target": ids[target]} | {key: data[key] for key in ("weight", "contribution")}
        for source, target, data in graph.digraph.edges(data=True)
    ]
    groups = [[group.label, *(ids[member] for member in group.members)] for group in supernodes]
    return {
        "metadata": {
            "slug": plain_name(slug),
            "scan": plain_name(origin.model),
            "prompt": origin.prompt or ("" if graph.meta.get("tokens") else " ").join(writer.tokens),
            "prompt_tokens": writer.tokens,
            "transcoder_list": [],
            "schema_version": 1,
            "node_threshold": 1.0,  # where the page's slider starts: all that is here
            "pruning_settings": {"node_threshold": shares["nodes"], "edge_threshold": shares["edges"]},
            "info": {
                "description": _description(graph),
                "generator": {"name": "latent-mediation", "version": metadata.version("latent-mediation")},
            },
        },
        "qParams": {
            "linkType": "both",
            "pinnedIds": [node for group in groups for node in group[1:]],
            "supernodes": groups,
        },
        "nodes": [
            {"node_id": ids[name], "influence": shown.get(name)} | writer.node(name, data) for name, data in nodes
        ],
        "links": links,
    }


def probability(behaviour: Behaviour, value: float) -> float:
    """What a behaviour's value (nats) says: the answer's probability against the wrong answer, or its own."""
    return float(expit(value)) if behaviour is Behaviour.LOGIT_DIFF else math.exp(value)


def plain_name(text: str) -> str:
    """The text with what Neuronpedia refuses in names replaced by a dash."""
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", text).strip("-") or "graph"


def cantor(layer: int, latent: int) -> int:
    """Cantor's pairing: one integer for two."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


@dataclass(frozen=True)
class _Writer:
    """What all nodes need: sites by name, columns by position, the text of each column, the target's layer."""

    sites: dict[str, Site]
    column: dict[int | str, int]
    tokens: list[str]
    top: int
    origin: Origin

    @classmethod
    def of(cls, graph: AttributionGraph, origin: Origin) -> _Writer:
        sites = {data["site"]: Site.parse(data["site"]) for _, data in graph.digraph.nodes(data=True) if _sited(data)}
        deepest = max((site.layer for site in sites.values()), default=0)
        if deepest < 1:
            raise MediationError("Neuronpedia opens no graph that ends at layer 0: trace a later site too.")
        places = graph.positions()
        tokens = [str(token) for token in graph.meta.get("tokens") or ()]
        if all(isinstance(place, int) and 0 <= place < len(tokens) for place in places):
            column = {place: int(place) for place in places}
        else:
            tokens = [str(place) for place in places]
            column = {place: k for k, place in enumerate(places)}
        return cls(sites, column, tokens, deepest + 1, origin)

    def at(self, name: str, data: dict[str, Any]) -> int:
        """A node's column; the target stands at the last."""
        return len(self.tokens) - 1 if name == TARGET else self.column[data["position"]]

    def node_id(self, name: str, data: dict[str, Any]) -> str:
        if name == TARGET:
            return f"{self.top}_target_{self.at(name, data)}"
        if data["kind"] == NodeKind.EMBEDDING:
            return f"E_{self.at(name, data)}"
        if not _sited(data):
            raise MediationError(f"'{name}' is a {data['kind']}: give the graph of latents, and its groups beside it.")
        site, unit = self.sites[data["site"]], "error" if data["latent"] is None else data["latent"]
        return f"{site.layer}_{site.stream.value}_{unit}_{self.at(name, data)}"

    def node(self, name: str, data: dict[str, Any]) -> dict[str, Any]:
        """All of a node but its id and influence."""
        at = self.at(name, data)
        ours = {key: data[key] for key in OURS if data[key] is not None}
        if data["position"] is not None:
            ours["position"] = data["position"]
        return {"ctx_idx": at, "activation": data["activation"]} | self._kind(name, data, self.tokens[at], at) | ours

    def _kind(self, name: str, data: dict[str, Any], token: str, at: int) -> dict[str, Any]:
        label = node_label(data, name)
        if name == TARGET:
            # the reader takes the number after the first "(p="
            text = (self.origin.answer or label).replace("(p=", "(p =").replace('"', "'")
            return _fields(
                self.top, None, "logit", f"{self.top}_target-0", f'Output "{text}" (p={self.origin.probability:.6f})'
            )
        if data["kind"] == NodeKind.EMBEDDING:
            return _fields("E", None, "embedding", f"E_{at}-0", f'Emb: "{token}"')
        site, latent = self.sites[data["site"]], data["latent"]
        if data["kind"] == NodeKind.ERROR:
            return _fields(site.layer, -1, ERROR, f"{site.layer}_error-0", f'Err: {site.stream.value} "{token}"')
        return _fields(site.layer, cantor(site.layer, latent), FEATURE, f"{site.layer}_{latent}-0", label)


def _sited(data: dict[str, Any]) -> bool:
    return data["kind"] in (NodeKind.LATENT, NodeKind.ERROR)


def _fields(layer: int | str, feature: int | None, kind: str, js_id: str, clerp: str) -> dict[str, Any]:
    return {"layer": str(layer), "feature": feature, "feature_type": kind, "jsNodeId": js_id, "clerp": clerp}


def _cumulative(graph: AttributionGraph) -> dict[str, float]:
    """Cumulative shares of the influence of latents and error nodes, strongest first, the pruned ones last."""
    values = {name: data["influence"] for name, data in graph.digraph.nodes(data=True) if _sited(data)}
    ranked = sorted(values, key=lambda name: (-values[name], name))
    sums = list(accumulate(values[name] for name in ranked))
    pruned = graph.meta["pruned"]
    total = (sums[-1] if sums else 0.0) + pruned["of_influence"] - pruned["influence"]
    return {name: min(part / total, 1.0) if total > 0 else 1.0 for name, part in zip(ranked, sums, strict=True)}


def _description(graph: AttributionGraph) -> str:
    prompts = graph.meta.get("prompts", 1)
    of = "one prompt" if prompts == 1 else f"mean over {prompts} prompts, with roles in place of tokens"
    return f"{graph.meta.get('behaviour')}, {of}"
