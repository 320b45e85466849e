"""A run survives being killed, refuses what is not its own, and gives back what was put in."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from mediation.errors import MediationError
from mediation.runs import PACKAGES, Run
from mediation.statistics import Agreement

SETTINGS = {"model": "tiny", "seed": 0, "taus": [0.5, 0.7]}
FRAME = pl.DataFrame({"node": ["a", "b"], "effect": [1.5, float("nan")]})


def files(run: Run) -> set[str]:
    return {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()}


# Create, resume, open --------------------------------------------------------------------------------------


def test_a_new_run_says_what_it_was_made_with(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "deep" / "run", SETTINGS)
    info = json.loads((run.path / "run.json").read_text())
    assert info["settings"] == Run.open(run.path).settings == SETTINGS
    assert info["versions"].keys() == {"python", *PACKAGES}
    assert info["versions"]["torch"] == metadata.version("torch")
    assert 10 < info["peak_memory_mb"] < 1e6
    assert files(run) == {"run.json"}


def test_the_same_settings_resume_with_shards_and_figures_kept(tmp_path: Path) -> None:
    class Baseline(StrEnum):
        ZERO = "zero"

    settings: dict[str, Any] = {
        "baseline": Baseline.ZERO,
        "pair": (1, 2),
        "folder": Path("x"),
        "nan": float("nan"),
    }
    run = Run.create(tmp_path, settings)
    run.write_shard("nodes", "0000", FRAME)
    run.record(trust={"gap": 0.1})
    again = Run.create(tmp_path, dict(reversed(settings.items())))
    assert again.has_shard("nodes", "0000")
    assert not again.has_shard("nodes", "0001")
    assert again.info["trust"] == {"gap": 0.1}


@pytest.mark.parametrize("other", [{"seed": 1}, {"taus": [0.5]}, {"extra": 1}])
def test_other_settings_are_refused_and_named(tmp_path: Path, other: dict[str, Any]) -> None:
    Run.create(tmp_path, SETTINGS)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(MediationError, match="other settings") as caught:
        Run.create(tmp_path, SETTINGS | other)
    assert next(iter(other)) in str(caught.value)
    assert "model" not in str(caught.value)
    assert (tmp_path / "run.json").read_bytes() == before


def test_without_resume_an_existing_run_is_refused(tmp_path: Path) -> None:
    Run.create(tmp_path, SETTINGS, resume=False)
    with pytest.raises(MediationError, match="already holds a run"):
        Run.create(tmp_path, SETTINGS, resume=False)


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".mine.tmp").write_text("mine")
    with pytest.raises(MediationError, match="not a run"):
        Run.create(tmp_path, SETTINGS)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".mine.tmp", "notes.txt"]


def test_a_path_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(MediationError, match="a file stands where a folder must be"):
            Run.create(path, SETTINGS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no run.json"),
        ('{"format": ', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("\ud800", "cannot be read"),
        ("[]", "not the run.json"),
        ('{"settings": {}}', "not the run.json"),
        ('{"format": "latent-mediation run 2", "settings": 3}', "not the run.json"),
    ],
)
def test_what_is_not_a_run_cannot_be_opened(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(MediationError, match=said):
        Run.open(tmp_path)
    if text is not None:
        with pytest.raises(MediationError, match=said):
            Run.create(tmp_path, SETTINGS)


# Tables ----------------------------------------------------------------------------------------------------

frames = st.lists(
    st.tuples(st.text(max_size=5), st.floats(allow_nan=True), st.integers(-(2**40), 2**40)), max_size=5
).map(
    lambda rows: pl.DataFrame(
        rows, schema={"node": pl.String, "effect": pl.Float64, "position": pl.Int64}, orient="row"
    )
)


@hypothesis.settings(deadline=None)  # it writes files, and a disk may be slow
@example(
    shards={
        "a.b": pl.DataFrame({"node": ["y"], "effect": [2.0], "position": [2]}),
        "a": pl.DataFrame({"node": ["x"], "effect": [1.0], "position": [1]}),
    }
)
@given(
    shards=st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9._\-]{0,8}", fullmatch=True), frames, min_size=1, max_size=4)
)
def test_shards_come_back_in_the_order_of_their_names(shards: dict[str, pl.DataFrame]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(folder, SETTINGS)
        for name, frame in shards.items():
            run.write_shard("nodes", name, frame)
            assert run.has_shard("nodes", name)
        assert_frame_equal(run.read("nodes"), pl.concat([shards[name] for name in sorted(shards)]))


def test_tables_and_text_are_single_files(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SETTINGS)
    assert not run.has("flags")
    run.write_table("flags", FRAME)
    run.write_text("index.html", "<p>é</p>")
    assert run.has("flags")
    assert_frame_equal(run.read("flags"), FRAME)
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "<p>é</p>"
    assert files(run) == {"run.json", "flags.parquet", "index.html"}


def test_reading_what_is_missing_damaged_or_unlike_is_an_error(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SETTINGS)
    with pytest.raises(MediationError, match="has no edges yet"):
        run.read("edges")
    file = run.write_shard("edges", "0", FRAME)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(MediationError, match=r"The edges in .* cannot be read"):
        run.read("edges")
    run.write_shard("meta", "0", FRAME)
    run.write_shard("meta", "1", FRAME.rename({"effect": "code"}))
    with pytest.raises(MediationError, match=r"The meta in .* cannot be read"):
        run.read("meta")


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "a\0b", "a\n"])
def test_names_stay_inside_the_run(tmp_path: Path, name: str) -> None:
    run = Run.create(tmp_path / "run", SETTINGS)
    for write in (
        lambda: run.write_shard("nodes", name, FRAME),
        lambda: run.write_shard(name, "0", FRAME),
        lambda: run.write_table(name, FRAME),
        lambda: run.write_text(name, ""),
        lambda: run.write_text("nodes.csv", "", folder=f"{name}/"),
        lambda: run.read(name),
    ):
        with pytest.raises(MediationError, match="cannot name a file"):
            write()
    assert files(run) == {"run.json"}


# Figures ---------------------------------------------------------------------------------------------------


def test_figures_are_merged_and_strict_json(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SETTINGS)
    run.record(
        trust={"gap": np.float32(0.5), "agreement": Agreement(float("nan"), 0.5, float("inf"), 3)},
        n=np.int64(4),
    )
    run.record(trust={"error_share": torch.tensor([0.25, -float("inf")])}, seed=7)

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    info = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert info["trust"] == {
        "gap": 0.5,
        "agreement": {"pearson": None, "spearman": 0.5, "sign": None, "n": 3},
        "error_share": [0.25, None],
    }
    assert (info["n"], info["seed"]) == (4, 7)
    assert info["settings"] == SETTINGS


def test_timings_add_up_over_resumes_and_leave_out_failures(tmp_path: Path) -> None:
    for _ in range(2):
        run = Run.create(tmp_path, SETTINGS)
        with run.timed("nodes"):
            time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), run.timed("edges"):
        _ = 1 / 0
    timings = run.info["timings"]
    assert 0.04 <= timings["nodes"] < 2
    assert "edges" not in timings


# Failure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "No room on the disk"),
        (errno.EDQUOT, "No room on the disk"),
        (errno.EACCES, "No permission"),
        (errno.EROFS, "No permission"),
        (errno.EIO, "Cannot write"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, said: str
) -> None:
    run = Run.create(tmp_path, SETTINGS)
    run.write_shard("nodes", "old", FRAME)

    def fail(*_: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        for write in (
            lambda: run.write_shard("nodes", "old", FRAME.head(1)),
            lambda: run.write_shard("nodes", "new", FRAME),
            lambda: run.record(n=1),
        ):
            with pytest.raises(MediationError, match=said):
                write()
        with pytest.raises(MediationError, match=said):
            Run.create(tmp_path / "other", SETTINGS)
    assert files(run) == {"run.json", "nodes/old.parquet"}
    assert_frame_equal(run.read("nodes"), FRAME)
    assert "n" not in run.info


def test_a_writer_interrupted_in_the_middle_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path, SETTINGS)

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.write_shard("nodes", "0", FRAME)
    assert files(run) == {"run.json"}


DYING_WRITER = """
import os, signal, sys
import polars as pl
from mediation.runs import Run

folder, when, settings = sys.argv[1], sys.argv[2], {"seed": 0}
frame = pl.DataFrame({"node": ["a"]})
if when == "shard":
    Run.create(folder, settings).write_shard("nodes", "0", frame)
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Run.create(folder, settings).write_shard("nodes", "1", frame)
"""


@pytest.mark.parametrize("when", ["create", "shard"])
def test_a_killed_run_resumes(tmp_path: Path, when: str) -> None:
    frame = pl.DataFrame({"node": ["a"]})
    died = subprocess.run([sys.executable, "-c", DYING_WRITER, str(tmp_path), when])
    assert died.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    if when == "shard":
        assert_frame_equal(Run.open(tmp_path).read("nodes"), frame)

    run = Run.create(tmp_path, {"seed": 0})
    assert run.has_shard("nodes", "0") is (when == "shard")
    assert not run.has_shard("nodes", "1")
    run.write_shard("nodes", "1", frame)
    Run.create(tmp_path, {"seed": 0})
    assert not list(tmp_path.rglob("*.tmp"))
