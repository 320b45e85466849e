"""A dictionary's quality: closed forms for the geometry, planted absorption, a null that shares nothing."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch.nn.functional import normalize

from mediation.absorption import absorption_fractions, measure_absorption, read_words
from mediation.cli import main
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.metabench import Setting, plant
from mediation.metalatents import MetaDictionary
from mediation.quality import (
    geometry,
    max_cosines,
    meta_against_null,
    meta_beside,
    meta_made_from,
    text_quality,
    use,
    with_published,
)
from mediation.subject import SubjectModel
from mediation.training.meta import train_meta
from tests.setups import detector_dictionary, detector_model, random_dictionary
from tests.tiny_models import WORDS, tiny_module, tiny_tokenizer

HOOK = "blocks.1.hook_resid_pre"


class TestGeometry:
    def test_closed_form(self) -> None:
        """Two rows at 60 degrees, one at right angles to both, one opposite to the first, one zero."""
        rows = torch.tensor([[2.0, 0, 0], [0.5, 0.75**0.5, 0], [0, 0, 3.0], [-1.0, 0, 0], [0, 0, 0]])
        assert max_cosines(rows).tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0], abs=1e-6)

    @settings(max_examples=20, deadline=None)
    @given(block=st.integers(1, 40), scale=st.floats(0.01, 100), seed=st.integers(0, 20))
    def test_neither_block_size_nor_scale_matters(self, block: int, scale: float, seed: int) -> None:
        rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(max_cosines(rows * scale, block), max_cosines(rows), atol=1e-5)

    def test_of_a_dictionary(self, tmp_path: Path) -> None:
        dictionary = detector_dictionary(tmp_path)
        found = geometry(dictionary)  # encoder and decoder are the same axes
        assert found.mean_max_cosine == pytest.approx(0.0, abs=1e-6)
        assert found.share_max_cosine_over_07 == 0.0
        assert found.mean_encoder_cosine == found.p5_encoder_cosine == pytest.approx(1.0)
        other = random_dictionary(tmp_path / "other", "blocks.1.hook_resid_pre")
        by_hand = torch.cosine_similarity(other.sae.W_enc.T, other.sae.W_dec, dim=1)
        assert geometry(other).mean_encoder_cosine == pytest.approx(float(by_hand.mean()), abs=1e-5)


def test_dead_and_dense_shares() -> None:
    density = torch.tensor([0.0, 1e-6, 2e-5, 0.05, 0.2, 0.9])
    assert use(density) == pytest.approx({"dead_share": 2 / 6, "dense_share": 2 / 6})


@pytest.mark.filterwarnings("ignore::mediation.errors.FidelityWarning")
def test_quality_on_text_of_planted_detectors(tmp_path: Path) -> None:
    """One of sixty words in turn: each detector is on once in sixty tokens, the last latent never."""
    (tmp_path / "text").write_text(" ".join(f"w{n % 60}" for n in range(3000)))
    model, dictionary = detector_model(tmp_path / "model"), detector_dictionary(tmp_path / "sae")
    found = text_quality(model, dictionary, [tmp_path / "text"], 2560)
    assert found.density.tolist() == pytest.approx([*[1 / 60] * 6, 0.0], abs=2e-3)
    assert found.figures["dead_share"] == pytest.approx(1 / 7)
    assert found.figures["l0"] == pytest.approx(0.1, abs=0.02)
    (tmp_path / "short").write_text("w1")
    with pytest.raises(MediationError, match="too little text"):
        text_quality(model, dictionary, [tmp_path / "short"], 2560)


class TestMeta:
    @pytest.mark.filterwarnings("ignore::mediation.errors.FidelityWarning")
    def test_shared_facts_stand_out_against_the_null(self) -> None:
        """Rows that are pairs of 12 directions are explained; the same rows turned at random are not."""
        generator = torch.Generator().manual_seed(0)
        atoms = normalize(torch.randn(12, 32, generator=generator), dim=1)
        pairs = torch.stack([torch.randperm(12, generator=generator)[:2] for _ in range(300)])
        rows = normalize(atoms[pairs].sum(1), dim=1)
        meta = MetaDictionary.train(rows, width=18, k=2, steps=400, restarts=1)
        found = meta_against_null(meta, rows)
        assert found["meta_variance_explained"] > 0.95
        assert found["meta_variance_explained_null"] < 0.5
        assert found["meta_l0"] == pytest.approx(2, abs=0.3)
        assert meta_made_from(meta) == {}

    def test_a_null_that_was_trained_beside_it_is_not_trained_again(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = plant(Setting((2, 4, 8), rows=240, noise=0.2), 1).rows
        sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=240, metadata=SAEMetadata(hook_name=HOOK)))
        sae.W_dec.data = rows
        sae.save_model(tmp_path / "sae")
        made = train_meta([tmp_path / "sae"], tmp_path / "sae-meta")
        meta = MetaDictionary.load(tmp_path / "sae-meta")
        steps: list[int] = []
        found = meta_against_null(meta, rows, progress=lambda done, of: steps.append(done))
        assert not steps
        assert found["meta_variance_explained_null"] == made["null_variance_explained"]
        assert found["meta_variance_explained"] == pytest.approx(made["variance_explained"], abs=1e-5)
        main(["inspect", "--dictionary", str(tmp_path / "sae"), "--json"])
        shown = json.loads(capsys.readouterr().out)
        assert shown["meta_made_from"]["variance_explained"] == made["variance_explained"]
        assert list(shown["meta_made_from"]["dictionaries"].values()) == ["sae"]
        assert any("14 meta-latents from 240 rows of sae" in note for note in shown["notes"])

    def test_is_found_beside_the_dictionary(self, tmp_path: Path) -> None:
        dictionary = random_dictionary(tmp_path / "saes" / "layer", "blocks.1.hook_resid_pre")
        assert meta_beside(dictionary) is None
        random_dictionary(tmp_path / "meta" / "layer", "blocks.1.hook_resid_pre")
        assert meta_beside(dictionary) == tmp_path / "meta" / "layer"
        random_dictionary(tmp_path / "saes" / "layer-meta", "blocks.1.hook_resid_pre")
        assert meta_beside(dictionary) == tmp_path / "saes" / "layer-meta"


def test_published_figures_have_a_source() -> None:
    table = with_published({"l0": 3.0, "dead_share": 0.1})
    assert table["l0"]["value"] == 3.0
    assert table["l0"]["source"]
    assert table["dead_share"] == {"value": 0.1, "published": None, "source": None}


class TestFraction:
    """One letter along axis 0 of size 1; a main latent writes it, a word's own latent has taken `delta` of it."""

    def fractions(self, delta: float, main: float, *, scale: float = 1.0) -> float:
        child = torch.tensor([delta, 1.0, 0.0])
        decoder = torch.stack([torch.tensor([1.0, 0, 0]), normalize(child, dim=0), torch.tensor([0, 0, 1.0])])
        latents = torch.tensor([[main, float(child.norm()), 2.0]]) * scale
        x = torch.tensor([[1.0, 1.0, 0.0]]) * scale
        return float(absorption_fractions(latents, x, decoder, torch.tensor([3.0, 0, 0]) * scale, [0])[0])

    @settings(max_examples=30, deadline=None)
    @given(delta=st.floats(0.41, 1.0))
    def test_is_what_was_moved(self, delta: float) -> None:
        assert self.fractions(delta, 1 - delta) == pytest.approx(delta, abs=1e-4)

    def test_limits(self) -> None:
        assert self.fractions(0.6, 0.0) == 1.0  # the main latent is silent
        assert self.fractions(0.6, 1.0) == 0.0  # and here it says all there is
        assert self.fractions(0.3, 0.0) == 0.0  # others carry too little of it
        assert self.fractions(0.9, 0.8) == pytest.approx(0.2)  # no more than what the main latent lacks

    @settings(max_examples=20, deadline=None)
    @given(scale=st.floats(0.01, 100), delta=st.floats(0.45, 1.0), main=st.floats(0, 1))
    def test_scale_does_not_matter(self, scale: float, delta: float, main: float) -> None:
        assert self.fractions(delta, main, scale=scale) == pytest.approx(self.fractions(delta, main), abs=1e-3)

    def test_only_the_three_largest_absorbers_count(self) -> None:
        """Five latents carry .2 of the letter each: three make .6."""
        d = 7
        children = torch.zeros(5, d)
        children[:, 0] = 0.2
        children[torch.arange(5), torch.arange(1, 6)] = 0.3
        decoder = torch.cat([torch.eye(d)[:1], normalize(children, dim=1)])
        latents = torch.cat([torch.tensor([0.3]), children.norm(dim=1)])[None]
        found = absorption_fractions(latents, torch.eye(d)[:1], decoder, torch.eye(d)[0], [0])
        assert float(found[0]) == pytest.approx(0.6 / 0.9)


