"""The linear model: the model's own values where it was recorded, and affine everywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mediation.frozen import Frozen
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel
from tests.setups import tiny
from tests.tiny_models import CONFIGS, D_MODEL, LAYERS

FIRST, LAST = Site(0, Stream.RESID_PRE), Site(LAYERS - 1, Stream.RESID_POST)
TOKENS = torch.tensor([[3, 9, 27, 14, 5], [8, 4, 40, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    return tiny(tmp_path_factory.mktemp(request.param), request.param)


def last_value(model: SubjectModel, start: Tensor) -> Tensor:
    run = model.forward(TOKENS, MASK, read=[LAST], edit={FIRST: lambda _: start}, logits=False)
    return run.sites[LAST][MASK.bool()]


def test_recording_changes_no_value_and_leaves_no_trace(model: SubjectModel) -> None:
    before = model.forward(TOKENS, MASK).logits
    with Frozen(model).record():
        inside = model.forward(TOKENS, MASK).logits
    assert before is not None
    assert inside is not None
    assert torch.allclose(inside, before, atol=2e-5)
    assert torch.equal(model.forward(TOKENS, MASK).logits, before)


def test_replay_is_affine_where_the_model_is_not(model: SubjectModel) -> None:
    frozen = Frozen(model)
    with frozen.record():
        clean = model.forward(TOKENS, MASK, read=[FIRST], logits=False).sites[FIRST]
        model.forward(TOKENS, MASK)
    other = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    def bend() -> Tensor:
        a, b, middle = (last_value(model, start) for start in (clean, other, (clean + other) / 2))
        return (middle - (a + b) / 2).abs().max() / (a - b).abs().max()

    assert bend() > 1e-3
    with frozen.replay():
        assert bend() < 1e-5
        linear = last_value(model, clean)
    assert torch.allclose(linear, last_value(model, clean), atol=2e-5)


def test_recorded_gradient_is_the_linear_models_slope(model: SubjectModel) -> None:
    """grad . change while recording = difference of two replays, however large the change."""
    frozen = Frozen(model)
    with frozen.record():
        run = model.forward(TOKENS, MASK, read=[FIRST, LAST], grad=True, logits=False)
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(run.sites[LAST][0, 4] @ direction, run.sites[FIRST])
    clean = run.sites[FIRST].detach()
    change = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    with frozen.replay():
        values = []
        for start in (clean + change, clean):
            moved = model.forward(TOKENS, MASK, read=[LAST], edit={FIRST: lambda _, s=start: s}, logits=False)
            values.append(moved.sites[LAST][0, 4] @ direction)
    assert float((gradient * change).sum()) == pytest.approx(float(values[0] - values[1]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_eager_attention_is_frozen_as_well(tmp_path: Path, kind: str) -> None:
    """Each family has an eager function of its own; replay moves the last site by the same amount either way."""
    moves = []
    for attention in ("sdpa", "eager"):
        model = tiny(tmp_path / attention, kind)
        model.module.set_attn_implementation(attention)
        frozen = Frozen(model)
        with frozen.record():
            clean = model.forward(TOKENS, MASK, read=[FIRST, LAST], logits=False).sites[FIRST]
        other = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        with frozen.replay():
            moves.append(last_value(model, other) - last_value(model, clean))
        free = last_value(model, other) - last_value(model, clean)
        assert (free - moves[-1]).abs().max() > 1e-2
    assert torch.allclose(*moves, atol=1e-4)
