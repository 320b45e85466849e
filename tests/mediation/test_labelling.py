"""Labels from a corpus: statistics against dense ones, names and scores against planted answers and scikit-learn."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mediation.contexts import BEFORE, EDGES, Block, Context, Reader, Statistics, blocks, judged, read_half
from mediation.errors import MediationError
from mediation.explanations import import_explanations
from mediation.labelling import label_readers
from mediation.labels import load_labels, read_labels, save_labels, update_labels
from mediation.metalatents import MatchingPursuit
from mediation.names import FEW, OFFSETS, Name, Place, Trial, find_name, plain_words
from tests.setups import detector_dictionary, detector_model, random_dictionary, tiny

VOCABULARY, WIDTH = 12, 5


def random_block(windows: int = 14, length: int = 20, seed: int = 0) -> Block:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(windows, length, WIDTH, generator=generator).sub(0.8).relu()
    kept = torch.rand(windows, length, generator=generator) < 0.9
    tokens = torch.randint(VOCABULARY, (windows, length), generator=generator)
    return Block(0, tokens, kept, values * kept[..., None])


def pieces(block: Block, sizes: list[int]) -> list[Block]:
    cuts = torch.tensor(sizes).cumsum(0).clamp(max=len(block.tokens)).unique().tolist()
    parts = torch.tensor_split(torch.arange(len(block.tokens)), cuts)
    return [Block(0, block.tokens[p], block.kept[p], block.values[p]) for p in parts]


class TestStatistics:
    @settings(max_examples=20, deadline=None)
    @given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8), seed=st.integers(0, 50))
    def test_any_cutting_into_blocks_gives_the_dense_answer(self, sizes: list[int], seed: int) -> None:
        block = random_block(seed=seed)
        found = Statistics(WIDTH, VOCABULARY, n=4)
        for piece in pieces(block, sizes):
            found.add(piece)
        on = block.values > 0
        assert found.seen == int(block.kept.sum())
        assert torch.equal(found.on, on.sum(dim=(0, 1)))
        assert torch.allclose(found.density(), on[block.kept].float().mean(0))
        assert torch.equal(found.vocabulary, block.tokens[block.kept].bincount(minlength=VOCABULARY))
        assert torch.equal(found.histogram.sum(1), found.on)
        for latent in range(WIDTH):
            peaks = block.values[..., latent].max(dim=1)
            expected = [w for w in peaks.values.argsort(descending=True).tolist() if peaks.values[w] > 0][:4]
            contexts = found.contexts(latent)
            assert len(contexts) == len(expected)
            for context, window in zip(contexts, expected, strict=True):
                at = int(peaks.indices[window])
                start, stop = max(0, at - BEFORE), min(20, at + 6)
                assert context.tokens == block.tokens[window, start:stop].tolist()
                assert np.allclose(context.values, block.values[window, start:stop, latent])
                assert start + context.position == at

    def test_histogram_bins_are_half_octaves_open_at_both_ends(self) -> None:
        values = torch.tensor([1e-9, 1.0, 1.4, 1.5, 1e9])
        tokens = torch.zeros(1, 5, dtype=torch.long)
        found = Statistics(1, VOCABULARY, n=1)
        found.add(Block(0, tokens, torch.ones(1, 5, dtype=torch.bool), values[None, :, None]))
        octaves = {float(EDGES[k].log2()): n for k, n in enumerate(found.histogram[0].tolist()) if n}
        assert {round(each, 3): n for each, n in octaves.items()} == {-8.0: 1, 0.0: 2, 0.5: 1, 16.0: 1}


def test_sinks_bos_and_the_first_token_are_left_out() -> None:
    x = torch.ones(1, 6, 3)
    x[0, 0] *= 100
    x[0, 2] *= 9.9
    x[0, 3] *= 10.1
    tokens = torch.tensor([[5, 5, 5, 5, 1, 5]])
    assert judged(x, tokens, 1).tolist() == [[False, True, True, False, False, True]]
    assert torch.equal(judged(x * 1e3, tokens, 1), judged(x, tokens, 1))


def test_the_halves_of_files_are_disjoint_and_complete(tmp_path: Path) -> None:
    texts = ["".join(f"line {n} of {name}\n" for n in range(900)) for name in "ab"]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    halves = [list(read_half(paths, half)) for half in (0, 1)]
    lines = [set("".join(half).splitlines()) for half in halves]
    assert not lines[0] & lines[1]
    assert sorted(lines[0] | lines[1]) == sorted("".join(texts).splitlines())
    for half in lines:
        assert {line[-1] for line in half} == {"a", "b"}


def test_text_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(MediationError, match="UTF-8"):
        list(read_half([tmp_path / "latin"], 0))
    with pytest.raises(MediationError, match="No such file"):
        list(read_half([tmp_path / "none"], 0))


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_blocks_are_the_models_own_values(tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mediation.contexts.BATCH", batch)
    model = tiny(tmp_path / "model")
    readers = [
        Reader(random_dictionary(tmp_path / hook, hook))
        for hook in ("blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out")
    ]
    sequences = torch.randint(3, 60, (5, 8)).tolist()
    found = list(blocks(model, iter(sequences), readers, n_tokens=40))
    for index, reader in enumerate(readers):
        site = reader.dictionary.site
        x = model.forward(torch.tensor(sequences), read=[site]).sites[site]
        kept = torch.cat([block.kept for block in found if block.reader == index])
        values = torch.cat([block.values for block in found if block.reader == index])
        assert torch.equal(kept, judged(x, torch.tensor(sequences), model.bos_id))
        assert torch.allclose(values, reader.dictionary.encode(x) * kept[..., None], atol=1e-5)


def test_meta_latents_are_read_as_the_sum_over_their_members(tmp_path: Path) -> None:
    dictionary = random_dictionary(tmp_path, "blocks.1.hook_resid_pre")
    pursuit = MatchingPursuit(torch.randn(9, 16), k=2)
    reader, x = Reader(dictionary, pursuit), torch.randn(7, 16)
    latents, codes = dictionary.encode(x), pursuit.codes(dictionary.decoder)
    assert torch.allclose(reader(x), torch.cat([latents, latents @ codes], dim=1), atol=1e-5)
    members = reader.members(4, 3)
    assert [i for i, _ in members] == codes[:, 4].topk(3).indices.tolist()[: len(members)]


WORDS = ["the", "a", "of", "cat", "dog", "new", "york", "said", "war", "army", "x", "y"]


def planted_contexts(place: Place, words: list[str], n: int = 10) -> list[Context]:
    """Noise of common words, and one of `words` where `place` says."""
    rng = np.random.default_rng(3)
    contexts = []
    for index in range(n):
        tokens = rng.integers(0, 3, 16).tolist()
        offset = OFFSETS[place][index % len(OFFSETS[place])]
        tokens[10 + offset] = WORDS.index(words[index // 2 % len(words)])
        contexts.append(Context(tokens, [0.0] * 16, 10))
    return contexts


FREQUENCY = Counter({word: 1000 if word in ("the", "a", "of") else 5 for word in WORDS})


@pytest.mark.parametrize("place", [Place.HERE, Place.AFTER, Place.NEAR, Place.BEFORE])
def test_a_planted_word_is_found_where_it_stands(place: Place) -> None:
    name = find_name(planted_contexts(place, ["cat", "dog"]), WORDS, FREQUENCY, [" up"])
    assert name is not None
    assert name.place is place
    assert set(name.words) == {"cat", "dog"}


def test_contexts_that_share_nothing_leave_what_is_promoted() -> None:
    words = [f"v{k}" for k in range(200)]
    frequency = Counter(dict.fromkeys(words, 100))
    rng = np.random.default_rng(0)
    names = []
    for _ in range(40):
        contexts = [Context(row, [0.0] * 16, 10) for row in rng.integers(0, 200, (20, 16)).tolist()]
        names.append(find_name(contexts, words, frequency, [" Up", "up", " down"]))
    assert np.mean([str(name) == "promotes up | down" for name in names]) >= 0.8
    assert find_name([], words, frequency, [" Up"]) is None


def naive_prediction(name: Name | None, tokens: list[int]) -> list[bool]:
    if name is None:
        return [False] * len(tokens)
    around = [[t + offset for offset in OFFSETS[name.place]] for t in range(len(tokens))]
    return [any(0 <= s < len(tokens) and WORDS[tokens[s]] in name.words for s in places) for places in around]


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8), seed=st.integers(0, 50))
def test_scores_are_scikit_learns_area_under_the_curve(sizes: list[int], seed: int) -> None:
    block = random_block(seed=seed)
    names = [
        Name(Place.HERE, ("cat", "dog")), Name(Place.AFTER, ("new",)), Name(Place.NEAR, ("war", "army")),
        Name(Place.PROMOTES, ("york", "absent")), None,
    ]  # fmt: skip
    trial = Trial(names, WORDS)
    for piece in pieces(block, sizes):
        trial.add(piece)
    scores = trial.scores()
    for latent, name in enumerate(names):
        if name is None:
            assert scores[latent].isnan()
            continue
        predicted = torch.tensor([naive_prediction(name, row) for row in block.tokens.tolist()])[block.kept]
        on = (block.values[..., latent] > 0)[block.kept]
        assert int(on.sum()) >= FEW
        assert scores[latent].item() == pytest.approx(roc_auc_score(on, predicted.float()))


def test_too_few_held_out_activations_give_no_score() -> None:
    block = random_block(windows=1)
    block.values[0, FEW - 1 :, 0] = 0.0
    trial = Trial([Name(Place.HERE, ("cat",))] * WIDTH, WORDS)
    trial.add(block)
    assert trial.scores()[0].isnan()


def test_words_are_compared_without_case_and_space() -> None:
    texts = [" The", "the", "\n", " ", "�"]
    assert plain_words(lambda ids: texts[ids[0]], 5) == ["the", "the", "\\n", "␣", "�"]


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(" ".join(f"w{n}" for n in rng.integers(0, 60, 12)) for _ in range(600)))
    return [path]


def test_planted_detectors_are_named_and_their_names_hold(tmp_path: Path, corpus: list[Path]) -> None:
    """Each latent is on at one word; a meta-latent that joins two is on at both, and has them as members."""
    model = detector_model(tmp_path / "model")
    dictionary = detector_dictionary(tmp_path / "sae")
    joined = torch.zeros(2, 16)
    joined[0, 0] = joined[0, 1] = joined[1, 2] = joined[1, 3] = 0.5**0.5
    ticks: list[tuple[int, int]] = []
    ((latents, metas),) = label_readers(
        model, [Reader(dictionary, MatchingPursuit(joined, k=1))], corpus, n_tokens=8000,
        progress=lambda done, of: ticks.append((done, of)),
    )  # fmt: skip
    assert latents["label"].to_list() == [*(f"on w{k}" for k in range(6)), None]
    assert latents["score"].to_list() == [*[1.0] * 6, None]
    assert latents["density"].to_list() == pytest.approx([*[1 / 60] * 6, 0.0], abs=0.01)
    assert latents["contexts"][2][0]["values"][latents["contexts"][2][0]["position"]] == pytest.approx(5.0)
    assert {entry["tokens"][entry["position"]] for entry in latents["contexts"][2]} == {"w2"}
    assert latents["histogram"][6].to_list() == []
    assert metas is not None
    assert [set(label.removeprefix("on ").split(" | ")) for label in metas["label"]] == [{"w0", "w1"}, {"w2", "w3"}]
    assert metas["score"].to_list() == [1.0, 1.0]
    assert [{member["latent"] for member in row} for row in metas["members"]] == [{0, 1}, {2, 3}]
    assert metas["members"][0][0]["label"] in ("on w0", "on w1")
    assert ticks[-1][1] == 8000
    assert [done for done, _ in ticks] == sorted(done for done, _ in ticks)


def test_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2")
    model, dictionary = detector_model(tmp_path / "model"), detector_dictionary(tmp_path / "sae")
    with pytest.raises(MediationError, match="too little text"):
        label_readers(model, [Reader(dictionary)], [tmp_path / "short.txt"], n_tokens=1000)


class TestImport:
    def entries(self) -> list[dict]:
        return [
            {"modelId": "toy", "layer": "0-res", "index": "1", "description": " cats "},
            {"modelId": "toy", "layer": "0-res", "index": 3, "explanations": [{"description": "dogs"}]},
            {"modelId": "toy", "layer": "1-res", "index": 2, "description": "another layer"},
        ]

    def test_neuronpedia_by_id(self, tmp_path: Path) -> None:
        dictionary = detector_dictionary(tmp_path / "sae")
        dictionary.sae.cfg.metadata.neuronpedia_id = "toy/0-res"
        whole, lines = tmp_path / "all.json", tmp_path / "batch-0.jsonl.gz"
        whole.write_text(json.dumps(self.entries()))
        lines.write_bytes(gzip.compress("\n".join(map(json.dumps, self.entries())).encode()))
        for path in (whole, lines):
            table = import_explanations(path, dictionary)
            assert table.rows() == [(1, "cats", None, "neuronpedia"), (3, "dogs", None, "neuronpedia")]

    def test_several_sources_need_an_id(self, tmp_path: Path) -> None:
        dictionary = detector_dictionary(tmp_path / "sae")
        path = tmp_path / "all.json"
        path.write_text(json.dumps(self.entries()))
        with pytest.raises(MediationError, match="neuronpedia_id"):
            import_explanations(path, dictionary)
        path.write_text(json.dumps(self.entries()[:1]))
        assert import_explanations(path, dictionary)["label"].to_list() == ["cats"]

    def test_delphi_by_hook(self, tmp_path: Path) -> None:
        dictionary = random_dictionary(tmp_path / "sae", "blocks.1.hook_resid_pre")
        folder = tmp_path / "results" / "explanations"
        folder.mkdir(parents=True)
        for name, text in (("layers.0_latent4", "four"), ("layers.0_latent11", "eleven"), ("layers.1_latent5", "no")):
            (folder / f"{name}.txt").write_text(json.dumps(text))
        table = import_explanations(tmp_path / "results", dictionary)
        assert table.rows() == [(4, "four", None, "delphi"), (11, "eleven", None, "delphi")]

    @pytest.mark.parametrize("content", ["{", "[1]", '[{"index": 1}]', "[]", '[{"index": 99, "description": "x"}]'])
    def test_what_is_no_explanation_is_one_sentence(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises(MediationError, match=r"bad\.json"):
            import_explanations(path, detector_dictionary(tmp_path / "sae"))


class TestUpdate:
    def own(self, labels: list[str | None]) -> pl.DataFrame:
        return pl.DataFrame(
            {"index": range(len(labels)), "label": labels, "score": 0.9, "density": 0.5, "source": "contexts"}
        )

    def test_imported_labels_stay_when_evidence_comes(self, tmp_path: Path) -> None:
        imported = pl.DataFrame({"index": [1], "label": ["cats"], "score": [None], "source": ["delphi"]})
        for tables in ([imported, self.own(["a", "b"])], [self.own(["a", "b"]), imported]):
            for table in tables:
                update_labels(tmp_path, table)
            saved = read_labels(tmp_path)
            assert saved is not None
            assert saved.select("label", "score", "density", "source").rows() == [
                ("a", 0.9, 0.5, "contexts"),
                ("cats", None, 0.5, "delphi"),
            ]
            (tmp_path / "labels.parquet").unlink()

    def test_own_labels_replace_own_labels(self, tmp_path: Path) -> None:
        update_labels(tmp_path, self.own(["a", "b"]))
        update_labels(tmp_path, self.own(["c", None]))
        assert load_labels(tmp_path) == {0: "c"}

    @pytest.mark.parametrize("score", [{"score": [0.7]}, {}])
    def test_labels_of_tags_stay_with_their_own_score(self, tmp_path: Path, score: dict[str, list[float]]) -> None:
        save_labels(tmp_path, pl.DataFrame({"meta": [0], "label": ["job=baker"], **score}))
        update_labels(tmp_path, self.own(["a", "b"]))
        assert load_labels(tmp_path) == {0: "job=baker", 1: "b"}
        saved = read_labels(tmp_path)
        assert saved is not None
        assert saved["score"].to_list() == [score.get("score", [None])[0], 0.9]
        assert not list(tmp_path.glob("*.tmp"))
