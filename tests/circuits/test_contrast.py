"""Two runs compared, where the difference is planted and where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from circuits.contrast import Contrast, contrast
from circuits.graph import TARGET
from mediation.commands import Source, trace_command
from mediation.errors import MediationError
from mediation.prompts import Half
from mediation.runs import Run
from mediation.statistics import mean_difference
from tests.circuits.planted_runs import HIGH, LOW, NODES, node_id, planted_run
from tests.setups import random_dictionary, tiny

ENDS = (("embed", "a"), ("a", "c"), ("b", "c"), ("c", TARGET), ("e", TARGET))


def values(seed: int, n: int, shift: float, prefix: str = "p") -> tuple[dict, dict]:
    """Attributions of about 1 for a, b, c and e, a's by `shift` higher, and the edge from a to c by -`shift`."""
    rng = np.random.default_rng(seed)
    names = [f"{prefix}{k:02d}" for k in range(n)]
    nodes = {p: {name: rng.normal(1, 0.4) + shift * (name == "a") for name in NODES} for p in names}
    edges = {p: {ends: rng.normal(1, 0.4) - shift * (ends == ("a", "c")) for ends in ENDS} for p in names}
    return nodes, edges


def run_of(folder: Path, seed: int, n: int = 24, shift: float = 0.0, prefix: str = "p", **more: Any) -> Run:
    return planted_run(folder, *values(seed, n, shift, prefix), **more)


def node(found: Contrast, name: str) -> dict[str, Any]:
    return found.nodes.row(by_predicate=pl.col("id") == node_id(name), named=True)


def edge(found: Contrast, source: str, target: str) -> dict[str, Any]:
    into = target if target == TARGET else node_id(target)
    return found.edges.row(by_predicate=(pl.col("source") == source) & (pl.col("target") == into), named=True)


@pytest.mark.parametrize("prefix", ["p", "q"])
def test_a_planted_difference_is_found_with_its_sign_and_nothing_else(tmp_path: Path, prefix: str) -> None:
    """Pairs where the prompts share ids; two samples where they do not. Ten draws: of 70 other nodes and edges about
    two are claimed at this rate."""
    others = 0
    for seed in range(10):
        first = run_of(tmp_path / f"a{seed}", seed, shift=1.0)
        second = run_of(tmp_path / f"b{seed}", seed + 100, prefix=prefix)
        found = contrast(first, second)
        assert found.paired == (prefix == "p")
        assert found.prompts == (12, 12)
        assert node(found, "a")["difference"] == pytest.approx(1.0, abs=0.45)
        assert edge(found, node_id("a"), "c")["difference"] == pytest.approx(-1.0, abs=0.45)
        nodes, edges = found.nodes.filter(pl.col("q") <= 0.05), found.edges.filter(pl.col("q") <= 0.05)
        assert nodes["id"][0] == edges["source"][0] == node_id("a")
        others += len(nodes) + len(edges) - 2
        assert found.summary()["significant"] == {"nodes": len(nodes), "edges": len(edges)}
    assert others <= 6
    assert found.smallest_p == (2 / 2**12 if found.paired else 1e-4)
    back = contrast(second, first)
    assert node(back, "a")["difference"] == pytest.approx(-node(found, "a")["difference"])
    if found.paired:
        assert node(back, "a")["p"] == node(found, "a")["p"]


