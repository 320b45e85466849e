"""Proofs from end to end: on compiled circuits, where the answer is known, and on a tiny model under every setting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from circuits.ablation import Errors
from circuits.proof import Kind, Proof, ProofSettings, place_prompts, prove
from mediation.commands import Source, load_dictionaries
from mediation.errors import MediationError
from mediation.estimators.common import behaviour
from mediation.heads import Heads
from mediation.organisms.compiled import Truth, compile_circuit
from mediation.prompts import Baseline, PromptSet, collate, tokenize
from mediation.subject import SubjectModel
from mediation.trace import TraceSettings
from tests.setups import random_dictionary, tiny

ROWS = [
    {"clean": f"w1 w{k} w9 w20", "corrupt": f"w1 w{k + 9} w9 w20", "answer": " w3", "wrong_answer": " w4", "id": k}
    for k in range(10, 18)
]


def proof_of(folder: Path, batch_size: int = 16, **settings: Errors) -> tuple[Proof, Truth, SubjectModel]:
    truth = compile_circuit(3, folder, ("sum",), prompts=24)
    model = SubjectModel.load(folder / "model", device="cpu")
    dictionaries = load_dictionaries(Source("", (str(folder / "saes"),), ""), "cpu")
    discovery, evaluation = PromptSet.from_jsonl(folder / "prompts.jsonl").split(0.5)
    traced = TraceSettings(steps=2, top=8, batch_size=batch_size)
    return prove(model, dictionaries, discovery, evaluation, traced, ProofSettings(**settings)), truth, model


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Proof, Truth, SubjectModel]:
    return proof_of(tmp_path_factory.mktemp("compiled"), errors=Errors.REMOVED)


def test_the_true_circuit_is_first_and_does_it_all(proven: tuple[Proof, Truth, SubjectModel]) -> None:
    """As many nodes and edges as are true are the true ones: faithful, and the model without them does nothing."""
    proof, truth, _ = proven
    for kind, true in ((Kind.NODES, truth.nodes), (Kind.EDGES, truth.edges)):
        members = proof.members.filter(pl.col("kind") == kind.value).sort("rank").head(len(true))
        found = {a if b is None else (a, b) for a, b in zip(members["source"], members["target"], strict=True)}
        assert found == true
        own = proof.curves[kind][0]
        larger = [index for index, size in enumerate(own.sizes) if size >= len(true)]
        assert own.faithfulness()[larger] == pytest.approx(1.0, abs=1e-2)
        assert own.completeness()[larger] == pytest.approx(0.0, abs=1e-2)


def test_baselines_are_worse_at_equal_size(proven: tuple[Proof, Truth, SubjectModel]) -> None:
    proof, _, _ = proven
    for kind, figures in proof.summary(seed=0).items():
        names = list(figures["scores"])
        assert names[0] == "circuit"
        assert {"random", "activation", "neurons"} < set(names)
        assert ("nodes' attribution" in names) == (kind == Kind.EDGES)
        for name, each in figures["against"].items():
            if name not in ("contribution", "neurons"):  # the compiled latents are coordinates
                assert each["cpr_log"]["low"] > 0, (kind, name)
                assert each["baseline_closer_at"] == [], (kind, name)


def test_ends_of_the_curves(proven: tuple[Proof, Truth, SubjectModel]) -> None:
    """Nothing kept is the empty circuit, and the complement of nothing the model; every ranking ends in one circuit."""
    proof, _, _ = proven
    for curves in proof.curves.values():
        for curve in curves:
            assert np.allclose(curve.circuit[0], curve.empty, atol=1e-3)
            assert np.array_equal(curve.clean, curves[0].clean)
        last = [curve.circuit[-1] for curve in curves if curve.name != "neurons"]
        assert all(np.allclose(each, last[0], atol=1e-3) for each in last)
    assert np.allclose(proof.curves[Kind.NODES][0].complement[0], proof.curves[Kind.NODES][0].clean, atol=1e-2)


def test_clean_is_the_behaviour_of_the_evaluation_prompts(proven: tuple[Proof, Truth, SubjectModel]) -> None:
    proof, _, model = proven
    folder = Path(model._files.weights[0]).parents[1]
    _, evaluation = PromptSet.from_jsonl(folder / "prompts.jsonl").split(0.5)
    batch = collate(tokenize(evaluation, model))
    clean = proof.curves[Kind.NODES][0].clean
    assert clean == pytest.approx(behaviour(model, batch).numpy(), abs=1e-3)
    members = proof.table(seed=0).filter(kind="nodes", ranking="circuit")
    assert members["clean"].to_list() == pytest.approx([clean.mean()] * len(members))


def test_the_batch_size_changes_nothing(tmp_path: Path, proven: tuple[Proof, Truth, SubjectModel]) -> None:
    other, _, _ = proof_of(tmp_path, batch_size=7, errors=Errors.REMOVED)
    for kind, curves in proven[0].curves.items():
        for mine, theirs in zip(curves, other.curves[kind], strict=True):
            if mine.name != "neurons":  # whose many equal scores fall in another order
                assert mine.circuit == pytest.approx(theirs.circuit, abs=5e-3), (kind, mine.name)


@pytest.mark.parametrize("baseline", list(Baseline))
@pytest.mark.parametrize("errors", list(Errors))
def test_every_baseline_and_policy_on_a_tiny_model(tmp_path: Path, baseline: Baseline, errors: Errors) -> None:
    model = tiny(tmp_path / "model")
    sites = ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out")
    dictionaries = [random_dictionary(tmp_path / s, s, d_sae=6, seed=i) for i, s in enumerate(sites)]
    dictionaries.append(Heads(model, 2))
    discovery, evaluation = PromptSet.from_rows(ROWS).split(0.5)
    traced = TraceSettings(steps=2, top=3, baseline=baseline)
    done = []
    proof = prove(model, dictionaries, discovery, evaluation, traced, ProofSettings(errors=errors),
                  progress=lambda *at: done.append(at))  # fmt: skip
    assert done[-1][0] == done[-1][1] == len(done)
    nodes = proof.curves[Kind.NODES]
    assert (proof.table(seed=0)["faithfulness"].is_finite()).all()
    if errors is Errors.KEPT:  # the errors alone, and with every latent the model but for latents never met
        assert np.abs(nodes[0].circuit[0] - nodes[0].empty).max() > 1e-3
    else:
        assert np.allclose(nodes[0].circuit[0], nodes[0].empty, atol=1e-4)


def test_nodes_alone(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    dictionary = random_dictionary(tmp_path / "one", "blocks.1.hook_resid_pre", d_sae=6)
    discovery, evaluation = PromptSet.from_rows(ROWS).split(0.5)
    settings = ProofSettings(kinds=(Kind.NODES,))
    proof = prove(model, [dictionary], discovery, evaluation, TraceSettings(steps=2), settings)
    assert list(proof.curves) == list(proof.summary(seed=0)) == [Kind.NODES]
    assert set(proof.members["kind"]) == {"nodes"}


def test_one_discovery_prompt_has_the_places_of_the_others(tmp_path: Path) -> None:
    """Its tokens are placed as those of a half of several prompts, whose circuit it is to choose."""
    model = tiny(tmp_path / "model")
    dictionary = random_dictionary(tmp_path / "sae", "blocks.1.hook_resid_pre")
    rows = [{"clean": f"w1 w{k} w9 w20", "answer": " w3", "wrong_answer": " w4"} for k in (10, 14, 18)]
    traced, names = TraceSettings(baseline=Baseline.ZERO), dict[str, int]()
    halves = [place_prompts(model, [dictionary], PromptSet.from_rows(r), traced, names) for r in (rows[:1], rows[1:])]
    (one,), (others,) = (half.places for half in halves)
    assert one[0].tolist() == others[0].tolist() == others[1].tolist()
    assert set(names) == {"rest", "end"}


def test_prompts_without_an_effect_are_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    dictionary = random_dictionary(tmp_path / "one", "blocks.1.hook_resid_pre", d_sae=6)
    rows = [row | {"corrupt": row["clean"]} for row in ROWS]
    discovery, evaluation = PromptSet.from_rows(rows).split(0.5)
    with pytest.raises(MediationError, match="No latent changes"):
        prove(model, [dictionary], discovery, evaluation, TraceSettings(steps=2), ProofSettings())
