"""A pack trained from scratch on a small real model: four sites from one pass, opened by SAELens, good on new text."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from sae_lens import SAE

from mediation.dictionaries import Dictionary
from mediation.quality import held_out_figures
from mediation.sites import Site
from mediation.subject import SubjectModel
from mediation.training.activations import collect_activations
from mediation.training.several import Plan, train_saes
from tests.setups import shared_data

SITES = [Site.parse(f"blocks.{layer}.hook_resid_pre") for layer in (1, 2, 3, 4)]


def stories(model: SubjectModel, n: int, seed: int) -> torch.Tensor:
    """The model's own stories, [n, 192]."""
    torch.manual_seed(seed)
    start = torch.full((n, 1), 1)
    return model.module.generate(start, max_new_tokens=191, min_new_tokens=191, do_sample=True, pad_token_id=0)


def test_a_pack_for_a_small_real_model_takes_minutes_and_is_good_on_new_text(tmp_path: Path) -> None:
    model = SubjectModel.load(shared_data("stories260k", "hf_llama"), device="cpu")
    started = time.perf_counter()
    plan = Plan.of(SITES, 190_000, batch=1024, d_sae=512, k=24, lr=3e-3, normalize=True)
    folders = train_saes(model, stories(model, 1024, 0), plan, tmp_path / "pack")
    assert time.perf_counter() - started < 180
    unseen = collect_activations(model, stories(model, 64, 1).tolist(), SITES, n_tokens=12_000)
    for folder, site in zip(folders, SITES, strict=True):
        assert SAE.load_from_disk(folder).cfg.metadata.hook_name == site.name
        dictionary = Dictionary.load(folder)
        dictionary.check(model)
        figures = held_out_figures(dictionary, unseen.x[site])
        assert figures["variance_explained"] >= 0.9, site
        assert 12 <= figures["l0"] <= 40, site
