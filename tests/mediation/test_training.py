"""Training: activations are the model's own, and a trained dictionary is one SAELens opens, hook intact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.sites import Site
from mediation.training.activations import collect_activations, shuffled_batches, token_windows, windows
from mediation.training.saes import SAESettings, train_sae
from tests.setups import tiny

SITE = Site.parse("blocks.1.hook_resid_pre")


def planted(n: int = 4096, atoms: int = 24, d: int = 32, on: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(atoms, d, generator=generator), dim=1)
    chosen = torch.rand(n, atoms, generator=generator).topk(on, dim=1).indices
    codes = torch.zeros(n, atoms).scatter(1, chosen, 1 + torch.rand(n, on, generator=generator))
    return codes @ directions + 3.0, directions


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_a_trained_sae_finds_planted_directions_and_loads(tmp_path: Path, architecture: str) -> None:
    x, directions = planted()
    seen = []
    folder = train_sae(
        shuffled_batches(x, 256), tmp_path / "saes" / "one", SAESettings(48, 2, 600, architecture, lr=3e-3, seed=1),
        site=SITE, model_name="tiny", progress=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen[-1] == (600, 600)
    assert SAE.load_from_disk(folder).cfg.metadata.hook_name == SITE.name
    dictionary = Dictionary.load(folder)
    assert (dictionary.site, dictionary.model_name, dictionary.d_sae) == (SITE, "tiny", 48)
    error = dictionary.split(x).error
    assert 1 - (error.square().sum() / (x - x.mean(0)).square().sum()).item() > 0.9
    assert (directions @ dictionary.decoder.T).max(dim=1).values.mean() > 0.9
    assert not list(tmp_path.glob("**/*.partial"))


def test_same_seed_same_weights(tmp_path: Path) -> None:
    x, _ = planted(512)
    loaded = []
    for name in ("a", "b"):
        folder = train_sae(
            shuffled_batches(x, 64), tmp_path / name, SAESettings(48, 2, 20), site=SITE, model_name="tiny"
        )
        loaded.append(Dictionary.load(folder))
    assert torch.equal(loaded[0].decoder, loaded[1].decoder)


def test_rows_begin_where_they_are_told(tmp_path: Path) -> None:
    x, _ = planted(512)
    settings, names = SAESettings(48, k=2, steps=1, lr=1e-8), {"site": SITE, "model_name": "tiny"}
    folder = train_sae(iter([x]), tmp_path / "a", settings, start=x[:48], **names)
    expected = torch.nn.functional.normalize(x[:48] - x.mean(0), dim=1)
    assert torch.allclose(Dictionary.load(folder).decoder, expected, atol=1e-4)
    with pytest.raises(MediationError, match="give one per latent"):
        train_sae(iter([x]), tmp_path / "b", settings, start=x[:47], **names)


def test_impossible_settings() -> None:
    with pytest.raises(MediationError, match="batchtopk, matryoshka, topk"):
        SAESettings(4, 1, 1, architecture="dense")
    with pytest.raises(MediationError, match="smaller k"):
        SAESettings(4, 5, 1)


def test_activations_are_the_models_without_the_first_token(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    sites = [SITE, Site.parse("blocks.2.hook_mlp_out")]
    sequences = [torch.randint(3, 60, (6,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(7)]
    found = collect_activations(model, sequences, sites, n_tokens=23, batch_size=3)
    assert found.tokens.tolist() == [token for row in sequences for token in row[1:]][:23]
    whole = model.forward(torch.tensor(sequences), read=sites)
    for site in sites:
        assert torch.allclose(found.x[site], whole.sites[site][:, 1:].flatten(0, 1)[:23], atol=1e-6)


def test_windows_cut_and_join_texts(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
    joined = [token for text in texts for token in model.encode(text)]
    assert [token for window in windows(texts, model, 3) for token in window] == joined[:6]


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MediationError, match="no text"):
        token_windows(["w1 w2"], tiny(tmp_path), 8, 4)
