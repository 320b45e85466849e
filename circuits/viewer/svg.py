"""The graph as one inline SVG: well-formed XML, every text escaped, no style but class names."""

from __future__ import annotations

from typing import Any

from circuits.export import tier_text
from circuits.graph import TARGET, AttributionGraph, node_label
from circuits.viewer.layout import BOX, HEADING, HIGH, MARGIN, Layout, lay_out
from circuits.viewer.text import escape, fit, percent, signed

THINNEST, THICKEST = 0.7, 6.0  # stroke of an edge, px
PADDING, LONGEST_BAR = 9, 80


def draw(graph: AttributionGraph, *, numbers: dict[str, int], edges: list[tuple[str, str]]) -> str:
    """An <svg> of the graph. `numbers` gives each node its element id; `edges` are those to draw."""
    layout = lay_out(graph)
    largest = max((abs(graph.digraph.edges[e]["contribution"]) for e in edges), default=0.0) or 1.0
    strongest = max((graph.strength(name) for name in graph.ranked()), default=0.0) or 1.0
    # the strongest edges are drawn last, on top of the rest
    ordered = sorted(edges, key=lambda edge: abs(graph.digraph.edges[edge]["contribution"]))
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" id="graph" role="img" aria-label="attribution graph" '
        f'width="{layout.width:g}" height="{layout.height:g}">',
        *_rows(layout, graph.error_share()),
        *(_edge(graph, layout, edge, numbers, largest) for edge in ordered),
        *_headings(layout),
        *(_node(graph, layout, name, numbers, strongest) for name in layout.at),
        "</svg>",
    ]
    return "\n".join(parts)


def _rows(layout: Layout, error_share: dict[str, float]) -> list[str]:
    parts = []
    for site, row in layout.rows.items():
        middle = row.start + row.size / 2
        parts.append(
            f'<rect class="row" y="{row.start:g}" width="100%" height="{row.size:g}" rx="6"/>'
            f'<text class="site" x="12" y="{middle - 2:g}">{escape(fit(row.title, MARGIN - 20))}</text>'
        )
        if site in error_share:
            parts.append(f'<text class="share" x="12" y="{middle + 13:g}">error {percent(error_share[site])}</text>')
    return parts


def _headings(layout: Layout) -> list[str]:
    parts = []
    bottom = layout.height - HEADING
    top = min((band.start for band in layout.rows.values()), default=0.0)
    for column in layout.columns.values():
        middle, title = column.start + column.size / 2, escape(fit(column.title, column.size - 8))
        hint = f"<title>{escape(column.title)}</title>"
        parts += [
            f'<text class="column" x="{middle:g}" y="{y:g}">{hint}{title}</text>' for y in (top - 10, bottom + 12)
        ]
    return parts


def _edge(
    graph: AttributionGraph,
    layout: Layout,
    edge: tuple[str, str],
    numbers: dict[str, int],
    largest: float,
) -> str:
    data = graph.digraph.edges[edge]
    (x0, x1), y0, y1 = (layout.port[end] for end in edge), layout.at[edge[0]][1], layout.at[edge[1]][1] + HIGH
    bend = max((y0 - y1) / 2, 24)
    share = abs(data["contribution"]) / largest
    width = THINNEST + (THICKEST - THINNEST) * share
    names = [node_label(graph.digraph.nodes[name], name) for name in edge]
    amounts = f"contribution {signed(data['contribution'])}, weight {signed(data['weight'])}"
    hint = f"{names[0]} → {names[1]}\n{amounts}"
    return (
        f'<path class="edge {_sign(data["contribution"])}" data-s="{numbers[edge[0]]}" '
        f'data-t="{numbers[edge[1]]}" stroke-width="{width:.2f}" stroke-opacity="{0.3 + 0.6 * share:.2f}" '
        f'd="M{x0:g},{y0:g} C{x0:g},{y0 - bend:g} {x1:g},{y1 + bend:g} {x1:g},{y1:g}">'
        f"<title>{escape(hint)}</title></path>"
    )


def _node(graph: AttributionGraph, layout: Layout, name: str, numbers: dict[str, int], strongest: float) -> str:
    data = graph.digraph.nodes[name]
    x, y = layout.at[name]
    number, label, amount = numbers[name], node_label(data, name), data["attribution"]
    length = 0.0 if amount is None else min(1.0, abs(amount) / strongest) * LONGEST_BAR
    shape = f'x="{PADDING}" y="{HIGH - 14}" width="{length:.1f}" height="4" rx="1"'
    bar = "" if name == TARGET else f'<rect class="bar {_sign(amount)}" {shape}/>'
    link = "" if name == TARGET else f' href="#n{number}"'
    # A nested svg clips what it holds: no label can run into its neighbour, whatever the font.
    return (
        f'<a class="node {escape(data["kind"])}" id="g{number}" data-n="{number}"{link}>'
        f"<title>{escape(_hint(name, data, label))}</title>"
        f'<rect class="box" x="{x:g}" y="{y:g}" width="{BOX}" height="{HIGH}" rx="6"/>'
        f'<svg x="{x:g}" y="{y:g}" width="{BOX}" height="{HIGH}">'
        f'<text class="label" x="{PADDING}" y="17">{escape(fit(label, BOX - 2 * PADDING))}</text>'
        f'<text class="value" x="{BOX - PADDING}" y="{HIGH - 8}">{signed(amount)}</text>'
        f"{bar}</svg></a>"
    )


def _hint(name: str, data: dict[str, Any], label: str) -> str:
    lines = [label, name]
    interval = ""
    if data["low"] is not None and data["high"] is not None:
        interval = f" [{signed(data['low'])}, {signed(data['high'])}]"
    if data["held_out"] is not None:
        lines.append(f"attribution {signed(data['attribution'])}")
        lines.append(f"held out {signed(data['held_out'])}{interval}, {tier_text(data)}")
    elif data["attribution"] is not None:
        lines.append(f"attribution {signed(data['attribution'])}{interval}")
    if data["activation"] is not None:
        lines.append(f"activation {data['activation']:.3g}")
    if data["influence"] is not None:
        lines.append(f"influence {percent(data['influence'])}")
    return "\n".join(lines)


def _sign(value: float | None) -> str:
    return "none" if not value else "up" if value > 0 else "down"
