"""Neuronpedia's JSON against a schema, and against what its reader does with it."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.graph import TARGET, AttributionGraph
from circuits.neuronpedia import Origin, cantor, plain_name, probability, to_neuronpedia
from circuits.pruning import Keep, influence, prune
from circuits.supernodes import Supernode, quotient
from mediation.behaviours import Behaviour
from mediation.errors import MediationError
from tests.circuits.random_graphs import random_graph
from tests.circuits.test_supernodes import random_groups

SCHEMA = json.loads((Path(__file__).parent / "neuronpedia.schema.json").read_text())
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None),
}  # fmt: skip
KEYWORDS = {
    "$schema", "title", "type", "required", "additionalProperties", "properties", "items", "minItems", "pattern",
    "enum", "const", "minimum", "maximum",
}  # fmt: skip


def violations(value: Any, schema: dict[str, Any], at: str = "graph") -> list[str]:
    """Where a value breaks a JSON Schema, for the keywords of draft 7 that ours uses."""
    assert set(schema) <= KEYWORDS
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, bool) or not any(isinstance(value, TYPES[kind]) for kind in kinds):
        return [f"{at}: {value!r} is no {kinds}"]
    found = []
    if "const" in schema and value != schema["const"]:
        found.append(f"{at}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r} is none of {schema['enum']}")
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        found.append(f"{at}: {value!r} does not match {schema['pattern']}")
    if isinstance(value, int | float) and not schema.get("minimum", -math.inf) <= value <= schema.get(
        "maximum", math.inf
    ):
        found.append(f"{at}: {value} is out of bounds")
    if isinstance(value, list):
        found += [f"{at}: too short"] * (len(value) < schema.get("minItems", 0))
        for k, each in enumerate(value):
            found += violations(each, schema.get("items", {}), f"{at}[{k}]")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{at}: lacks {name}" for name in schema.get("required", ()) if name not in value]
        found += [
            f"{at}: has {name}" for name in value if not schema.get("additionalProperties", True) and name not in known
        ]
        for name, each in value.items():
            found += violations(each, known.get(name, {}), f"{at}.{name}")
    return found


def exported(graph: AttributionGraph, supernodes: Sequence[Supernode] = (), **known: str) -> dict[str, Any]:
    """The export as a reader has it: through JSON."""
    data = to_neuronpedia(graph, "my run: 1", Origin("org/model", 0.25, **known), supernodes)
    return json.loads(json.dumps(data, allow_nan=False))


def with_roles(graph: AttributionGraph) -> AttributionGraph:
    for _, data in graph.digraph.nodes(data=True):
        data["position"] = {0: "claim", 1: "end", None: None}[data["position"]]
    meta = {"behaviour": "logit_diff", "prompts": 7, "positions": ["rest", "claim", "end"]}
    return AttributionGraph(graph.digraph, meta)


def mixed_sites(graph: AttributionGraph) -> AttributionGraph:
    """A copy of every latent and error of a layer at the MLP's and attention's output of the same layer."""
    digraph = nx.DiGraph(graph.digraph)
    for name, data in list(graph.digraph.nodes(data=True)):
        for stream in ("mlp_out", "attn_out"):
            if data["kind"] in ("latent", "error"):
                site = str(data["site"]).replace("resid_pre", stream)
                copy = name.replace(data["site"], site)
                digraph.add_node(copy, **data | {"site": site})
                digraph.add_edge(copy, TARGET, weight=1.0, contribution=1.0)
    return AttributionGraph(digraph, graph.meta)


def test_the_checker_finds_faults() -> None:
    good = exported(random_graph(0))
    assert violations(good, SCHEMA) == []
    for path, value in [
        (("nodes", 0, "feature"), "12"), (("nodes", 0, "layer"), 3), (("nodes", 0, "influence"), 1.5),
        (("nodes", 0, "feature_type"), "latent"), (("metadata", "schema_version"), 2), (("metadata", "slug"), "a b"),
        (("links", 0, "weight"), None), (("qParams", "supernodes"), [["alone", "1_resid_pre_1_0"]]), (("nodes",), []),
    ]:  # fmt: skip
        bad = json.loads(json.dumps(good))
        place = bad
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert violations(bad, SCHEMA), path
        del place[path[-1]]
        assert violations(bad, SCHEMA) or path[-1] in ("influence", "supernodes", 0), path
    assert violations(good | {"extra": 1}, SCHEMA)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999), roles=st.booleans(), mixed=st.booleans(), pruned=st.booleans(), named=st.booleans(),
    label=st.text(max_size=30),
)  # fmt: skip
def test_it_is_valid_whatever_the_graph(
    seed: int, roles: bool, mixed: bool, pruned: bool, named: bool, label: str
) -> None:
    graph = random_graph(seed, width=6)
    if mixed:
        graph = mixed_sites(graph)
    if roles:
        graph = with_roles(graph)
    if pruned:
        graph = prune(graph)
    if named:
        for name, data in graph.digraph.nodes(data=True):
            data["label"] = label + name
    groups = [group for group in random_groups(graph, seed) if len(group.members) > 1]
    data = exported(graph, supernodes=groups if pruned else ())
    assert violations(data, SCHEMA) == []
    nodes = {node["node_id"]: node for node in data["nodes"]}
    assert len(nodes) == len(data["nodes"])
    assert {link[end] for link in data["links"] for end in ("source", "target")} <= set(nodes)
    # what the reader does: the page's own layers, the token under each node, the number after the first "(p="
    layers = [
        float(node["layer"]) for node in data["nodes"] if node["feature_type"] != "logit" and node["layer"] != "E"
    ]
    assert max(layers) >= 1
    (logit,) = (node for node in data["nodes"] if node["feature_type"] == "logit")
    assert float(logit["layer"]) > max(layers)
    assert float(logit["clerp"].split("(p=")[1].split(")")[0]) == 0.25
    assert re.search(r'".*"', logit["clerp"], re.DOTALL)
    assert all(node["ctx_idx"] < len(data["metadata"]["prompt_tokens"]) for node in data["nodes"])


def test_every_number_is_the_graphs() -> None:
    graph = prune(random_graph(4, width=6))
    data = exported(graph)
    found = influence(random_graph(4, width=6)).nodes
    assert data["metadata"]["prompt_tokens"] == ["<s>", " Paris"]
    assert data["metadata"]["prompt"] == "<s> Paris"
    assert (data["metadata"]["slug"], data["metadata"]["scan"]) == ("my-run-1", "org-model")
    assert data["metadata"]["pruning_settings"] == {"node_threshold": 0.8, "edge_threshold": 0.98}
    named = dict(zip(graph.digraph, data["nodes"], strict=True))
    for name, node in named.items():
        given = graph.digraph.nodes[name]
        kind = given["kind"]
        assert node["ctx_idx"] == (1 if kind == "target" else given["position"])
        if kind == "latent":
            layer = int(given["site"].split(".")[1])
            assert node["node_id"] == f"{layer}_resid_pre_{given['latent']}_{given['position']}"
            assert node["layer"] == str(layer)
            diagonal = (math.isqrt(8 * node["feature"] + 1) - 1) // 2  # Cantor, undone
            index = node["feature"] - diagonal * (diagonal + 1) // 2
            assert (diagonal - index, index) == (layer, given["latent"])
            assert node["clerp"] == (given["label"] or f"latent {given['latent']}")
            assert (node["attribution"], node["low"], node["high"]) == (
                given["attribution"], given["low"], given["high"],
            )  # fmt: skip
        elif kind == "error":
            assert (node["feature"], node["feature_type"]) == (-1, "mlp reconstruction error")
        elif kind == "embedding":
            assert (node["layer"], node["influence"]) == ("E", None)
    sited = [name for name in found if name.startswith("blocks")]
    total = sum(found[name] for name in sited if name in graph.digraph or not name.endswith("error"))
    for name, node in named.items():
        if name in sited:
            above = sum(found[each] for each in named if each in sited and (-found[each], each) <= (-found[name], name))
            assert node["influence"] == pytest.approx(above / total)
    for (source, target, values), link in zip(graph.digraph.edges(data=True), data["links"], strict=True):
        assert link["source"] == named[source]["node_id"]
        assert link["target"] == named[target]["node_id"]
        assert (link["weight"], link["contribution"]) == (values["weight"], values["contribution"])


def test_a_set_has_its_roles_as_tokens() -> None:
    data = exported(with_roles(random_graph(2)))
    assert data["metadata"]["prompt_tokens"] == ["claim", "end"]
    assert data["metadata"]["prompt"] == "claim end"
    assert "mean over 7 prompts" in data["metadata"]["info"]["description"]
    for node in data["nodes"]:
        if node["feature_type"] != "logit":
            assert data["metadata"]["prompt_tokens"][node["ctx_idx"]] == node["position"]


def test_the_prompts_text_and_the_answer_when_they_are_known() -> None:
    data = exported(random_graph(2), prompt="The capital:  Paris", answer=" Rome (p=1)")
    assert data["metadata"]["prompt"] == "The capital:  Paris"
    assert data["metadata"]["prompt_tokens"] == ["<s>", " Paris"]
    (logit,) = (node for node in data["nodes"] if node["feature_type"] == "logit")
    assert logit["clerp"] == 'Output " Rome (p =1)" (p=0.250000)'


def test_positions_without_tokens_stand_side_by_side() -> None:
    graph = random_graph(2)
    graph.meta["tokens"] = ["one"]
    assert exported(graph)["metadata"]["prompt_tokens"] == ["0", "1"]


def test_supernodes_are_pinned_by_id() -> None:
    graph = prune(random_graph(8, width=12, positions=1), Keep(nodes=1))
    groups = [group for group in random_groups(graph, 3) if len(group.members) > 1]
    data = exported(graph, supernodes=groups)
    ids = dict(zip(graph.digraph, (node["node_id"] for node in data["nodes"]), strict=True))
    assert len(groups) > 2
    assert data["qParams"]["supernodes"] == [[g.label, *(ids[member] for member in g.members)] for g in groups]
    assert data["qParams"]["pinnedIds"] == [ids[member] for group in groups for member in group.members]
    with pytest.raises(MediationError, match="supernode"):
        exported(quotient(graph, groups))


def test_a_label_cannot_pose_as_the_probability() -> None:
    graph = random_graph(3)
    graph.digraph.nodes[TARGET]["label"] = 'x (p=0.99) "y"'
    (logit,) = (node for node in exported(graph)["nodes"] if node["feature_type"] == "logit")
    assert logit["clerp"] == "Output \"x (p =0.99) 'y'\" (p=0.250000)"


def test_a_graph_of_layer_0_is_refused() -> None:
    graph = random_graph(1, layers=1)
    for _, data in graph.digraph.nodes(data=True):
        if data["site"]:
            data["site"] = "blocks.0.hook_resid_pre"
    with pytest.raises(MediationError, match="layer 0"):
        exported(graph)
    for _, data in graph.digraph.nodes(data=True):
        if data["site"]:
            data["site"] = "somewhere"
    with pytest.raises(MediationError, match="somewhere"):
        exported(graph)


def test_edges_that_carry_nothing_make_no_division_by_zero() -> None:
    graph = random_graph(1)
    for _, _, data in graph.digraph.edges(data=True):
        data["contribution"] = 0.0
    assert violations(exported(graph), SCHEMA) == []


def test_cantor_counts_along_diagonals() -> None:
    pairs = sorted(itertools.product(range(40), repeat=2), key=lambda pair: (sum(pair), pair[1]))
    counted = [pair for pair in pairs if sum(pair) < 40]
    assert [cantor(*pair) for pair in counted] == list(range(len(counted)))


def test_a_behaviour_as_a_probability() -> None:
    """Two logits' difference is the log odds of one against the other; a log-probability is one."""
    assert probability(Behaviour.LOGIT_DIFF, math.log(0.9 / 0.1)) == pytest.approx(0.9)
    assert probability(Behaviour.LOGPROB, math.log(0.9)) == pytest.approx(0.9)
    assert probability(Behaviour.LOGIT_DIFF, -800.0) == pytest.approx(0.0)


@given(text=st.text(max_size=20))
def test_names_hold_no_more_than_neuronpedia_takes(text: str) -> None:
    assert re.fullmatch("[a-zA-Z0-9_.-]+", plain_name(text))