LETTERS = "abcdefghijklmnopqrst"
EACH, ABSORBED, DELTA = 40, 2, 0.6


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> tuple[SubjectModel, Dictionary, list[tuple[str, str]]]:
    """Twenty letters of forty words. At the embedding a word is its letter's axis and something of its own.

    The first two words of a letter have latents of their own, which carry .6 of the letter and silence its latent.
    """
    folder = tmp_path_factory.mktemp("spelling")
    n, special = len(LETTERS), len(LETTERS) * ABSORBED
    words = [(f"{letter}{k}", letter) for letter in LETTERS for k in range(EACH)]
    vocabulary = [*WORDS[:4], *(word for word, _ in words)]
    d = n + special + 20
    model = tiny_module(
        "llama", vocab_size=len(vocabulary), hidden_size=d, head_dim=d // 4, max_position_embeddings=512
    )
    embeddings = model.get_input_embeddings().weight.data.zero_()
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(d)
    children = []
    for k, (word, letter) in enumerate(words):
        at = LETTERS.index(letter)
        if k % EACH < ABSORBED:
            own = axes[n + len(children)]
            children.append((own, at))
        else:
            own = torch.zeros(d)
            own[n + special :] = 0.5 * torch.randn(20, generator=generator) / 20**0.5
        embeddings[vocabulary.index(word)] = axes[at] + own
    model.save_pretrained(folder / "model")
    tiny_tokenizer(words=vocabulary).save_pretrained(folder / "model")

    sae = StandardSAE(
        StandardSAEConfig(d_in=d, d_sae=n + special, metadata=SAEMetadata(hook_name="blocks.0.hook_resid_pre"))
    )
    encoder = torch.zeros(d, n + special)
    encoder[:n, :n] = torch.eye(n)
    decoder = torch.zeros(n + special, d)
    decoder[:n, :n] = torch.eye(n)
    for k, (own, at) in enumerate(children):
        encoder[:, at] -= 2 * own
        encoder[:, n + k] = own
        decoder[n + k] = own + DELTA * axes[at]
    sae.W_enc.data, sae.W_dec.data = encoder, decoder
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    sae.save_model(folder / "sae")
    return SubjectModel.load(folder / "model", device="cpu"), Dictionary.load(folder / "sae"), words


