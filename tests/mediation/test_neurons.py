"""Neurons: an exact transcoder of the model's own MLP, and nodes of a graph like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from circuits.edges import Sources, Targets, edges
from mediation.dictionaries import Coordinates
from mediation.errors import MediationError
from mediation.frozen import Semantics
from mediation.neurons import Neurons
from mediation.nodes import site_states
from mediation.prompts import Baseline
from mediation.sites import Site, Stream
from tests.setups import batch_of, tiny
from tests.tiny_models import D_MODEL

READ, WRITTEN = Site(1, Stream.MLP_IN), Site(1, Stream.MLP_OUT)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma"])
def test_neurons_rebuild_the_mlp(tmp_path: Path, kind: str) -> None:
    model, batch = tiny(tmp_path, kind), batch_of(3)
    neurons = Neurons(model, 1)
    sites = model.forward(batch.clean, batch.mask, read=[READ, WRITTEN]).sites
    split = neurons.split(sites[WRITTEN], sites[READ])
    assert split.error.abs().max() < 1e-5
    assert split.latents.shape[-1] == neurons.d_sae > D_MODEL
    norms = neurons.decoder.norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_slopes_are_the_derivatives(tmp_path: Path, kind: str) -> None:
    neurons = Neurons(tiny(tmp_path, kind), 1)
    generator = torch.Generator().manual_seed(0)
    read, push = torch.randn(2, 6, D_MODEL, generator=generator)
    latent = torch.tensor([0, 3, 3, 7, 12, 20])
    ends = [neurons.encode(read + sign * 1e-2 * push)[torch.arange(6), latent] for sign in (1, -1)]
    slopes = neurons.rows(read, latent)
    assert torch.allclose((slopes * push).sum(-1), (ends[0] - ends[1]) / 2e-2, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(slopes[1], slopes[2])


@pytest.mark.parametrize("semantics", Semantics)
def test_neurons_carry_what_the_mlps_output_carries(tmp_path: Path, semantics: Semantics) -> None:
    """In a graph over neurons of two layers and the coordinates between, and as targets too."""
    model, batch = tiny(tmp_path), batch_of(3)
    between = Coordinates(Site(1, Stream.RESID_POST), D_MODEL)
    groups = [[Neurons(model, 1), between, Neurons(model, 2)]]
    groups.append([Coordinates(WRITTEN, D_MODEL), between, Coordinates(Site(2, Stream.MLP_OUT), D_MODEL)])
    states = site_states(model, batch, groups[0], Baseline.CORRUPT)
    chosen = torch.arange(0, len(states[2].row), 9)
    targets = [Targets.latents(states[2], torch.zeros_like(states[2].x), chosen), Targets.behaviour(batch)]
    sums = []
    for group in groups:
        sources = [Sources.of(state) for state in site_states(model, batch, group, Baseline.CORRUPT)]
        found = edges(model, batch, sources, targets, semantics=semantics)
        of_site = found.target + len(found.total) * found.source
        sums.append(torch.zeros(3 * len(found.total)).index_add(0, of_site, found.weight))
    assert torch.allclose(*sums, atol=2e-4)
    assert sums[0].abs().max() > 0.1
    if semantics is Semantics.LINEAR:
        assert found.gap[: len(chosen)].abs().max() < 1e-4


def test_neurons_before_a_norm_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediationError, match="norm stands after"):
        Neurons(tiny(tmp_path, "gemma2"), 0)
