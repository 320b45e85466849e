"""One finished run for all tests that only read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mediation.cli import main
from tests.setups import ORGANISM, organism_rows, write_rows

SITE = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two questions of the shipped organism with all that the commands add to it: latents labelled, hidden
    facts flagged, circuits proven, page written. To be read; who writes takes a copy."""
    folder = tmp_path_factory.mktemp("finished")
    organism, run = folder / "organism", folder / "run"
    shutil.copytree(ORGANISM, organism)
    model, saes, meta = (str(organism / name) for name in ("model", "saes", f"meta/{SITE}"))
    rows = organism_rows()
    text = folder / "text.txt"
    text.write_text("\n".join(row["clean"] + row["answer"] for row in rows * 30))
    main(["label", saes, "--model", model, "--text", str(text), "--tokens", "8000", "--meta", meta, "--json"])
    prompts = write_rows(folder, rows[:24])
    options = ["--steps", "8", "--sample", "48", "--out", str(run), "--json"]
    main(["trace", prompts, "--model", model, "--saes", saes, *options])
    main(["flag", str(run), "--meta", meta, "--controls", "39", "--parts", "4", "--json"])
    main(["prove", str(run), "--no-edges", "--prompts", "4", "--json"])
    main(["inspect", str(run), "--json"])
    return run
