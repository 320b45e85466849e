"""The usual figures of a run, drawn with matplotlib: each a function of an opened run that returns the Axes it drew on.

Blue pushes the behaviour up, orange down: colours that colour-blind people tell apart. Each takes `ax`, an Axes to draw
on; without it a new figure is made. What is drawn is in the tables of `OpenedRun`, under the names used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
import polars as pl

from circuits.evidence import short_site
from circuits.graph import TARGET, AttributionGraph, NodeKind, node_label
from circuits.opened import OpenedRun
from circuits.pruning import Keep
from mediation.errors import MediationError
from mediation.sites import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UP, DOWN, PLAIN = "#1769b4", "#c4500b", "#9a9790"
DRAWN = Keep(nodes=0.8, edges=0.9, top=16)  # of a graph in small
LABEL, LABELLED = 22, 12  # characters of a label in a figure; latents of a graph that are named
UPRIGHT = 8  # so many names fit below an axis
APART = 0.36  # of nodes side by side in a graph, in columns
MARKERS = {NodeKind.LATENT: "o", NodeKind.ERROR: "s", NodeKind.EMBEDDING: "^"}
PARTS = 10  # meta-latents drawn of a split; the others are one bar


def attribution(run: OpenedRun, *, ax: Axes | None = None) -> Axes:
    """Who carries the total effect: attribution by site and role, latents and errors apart, with 95 % intervals."""
    table, ax = run.by_role(), _axes(ax, (8, 4))
    places = table.select("site", "role").unique(maintain_order=True)
    place = {pair: k for k, pair in enumerate(places.iter_rows())}
    for kind, offset, hatch in (("latent", -0.19, None), ("error", 0.19, "////")):
        here = table.filter(pl.col("kind") == kind)
        x = np.array([place[pair] for pair in here.select("site", "role").iter_rows()]) + offset
        values = here["attribution"].to_numpy()
        ends = np.abs(here.select("low", "high").to_numpy().T - values)
        ax.bar(x, values, width=0.36, color=_colours(values), hatch=hatch, edgecolor="white")
        ax.errorbar(x, values, yerr=ends, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    ax.bar([0], [0], color=PLAIN, label="latents")
    ax.bar([0], [0], color=PLAIN, hatch="////", edgecolor="white", label="errors: what the dictionary misses")
    names = [f"{_cut(role)}\n{short_site(site)}" for site, role in place]
    ax.set_xticks(range(len(place)), names, rotation=0 if len(place) <= UPRIGHT else 90, fontsize=8)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_ylabel(f"attribution, {run.info['settings']['behaviour']}")
    ax.set_title(f"Total effect {run.effect()['mean']:+.2f}, by site and role")
    ax.legend(fontsize=8)
    return ax


def calibration(run: OpenedRun, of: str = "nodes", *, ax: Axes | None = None) -> Axes:
    """Estimates against exact patching of the run's stratified sample; of: nodes or edges."""
    if of not in ("nodes", "edges"):
        raise MediationError(f"Nodes or edges were patched exactly, and no '{of}'; give one of the two.")
    estimate = "ig" if of == "nodes" else "weight"
    table, ax = run.read("calibration" if of == "nodes" else "edge_calibration"), _axes(ax, (4.5, 4.5))
    trust = run.info["trust"]
    agreed = trust["estimator_vs_exact"]["ig"] if of == "nodes" else trust["edges_vs_exact"]
    x, y = table["exact_effect"].to_numpy(), table[estimate].to_numpy()
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8)
    ax.scatter(x, y, s=9, color=UP, alpha=0.6, linewidths=0)
    ax.set_xlabel("exact effect")
    ax.set_ylabel("ig" if of == "nodes" else f"direct effect ({run.info['settings']['semantics']})")
    pearson = "undefined" if agreed["pearson"] is None else f"{agreed['pearson']:.2f}"
    ax.set_title(f"{agreed['n']} {of} patched exactly: Pearson {pearson}")
    return ax


def faithfulness(run: OpenedRun, kind: str = "nodes", *, ax: Axes | None = None) -> Axes:
    """What the circuit alone does of what the model does, at every size, beside baselines (`mediation prove`).

    kind: nodes or edges. The circuit comes with its 95 % interval over evaluation prompts.
    """
    table = run.read("proof").filter(pl.col("kind") == kind)
    if table.is_empty():
        raise MediationError(f"The proof of the run in {run.path} has no circuits of '{kind}'; give nodes or edges.")
    ax = _axes(ax, (6, 4))
    for number, ((name,), here) in enumerate(table.group_by("ranking", maintain_order=True)):
        sizes = here["size"].to_numpy()
        own = number == 0  # the circuit comes first, baselines follow
        ax.plot(sizes, here["faithfulness"], marker="o", markersize=3, linewidth=2.2 if own else 1, label=str(name))
        if own:
            ax.fill_between(sizes, here["low"].to_numpy(), here["high"].to_numpy(), alpha=0.2, linewidth=0)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlabel(f"{kind} kept, of {table['of'][0]}")
    ax.set_ylabel("faithfulness (1: all of it)")
    ax.set_title(f"Circuits of {kind}")
    ax.legend(fontsize=8)
    return ax


