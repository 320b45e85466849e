"""Edges against patched runs: equal where the model is linear, close where it is nearly so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from circuits.calibration import calibrate_edges, exact_edges, kept_sample, missed_important
from circuits.edges import REST, Edges, Sources, Targets, edges
from mediation.estimators import EstimatorSettings, exact
from mediation.estimators.common import behaviour_gradient
from mediation.nodes import site_states
from mediation.prompts import Baseline, Batch
from mediation.statistics import agreement
from mediation.subject import SubjectModel
from tests.setups import batch_of, linear_model, random_dictionary, tiny

SITES = ("blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out")


def graph(model: SubjectModel, folder: Path) -> tuple[Batch, list[Targets], Edges]:
    batch = batch_of(3)
    dictionaries = [random_dictionary(folder / name, name, d_sae=12, seed=i) for i, name in enumerate(SITES)]
    states = site_states(model, batch, dictionaries, Baseline.CORRUPT)
    _, gradients = behaviour_gradient(model, batch, [state.dictionary.site for state in states])
    targets = [
        Targets.latents(state, gradient, torch.arange(0, len(state.row), 5))
        for state, gradient in zip(states, gradients, strict=True)
    ]
    targets.append(Targets.behaviour(batch))
    sources = [Sources.of(state) for state in states] + [Sources.embeddings(model, batch, Baseline.CORRUPT)]
    return batch, targets, edges(model, batch, sources, targets)


def test_in_a_linear_model_every_edge_is_exact(tmp_path: Path) -> None:
    model = linear_model(tmp_path / "model")
    batch, targets, found = graph(model, tmp_path)
    every = torch.arange(len(found.weight))
    exact = exact_edges(model, batch, targets, found, every, chunk=50)
    assert torch.allclose(exact, found.weight, atol=1e-4)
    assert exact.abs().max() > 0.1
    assert (found.latent == REST).any()


def test_small_changes_are_exact_in_a_curved_model_and_large_ones_are_not(tmp_path: Path) -> None:
    """Edges are first order: the smaller what is patched, the better they agree, whatever the chunk."""
    model = tiny(tmp_path / "model")
    batch, targets, found = graph(model, tmp_path)
    chosen, exact = calibrate_edges(model, batch, targets, found, 120, chunk=7)
    assert torch.allclose(exact, exact_edges(model, batch, targets, found, chosen, chunk=64), atol=1e-5)
    assert len(chosen.unique()) == 120
    weights = found.weight[chosen]
    large = (exact - weights).abs().max()
    assert large > 1e-2
    assert agreement(weights, exact).pearson < 0.9999
    errors = []
    for size in (0.004, 0.002):
        small = [
            Sources(**(vars(each) | {"delta": size * each.delta, "rest": size * each.rest})) for each in found.sources
        ]
        shrunk = Edges(**(vars(found) | {"sources": tuple(small), "weight": size * found.weight}))
        near = exact_edges(model, batch, targets, shrunk, chosen)
        errors.append((near - shrunk.weight[chosen]).norm() / near.norm())
    assert errors[1] < 0.6 * errors[0] < 0.05
    again = agreement(shrunk.weight[chosen], near)
    assert again.pearson > 0.999
    assert again.n == 120


def test_the_sample_reaches_all_sizes(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    batch, targets, found = graph(model, tmp_path)
    chosen, _ = calibrate_edges(model, batch, targets, found, 40)
    quarter = found.weight.abs().quantile(torch.tensor([0.25, 0.75]))
    sizes = found.weight[chosen].abs()
    assert (sizes < quarter[0]).sum() == pytest.approx(10, abs=1)
    assert (sizes > quarter[1]).sum() == pytest.approx(10, abs=1)


def sample_of(effects: np.ndarray, kept: np.ndarray, site: str = "s") -> pl.DataFrame:
    """Patched nodes: latent 1 is in the graph, latent 0 is not."""
    n = len(effects)
    latent = pl.Series(np.broadcast_to(kept, n).astype(int), dtype=pl.Int64)
    return pl.DataFrame({"site": [site] * n, "role": ["end"] * n, "latent": latent, "exact_effect": effects})


GRAPH = pl.DataFrame({"site": ["s", "s"], "role": ["end", "end"], "latent": pl.Series([1, None], dtype=pl.Int64)})


def test_missed_important_nodes_are_counted_by_the_definition() -> None:
    """Kept: 1 to 9, whose median is 5, and with 97.5 % at least 2; left out: -6, 5, 4 and 1, of which two reach 5 and
    three 2. 40 nodes are kept and 100 left out."""
    sample, kept = sample_of(np.array([-6.0, 5.0, 4.0, 1.0]), np.array(False)), np.arange(-9.0, 0.0)
    everything = sample_of(np.zeros(140), np.arange(140) < 40)
    found = missed_important(sample, kept, everything, GRAPH)
    assert (found.left_out, found.missed, found.kept, found.median) == (4, 2, 9, 5.0)
    share = stats.beta.ppf(0.975, 4, 1)  # three of four
    assert found.at_most == pytest.approx(100 * share / (100 * share + 20))
    errors = sample_of(np.full(3, 9.0), np.array(False)).with_columns(latent=pl.lit(None, dtype=pl.Int64))
    inside = sample_of(np.full(3, 9.0), np.array(True))
    more = pl.concat([sample, errors, inside])
    assert missed_important(more, kept, pl.concat([everything, errors]), GRAPH) == found
    assert missed_important(sample, kept[:5], everything, GRAPH).at_most == pytest.approx(100 / 120)
    assert missed_important(sample, kept[:0], everything, GRAPH).at_most is None
    whole = sample_of(np.zeros(5), np.array(True))
    assert missed_important(whole, kept, whole, GRAPH).at_most == 0.0


@pytest.mark.parametrize("left_out", [0.1, 0.5, 3.0])
def test_the_bound_holds_in_nineteen_samples_of_twenty(left_out: float) -> None:
    """Two sites of 16,000 and 4,000 nodes, sampled alike; the second's left-out nodes have twice the effect. 3,000 are
    in the graph, with effects of mean 1. It holds, and is not so wide that it says nothing."""
    rng = np.random.default_rng(5)
    kept = rng.exponential(1.0, 3000)
    others = [rng.exponential(left_out, 16_000), rng.exponential(2 * left_out, 4000)]
    important = sum((each >= np.median(kept)).sum() for each in others)
    share = important / (important + len(kept) / 2)
    sites = [sample_of(each, np.array(False), site) for each, site in zip(others, "st", strict=True)]
    everything, bounds = pl.concat([*sites, sample_of(kept, np.array(True))]), []
    for seed in range(200):
        sample = pl.concat([site.sample(200, seed=seed) for site in sites])
        found = missed_important(sample, rng.choice(kept, 60, replace=False), everything, GRAPH, seed=seed)
        assert found.at_most is not None
        bounds.append(found.at_most)
    assert np.mean(np.array(bounds) >= share) >= 0.95
    assert np.mean(bounds) <= share + 0.4


def test_the_sample_of_kept_nodes_is_theirs_and_measured(tmp_path: Path) -> None:
    model, batch = tiny(tmp_path / "model"), batch_of(3)
    dictionaries = [random_dictionary(tmp_path / name, name, d_sae=12, seed=i) for i, name in enumerate(SITES[1:3])]
    states = site_states(model, batch, dictionaries, Baseline.CORRUPT)
    chosen = [torch.arange(0, len(state.row), 4) for state in states]
    settings = EstimatorSettings(steps=4, chunk=8)
    every = torch.cat(
        [each.latents[some] for each, some in zip(exact(model, batch, states, settings), chosen, strict=True)]
    )
    whole = kept_sample(model, batch, states, chosen, 1000, settings)
    assert torch.allclose(whole, every, atol=1e-6)
    part = kept_sample(model, batch, states, chosen, 7, settings)
    assert len(part) == 7
    assert (torch.cdist(part[:, None], every[:, None]).min(dim=1).values < 1e-6).all()
    assert len(kept_sample(model, batch, states, [each[:0] for each in chosen], 7, settings)) == 0
