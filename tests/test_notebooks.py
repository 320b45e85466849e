"""The notebooks run from top to bottom, in a fresh kernel each, and are committed without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})


def shown(notebook: nbformat.NotebookNode) -> set[str]:
    """MIME types among the outputs."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return {kind for output in outputs for kind in output.get("data", {})}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_valid_and_empty(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


def test_the_first_traces_flags_and_inspects(tmp_path: Path) -> None:
    notebook = executed(ROOT / "examples" / "1-trace-flag-inspect.ipynb", tmp_path)
    assert {"text/html", "image/png"} <= shown(notebook)
    assert (tmp_path / "runs" / "notebook" / "flags.parquet").exists()
    assert any("<iframe" in output.get("data", {}).get("text/html", "")
               for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)  # fmt: skip


def test_the_second_reads_a_run(full: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notebook").symlink_to(full)
    assert {"text/html", "image/png"} <= shown(executed(ROOT / "examples" / "2-read-a-run.ipynb", tmp_path))
