"""The graph of a run over residual, attention and MLP dictionaries and a transcoder together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from circuits.build import build_graph
from circuits.edges import Sources, Targets, edges
from circuits.graph import TARGET, AttributionGraph, NodeKind
from circuits.prompt_graph import prompt_graph
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.frozen import Semantics
from mediation.nodes import site_states
from mediation.prompts import Baseline, Half, PromptSet
from mediation.runs import Run
from mediation.sites import Site
from mediation.subject import SubjectModel
from mediation.trace import (
    TraceSettings,
    error_warnings,
    prepare,
    prompt_ids,
    prompt_table,
    role_of,
    top_latents,
    trace,
)
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
    return run_of(folder / "run", model, found, ROWS, top=500)


def run_of(
    folder: Path, model: SubjectModel, found: list[Dictionary], rows: list[dict], **chosen: Any
) -> tuple[AttributionGraph, Run]:
    settings = TraceSettings(**({"sample": 40, "batch_size": 2, "steps": 48} | chosen))
    prepared = prepare(PromptSet.from_rows(rows), model, found, settings, alone=len(rows) == 1)
    run = Run.create(folder, {})
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


def test_a_sites_errors_that_carry_much_are_warned_of(built: tuple[AttributionGraph, Run]) -> None:
    """Random dictionaries miss nearly everything."""
    graph, run = built
    shares, warnings = run.info["trust"]["error_share"], run.info["trust"]["warnings"]
    loud = [site for site, share in shares.items() if share > 0.2]
    assert loud
    assert len(warnings) == len(loud)
    assert all(f"{shares[site]:.0%}" in text and site in text for site, text in zip(loud, warnings, strict=True))
    assert graph.meta["warnings"] == warnings
    assert error_warnings({"quiet": 0.2, "loud": 0.21})[0].startswith("21% of the attribution at loud")
    assert len(error_warnings({"quiet": 0.2, "loud": 0.21})) == 1


def test_a_linear_graph_has_the_edges_of_the_linear_model(tmp_path: Path) -> None:
    """Of the behaviour, whose in-edges are all kept; under the zero baseline no position is without a source."""
    model, found = tiny(tmp_path / "model"), dictionaries(tmp_path)
    chosen: dict[str, Any] = {"semantics": Semantics.LINEAR, "baseline": Baseline.ZERO}
    _, run = run_of(tmp_path / "run", model, found, ROWS[:1], top=500, **chosen)
    (batch,) = prepare(PromptSet.from_rows(ROWS[:1]), model, found, TraceSettings(**chosen)).batches
    sources = [Sources.of(state) for state in site_states(model, batch, found, Baseline.ZERO)]
    sources.append(Sources.embeddings(model, batch, Baseline.ZERO))
    gradient, linear = (
        edges(model, batch, sources, [Targets.behaviour(batch)], semantics=each).table() for each in Semantics
    )
    stored = run.read("edges").filter(pl.col("target") == TARGET).join(linear, on="source")
    assert len(stored) == len(linear)
    assert (stored["weight"] - stored["weight_right"]).abs().max() < 1e-5
    assert (linear["weight"] - gradient["weight"]).abs().max() > 1e-2


def test_what_may_be_missed_is_stored_beside_the_graph(built: tuple[AttributionGraph, Run]) -> None:
    graph, run = built
    held_out = prompt_ids(run, Half.EVALUATION)
    sample = run.read("calibration").filter(pl.col("prompt").is_in(held_out) & pl.col("latent").is_not_null())
    missed = graph.meta["calibration"]["important_missed"]
    assert missed == run.info["trust"]["important_missed"]
    assert (missed["left_out"], missed["at_most"]) == (0, 0.0)  # no latent was left out
    assert missed["kept"] == len(run.read("kept_calibration")) >= 40
    assert len(sample) > 0
    patched = run.read("calibration").join(run.read("nodes"), on=["prompt", "site", "position", "latent"])
    assert (patched["ig"] == patched["ig_right"]).all()
    assert (patched["role"] == patched["role_right"]).all()


# Graphs of single prompts ----------------------------------------------------------------------------------


def test_a_prompts_own_graph_carries_its_own_effect(built: tuple[AttributionGraph, Run]) -> None:
    _, run = built
    effects = prompt_table(run)
    for prompt in effects["prompt"].unique():
        graph = prompt_graph(run, prompt)
        mine = effects.filter(pl.col("prompt") == prompt)
        total = mine["clean"][0] - mine["baseline"][0]
        assert graph.meta["total_effect"] == pytest.approx(total)
        into = graph.digraph.in_edges(TARGET, data="weight")
        assert sum(weight for *_, weight in into) == pytest.approx(total, abs=1e-2)
        nodes = run.read("nodes").filter(pl.col("prompt") == prompt)
        for name, data in graph.digraph.nodes(data=True):
            assert name == TARGET or isinstance(data["position"], int)
            assert name == TARGET or name.split("/")[1] == str(data["position"])
            if data["kind"] == NodeKind.LATENT:
                row = nodes.row(
                    by_predicate=(pl.col("site") == data["site"])
                    & (pl.col("position") == data["position"])
                    & (pl.col("latent") == data["latent"]),
                    named=True,
                )
                assert (data["attribution"], data["activation"]) == (row["ig"], row["clean"])
                assert graph.meta["roles"][data["position"]] == row["role"]


def test_graphs_of_prompts_add_up_to_the_graph_of_the_set(built: tuple[AttributionGraph, Run]) -> None:
    """With a prompt's roles for positions, and its edges over the number of prompts."""
    whole, run = built
    prompts = run.read("prompts")["prompt"].unique().to_list()
    sums: Counter[tuple[str, str]] = Counter()
    for prompt in prompts:
        graph = prompt_graph(run, prompt)

        def named(name: str, roles: list[str] = graph.meta["roles"]) -> str:
            head, *rest = name.split("/")
            return "/".join([head, roles[int(rest[0])], *rest[1:]]) if rest else head

        for source, target, weight in graph.digraph.edges(data="weight"):
            sums[named(source), named(target)] += weight / len(prompts)
    edges = {(source, target): weight for source, target, weight in whole.digraph.edges(data="weight")}
    assert sums.keys() == edges.keys()
    for ends, weight in edges.items():
        assert sums[ends] == pytest.approx(weight, abs=1e-6)


