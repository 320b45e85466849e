"""Training: activations are the model's own, and a trained dictionary is one SAELens opens, hook intact."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.sites import Site
from mediation.subject import SubjectModel
from mediation.training import saes, several, sparse
from mediation.training.activations import collect_activations, shuffled_batches, token_windows, windows
from mediation.training.saes import SAESettings, SAETraining, train_sae
from mediation.training.several import Plan, train_saes
from mediation.training.sparse import SparseBatchTopK
from mediation.training.text import dataset_documents, documents_of, held_out, kept
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
    training, names = SAESettings(48, k=2, steps=1, lr=1e-8), {"site": SITE, "model_name": "tiny"}
    folder = train_sae(iter([x]), tmp_path / "a", training, start=x[:48], **names)
    expected = torch.nn.functional.normalize(x[:48] - x.mean(0), dim=1)
    assert torch.allclose(Dictionary.load(folder).decoder, expected, atol=1e-4)
    with pytest.raises(MediationError, match="give one per latent"):
        train_sae(iter([x]), tmp_path / "b", training, start=x[:47], **names)


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


# The sparse step ------------------------------------------------------------------------------------------


def dense_losses(sae: SparseBatchTopK, x: torch.Tensor, dead: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same step, written with dense products."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    sampled = pre[: sparse.SAMPLED_ROWS]
    threshold = sampled.flatten().topk(int(sae.cfg.k * len(sampled))).values.min().relu()
    latents = torch.where(pre > threshold, pre, 0.0).relu()
    losses = {}
    for width in sae.widths:
        out = latents[:, :width] @ sae.W_dec[:width] + sae.b_dec
        losses[f"mse_loss_{width}"] = (out - x).square().sum(1).mean()
    rows = slice(0, sparse.SAMPLED_ROWS)
    losses["auxiliary_reconstruction_loss"] = sae.calculate_topk_aux_loss(x[rows], out[rows], sampled, dead)
    return losses


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("n", [7, 300, 1100])
def test_a_sparse_step_has_the_losses_and_gradients_of_a_dense_one(architecture: str, n: int) -> None:
    x = planted(n, d=24)[0]
    sae = SAETraining(SAESettings(64, 3, 10, architecture), x).sae
    with torch.no_grad():
        sae.b_enc += 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    dead = torch.arange(64) % 5 == 0
    given = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    step = sae.training_forward_pass(given)
    step.loss.backward()
    found = {name: value.grad.clone() for name, value in sae.named_parameters()}
    sae.zero_grad()
    expected = dense_losses(sae, x, dead)
    torch.stack(list(expected.values())).sum().backward()
    assert {k: v.item() for k, v in step.losses.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-5
    )
    for name, value in sae.named_parameters():
        assert value.grad is not None
        assert torch.allclose(found[name], value.grad, rtol=1e-3, atol=1e-4 * value.grad.abs().max()), name
    assert step.feature_acts.is_sparse
    assert step.feature_acts.sum(-2).to_dense().shape == (64,)


@settings(max_examples=10, deadline=None)
@given(block=st.integers(1, 400))
def test_the_pattern_does_not_depend_on_the_block(block: int) -> None:
    x = planted(300, d=24)[0]
    sae = SAETraining(SAESettings(64, 3, 10), x).sae
    _, whole = sae._pattern(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "BLOCK_ROWS", block)
        _, parts = sae._pattern(x)
    assert len(whole.row) > 100
    assert torch.equal(whole.row, parts.row)
    assert torch.equal(whole.latent, parts.latent)


def test_bf16_changes_only_which_latents_fire_at_the_border() -> None:
    x = planted(1024, d=24)[0]
    runs = {}
    for bf16 in (False, True):
        sae = SAETraining(SAESettings(64, 3, 10, bf16=bf16), x).sae
        _, pattern = sae._pattern(x - sae.b_dec)
        runs[bf16] = set(zip(pattern.row.tolist(), pattern.latent.tolist(), strict=True))
    assert len(runs[False]) > 100
    assert len(runs[True] ^ runs[False]) < 0.01 * len(runs[False])


def test_normalised_training_is_the_same_at_any_scale(tmp_path: Path) -> None:
    x, _ = planted()
    decoders = []
    for scale in (1.0, 100.0):
        training = SAESettings(48, 2, 300, lr=3e-3, normalize=True)
        folder = train_sae(
            shuffled_batches(x * scale, 256), tmp_path / str(scale), training, site=SITE, model_name="tiny"
        )
        dictionary = Dictionary.load(folder)
        error = dictionary.split(x * scale).error / scale
        assert 1 - (error.square().sum() / (x - x.mean(0)).square().sum()).item() > 0.85
        decoders.append(dictionary.decoder)
    assert torch.allclose(*decoders, atol=1e-3)


# Several sites --------------------------------------------------------------------------------------------


def tiny_plan(**changes: object) -> Plan:
    options = {"tokens": 256, "batch": 32, "chunk": 64, "d_sae": 24, "k": 3, "normalize": True} | changes
    return Plan.of([SITE, Site.parse("blocks.2.hook_mlp_out")], **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[SubjectModel, torch.Tensor]:
    model = tiny(tmp_path_factory.mktemp("model"))
    return model, torch.randint(3, 60, (64, 9), generator=torch.Generator().manual_seed(0))


class Killed(Exception):
    pass


@pytest.mark.parametrize("architecture", ["batchtopk", "topk"])
@pytest.mark.parametrize("killed_at", [40, 150, 250])
def test_a_resumed_training_gives_the_weights_of_an_unbroken_one(
    corpus: tuple[SubjectModel, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
    architecture: str,
) -> None:
    monkeypatch.setattr(several, "CHECKPOINT_SECONDS", 0.0)
    plan = tiny_plan(architecture=architecture)
    whole = train_saes(*corpus, plan, tmp_path / "whole")

    def kill(done: int, of: int, figures: dict[str, float]) -> None:
        if done >= killed_at:
            raise Killed

    with pytest.raises(Killed):
        train_saes(*corpus, plan, tmp_path / "broken", kill)
    assert not list((tmp_path / "broken").glob("blocks*"))
    seen: list[int] = []
    resumed = train_saes(*corpus, plan, tmp_path / "broken", lambda done, of, figures: seen.append(done))
    assert seen[0] > (killed_at // 64 - 1) * 64  # it went on, not from the start
    assert seen[-1] == plan.tokens
    for one, two in zip(whole, resumed, strict=True):
        assert load_file(one / "sae_weights.safetensors").keys() == load_file(two / "sae_weights.safetensors").keys()
        for name, value in load_file(one / "sae_weights.safetensors").items():
            assert torch.equal(value, load_file(two / "sae_weights.safetensors")[name]), name
        assert SAE.load_from_disk(two).cfg.metadata.hook_name == two.name
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == sorted(site.name for site in plan.sites)


def test_a_kill_between_two_saves_loses_nothing(
    corpus: tuple[SubjectModel, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_saes(*corpus, tiny_plan(), tmp_path / "whole")
    save = SAETraining.save

    def second_fails(self: SAETraining, folder: Path, site: Site, model_name: str) -> Path:
        if "mlp_out" in folder.name:
            raise Killed
        return save(self, folder, site, model_name)

    with monkeypatch.context() as patch:
        patch.setattr(SAETraining, "save", second_fails)
        with pytest.raises(Killed):
            train_saes(*corpus, tiny_plan(), tmp_path / "broken")
    for one, two in zip(whole, train_saes(*corpus, tiny_plan(), tmp_path / "broken"), strict=True):
        for name, value in load_file(one / "sae_weights.safetensors").items():
            assert torch.equal(value, load_file(two / "sae_weights.safetensors")[name])
    assert not (tmp_path / "broken" / several.CHECKPOINT).exists()


def test_what_stops_a_training_is_said_in_a_sentence_and_leaves_nothing_half_written(
    corpus: tuple[SubjectModel, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = corpus
    with pytest.raises(MediationError, match="give more text"):
        train_saes(model, tokens[:10], tiny_plan(), tmp_path / "a")
    with pytest.raises(MediationError, match=r"no site blocks\.9"):
        train_saes(model, tokens, Plan.of([Site.parse("blocks.9.hook_resid_pre")], 64, d_sae=8, k=1), tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(several.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        with pytest.raises(MediationError, match="GiB of memory"):
            train_saes(model, tokens, tiny_plan(), tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(several.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(MediationError, match="GiB on disk"):
            train_saes(model, tokens, tiny_plan(), tmp_path / "a")
    assert not (tmp_path / "a").exists()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saes, "save_file", full)
        with pytest.raises(MediationError, match="the disk is full"):
            train_saes(model, tokens, tiny_plan(), tmp_path / "b")
    assert not [path for path in (tmp_path / "b").glob("*") if not path.name.startswith(".")]
    monkeypatch.setattr(several, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        train_saes(model, tokens, tiny_plan(), tmp_path / "c", _kill_at(200))
    with pytest.raises(MediationError, match="other settings"):
        train_saes(model, tokens, tiny_plan(k=4), tmp_path / "c")
    train_saes(model, tokens, tiny_plan(), tmp_path / "c")
    with pytest.raises(MediationError, match="already holds an SAE"):
        train_saes(model, tokens, tiny_plan(), tmp_path / "c")


def _kill_at(tokens: int) -> Callable[[int, int, dict[str, float]], None]:
    def kill(done: int, of: int, figures: dict[str, float]) -> None:
        if done >= tokens:
            raise Killed

    return kill


def test_activations_that_are_no_numbers_stop_a_training() -> None:
    training = SAETraining(SAESettings(8, 1, 2), torch.randn(16, 4))
    with pytest.raises(MediationError, match="not finite"):
        training.step(torch.full((16, 4), torch.nan))


def test_attention_sinks_are_left_out(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    tokens = [[5, 6, 7, 8, 9, 10]] * 4
    plain = collect_activations(model, tokens, [SITE], n_tokens=100)
    with torch.no_grad():
        model.module.get_input_embeddings().weight[8] *= 1000
    found = collect_activations(model, tokens, [SITE], n_tokens=100)
    assert plain.tokens.tolist() == [6, 7, 8, 9, 10] * 4
    assert found.tokens.tolist() == [6, 7, 9, 10] * 4


def test_bos_is_left_out_where_texts_begin_with_it(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    model.bos_id = 8
    tokens = [[5, 6, 7, 8, 9, 10]] * 4
    for prepended, seen in ((False, [6, 7, 8, 9, 10]), (True, [6, 7, 9, 10])):
        model.prepend_bos = prepended
        assert collect_activations(model, tokens, [SITE], n_tokens=100).tokens.tolist() == seen * 4


# Text -----------------------------------------------------------------------------------------------------


def test_documents_cover_the_files_and_the_held_out_ones_are_not_trained_on(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "x" * 1500 for i in range(400)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs[:300]))
    (tmp_path / "b.txt").write_text("\n\n".join(paragraphs[300:]))
    documents = documents_of([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert sorted(p for d in documents for p in d.split("\n\n")) == sorted(paragraphs)
    assert documents == documents_of([tmp_path / "a.txt", tmp_path / "b.txt"])
    train, test = list(kept(documents)), list(held_out(documents))
    assert sorted(train + test) == sorted(documents)
    assert len(test) == len(documents) // 50
    assert not set(train) & set(test)


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(MediationError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        documents_of([tmp_path / "latin.txt"])
    with pytest.raises(MediationError, match="cannot be read"):
        documents_of([tmp_path / "none.txt"])


def test_a_dataset_folder_is_read_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    pl.DataFrame({"text": [f"w{i}" for i in range(9)]}).write_parquet(tmp_path / "part.parquet")
    assert sorted(dataset_documents(str(tmp_path))) == [f"w{i}" for i in range(9)]
    with pytest.raises(MediationError, match="no column 'body'"):
        dataset_documents(str(tmp_path), column="body")
    with pytest.raises(MediationError, match="cannot be opened"):
        dataset_documents(str(tmp_path / "none"))
