"""Every Python snippet of docs/python.md runs, in order, in one session."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_guide_to_python_runs(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    snippets = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 4
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "readme").symlink_to(full)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, str(GUIDE), "exec"), names)
    assert (tmp_path / "split.png").stat().st_size > 10_000
