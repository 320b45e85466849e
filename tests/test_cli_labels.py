"""`mediation label` and `mediation inspect --dictionary` as a user meets them, on the shipped organism."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from mediation.cli import main
from mediation.labels import load_labels, read_labels
from tests.setups import random_dictionary, shared_data
from tests.test_cli import DEFAULT, ROWS, refused, write

SITE = "blocks.1.hook_resid_pre"
NASTY = "[/red] <script>alert(1)</script>"


@pytest.fixture
def organism(tmp_path: Path) -> Path:
    shutil.copytree(DEFAULT, tmp_path / "organism")
    return tmp_path / "organism"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(row["clean"] + row["answer"] for row in ROWS * 30))
    return path


def test_labels_are_made_kept_and_shown_in_table_graph_and_page(
    organism: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, saes = str(organism / "model"), str(organism / "saes")
    meta = organism / "meta" / SITE
    tags = load_labels(meta)
    main(
        ["label", saes, "--model", model, "--text", str(text), "--tokens", "12000", "--meta", str(meta), "--json"]
    )  # fmt: skip
    made = json.loads(capsys.readouterr().out)["labels"]
    assert [Path(each["folder"]).parent.name for each in made] == ["saes", "meta", "saes"]
    assert all(0 < each["scored"] <= each["labelled"] <= each["latents"] for each in made)
    assert made[0]["median_score"] > 0.7
    assert tags.items() <= load_labels(meta).items()  # labels by tags stay, the evidence is added
    table = read_labels(meta)
    assert table is not None
    assert {"members", "shared", "contexts", "logits_up", "histogram", "density"} <= set(table.columns)

    for site in (SITE, "blocks.2.hook_resid_pre"):
        labels = read_labels(organism / "saes" / site)
        assert labels is not None
        labels.with_columns(label=pl.lit(NASTY)).write_parquet(organism / "saes" / site / "labels.parquet")
    run = tmp_path / "run"
    options = ["--model", model, "--saes", saes, "--out", str(run), "--sample", "0", "--steps", "4"]
    main(["trace", write(tmp_path, ROWS[:4]), *options])
    assert "[/red] <script>" in capsys.readouterr().out
    nodes = json.loads((run / "graph.json").read_text())["nodes"]
    assert any((node["label"] or "").endswith(NASTY) for node in nodes)
    main(["inspect", str(run)])
    assert "[/red] <script>" in capsys.readouterr().out
    page = (run / "index.html").read_text()
    assert "\\u003cscript>alert(1)" in page
    assert "<script>alert(1)" not in page


def test_explanations_are_imported(organism: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(organism / "saes" / SITE)
    file = tmp_path / "explanations.json"
    file.write_text(json.dumps([{"index": "7", "description": "people called [bold]Alma"}]))
    main(["label", folder, "--import", str(file)])
    assert "1 labels for 1 latents" in capsys.readouterr().out
    assert load_labels(folder) == {7: "people called [bold]Alma"}


def test_quality_of_the_shipped_dictionary(
    organism: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\n".join(row["clean"].split()[0] for row in ROWS))
    dictionary = ["--dictionary", str(organism / "saes" / "blocks.2.hook_resid_pre")]
    options = ["--model", str(organism / "model"), "--text", str(text), "--tokens", "4000", "--spelling", str(words)]
    main(["inspect", *dictionary, *options, "--json"])
    found = json.loads(capsys.readouterr().out)
    figures = found["figures"]
    assert figures["l0"]["value"] == pytest.approx(8, abs=0.5)  # TopK with k = 8
    assert figures["variance_explained"]["value"] > 0.5
    assert figures["absorption_fraction"]["value"] is None
    assert any(note.startswith("No absorption figure") for note in found["notes"])
    assert all(row["published"] is None or row["source"] for row in figures.values())
    main(["inspect", *dictionary])
    shown = capsys.readouterr().out
    assert "mean max cosine" in shown
    assert "need --model and --text" in shown


def test_a_real_model_is_labelled_and_inspected_from_its_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """stories260k comes without a tokenizer, so its dictionary can be judged by its weights and no more."""
    model = shared_data("stories260k", "hf_llama")
    random_dictionary(tmp_path / "sae", "blocks.2.hook_resid_pre", d_in=64)
    main(["inspect", "--dictionary", str(tmp_path / "sae"), "--model", str(model), "--json"])
    assert json.loads(capsys.readouterr().out)["figures"]["mean_encoder_cosine"]["value"] is not None
    (tmp_path / "text").write_text("Once upon a time")
    message = refused(capsys, "label", str(tmp_path / "sae"), "--model", str(model), "--text", str(tmp_path / "text"))
    assert "tokenizer" in message


class TestBadInput:
    def test_inspect_wants_one_thing(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "--dictionary" in refused(capsys, "inspect")
        assert "--dictionary" in refused(capsys, "inspect", str(tmp_path), "--dictionary", str(tmp_path))

    def test_text_needs_a_model(self, capsys: pytest.CaptureFixture[str], text: Path) -> None:
        folder = str(DEFAULT / "saes" / SITE)
        assert "--model" in refused(capsys, "inspect", "--dictionary", folder, "--text", str(text))
        assert "--import" in refused(capsys, "label", folder)
        assert "--import" in refused(capsys, "label", folder, "--model", str(DEFAULT / "model"))

    def test_one_dictionary_at_a_time(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "2 dictionaries" in refused(capsys, "inspect", "--dictionary", str(DEFAULT / "saes"))

    def test_another_dictionarys_meta(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        random_dictionary(tmp_path / "sae", "blocks.1.hook_resid_pre", d_in=128)
        meta = str(DEFAULT / "meta" / SITE)
        assert "meta" in refused(capsys, "inspect", "--dictionary", str(tmp_path / "sae"), "--meta", meta).lower()

    def test_text_in_another_encoding(self, capsys: pytest.CaptureFixture[str], organism: Path, tmp_path: Path) -> None:
        (tmp_path / "latin").write_bytes("é".encode("latin-1"))
        options = ["--model", str(organism / "model"), "--text", str(tmp_path / "latin")]
        assert "UTF-8" in refused(capsys, "label", str(organism / "saes"), *options)
        assert not (organism / "saes" / SITE / "labels.parquet").exists()
