"""Rankings: paths against all paths written out, edges against their definition, planted nodes and edges found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from circuits.ablation import EMBEDDING, Nodes
from circuits.edges import REST
from circuits.graph import TARGET
from circuits.proof import Discovery, Kind, ProofSettings, discover, place_prompts
from circuits.rankings import EdgeScores, NodeScores, edges_by_ends, edges_by_paths, node_ids, path_strength
from mediation.commands import Source, load_dictionaries
from mediation.organisms.compiled import GATES, Truth, compile_circuit
from mediation.prompts import PromptSet
from mediation.subject import SubjectModel
from mediation.trace import TraceSettings


def random_scores(seed: int) -> EdgeScores:
    """Two embeddings and three sites of three nodes; most edges forwards are there."""
    generator = torch.Generator().manual_seed(seed)
    site = torch.tensor([EMBEDDING] * 2 + [0] * 3 + [1] * 3 + [2] * 3)
    n = len(site)
    nodes = Nodes(site, torch.zeros(n, dtype=torch.long), torch.full((n,), REST))
    there = (torch.rand(n + 1, n, generator=generator) < 0.7) & (torch.cat([site, torch.tensor([9])])[:, None] > site)
    contribution = torch.where(there, torch.randn(n + 1, n, generator=generator), 0.0)
    errors = torch.rand(n + 1, generator=generator) * (torch.cat([site, torch.tensor([9])]) > 0)
    own = torch.randn(n, generator=generator)
    return EdgeScores(NodeScores(nodes, own, own.abs()), contribution, there, errors)


@pytest.mark.parametrize("errors_kept", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_an_edge_counts_its_strongest_path(seed: int, errors_kept: bool) -> None:
    scores = random_scores(seed)
    n = len(scores.ends.nodes)
    total = scores.contribution.abs().sum(dim=1) + scores.errors
    best = torch.zeros(n + 1, n)

    def walk(node: int, carried: float, edges: list[tuple[int, int]]) -> None:
        """Backwards from the behaviour; every source is tried."""
        sources = scores.there[node].nonzero()[:, 0].tolist() if node <= n else []
        if errors_kept and float(total[node]) > 0:
            end(carried * float(scores.errors[node] / total[node]), edges)
        if not sources:
            end(carried, edges)
        for source in sources:
            share = float(scores.contribution[node, source].abs() / total[node])
            walk(source, carried * share, [*edges, (node, source)])

    def end(carried: float, edges: list[tuple[int, int]]) -> None:
        for d, u in edges:
            best[d, u] = max(float(best[d, u]), carried)

    walk(n, 1.0, [])
    assert best.max() > 0
    assert torch.allclose(path_strength(scores, errors_kept), best, atol=1e-6)


def test_small_circuits_of_paths_have_no_loose_ends() -> None:
    """Every edge among the first comes with a way in and a way out among them, once ties are whole."""
    scores = random_scores(1)
    n = len(scores.ends.nodes)
    strength = path_strength(scores, errors_kept=False).flatten()
    order = edges_by_paths(scores, errors_kept=False)
    for size in range(1, 20):
        if strength[order[size - 1]] == strength[order[size]]:
            continue
        kept = [(int(each) // n, int(each) % n) for each in order[:size]]
        into, out = {d for d, _ in kept}, {u for _, u in kept}
        assert all(d == n or d in out for d, _ in kept)
        assert all(not scores.there[u].any() or u in into for _, u in kept)


def test_ends_rank_by_the_weaker_then_the_stronger() -> None:
    scores = random_scores(2)
    n = len(scores.ends.nodes)
    own = torch.cat([scores.ends.attribution.abs(), torch.tensor([torch.inf])])
    order = [(int(each) // n, int(each) % n) for each in edges_by_ends(scores, scores.ends.attribution)]
    assert len(order) == scores.number
    keys = [tuple(sorted((float(own[d]), float(own[u])))) for d, u in order]
    assert keys == sorted(keys, reverse=True)


# Where the circuit is known ------------------------------------------------------------------------------------


def discovered(folder: Path, seed: int, kinds: tuple[str, ...], batch_size: int = 16) -> tuple[Discovery, Truth, list]:
    truth = compile_circuit(seed, folder, kinds, prompts=96)
    model = SubjectModel.load(folder / "model", device="cpu")
    dictionaries = load_dictionaries(Source("", (str(folder / "saes"),), ""), "cpu")
    names: dict[str, int] = {}
    traced = TraceSettings(steps=8, batch_size=batch_size, top=40)
    half = place_prompts(model, dictionaries, PromptSet.from_jsonl(folder / "prompts.jsonl"), traced, names)
    return discover(model, dictionaries, half, traced, ProofSettings()), truth, list(names)


def recovered(found: Discovery, truth: Truth, places: list[str], kind: Kind, name: str) -> float:
    """Precision, which is recall, of the first as many as are true."""
    (ranking,) = (each for each in found.rankings if each.kind is kind and each.name == name)
    true = truth.nodes if kind is Kind.NODES else truth.edges
    members = ranking.members(ranking.orders[0], found.ids(ranking, places))[: len(true)]
    return len(true & {a if b is None else (a, b) for a, b in members}) / len(true)


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_nodes_and_edges_are_found(tmp_path: Path, seed: int) -> None:
    """Sums are linear, so every true node and edge is found and no decoy; activation takes decoys."""
    found, truth, places = discovered(tmp_path, seed, ("sum",))
    assert recovered(found, truth, places, Kind.NODES, "circuit") == 1.0
    assert recovered(found, truth, places, Kind.EDGES, "circuit") == 1.0
    assert recovered(found, truth, places, Kind.EDGES, "contribution") == 1.0
    assert recovered(found, truth, places, Kind.NODES, "activation") < 0.9
    assert recovered(found, truth, places, Kind.NODES, "random") < 0.9
    assert recovered(found, truth, places, Kind.EDGES, "random") < 0.7
    own = dict(zip(found.ids(found.rankings[0], places), found.nodes.attribution.tolist(), strict=True))
    assert max(abs(value) for node, value in own.items() if node not in truth.nodes) < 1e-3


def test_gates_that_saturate(tmp_path: Path) -> None:
    found, truth, places = discovered(tmp_path, 0, GATES)
    assert recovered(found, truth, places, Kind.NODES, "circuit") >= 0.8
    assert recovered(found, truth, places, Kind.EDGES, "circuit") >= 0.8


def test_neither_the_batch_size_nor_the_order_changes_scores(tmp_path: Path) -> None:
    found, _, places = discovered(tmp_path / "a", 0, GATES)
    other, _, _ = discovered(tmp_path / "b", 0, GATES, batch_size=5)
    ids, same = (each.ids(each.rankings[0], places) for each in (found, other))
    a, b = (
        dict(zip(names, each.nodes.attribution.tolist(), strict=True)) for names, each in ((ids, found), (same, other))
    )
    assert a == pytest.approx(b, abs=1e-4)
    assert found.links.contribution.sum() == pytest.approx(float(other.links.contribution.sum()), abs=1e-3)


def test_ids_are_those_of_graphs() -> None:
    nodes = Nodes(torch.tensor([EMBEDDING, 1]), torch.tensor([0, 1]), torch.tensor([REST, 7]))
    assert node_ids(nodes, ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"], ["end", "rest"]) == [
        "embed/end", "blocks.1.hook_mlp_out/rest/7",
    ]  # fmt: skip
    assert TARGET == "target"
