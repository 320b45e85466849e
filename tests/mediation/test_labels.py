"""Labels against planted tags, SciPy's test, and the unembedding itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from mediation.errors import MediationError
from mediation.labels import (
    enrichment,
    final_norm_scale,
    load_labels,
    logit_effects,
    save_labels,
)
from tests.setups import tiny
from tests.tiny_models import CONFIGS


def planted(n: int = 200, seed: int = 0) -> tuple[torch.Tensor, list[dict[str, str]]]:
    rng = np.random.default_rng(seed)
    tags = [{"job": f"j{rng.integers(6)}", "town": f"t{rng.integers(5)}"} for _ in range(n)]
    scores = torch.from_numpy(rng.normal(size=(n, 4))).float()
    scores[:, 0] += torch.tensor([3.0 * (row["job"] == "j2") for row in tags])
    scores[:, 1] = torch.tensor([float(row["town"] == "t4") for row in tags])  # sparse, all ties elsewhere
    scores[:, 3] = 0.0
    return scores, tags


def test_enrichment_finds_planted_tags_and_leaves_noise_without_a_label() -> None:
    table = enrichment(*planted())
    assert dict(zip(table["meta"], table["label"], strict=True)) == {0: "job=j2", 1: "town=t4"}
    assert table["score"][1] == 1.0


def test_enrichment_statistic_is_scipys() -> None:
    scores, tags = planted()
    table = enrichment(scores, tags)
    inside = np.array([row["job"] == "j2" for row in tags])
    values = scores[:, 0].numpy()
    expected = stats.mannwhitneyu(
        values[inside], values[~inside], alternative="greater", use_continuity=False, method="asymptotic"
    )
    n_tags = len({f"{k}={v}" for row in tags for k, v in row.items()})
    assert table["p"][0] == pytest.approx(min(expected.pvalue * n_tags, 1), rel=1e-6)
    assert table["score"][0] == pytest.approx(expected.statistic / inside.sum() / (~inside).sum())


def test_a_meta_latent_of_three_texts_among_a_thousand_has_no_name() -> None:
    """It fires on three of a hundred bakers and on nobody else: significant by rank, and no name for bakers."""
    tags = [{"job": f"j{i % 10}"} for i in range(1000)]
    scores = torch.zeros(1000, 2)
    scores[[0, 10, 20], 0] = 1.0
    scores[torch.arange(0, 1000, 20), 1] = 1.0  # half of j0: a name
    table = enrichment(scores, tags)
    assert table["meta"].to_list() == [1]
    assert table["score"][0] == pytest.approx(0.75)


def test_noise_is_rarely_labelled() -> None:
    """At most alpha of meta-latents that know nothing get a label (Bonferroni over tags)."""
    _, tags = planted()
    noise = torch.randn(200, 2000, generator=torch.Generator().manual_seed(1))
    assert len(enrichment(noise, tags, alpha=0.05)) / 2000 < 0.065


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_final_norm_scale_is_what_the_norm_does_at_right_angles_to_its_input(tmp_path: Path, kind: str) -> None:
    """Moving x across itself (and across the mean), a norm only scales: finite differences show by how much."""
    model = tiny(tmp_path, kind)
    layer_norm = kind.startswith("gpt")
    x, step, eps = torch.randn(16), torch.randn(16), 1e-3
    if layer_norm:
        x, step = x - x.mean(), step - step.mean()
    step = step - (step @ x) / (x @ x) * x
    with torch.no_grad():
        moved = (model.final_norm((x + eps * step)[None]) - model.final_norm((x - eps * step)[None])) / (2 * eps)
    expected = step * final_norm_scale(model) / x.pow(2).mean().sqrt()
    assert torch.allclose(moved[0], expected, atol=1e-2 * float(expected.abs().max()))


def test_logit_lens_gives_the_tokens_a_direction_raises_and_lowers_most(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    unembedding = model.module.get_output_embeddings().weight
    centred = unembedding - unembedding.mean(dim=0)
    wanted = centred[[7, 30]] / final_norm_scale(model)  # promotes its own token, up to the other's overlap
    for found, largest in zip(logit_effects(model, wanted.detach(), n=3), (True, False), strict=True):
        for row, direction in zip(found, wanted, strict=True):
            effect = (unembedding @ (direction * final_norm_scale(model))).topk(3, largest=largest).indices
            assert row == [model.tokenizer.decode([token]) for token in effect.tolist()]


def test_labels_round_trip_and_damaged_files(tmp_path: Path) -> None:
    table = enrichment(*planted())
    save_labels(tmp_path, table)
    assert load_labels(tmp_path) == {0: "job=j2", 1: "town=t4"}
    assert load_labels(tmp_path / "none") == {}
    (tmp_path / "labels.parquet").write_bytes(b"no parquet")
    with pytest.raises(MediationError, match=r"labels\.parquet"):
        load_labels(tmp_path)
