"""Every snippet of the README runs as it stands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mediation.cli import main
from mediation.prompts import PromptSet

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def snippets(language: str) -> list[str]:
    return [text for kind, text in SNIPPETS if kind == language]


def test_there_is_no_snippet_of_another_kind() -> None:
    assert {kind for kind, _ in SNIPPETS} == {"bash", "python", "json"}


def test_python_snippets_run() -> None:
    for text in snippets("python"):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "tensor" in done.stdout


def test_json_snippets_are_prompts() -> None:
    for text in snippets("json"):
        assert len(PromptSet.from_rows([json.loads(text)])) == 1


def lines() -> list[list[str]]:
    return [line.split("#")[0].split() for text in snippets("bash") for line in text.strip().splitlines()]


def test_make_targets_do_what_the_readme_says() -> None:
    """The recipes themselves are run by the other tests (`mediation demo`) and by whoever runs this one."""
    wanted = {"demo": "mediation demo", "test": "pytest"}
    for words in lines():
        if words[0] == "make":
            dry = subprocess.run(["make", "-n", words[1]], capture_output=True, text=True, cwd=ROOT, check=True)
            assert wanted[words[1]] in dry.stdout


def test_the_three_jobs_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mediation").symlink_to(ROOT / "mediation")
    monkeypatch.chdir(tmp_path)
    jobs = [words[1:] for words in lines() if words[0] == "mediation" and words[1] in ("trace", "flag", "inspect")]
    assert len(jobs) == 3
    for arguments in jobs:
        main(arguments)
    assert (tmp_path / "runs" / "readme" / "index.html").exists()


def test_organism_and_bench_commands_are_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Making one takes minutes, so the maker is replaced; the bench runs on the shipped organism."""
    from mediation.organisms import score, train

    made = []

    def copy(seed: int, family: str, out: Path, show: object) -> dict[str, int]:
        made.append((seed, family))
        shutil.copytree(ROOT / "mediation" / "organisms" / "default", out)
        return {"seed": seed}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "make_organism", copy)
    monkeypatch.setattr(score, "BASELINE_PROMPTS", 4)
    for words in lines():
        if words[0] == "mediation" and words[1] in ("organism", "bench"):
            extra = ["--prompts", "40"] if words[1] == "bench" else []
            main([*words[1:], *extra])
    assert made == [(7, "shaped")]