def test_tokens_and_roles_of_a_prompt_are_its_own(built: tuple[AttributionGraph, Run]) -> None:
    _, run = built
    graph = prompt_graph(run, "row-4")
    assert [text.strip() for text in graph.meta["tokens"]][-5:] == ["w7", "w2", "w5", "w6", "w20"]
    assert graph.meta["roles"][-1] == "end"
    labels = {data["label"] for _, data in graph.digraph.nodes(data=True) if data["kind"] == NodeKind.EMBEDDING}
    assert labels <= {"token 'w2'", "token 'w5'", "token 'w6'", "token 'w20'"}
    with pytest.raises(MediationError, match="no prompt 'row-9'; its ids are row-1, row-2, row-3, row-4"):
        prompt_graph(run, "row-9")


def test_one_prompt_alone_keeps_its_positions(tmp_path: Path) -> None:
    """Positions become roles so that prompts can be aligned; a single prompt has nothing to be aligned with."""
    model, found = tiny(tmp_path / "model"), dictionaries(tmp_path)
    rows = [ROWS[3] | {"roles": {"second": [3, 5]}}]
    expected = {True: ({"@2", "@3", "second", "end"}, "rest"), False: ({"rest", "second", "end"}, "@2")}
    for alone, (some, other) in expected.items():
        prepared = prepare(PromptSet.from_rows(rows), model, found, TraceSettings(), alone=alone)
        roles = {role_of(example, at) for example in prepared.batches[0].examples for at in range(len(example))}
        assert some <= roles
        assert other not in roles
    graph, _ = run_of(tmp_path / "run", model, found, rows, top=500)
    assert {"@2", "@3", "second", "end"} <= {str(data["position"]) for _, data in graph.digraph.nodes(data=True)}


def test_answers_of_several_tokens_make_one_graph_of_a_prompt(tmp_path: Path) -> None:
    """Two sequences of different length, in different batches."""
    rows = [row | {"answer": " w3 w5 w8"} for row in ROWS]
    _, run = run_of(tmp_path / "run", tiny(tmp_path / "model"), dictionaries(tmp_path), rows, top=500, batch_size=1)
    graph = prompt_graph(run, "row-1")
    into = graph.digraph.in_edges(TARGET, data="weight")
    assert sum(weight for *_, weight in into) == pytest.approx(graph.meta["total_effect"], abs=2e-2)
    assert graph.meta["roles"][-3:] == ["end", "answer", "answer"]


# Which prompts choose --------------------------------------------------------------------------------------


def test_discovery_prompts_choose_the_nodes(tmp_path: Path) -> None:
    """With the other prompts' values exchanged between latents, the graph is of the same latents."""
    model, found = tiny(tmp_path / "model"), dictionaries(tmp_path)
    _, run = run_of(tmp_path / "run", model, found, ROWS, top=3)
    discovery = prompt_ids(run, Half.DISCOVERY)
    assert set(discovery) & set(prompt_ids(run, Half.EVALUATION)) == set()
    before = top_latents(run, 3, by_site=True, chosen_on=discovery)
    everyone = top_latents(run, 3, by_site=True)
    for number in range(2):
        shard = pl.read_parquet(run.path / "nodes" / f"{number:05d}.parquet")
        turned = pl.when(pl.col("prompt").is_in(discovery)).then(pl.col("ig")).otherwise(9.0 * pl.col("latent"))
        run.write_shard("nodes", f"{number:05d}", shard.with_columns(ig=turned))
    keys = ["site", "role", "latent"]
    assert top_latents(run, 3, by_site=True, chosen_on=discovery).select(keys).equals(before.select(keys))
    assert not top_latents(run, 3, by_site=True).select(keys).equals(everyone.select(keys))
    graph = run.read("graph_nodes")
    assert graph.select(keys).equals(before.select(keys))
