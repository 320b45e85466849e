"""The page of a run: one HTML file that needs no network, shows the graph, its nodes and the hidden facts.

Everything that comes from prompts, labels or models is escaped (`circuits.viewer.text.escape`). As a second
lock the page's content security policy allows no request at all and only its own script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import networkx as nx

from circuits.graph import TARGET, AttributionGraph, NodeKind, node_label
from circuits.pruning import SOURCES, Keep, prune
from circuits.supernodes import Supernode, quotient, within
from circuits.viewer.layout import site_title
from circuits.viewer.svg import draw
from circuits.viewer.text import escape, percent, plain, probability, signed

DRAWN_LATENTS, DRAWN_SOURCES, DRAWN_EDGES, PATHS = 40, 40, 160, 10  # at most; sources: error nodes and embeddings
FLAG_TITLES = {
    "fact": "Fact", "effect": "Effect", "hidden_share": "Hidden share", "p": "p", "q": "q",
    "carriers": "Carriers", "removal": "Removal", "swap": "Swap",
}  # fmt: skip
MEDIATORS = (NodeKind.LATENT, NodeKind.SUPERNODE)
GROUP_KEY = '<span><i class="box group"></i>several latents that are alike</span>'
BAR, BAR_HIGH = 190, 14  # interval bars, px


def render(
    graph: AttributionGraph,
    *,
    title: str,
    figures: Mapping[str, Any] | None = None,
    flags: Sequence[Mapping[str, Any]] = (),
    keep: Keep | None = None,
    supernodes: Sequence[Supernode] = (),
) -> str:
    """The whole page as HTML.

    `figures`: name -> value, shown at the top (total effect, gap, fidelity, ...). `flags`: one dict per
    tested fact with any of fact, effect, hidden_share, p, q, carriers, removal, swap, flagged (True marks
    it); further keys become further columns. The graph is pruned by influence as `keep` says, and further where
    it would be too large to read; the page says what is left out. Each of `supernodes` is one box.
    """
    part = _readable(prune(graph, keep or Keep()))
    omitted = _what_is_drawn(graph, part)
    part = quotient(part, within(supernodes, part))
    numbers = {name: k for k, name in enumerate([TARGET, *part.ranked()])}
    edges = _drawn_edges(part)
    sections = [
        f"<h1>{escape(title)}</h1>",
        _figures({"behaviour": graph.meta.get("behaviour"), **(figures or {})}),
        "<h2>Attribution graph</h2>",
        f"<p>{omitted} {len(edges):,} of {graph.digraph.number_of_edges():,} edges are drawn. "
        "Point at a node to see only its edges; click it for its row in the table.</p>",
        f'<div class="pane">{draw(part, numbers=numbers, edges=edges)}</div>',
        '<div class="key"><span><i class="up"></i>pushes the behaviour up</span>'
        '<span><i class="down"></i>pushes it down</span>'
        "<span>width of an edge: its contribution to the behaviour</span>"
        '<span><i class="box"></i>error: what the dictionary misses</span>'
        f"{GROUP_KEY if part.ranked([NodeKind.SUPERNODE]) else ''}</div>",
        _facts(flags),
        _paths(graph),
        _nodes(part, numbers, graph),
    ]
    script, style = _asset("page.js"), _asset("style.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + f"\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return files("circuits.viewer").joinpath(name).read_text(encoding="utf-8")


def _drawn_edges(graph: AttributionGraph) -> list[tuple[str, str]]:
    """The strongest edges, and the strongest one out of every node, so that none seems cut off."""
    digraph = graph.digraph

    def size(edge: tuple[str, str]) -> float:
        return abs(digraph.edges[edge]["contribution"])

    ranked = sorted(digraph.edges, key=lambda edge: (-size(edge), edge))
    chosen = dict.fromkeys(ranked[:DRAWN_EDGES])
    for name in digraph:
        chosen.update(dict.fromkeys(sorted(digraph.out_edges(name), key=lambda e: (-size(e), e))[:1]))
    return list(chosen)


def _readable(graph: AttributionGraph) -> AttributionGraph:
    """Of a pruned graph that is too large to read, the most influential nodes that reach the target."""

    def most(kinds: Sequence[NodeKind], n: int) -> list[str]:
        return sorted(graph.ranked(kinds), key=lambda name: -graph.digraph.nodes[name]["influence"])[:n]

    chosen = [TARGET, *most(MEDIATORS, DRAWN_LATENTS), *most(SOURCES, DRAWN_SOURCES)]
    part = graph.digraph.subgraph(chosen)
    drawn = part.subgraph(nx.ancestors(part, TARGET) | {TARGET})
    return graph.restricted(drawn.nodes, drawn.edges, graph.meta)


def _what_is_drawn(graph: AttributionGraph, part: AttributionGraph) -> str:
    """How much is drawn, and what of the error nodes is not."""
    errors = [NodeKind.ERROR]
    held = sum(part.digraph.nodes[name]["influence"] for name in part.ranked(MEDIATORS))
    everything = part.meta["pruned"]["of_influence"]
    hidden = len(graph.ranked(errors)) - len(part.ranked(errors))
    left_out = f"; {hidden:,} error nodes of less influence are not drawn" if hidden else ""
    return (
        f"{len(part.digraph) - 1:,} of {len(graph.digraph) - 1:,} nodes, holding "
        f"{percent(held / everything if everything else 1.0)} of the latents' influence: the part of the absolute flow "
        "into the behaviour that passes through them. Paths from error nodes carry "
        f"{percent(part.meta['pruned']['from_errors'])} of it{left_out}."
    )


def _figures(figures: Mapping[str, Any]) -> str:
    shown = [(name, plain(value)) for name, value in figures.items() if value is not None]
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in shown)
    return f"<dl>{cards}</dl>"


def _facts(flags: Sequence[Mapping[str, Any]]) -> str:
    heading = "<h2>Hidden facts</h2>"
    if not flags:
        return heading + "<p>No fact was tested in this run: run <code>mediation flag</code> on it.</p>"
    used = dict.fromkeys(key for flag in flags for key in flag if key not in FLAG_TITLES and key != "flagged")
    keys = [key for key in FLAG_TITLES if any(key in flag for flag in flags)] + list(used)
    scale = max((abs(value) for flag in flags if (value := _number(flag.get("effect"))) is not None), default=0)
    titles = [FLAG_TITLES.get(key, key.replace("_", " ")) for key in keys]
    rows = [[_flag_cell(key, flag, scale) for key in keys] for flag in flags]
    count = sum(bool(flag.get("flagged")) for flag in flags)
    text = (
        f"{count} of {len(flags)} tested facts are flagged: they act on the answer through latents that are "
        "not about them, while the latents that are stay silent. Removal and swap are measured, p compares "
        "the removal with matched controls, q corrects for all tests of the run."
    )
    return f"{heading}<p>{text}</p>{_table(titles, rows)}"


def _flag_cell(key: str, flag: Mapping[str, Any], scale: float) -> str:
    value = flag.get(key)
    number = _number(value)
    if key == "fact":
        badge = '<span class="badge">hidden</span>' if flag.get("flagged") else ""
        return f'<td class="fact">{escape(plain(value))}{badge}</td>'
    if key == "effect" and number is not None:
        return f'<td><div class="both"><b>{signed(number)}</b>{_bar(number, None, None, scale)}</div></td>'
    if key == "hidden_share" and number is not None:
        return f'<td><div class="both"><b>{percent(number)}</b>{_meter(number)}</div></td>'
    if key in ("p", "q") and (number is not None or value is None):
        return f'<td class="number">{escape(probability(number))}</td>'
    if number is not None:
        return f'<td class="number">{signed(number) if isinstance(value, float) else escape(value)}</td>'
    return f"<td>{escape(plain(value))}</td>"


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value == value else None


def _paths(graph: AttributionGraph) -> str:
    items = []
    for path in graph.strongest_paths(PATHS):
        steps = []
        for source, target in zip(path.nodes, path.nodes[1:], strict=False):
            sign = "up" if graph.digraph.edges[source, target]["contribution"] > 0 else "down"
            steps.append(f'{_place(graph, source)} <span class="{sign}">→</span> ')
        carried = f'<span class="carried">({path.carried:.3g})</span>'
        items.append(f"<li>{''.join(steps)}{_place(graph, path.nodes[-1])} {carried}</li>")
    text = "In brackets what a path carries of the behaviour, in its units; arrows have their edge's colour."
    return f"<h2>Strongest paths</h2><p>{text}</p><ol>{''.join(items)}</ol>"


def _place(graph: AttributionGraph, name: str) -> str:
    data = graph.digraph.nodes[name]
    label = escape(node_label(data, name))
    if data["position"] is None:
        return label
    site = "" if data["kind"] == NodeKind.EMBEDDING else f", {escape(site_title(data['site']))}"
    return f"{label} <small>@{escape(data['position'])}{site}</small>"


def _nodes(graph: AttributionGraph, numbers: Mapping[str, int], whole: AttributionGraph) -> str:
    data = {name: graph.digraph.nodes[name] for name in graph.ranked()}
    judged = bool(graph.meta.get("held_out_prompts"))
    value = "held_out" if judged else "attribution"
    ends = [node[key] for node in data.values() for key in (value, "low", "high")]
    scale = max((abs(value) for value in ends if value is not None), default=0.0)
    rows = []
    ordered = graph.ranked(MEDIATORS) + graph.ranked([NodeKind.ERROR, NodeKind.EMBEDDING])
    for name in ordered:
        node = data[name]
        low, high = node["low"], node["high"]
        interval = "" if low is None or high is None else f"{signed(low)} to {signed(high)}"
        rows.append([
            f'<td><a href="#g{numbers[name]}">{escape(node_label(node, name))}</a>{_members(graph, name, whole)}</td>',
            f'<td class="soft">{escape(node["site"] or "")}</td>',
            f'<td class="soft">{escape("" if node["position"] is None else node["position"])}</td>',
            f'<td class="number">{"" if node["latent"] is None else escape(node["latent"])}</td>',
            f'<td class="number">{signed(node["attribution"])}</td>',
            f"<td>{'' if node[value] is None else _bar(node[value], low, high, scale)}</td>",
            f'<td class="number">{interval}</td>',
        ])  # fmt: skip
        if judged:
            kept = "" if node["frequency"] is None else percent(node["frequency"])  # a supernode has none
            rows[-1].append(f'<td class="number">{kept}</td>')
            rows[-1].append(f'<td class="soft">{escape(node["tier"] or "")}</td>')
    titles = ["Node", "Site", "Position", "Latent", "Attribution", "with its interval", "Interval"]
    text = "Latents by strength, then errors and embeddings. Positive attribution pushes the behaviour up."
    if judged:
        titles[-2:] = ["Held-out mean", "its interval", "Kept in", "Tier"]
        text += (
            " Attribution is the mean over all prompts. Bar, interval, how often a prompt's own graph keeps the node, "
            f"and its tier come from {graph.meta['held_out_prompts']} held-out prompts, on which no node was chosen."
        )
    return f"<h2>Nodes</h2><p>{text}</p>{_table(titles, rows, [f'n{numbers[name]}' for name in ordered])}"


def _members(graph: AttributionGraph, name: str, whole: AttributionGraph) -> str:
    """Labels of what a supernode holds; nothing for other nodes."""
    if (group := graph.meta["supernodes"].get(name)) is None:
        return ""
    known = whole.digraph.nodes
    labels = [node_label(known[member], member) if member in known else member for member in group["members"]]
    return f"<br><small>{escape(' · '.join(labels))}</small>"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], ids: Sequence[str] = ()) -> str:
    """`rows` are finished <td> elements; a title stands right where the first row's cell does."""
    classes = [' class="number"' if cell.startswith('<td class="number"') else "" for cell in rows[0]] if rows else []
    classes += [""] * (len(titles) - len(classes))
    head = "".join(f"<th{c}>{escape(t)}</th>" for t, c in zip(titles, classes, strict=True))
    anchors = [f' id="{each}"' for each in ids] or [""] * len(rows)
    body = "".join(f"<tr{a}>{''.join(row)}</tr>" for a, row in zip(anchors, rows, strict=True))
    return f'<div class="pane"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _bar(value: float, low: float | None, high: float | None, scale: float) -> str:
    """A bar from zero (middle) to the value, with its interval as a whisker."""

    def at(number: float) -> float:
        return BAR / 2 * (1 + number / scale) if scale else BAR / 2

    left, right = sorted((at(0), at(value)))
    middle = BAR_HIGH / 2
    whisker = ""
    if low is not None and high is not None:
        whisker = f'<line class="whisker" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{middle:g}" y2="{middle:g}"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{BAR}" height="{BAR_HIGH}" aria-hidden="true">'
        f'<line x1="{BAR / 2:g}" x2="{BAR / 2:g}" y1="0" y2="{BAR_HIGH}"/>'
        f'<rect class="{"up" if value > 0 else "down"}" x="{left:.1f}" y="2.5" width="{right - left:.1f}" '
        f'height="{BAR_HIGH - 5}" rx="1.5"/>{whisker}</svg>'
    )


def _meter(share: float) -> str:
    filled = 80 * min(max(share, 0.0), 1.0)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="80" height="10" aria-hidden="true">'
        '<rect class="meter" width="80" height="6" y="2" rx="3"/>'
        f'<rect class="level" width="{filled:.1f}" height="6" y="2" rx="3"/></svg>'
    )