@pytest.mark.filterwarnings("ignore::mediation.errors.FidelityWarning")
def test_a_model_against_one_with_the_answers_exchanged_is_twice_itself(tmp_path: Path) -> None:
    """The second model's unembedding has the rows of the two answers exchanged: its effects are the opposite."""
    first = tiny(tmp_path / "first")
    second = tiny(tmp_path / "second")
    answers = [second.encode(word)[-1] for word in ("w3", "w4")]
    unembedding = second.module.get_output_embeddings().weight.data
    unembedding[answers] = unembedding[answers[::-1]]
    second.save(tmp_path / "second")
    saes = [f"blocks.{layer}.hook_resid_pre" for layer in (1, 2)]
    for seed, name in enumerate(saes):
        random_dictionary(tmp_path / "saes" / name, name, d_sae=12, seed=seed)
    rows = [
        {"clean": f"w1 w{k} w9 w20", "corrupt": f"w1 w{k + 20} w9 w20", "answer": " w3", "wrong_answer": " w4"}
        for k in range(10, 26)
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    runs = []
    for model in (first, second):
        folder = tmp_path / f"run-{len(runs)}"
        source = Source(str(tmp_path / model.name), (str(tmp_path / "saes"),), str(prompts), "cpu")
        trace_command(source, {"steps": 4, "sample": 4, "top": 6}, folder, quiet=True)
        runs.append(Run.open(folder))
    found = contrast(*runs)
    assert found.paired
    for table, least in ((found.nodes, 12), (found.edges, 20)):
        assert len(table) >= least
        scale = float(table["first"].abs().max())
        assert (table["second"] + table["first"]).abs().max() < 1e-3 * scale
        assert (table["difference"] - 2 * table["first"]).abs().max() < 2e-3 * scale


def test_only_evaluation_prompts_count_and_p_is_that_of_their_values(tmp_path: Path) -> None:
    a, b = values(0, 16, 0.3), values(1, 16, 0.0)
    first, second = planted_run(tmp_path / "a", *a), planted_run(tmp_path / "b", *b)
    found = contrast(first, second)
    odd = [p for p in sorted(a[0]) if int(p[-1]) % 2]
    sides = [np.array([[nodes[p]["a"]] for p in odd]) for nodes, _ in (a, b)]
    expected = mean_difference(*sides, paired=True)
    row = node(found, "a")
    assert row["p"] == pytest.approx(expected.p[0])
    assert row["difference"] == pytest.approx(expected.difference[0])
    assert row["first"] == pytest.approx(sides[0].mean())


def test_order_of_prompts_does_not_matter(tmp_path: Path) -> None:
    nodes, edges = values(0, 40, 0.3)
    second = run_of(tmp_path / "b", 1, 40, prefix="q")
    found = contrast(planted_run(tmp_path / "a", nodes, edges), second)
    turned = contrast(planted_run(tmp_path / "turned", dict(reversed(nodes.items())), edges, shards=7), second)
    assert not found.exact
    for one, other in ((found.nodes, turned.nodes), (found.edges, turned.edges)):
        keys = ["id"] if "id" in one.columns else ["source", "target"]
        assert one.sort(keys).equals(other.sort(keys))


def test_nodes_of_either_graph_count_and_edges_only_where_both_measured_them(tmp_path: Path) -> None:
    """c is in the first graph alone: its attribution is known in both runs, its in-edges in one."""
    first, second = run_of(tmp_path / "a", 0), run_of(tmp_path / "b", 1, chosen=("a", "b", "e"))
    found = contrast(first, second)
    assert node(found, "c")["graphs"] == "first"
    assert node(found, "c")["second"] == pytest.approx(1.0, abs=0.4)
    assert node(found, "c")["p"] is not None
    assert edge(found, node_id("a"), "c")["p"] is None
    assert edge(found, node_id("c"), TARGET)["p"] is not None
    assert any("2 edges" in note for note in found.notes)
    assert all(row["p"] is not None for row in found.summary()["edges"])


def test_prompts_that_either_run_chose_nodes_on_are_left_out(tmp_path: Path) -> None:
    nodes, edges = values(0, 16, 0.0)
    other = {p: Half.EVALUATION if k < 8 else Half.DISCOVERY for k, p in enumerate(nodes)}
    first, second = planted_run(tmp_path / "a", nodes, edges), planted_run(tmp_path / "b", nodes, edges, halves=other)
    found = contrast(first, second)
    assert found.prompts == (4, 4)
    assert found.paired
    assert any("8 held-out prompts" in note for note in found.notes)
    opposite = {p: Half.DISCOVERY if int(p[-1]) % 2 else Half.EVALUATION for p in nodes}
    with pytest.raises(MediationError, match="No held-out prompt"):
        contrast(first, planted_run(tmp_path / "c", nodes, edges, halves=opposite))


def test_sites_that_only_one_run_has_take_the_edges_away(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", 0)
    second = run_of(tmp_path / "b", 1, hashes={LOW: "low", "blocks.0.hook_mlp_out": "more", HIGH: "high"})
    found = contrast(first, second)
    assert len(found.nodes) == 4
    assert found.edges.is_empty()
    assert any("other sites" in note for note in found.notes)


def test_runs_that_do_not_compare_are_refused_in_one_sentence(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", 0)
    with pytest.raises(MediationError, match="no site in common"):
        contrast(first, run_of(tmp_path / "b", 1, hashes={"blocks.5.hook_resid_pre": "low"}))
    with pytest.raises(MediationError, match=f"different dictionaries at {HIGH}"):
        contrast(first, run_of(tmp_path / "c", 1, hashes={LOW: "low", HIGH: "other"}))
    with pytest.raises(MediationError, match="baseline corrupt and zero"):
        contrast(first, run_of(tmp_path / "d", 1, baseline="zero"))
    with pytest.raises(MediationError, match="not that of a trace"):
        contrast(first, Run.create(tmp_path / "e", {}))


def test_two_draws_of_one_kind_of_prompts_hardly_ever_differ(tmp_path: Path) -> None:
    """20 pairs of runs without a difference: a claim among the nodes in one of them is expected."""
    claims = [
        contrast(run_of(tmp_path / f"a{k}", k, 16), run_of(tmp_path / f"b{k}", 100 + k, 16)).summary()["significant"]
        for k in range(20)
    ]
    assert sum(each["nodes"] > 0 for each in claims) <= 4
    assert sum(each["edges"] > 0 for each in claims) <= 4
