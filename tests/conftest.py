"""Runs that the tests of the page share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mediation import commands
from tests.test_cli import DEFAULT, ROWS

META = "blocks.1.hook_resid_pre"
QUICK = {"sample": 48, "steps": 8}


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the shipped organism that has all a run can have: labels, flags, a proof and another to compare with.

    The other lies beside it, in `other`: clean and corrupt are exchanged there.
    """
    folder = tmp_path_factory.mktemp("full")
    shutil.copytree(DEFAULT, folder / "organism")
    organism = folder / "organism"
    (folder / "text.txt").write_text("\n".join(row["clean"] + row["answer"] for row in ROWS * 30))
    source = commands.Source(str(organism / "model"), (str(organism / "saes"),), "", "cpu")
    commands.label_command(source, [folder / "text.txt"], 12_000, organism / "meta" / META, quiet=True)
    turned = [
        row | {"clean": row["corrupt"], "corrupt": row["clean"], "answer": row["wrong_answer"],
               "wrong_answer": row["answer"], "roles": {}}
        for row in ROWS[:32]
    ]  # fmt: skip
    for name, rows in (("run", ROWS[:32]), ("other", turned)):
        prompts = folder / f"{name}.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen = commands.Source(source.model, source.saes, str(prompts), "cpu")
        commands.trace_command(chosen, QUICK, folder / name, quiet=True)
    commands.flag_command(folder / "run", organism / "meta" / META, {"controls": 399}, quiet=True)
    proof = {"errors": "kept", "top": 4, "prompts": 4, "edges": False, "seed": 0}
    commands.prove_command(folder / "run", proof, quiet=True)
    view = commands.View.of(commands.Keep(), "meta", organism / "meta" / META, [], folder / "other")
    commands.inspect_command(folder / "run", 1, view=view, quiet=True)
    return folder / "run"


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a trace alone: no labels, no flags, no proof."""
    folder = tmp_path_factory.mktemp("bare")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    source = commands.Source(str(DEFAULT / "model"), (str(DEFAULT / "saes"),), str(prompts), "cpu")
    commands.trace_command(source, {"sample": 0, "steps": 4}, folder / "run", quiet=True)
    commands.inspect_command(folder / "run", 1, quiet=True)
    return folder / "run"