def test_planted_absorption_is_measured(
    spelling: tuple[SubjectModel, Dictionary, list[tuple[str, str]]],
) -> None:
    model, dictionary, words = spelling
    ticks: list[tuple[int, int]] = []
    found = measure_absorption(model, dictionary, words, progress=lambda done, of: ticks.append((done, of)))
    assert found.reason is None
    assert min(found.probe_f1.values()) > 0.9
    assert found.main == {letter: [k] for k, letter in enumerate(LETTERS)}
    absorbed = {word for word, _ in words if int(word[1:]) < ABSORBED}
    assert all(row["fraction"] == float(row["word"] in absorbed) for row in found.words.iter_rows(named=True))
    assert set(found.words["word"]) & absorbed
    per_letter = found.words.group_by("letter").agg(pl.col("fraction").mean())["fraction"]
    assert found.fraction == pytest.approx(float(per_letter.mean()))  # type: ignore[arg-type]
    assert ticks[-1] == (len(words), len(words))


def test_a_model_that_cannot_spell_gets_no_figure(
    spelling: tuple[SubjectModel, Dictionary, list[tuple[str, str]]],
) -> None:
    model, dictionary, words = spelling
    turned = [(word, LETTERS[(7 * k) % len(LETTERS)]) for k, (word, _) in enumerate(words)]
    found = measure_absorption(model, dictionary, turned)
    assert found.fraction is None
    assert found.reason is not None
    assert "cannot spell" in found.reason
    few = measure_absorption(model, dictionary, words[:100])
    assert few.fraction is None
    assert few.reason is not None
    assert "one-token words" in few.reason


def test_words_are_read_from_text_and_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text("Cat\n\ndog\n42\n" + json.dumps({"word": "owl", "first": "o", "id": 3}) + "\n")
    assert read_words(path) == [("Cat", "c"), ("dog", "d"), ("owl", "o")]
    path.write_text("cat\n{}\n")
    with pytest.raises(MediationError, match="Line 2"):
        read_words(path)
    with pytest.raises(MediationError, match="No such file"):
        read_words(tmp_path / "none")
