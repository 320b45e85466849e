"""Attention heads: nodes whose parts add up to what the heads hand on, read and written where they moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from circuits.calibration import exact_edges
from circuits.edges import Sources, Targets, edges
from mediation.dictionaries import Coordinates, Dictionary
from mediation.errors import MediationError
from mediation.estimators import EstimatorSettings, exact
from mediation.estimators.common import behaviour, behaviour_gradient, contract
from mediation.frozen import Semantics
from mediation.heads import Heads
from mediation.nodes import mean_state, site_states
from mediation.prompts import Baseline
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel
from tests.setups import batch_of, random_dictionary, tiny
from tests.tiny_models import D_MODEL, HEADS, save_tiny

Z = Site(1, Stream.ATTN_Z)


def wide(tmp_path: Path) -> SubjectModel:
    """A model whose heads together are wider than its residual stream."""
    return SubjectModel.load(save_tiny("qwen3", tmp_path / "wide", head_dim=8), device="cpu")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_what_heads_hand_on_is_what_the_attention_writes(tmp_path: Path, kind: str) -> None:
    """Zero in the heads' place, and the attention writes its bias only: the site is the projection's input."""
    model, batch = tiny(tmp_path, kind), batch_of(2)
    written = Site(1, Stream.ATTN_OUT)
    off = model.forward(batch.clean, batch.mask, read=[written], edit={Z: torch.zeros_like}).sites[written]
    assert torch.allclose(off, off[:1, :1].expand_as(off))
    assert not torch.allclose(off, model.forward(batch.clean, batch.mask, read=[written]).sites[written])


@pytest.mark.parametrize("baseline", Baseline)
def test_heads_add_up_to_the_change(tmp_path: Path, baseline: Baseline) -> None:
    model, batch = wide(tmp_path), batch_of(3)
    heads = Heads(model, 1)
    heads.check(model)
    assert heads.d_model == model.width(Z) == 8 * HEADS != D_MODEL
    means = {heads.name: mean_state(model, [batch], heads)} if baseline is Baseline.MEAN else None
    (state,) = site_states(model, batch, [heads], baseline, means)
    total = torch.zeros_like(state.x)
    total.index_put_((state.row, state.position), state.delta[:, None] * state.decoder[state.index], accumulate=True)
    assert torch.allclose(total, state.x - state.baseline_x, atol=1e-5)
    assert len(state.row) == int(state.free.sum()) * HEADS
    assert not state.error.any()
    _, (gradient,) = behaviour_gradient(model, batch, [Z])
    expected = (gradient * (state.x - state.baseline_x)).sum((1, 2)).double()
    assert torch.allclose(contract(state, gradient).per_row(state), expected, atol=1e-5)


def test_the_exact_effect_of_a_head_is_that_of_its_segment(tmp_path: Path) -> None:
    model, batch = wide(tmp_path), batch_of(2)
    (state,) = site_states(model, batch, [Heads(model, 1)], Baseline.CORRUPT)
    (measured,) = exact(model, batch, [state], EstimatorSettings())
    clean = behaviour(model, batch)
    for node in range(0, len(state.row), 5):
        row, position, head = int(state.row[node]), int(state.position[node]), int(state.latent[node])
        patched = state.x.clone()
        segment = slice(8 * head, 8 * head + 8)
        patched[row, position, segment] = state.baseline_x[row, position, segment]
        effect = clean - behaviour(model, batch, {Z: lambda _, patched=patched: patched})
        assert torch.allclose(measured.latents[node], effect[row], atol=1e-5)


@pytest.mark.parametrize("semantics", Semantics)
def test_edges_of_heads(tmp_path: Path, semantics: Semantics) -> None:
    """From heads: the sum of their coordinates' edges. To heads: they sum to what the linear model's heads change."""
    model, batch = wide(tmp_path), batch_of(2)
    below, above = site_states(model, batch, [Heads(model, 0), Heads(model, 2)], Baseline.CORRUPT)
    plain = Coordinates(below.dictionary.site, below.dictionary.d_model)
    (coordinates,) = site_states(model, batch, [plain], Baseline.CORRUPT)
    chosen = torch.arange(0, len(above.row), 3)
    targets = [Targets.latents(above, torch.ones_like(above.x), chosen), Targets.behaviour(batch)]
    words = Sources.embeddings(model, batch, Baseline.CORRUPT)
    found, split = (
        edges(model, batch, [words, Sources.of(state)], targets, semantics=semantics) for state in (below, coordinates)
    )
    table = found.table().filter(found.table()["source"].str.starts_with("blocks.0"))
    parts = split.table().filter(split.table()["source"].str.starts_with("blocks.0"))
    assert set(table["source"].str.split("/").list.last().unique()) <= {"error", *map(str, range(HEADS))}
    sums: dict[tuple, float] = {}
    for row, source, target, weight, _ in parts.iter_rows():
        site, position, latent = source.split("/")
        if latent != "error":
            key = (row, f"{site}/{position}/{int(latent) // 8}", target)
            sums[key] = sums.get(key, 0.0) + weight
    weights = {row[:3]: row[3] for row in table.iter_rows() if not row[1].endswith("error")}
    assert weights.keys() == sums.keys()
    assert max(abs(weights[key] - sums[key]) for key in weights) < 1e-5
    assert max(map(abs, weights.values())) > 1e-2
    assert torch.allclose(found.value[: len(chosen)], above.clean[chosen], atol=1e-5)
    if semantics is Semantics.LINEAR:
        assert found.gap[: len(chosen)].abs().max() < 1e-4
    else:
        little = [replace(each, delta=0.01 * each.delta, rest=0.01 * each.rest) for each in found.sources]
        nearly = replace(found, sources=tuple(little))
        measured = exact_edges(model, batch, targets, nearly, torch.arange(len(found.weight)))
        assert torch.corrcoef(torch.stack([measured, found.weight]))[0, 1] > 0.999


def test_a_dictionary_of_what_heads_hand_on(tmp_path: Path) -> None:
    """SAELens' SAEs at hook_z take [heads, d_head]; here the heads lie side by side, and nothing else changes."""
    model, batch = tiny(tmp_path), batch_of(2)
    dictionary = random_dictionary(tmp_path / "z", Z.name, reshape="hook_z")
    dictionary.check(model)
    again = Dictionary.load(tmp_path / "z")
    (state,) = site_states(model, batch, [again], Baseline.CORRUPT)
    sums = torch.zeros_like(state.x)
    sums.index_put_((state.row, state.position), state.delta[:, None] * again.decoder[state.latent], accumulate=True)
    assert torch.allclose(sums + state.error, state.x - state.baseline_x, atol=1e-5)
    flat = random_dictionary(tmp_path / "flat", Z.name)
    assert torch.equal(again.encode(state.x), flat.encode(state.x))
    other = SubjectModel.load(save_tiny("qwen3", tmp_path / "other", head_dim=8), device="cpu")
    with pytest.raises(MediationError, match=r"16 dimensions at blocks.1.attn.hook_z .* has 32"):
        dictionary.check(other)
