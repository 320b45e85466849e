"""`mediation train saes` as a user meets it, on the shipped organism's model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mediation.cli import main
from mediation.dictionaries import Dictionary
from mediation.training import commands
from tests.test_cli import DEFAULT, ROWS, refused

MODEL = str(DEFAULT / "model")
SITE = "blocks.1.hook_resid_pre"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "\n\n".join(
            " ".join(row["clean"] + row["answer"] for row in ROWS[k % 60 :] + ROWS[: k % 60]) for k in range(120)
        )
    )
    return path


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--tokens", "8192", "--d-sae", "64", "--k", "4", "--batch", "512", "--context", "16", "--lr", "0.003"]
    return ["train", "saes", "--model", MODEL, "--text", str(text), "--out", str(out), *sizes, *more]


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_saes_are_trained_saved_and_measured_on_held_out_text(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: str
) -> None:
    out = tmp_path / "pack"
    sites = ["--sites", SITE, "--sites", "model.layers.1.mlp"]
    main([*arguments(text, out, *sites), "--architecture", architecture, "--json"])
    made = json.loads(capsys.readouterr().out)
    assert [Path(folder).name for folder in made["saes"]] == [SITE, "blocks.1.hook_mlp_out"]
    for folder in made["saes"]:
        figures = made["held_out"][Path(folder).name]
        assert Dictionary.load(folder).site.name == Path(folder).name
        assert figures["variance_explained"] > 0.3
        assert 1 < figures["l0"] < 16
    with pytest.raises(SystemExit) as stop:
        main(arguments(text, out, *sites))
    assert stop.value.code == 2
    assert "already holds an SAE" in capsys.readouterr().err


def test_people_are_told_what_it_costs_and_how_it_came_out(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(text, tmp_path / "pack", "--sites", SITE))
    shown = capsys.readouterr().out
    assert "GiB of memory" in shown
    assert "minutes" in shown
    assert "variance explained" in shown
    assert "wrote" in shown


def test_what_cannot_be_trained_is_refused_in_a_sentence(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    site = ["--sites", SITE]
    assert "not UTF-8" in refused(capsys, *arguments(latin, out, *site))
    assert "cannot be read" in refused(capsys, *arguments(tmp_path / "none.txt", out, *site))
    assert "blocks.9" in refused(capsys, *arguments(text, out, "--sites", "blocks.9.hook_resid_pre"))
    assert "give more text" in refused(capsys, *arguments(text, out, *site, "--tokens", "50000000"))
    assert "--text files or a --dataset" in refused(capsys, "train", "saes", "--model", MODEL, "--out", str(out), *site)
    assert "batchtopk, matryoshka, topk" in refused(capsys, *arguments(text, out, *site, "--architecture", "dense"))
    monkeypatch.setattr(commands.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert "take" in refused(capsys, *arguments(text, out, *site))
    assert not out.exists()
