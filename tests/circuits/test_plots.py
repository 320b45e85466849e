"""The figures hold the numbers of the tables they are drawn from; every one is rendered once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
import pytest

from circuits import plots
from circuits.graph import NodeKind
from circuits.opened import OpenedRun, open_run
from mediation.errors import MediationError
from tests.conftest import META as SITE

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PROMPTS = 32  # of the run


@pytest.fixture(scope="module")
def run(full: Path) -> OpenedRun:
    return open_run(full)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def rendered(ax: Axes) -> Axes:
    ax.figure.canvas.draw()
    return ax


def test_attribution_has_a_bar_and_an_interval_for_every_row(run: OpenedRun) -> None:
    ax, table = rendered(plots.attribution(run)), run.by_role()
    heights = sorted(bar.get_height() for bar in ax.patches if bar.get_height())
    assert heights == pytest.approx(sorted(table["attribution"]))
    ends = [segment[:, 1] for lines in ax.collections for segment in lines.get_segments()]  # type: ignore[attr-defined]
    assert sorted(e.min() for e in ends) == pytest.approx(sorted(table["low"]))
    assert sorted(e.max() for e in ends) == pytest.approx(sorted(table["high"]))
    assert len(ax.get_xticklabels()) == table.select("site", "role").n_unique()


@pytest.mark.parametrize(
    ("of", "kind", "estimate"), [("nodes", "calibration", "ig"), ("edges", "edge_calibration", "weight")]
)
def test_calibration_shows_every_patched_one(run: OpenedRun, of: str, kind: str, estimate: str) -> None:
    ax = rendered(plots.calibration(run, of))
    (points,) = ax.collections
    assert np.allclose(points.get_offsets(), run.read(kind).select("exact_effect", estimate).to_numpy())
    assert ax.get_title().startswith(f"{len(run.read(kind))} {of}")
    with pytest.raises(MediationError, match="'paths'"):
        plots.calibration(run, "paths")


def test_faithfulness_has_a_curve_for_every_ranking(run: OpenedRun) -> None:
    ax, table = rendered(plots.faithfulness(run)), run.read("proof")
    curves = {line.get_label(): line for line in ax.lines if not str(line.get_label()).startswith("_")}
    assert set(curves) == set(table["ranking"])
    for name, line in curves.items():
        here = table.filter(ranking=name)
        assert np.allclose(line.get_xdata(), here["size"])
        assert np.allclose(line.get_ydata(), here["faithfulness"], equal_nan=True)
    with pytest.raises(MediationError, match="'edges'"):
        plots.faithfulness(run, "edges")


@pytest.mark.parametrize("own", [False, True])
def test_the_graph_in_small_draws_every_node_it_keeps(run: OpenedRun, own: bool) -> None:
    prompt = run.prompts()["prompt"][0] if own else None
    ax, part = rendered(plots.graph(run, prompt)), run.graph(prompt, plots.DRAWN)
    points = sum(len(each.get_offsets()) for each in ax.collections)
    assert points == len(part.digraph)
    assert len(part.ranked([NodeKind.LATENT])) <= 16
    assert len(ax.patches) == part.digraph.number_of_edges()
    columns = [label.get_text() for label in ax.get_xticklabels()]
    assert len(columns) == len(part.positions())
    if own:
        assert columns[0] in run.read("tokens").filter(prompt=prompt)["text"].to_list()
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "behaviour"


def test_the_steps_of_a_split_end_at_the_whole(run: OpenedRun) -> None:
    latent = run.nodes().filter(site=SITE).drop_nulls("latent")["latent"][0]
    ax = rendered(plots.split(run, "1.resid_pre", latent))
    *steps, whole = ax.patches
    total = run.read("nodes").filter(site=SITE, latent=latent)["ig"].sum() / PROMPTS
    assert whole.get_width() == pytest.approx(total, abs=1e-5)
    assert sum(step.get_width() for step in steps) == pytest.approx(total, abs=1e-5)
    ends = [step.get_x() + step.get_width() for step in steps]
    assert [step.get_x() for step in steps] == pytest.approx([0.0, *ends[:-1]])
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert {"bias", "residual", f"latent {latent}"} <= set(names)
    with pytest.raises(MediationError, match="No meta-dictionary"):
        plots.split(run, "blocks.2.hook_resid_pre", 1)


def test_removal_stands_beside_its_controls(run: OpenedRun) -> None:
    tests = run.tests()
    test = tests.row(len(tests) - 1, named=True)
    ax = rendered(plots.removal(run, test["group"], test["kind"]))
    assert sum(bar.get_height() for bar in ax.patches) == len(test["controls"]) == 399
    assert ax.lines[0].get_xdata() == [test["removal"]] * 2
    assert f"q {test['q']:.3g}" in ax.get_title()
    first = tests.row(0, named=True)
    assert first["kind"] in plots.removal(run).get_title()
    with pytest.raises(MediationError, match=r"run\.tests\(\)"):
        plots.removal(run, "no such question")


def test_axes_of_ones_own_are_drawn_on(run: OpenedRun) -> None:
    _, (left, right) = plt.subplots(1, 2)
    assert plots.calibration(run, ax=left) is left
    assert plots.removal(run, ax=right) is right
    assert len(plt.get_fignums()) == 1


def test_labels_are_text_and_never_formulas(run: OpenedRun, tmp_path: Path) -> None:
    """A lone $ or an unfinished formula in a label would stop matplotlib."""
    copy = open_run(shutil.copytree(run.path, tmp_path / "copy"))
    flags = copy.read("flags").with_columns(pl.lit(r"$\frac{$ _^").alias("kind"), pl.lit("a $ b").alias("group"))
    copy.run.write_table("flags", flags)
    ax = rendered(plots.removal(copy))
    assert r"\$" in ax.get_title()
    graph = copy.graph()
    for _, data in graph.digraph.nodes(data=True):
        data["label"] = r"$\frac{$ $"
    copy.run.write_text("graph.json", graph.to_json())
    legend = rendered(plots.graph(copy)).get_legend()
    assert legend is not None
    assert r"\$\frac{\$ \$" in legend.get_texts()[0].get_text()


def test_without_matplotlib_a_sentence_says_how_to_get_it(run: OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MediationError, match=r"latent-mediation\[plots\]"):
        plots.removal(run)
