"""Where the graph's nodes stand: columns are positions or roles, rows are sites from bottom to top.

Algorithm
1. Rows: the embeddings at the bottom, then sites by depth, the target on top.
2. Columns: `meta["positions"]` when the graph has it, else integers in order, else roles as they appear.
3. The nodes of a cell fill a small grid, strongest first, errors last. A column is as many boxes wide as
   keep its fullest cell near `STACK` high; a row is as high as its fullest cell. Boxes have one size, so
   they cannot overlap whatever their labels say.
4. Edges meet a box at its port, which differs from level to level, so that an edge to a lower box can be
   told from one to the box it passes behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from circuits.graph import TARGET, AttributionGraph, NodeKind
from circuits.viewer.text import token_text
from mediation.errors import MediationError
from mediation.sites import Site

BOX, HIGH, GAP = 156, 40, 8  # a node's width and height and the space between two, px
STACK, ABREAST = 3, 4  # boxes above each other before a column widens; most boxes side by side
MARGIN, LANE = 148, 46  # room for row titles, and between rows for the edges
HEADING = 26
PORTS = (0.5, 0.24, 0.76)  # of the width, by level
EMBEDDING_ROW = "embedding"


@dataclass(frozen=True)
class Band:
    """A row or a column: its title and the pixels it covers, from `start` on."""

    title: str
    start: float
    size: float


@dataclass(frozen=True)
class Layout:
    """Top-left corners of the boxes, the x of their ports, bands of rows (by site) and of columns (by
    position), whole size."""

    at: dict[str, tuple[float, float]]
    port: dict[str, float]
    rows: dict[str, Band]
    columns: dict[int | str, Band]
    width: float
    height: float


def lay_out(graph: AttributionGraph) -> Layout:
    """Steps 1 to 3 for every node of the graph."""
    cells: dict[tuple[str, int | str], list[str]] = {}
    for name in sorted(graph.ranked(), key=lambda n: graph.digraph.nodes[n]["kind"] == NodeKind.ERROR):
        data = graph.digraph.nodes[name]
        cells.setdefault((_row_of(data), data["position"]), []).append(name)
    positions = graph.positions()
    sites = sorted({site for site, _ in cells}, key=_depth, reverse=True)

    def fullest(keys: list[tuple[str, int | str]]) -> int:
        return max(len(cells.get(key, ())) for key in keys)

    columns: dict[int | str, Band] = {}
    abreast: dict[int | str, int] = {}
    x: float = MARGIN
    for position in positions:
        abreast[position] = min(ABREAST, ceil(fullest([(site, position) for site in sites]) / STACK))
        size = abreast[position] * (BOX + GAP) + GAP
        columns[position] = Band(_heading(graph, position), x, size)
        x += size + GAP
    width = max(x, MARGIN + BOX + 3 * GAP)
    rows: dict[str, Band] = {}
    y: float = GAP + HIGH + LANE + HEADING  # the target has the top to itself
    for site in sites:
        levels = max(ceil(len(cells.get((site, p), ())) / abreast[p]) for p in positions)
        rows[site] = Band(site_title(site), y, levels * (HIGH + GAP) + GAP)
        y += rows[site].size + LANE
    height = y - LANE + HEADING + GAP
    at = {TARGET: (width - BOX - 2 * GAP, float(GAP))}
    port = {TARGET: at[TARGET][0] + BOX / 2}
    for (site, position), names in cells.items():
        for k, name in enumerate(names):
            level, across = divmod(k, abreast[position])
            left = columns[position].start + GAP + across * (BOX + GAP)
            at[name] = (left, rows[site].start + GAP + level * (HIGH + GAP))
            port[name] = left + BOX * PORTS[level % len(PORTS)]
    return Layout(at, port, rows, columns, width, height)


def _row_of(data: dict) -> str:
    return EMBEDDING_ROW if data["kind"] == NodeKind.EMBEDDING else str(data["site"])


def _depth(site: str) -> tuple[int, str]:
    if site == EMBEDDING_ROW:
        return -1, site
    try:
        return Site.parse(site).depth, site
    except MediationError:
        return 0, site  # a graph made by hand may name its sites as it likes


def site_title(site: str) -> str:
    """A site as a reader says it: "layer 8 resid_pre"."""
    try:
        parsed = Site.parse(site)
    except MediationError:
        return site
    return f"layer {parsed.layer} {parsed.stream}"


def _heading(graph: AttributionGraph, position: int | str) -> str:
    tokens = graph.meta.get("tokens") or ()
    if isinstance(position, int) and 0 <= position < len(tokens):
        return f"{position}  {token_text(str(tokens[position]))}"
    return str(position)
