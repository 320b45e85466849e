"""The compiled circuit does what it was compiled to do, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from mediation.commands import Source, load_dictionaries
from mediation.errors import MediationError
from mediation.estimators.common import behaviour
from mediation.nodes import site_states
from mediation.organisms.compiled import (
    END,
    FEATURES,
    GATES,
    MOVED,
    PER_LAYER,
    TARGET,
    USED,
    _draw,
    _output,
    compile_circuit,
)  # fmt: skip
from mediation.prompts import Baseline, PromptSet, batches, tokenize
from mediation.subject import SubjectModel


@pytest.mark.parametrize("seed", [0, 1])
def test_the_model_computes_the_circuit(tmp_path: Path, seed: int) -> None:
    compile_circuit(seed, tmp_path, prompts=32)
    model = SubjectModel.load(tmp_path / "model", device="cpu")
    prompts = PromptSet.from_jsonl(tmp_path / "prompts.jsonl")
    gates, outputs = _draw(random.Random(f"circuit {seed}"), GATES)
    seen = []
    for batch in batches(tokenize(prompts, model), 16):
        for example, found in zip(batch.examples, behaviour(model, batch).tolist(), strict=True):
            prompt = prompts[example.prompt]
            on = [word.startswith("on") for word in str(prompt.clean).split()[:FEATURES]]
            expected = _output(gates, outputs, on) * (1 if prompt.answer == " yes" else -1)
            assert found == pytest.approx(expected, abs=5e-3)
            seen.append(expected)
    assert len(set(seen)) > 4


def test_latents_are_the_parts_and_decoys_are_there(tmp_path: Path) -> None:
    truth = compile_circuit(0, tmp_path, prompts=16)
    model = SubjectModel.load(tmp_path / "model", device="cpu")
    dictionaries = load_dictionaries(Source("", (str(tmp_path / "saes"),), ""), "cpu")
    (batch,) = batches(tokenize(PromptSet.from_jsonl(tmp_path / "prompts.jsonl"), model), 16)
    states = site_states(model, batch, dictionaries, Baseline.CORRUPT)
    for state in states:  # an axis each: what is left over is rounding
        assert state.error[state.free].norm(dim=-1).max() < 1e-3
    changing = {
        int(latent) for latent, by in zip(states[1].latent, states[1].delta, strict=True) if abs(float(by)) > 0.1
    }
    assert changing == set(range(FEATURES))  # decoys move as well
    moved = {node for node in truth.nodes if node.startswith(MOVED)}
    assert moved <= {f"{MOVED}/{END}/{k}" for k in range(USED)}
    ends = {node for edge in truth.edges for node in edge}
    assert ends == truth.nodes | {TARGET}
    assert not any(node.endswith(f"{END}/{PER_LAYER - 1}") and "mlp" in node for node in truth.nodes)
    assert torch.is_tensor(states[0].x)


def test_unknown_gates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediationError, match="no gates xor"):
        compile_circuit(0, tmp_path, ("xor",))
