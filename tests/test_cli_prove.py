"""`mediation prove` as a user meets it: circuits stored with the run, shown as tables, refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from mediation.cli import main
from tests.test_cli import MODEL, ROWS, SAES, refused, write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prove")
    options = ["--steps", "2", "--sample", "4", "--top", "3", "--json"]
    main(["trace", write(folder, ROWS[:8]), "--model", MODEL, "--saes", SAES, "--out", str(folder / "run"), *options])
    return folder / "run"


def test_a_proof_is_printed_and_stored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(["prove", str(run), "--top", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    table = pl.read_parquet(run / "proof.parquet")
    assert found["nodes"]["prompts"] == found["edges"]["prompts"] == 4
    assert set(found["edges"]["scores"]) == set(table.filter(kind="edges")["ranking"])
    assert len(found["curves"]) == len(table)
    info = json.loads((run / "run.json").read_text())
    assert info["proof"]["nodes"] == found["nodes"]
    assert info["proof"]["settings"]["errors"] == "kept"
    circuit = pl.read_parquet(run / "circuit.parquet")
    assert circuit.columns == ["kind", "rank", "source", "target"]
    assert circuit.filter(kind="nodes")["rank"].to_list() == list(range(1, found["nodes"]["of"] + 1))
    assert circuit.filter(kind="edges")["target"].null_count() == 0


def test_people_see_tables(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["prove", str(run), "--no-edges", "--prompts", "2", "--errors", "removed"])
    shown = capsys.readouterr().out
    assert "Circuits of nodes: faithfulness / completeness on 2 prompts" in shown
    assert "Circuits of edges" not in shown
    assert "CMD, log k" in shown


def test_bad_input_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "kept, removed, with_latents" in refused(capsys, "prove", str(run), "--errors", "some")
    assert "run.json" in refused(capsys, "prove", str(tmp_path))
