"""Edges against patched runs: equal where the model is linear, close where it is nearly so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from circuits.calibration import calibrate_edges, exact_edges, missed_important
from circuits.edges import REST, Edges, Sources, Targets, edges
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


def sample_of(effects: np.ndarray, kept: np.ndarray, prompts: list[str] | None = None) -> pl.DataFrame:
    """Patched nodes: latent 1 is in the graph, latent 0 is not."""
    n = len(effects)
    return pl.DataFrame(
        {"prompt": prompts or ["held out"] * n, "site": ["s"] * n, "role": ["end"] * n,
         "latent": pl.Series(kept.astype(int), dtype=pl.Int64), "exact_effect": effects}
    )  # fmt: skip


GRAPH = pl.DataFrame({"site": ["s", "s"], "role": ["end", "end"], "latent": pl.Series([1, None], dtype=pl.Int64)})


def test_missed_important_nodes_are_counted_by_the_definition() -> None:
    """Kept: 1 to 9, whose median is 5, and with 97.5 % at least 2; left out: -6, 5, 4 and 1, of which two reach 5 and
    three 2. 40 nodes are kept and 100 left out."""
    effects = np.array([*range(1, 10), -6.0, 5.0, 4.0, 1.0])
    kept = np.arange(13) < 9
    everything = sample_of(np.zeros(140), np.arange(140) < 40)
    found = missed_important(sample_of(effects, kept), everything, GRAPH, ["held out"])
    assert (found.important, found.missed, found.kept) == (7, 2, 9)
    share = stats.beta.ppf(0.975, 4, 1)  # three of four
    assert found.at_most == pytest.approx(100 * share / (100 * share + 20))
    errors = sample_of(effects, kept).with_columns(latent=pl.lit(None, dtype=pl.Int64), exact_effect=pl.lit(9.0))
    discovery = sample_of(effects * 100, ~kept, ["chosen on"] * 13)
    more = pl.concat([sample_of(effects, kept), errors, discovery])
    assert missed_important(more, pl.concat([everything, errors, discovery]), GRAPH, ["held out"]) == found
    nothing = missed_important(sample_of(effects, kept & False), everything, GRAPH, ["held out"])
    assert nothing.at_most is None


@pytest.mark.parametrize("left_out", [0.1, 0.5, 3.0])
def test_the_bound_holds_in_nineteen_samples_of_twenty(left_out: float) -> None:
    """20,000 nodes, 3,000 in the graph with effects of mean 1, the others of mean `left_out`; samples of 300.

    It holds, and is not so wide that it says nothing.
    """
    rng = np.random.default_rng(5)
    kept = np.arange(20_000) < 3000
    effects = rng.exponential(np.where(kept, 1.0, left_out))
    important = effects >= np.median(effects[kept])
    share = (important & ~kept).sum() / important.sum()
    everything, bounds = sample_of(effects, kept), []
    for _ in range(200):
        chosen = rng.choice(len(kept), 300, replace=False)
        found = missed_important(sample_of(effects[chosen], kept[chosen]), everything, GRAPH, ["held out"])
        assert found.at_most is not None
        bounds.append(found.at_most)
    assert np.mean(np.array(bounds) >= share) >= 0.95
    assert np.mean(bounds) <= share + 0.35
