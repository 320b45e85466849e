"""The graph of a run over residual, attention and MLP dictionaries and a transcoder together."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from circuits.build import build_graph
from circuits.graph import TARGET, AttributionGraph, NodeKind
from mediation.dictionaries import Dictionary
from mediation.prompts import PromptSet
from mediation.runs import Run
from mediation.sites import Site
from mediation.trace import TraceSettings, prepare, trace
from tests.setups import random_dictionary, tiny

SITES = ("blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out")
ROWS = [
    {"clean": f"w1 w{k} w9 w20", "corrupt": f"w1 w{k + 9} w9 w20", "answer": " w3", "wrong_answer": " w4"}
    for k in (10, 14, 18)
] + [{"clean": "w7 w2 w5 w6 w20", "corrupt": "w7 w8 w5 w6 w20", "answer": " w3", "wrong_answer": " w4"}]


def dictionaries(folder: Path) -> list[Dictionary]:
    reads = {SITES[3]: "blocks.2.mlp.hook_in"}
    return [
        random_dictionary(folder / name, name, d_sae=12, seed=i, reads=reads.get(name)) for i, name in enumerate(SITES)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[AttributionGraph, Run]:
    folder = tmp_path_factory.mktemp("build")
    model, found = tiny(folder / "model"), dictionaries(folder)
    settings = TraceSettings(top=500, sample=40, batch_size=2, steps=48)
    prepared = prepare(PromptSet.from_rows(ROWS), model, found, settings)
    run = Run.create(folder / "run", {})
    trace(model, found, prepared, run, settings)
    return build_graph(model, found, prepared, run, settings), run


@pytest.mark.filterwarnings("ignore::mediation.errors.FidelityWarning")
def test_every_site_is_in_the_graph_and_nothing_dangles(built: tuple[AttributionGraph, Run]) -> None:
    graph, _ = built
    digraph = graph.digraph
    sites = {data["site"] for _, data in digraph.nodes(data=True) if data["kind"] == NodeKind.LATENT}
    assert sites == set(SITES)
    into_first = {source.split("/")[0] for source, target in digraph.edges if target.startswith(SITES[0])}
    assert into_first == {"embed"}
    assert all(digraph.out_degree(name) for name in digraph if name != TARGET)
    for source, target in digraph.edges:
        if target != TARGET and not source.startswith("embed"):
            assert Site.parse(source.split("/")[0]).depth < Site.parse(target.split("/")[0]).depth


def test_in_edges_of_the_behaviour_sum_to_the_total_effect(built: tuple[AttributionGraph, Run]) -> None:
    """No node was left out (top is above their number), so nothing of the effect is either."""
    graph, _ = built
    weights = sum(weight for _, _, weight in graph.digraph.in_edges(TARGET, data="weight"))
    assert weights == pytest.approx(graph.meta["total_effect"], abs=5e-3)
    direct = {source.split("/")[0] for source, _ in graph.digraph.in_edges(TARGET)}
    assert direct == set(SITES[1:])  # the residual site hides what is before it


def test_a_sample_of_edges_is_measured_and_kept(built: tuple[AttributionGraph, Run]) -> None:
    _, run = built
    sample = run.read("edge_calibration")
    agreed = run.info["trust"]["edges_vs_exact"]
    assert agreed["n"] == len(sample) >= 80
    assert 0 < agreed["pearson"] <= 1
    into = sample.filter(pl.col("target") == TARGET)
    assert 0 < len(into) < len(sample)
    assert torch.isfinite(sample["exact_effect"].to_torch()).all()