def graph(run: OpenedRun, prompt: str | None = None, *, keep: Keep = DRAWN, ax: Axes | None = None) -> Axes:
    """The graph of the set or of one prompt in small: positions across, sites upward, pruned by influence.

    A node's area is its |attribution|, squares are errors, triangles embeddings, the star is the behaviour; an edge's
    width is its |contribution|.
    """
    part = run.graph(prompt, keep)
    digraph, at, columns, rows = part.digraph, *_places(part)
    ax = _axes(ax, (min(14.0, max(6.0, 0.8 * max(x for x, _ in at.values()) + 4)), max(3.5, 1.1 * len(rows) + 1)))
    amounts = [value for _, _, value in digraph.edges(data="contribution")]
    widest = max(map(abs, amounts), default=0.0) or 1.0
    nx.draw_networkx_edges(
        digraph, at, ax=ax, edge_color=_colours(amounts), width=[0.3 + 3 * abs(v) / widest for v in amounts],
        alpha=0.6, arrowsize=6, node_size=60, connectionstyle="arc3,rad=0.08",
    )  # fmt: skip
    largest = max((part.strength(name) for name in part.ranked()), default=0.0) or 1.0
    area = {name: 20 + 300 * part.strength(name) / largest for name in part.ranked()}  # square points
    for kind, marker in MARKERS.items():
        names = part.ranked([kind])
        values, sizes = [digraph.nodes[name]["attribution"] or 0.0 for name in names], [area[name] for name in names]
        x, y = np.array([at[name] for name in names]).reshape(-1, 2).T
        ax.scatter(x, y, s=sizes, marker=marker, c=_colours(values), edgecolors="white", zorder=3)
    ax.scatter(*at[TARGET], s=180, marker="*", c="black", zorder=3)
    named = part.ranked([NodeKind.LATENT])[:LABELLED]
    for number, name in enumerate(named, start=1):
        data = digraph.nodes[name]
        above = (0.0, area[name] ** 0.5 / 2 + 2)
        ax.annotate(str(number), at[name], xytext=above, textcoords="offset points", ha="center", fontsize=7, zorder=4)
        text = f"{number}  {_cut(node_label(data, name))}  {data['attribution']:+.2f}"
        ax.plot([], [], "o", color=_colours([data["attribution"]])[0], label=text)
    if named:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False, title="strongest latents")
    ax.set_xticks([x for x, _ in columns], [title for _, title in columns], rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.tick_params(left=True, bottom=True, labelleft=True, labelbottom=True)
    ax.set_xlabel("circles: latents; squares: errors; triangles: embeddings; area: |attribution|", fontsize=8)
    ax.margins(0.08)
    pruned = part.meta["pruned"]
    what = f"Prompt {_cut(prompt, 40)}" if prompt is not None else f"{part.meta['prompts']} prompts"
    ax.set_title(f"{what}: {pruned['kept']} of {pruned['of']} nodes, {pruned['edges']} of {pruned['of_edges']} edges")
    return ax


def split(run: OpenedRun, site: str, latent: int, *, prompt: str | None = None, ax: Axes | None = None) -> Axes:
    """A latent's attribution split into its parts, as steps that end at the whole: nothing is left out.

    The PARTS strongest meta-latents, all others as one, then bias and residual; for the mean over the prompts, or one
    prompt. Needs a run that `mediation flag` has split.
    """
    table = run.parts(site, latent, prompt=prompt)
    if table["attribution"].null_count() == len(table):
        raise MediationError(f"The attribution of {site} was not split; run `mediation flag` with its meta-dictionary.")
    metas = table.drop_nulls("meta").sort(pl.col("attribution").abs(), descending=True, maintain_order=True)
    steps = list(metas.head(PARTS).select("part", "attribution").iter_rows())
    if len(metas) > PARTS:
        steps.append((f"{len(metas) - PARTS} other meta-latents", float(metas["attribution"][PARTS:].sum())))
    steps += list(table.filter(pl.col("meta").is_null()).select("part", "attribution").iter_rows())
    values = np.array([value for _, value in steps])
    whole, starts = values.sum(), np.concatenate([[0.0], values.cumsum()[:-1]])
    ax = _axes(ax, (7, 0.34 * len(steps) + 1.4))
    rows = np.arange(len(steps))
    ax.barh(rows, values, left=starts, color=_colours(values), height=0.7)
    ax.barh(len(steps), whole, color="#333333", height=0.7)
    for row, (start, value) in enumerate(zip([*starts, 0.0], [*values, whole], strict=True)):
        ax.annotate(
            f"{value:+.2f}", (max(start, start + value), row), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    ax.set_yticks([*rows, len(steps)], [*(_cut(name) for name, _ in steps), f"latent {latent}"], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.use_sticky_edges = False
    ax.margins(x=0.14)
    ax.set_xlabel("attribution")
    of = f"in prompt {_cut(prompt, 40)}" if prompt is not None else "over all prompts"
    ax.set_title(f"Latent {latent} of {short_site(run.site(site))}, {of}", fontsize=11)
    return ax


def removal(run: OpenedRun, group: str | None = None, kind: str | None = None, *, ax: Axes | None = None) -> Axes:
    """A test behind the flags: the removal of a kind of fact beside what its matched controls do.

    group, kind: of one row of `run.tests()`; by default the first that fits, the one with the smallest q.
    """
    tests = run.tests()
    for name, wanted in (("group", group), ("kind", kind)):
        tests = tests if wanted is None else tests.filter(pl.col(name) == wanted)
    if tests.is_empty():
        raise MediationError(f"The run in {run.path} has no such test; run.tests() lists group and kind of each.")
    test, ax = tests.row(0, named=True), _axes(ax, (6, 3.4))
    ax.hist(test["controls"], bins=20, color=PLAIN, label=f"{len(test['controls'])} matched controls")
    ax.axvline(test["removal"], color=UP, linewidth=2.5, label=f"{_cut(test['kind'], 40)} removed")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("how far the behaviour moves, mean size over the test's prompts")
    ax.set_ylabel("controls")
    ax.set_title(
        f"{_cut(test['group'], 40)}: {_cut(test['kind'], 40)}, {test['prompts']} prompts, p {test['p']:.3g}, "
        f"q {test['q']:.3g}", fontsize=11,
    )  # fmt: skip
    ax.legend(fontsize=8)
    return ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """`ax`, or one of a new figure."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise MediationError("Plots need matplotlib; pip install 'latent-mediation[plots]'.") from None
    return plt.subplots(figsize=size, layout="constrained")[1]


def _colours(values: Sequence[float] | np.ndarray) -> list[str]:
    return [UP if value > 0 else DOWN if value < 0 else PLAIN for value in values]


def _cut(text: object, width: int = LABEL) -> str:
    """On one line, not longer than `width`; a $ would start a formula."""
    line = " ".join(str(text).split())
    return (line if len(line) <= width else f"{line[: width - 1]}…").replace("$", r"\$")


def _places(part: AttributionGraph) -> tuple[dict[str, tuple[float, float]], list[tuple[float, str]], list[str]]:
    """x and y of every node; x and title of every column, titles of the rows.

    The nodes of a cell stand side by side, strongest first; a column is as wide as its fullest cell.
    """
    data = dict(part.digraph.nodes(data=True))
    kinds = {name: data[name]["kind"] for name in part.ranked()}
    sites = {data[name]["site"] for name, kind in kinds.items() if kind != NodeKind.EMBEDDING}
    ordered = sorted(sites, key=lambda site: (Site.parse(site).depth, site))
    rows = ["embedding", *map(short_site, ordered), "behaviour"]
    cells: dict[int | str, dict[int, list[str]]] = {position: {} for position in part.positions()}
    for name, kind in kinds.items():
        row = 0 if kind == NodeKind.EMBEDDING else 1 + ordered.index(data[name]["site"])
        cells[data[name]["position"]].setdefault(row, []).append(name)
    tokens = part.meta.get("tokens")
    at: dict[str, tuple[float, float]] = {}
    columns: list[tuple[float, str]] = []
    left = 0.0
    for position, by_row in cells.items():
        width = max(1.0, APART * (max(map(len, by_row.values())) + 1))
        middle = left + width / 2
        for row, names in by_row.items():
            for k, name in enumerate(names):
                at[name] = (middle + APART * (k - (len(names) - 1) / 2), float(row))
        title = str(position) if tokens is None or not isinstance(position, int) else tokens[position]
        columns.append((middle, _cut(title)))
        left += width
    at[TARGET] = (columns[-1][0] if columns else 0.0, len(rows) - 1.0)
    return at, columns, rows
