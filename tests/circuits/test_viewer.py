"""The page as a browser reads it: nothing from data becomes markup, the SVG is XML, no boxes overlap."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import re
import time
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.graph import TARGET, AttributionGraph, NodeKind
from circuits.pruning import SOURCES, Keep, influence, prune
from circuits.supernodes import Supernode, quotient
from circuits.viewer import render
from circuits.viewer.layout import BOX, HIGH, lay_out
from circuits.viewer.page import DRAWN_EDGES, DRAWN_LATENTS, DRAWN_SOURCES
from circuits.viewer.text import CHARACTER, fit, plain, probability, signed
from tests.circuits.random_graphs import random_graph, random_tables

ATTACK = "</td></svg></title><script>alert(1)</script><img src=x onerror=alert(2)>\"' &amp; \x00\x1b\ud800"
FLAG: dict[str, Any] = {
    "fact": "capital", "effect": -0.5, "hidden_share": 0.25, "p": 0.0001, "q": 0.04, "carriers": ["a", "b"],
    "removal": -0.4, "swap": None, "prompt": "p-1", "flagged": True,
}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Elements with their attributes, the text of scripts, and all other text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def svgs(html: str) -> list[ElementTree.Element]:
    """Every outermost <svg> of the page, parsed as XML."""
    found, depth, start = [], 0, 0
    for match in re.finditer(r"<svg\b|</svg>", html):
        if match[0] == "</svg>":
            depth -= 1
            if depth == 0:
                found.append(ElementTree.fromstring(html[start : match.end()]))
        else:
            start = match.start() if depth == 0 else start
            depth += 1
    return found


def poisoned() -> AttributionGraph:
    """Every text of the graph is an attack; nodes and positions are renamed to hold it too."""
    graph = random_graph(0)
    renamed = {name: name if name == TARGET else f"{ATTACK}{name}" for name in graph.digraph}
    digraph = nx.relabel_nodes(graph.digraph, renamed)
    for _, data in digraph.nodes(data=True):
        data["label"] = f"{ATTACK}{data['label']}"
        if data["position"] is not None:
            data["position"] = f"{ATTACK}{data['position']}"
        if data["site"] is not None:
            data["site"] = f"{ATTACK}{data['site']}"
    return AttributionGraph(digraph, {"behaviour": ATTACK, "tokens": [ATTACK, ATTACK]})


def test_nothing_from_data_becomes_markup() -> None:
    hostile_flag = {key: ATTACK for key in FLAG} | {ATTACK: ATTACK, "list": [ATTACK], "map": {ATTACK: 1}}
    html = render(poisoned(), title=ATTACK, figures={ATTACK: ATTACK}, flags=[FLAG, hostile_flag])
    page = Page(html)
    names = [name for name, _ in page.elements]
    assert names.count("script") == 1
    assert page.scripts == [files("circuits.viewer").joinpath("page.js").read_text(encoding="utf-8")]
    assert not {"img", "iframe", "object", "link", "base", "form"} & set(names)
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert page.text.count("<script>alert(1)</script>") > 20
    assert not re.search("[\x00-\x08\x0b-\x1f]", html)
    html.encode()  # no lone surrogate is left
    assert len(svgs(html)) > 5


def test_the_page_asks_for_nothing_and_runs_only_its_own_script() -> None:
    html = render(random_graph(1), title="t", flags=[FLAG])
    page = Page(html)
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    (policy,) = (a["content"] for n, a in page.elements if n == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    css = html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in css
    assert "@import" not in css
    assert "prefers-color-scheme: dark" in css


@settings(max_examples=25, deadline=None)
@given(label=st.text(max_size=40), role=st.text(max_size=20), title=st.text(max_size=20))
def test_svg_is_xml_and_html_balances_for_any_text(label: str, role: str, title: str) -> None:
    graph = random_graph(2, layers=1, width=2)
    for _, data in graph.digraph.nodes(data=True):
        data["label"] = label
        if data["position"] == 1:
            data["position"] = role
    html = render(graph, title=title, flags=[{"fact": label, role: title}])
    assert svgs(html)[0].get("id") == "graph"
    opened = [name for name, _ in Page(html).elements]
    for name in ("table", "tr", "td", "ol", "li", "svg", "a", "div"):
        assert opened.count(name) == html.count(f"</{name}>"), name


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    layers=st.integers(1, 4),
    width=st.integers(1, 25),
    positions=st.integers(1, 6),
)
def test_boxes_do_not_overlap_and_stand_in_their_bands(seed: int, layers: int, width: int, positions: int) -> None:
    graph = random_graph(seed, layers=layers, width=width, positions=positions, density=0.3)
    layout = lay_out(graph)
    assert set(layout.at) == set(graph.digraph)
    for (x0, y0), (x1, y1) in itertools.combinations(layout.at.values(), 2):
        assert abs(x0 - x1) >= BOX + 4 or abs(y0 - y1) >= HIGH + 4
    for name, (x, y) in layout.at.items():
        assert 0 <= x <= layout.width - BOX
        assert 0 <= y <= layout.height - HIGH
        assert x < layout.port[name] < x + BOX
        data = graph.digraph.nodes[name]
        if name != TARGET:
            column = layout.columns[data["position"]]
            assert column.start <= x <= column.start + column.size - BOX
            row = layout.rows["embedding" if data["kind"] == NodeKind.EMBEDDING else data["site"]]
            assert row.start <= y <= row.start + row.size - HIGH
    for source, target in graph.digraph.edges:
        assert layout.at[source][1] > layout.at[target][1]  # upwards


def test_rows_go_by_depth_and_columns_by_position_or_as_told() -> None:
    nodes, edges = random_tables(3, layers=6, positions=3)
    graph = AttributionGraph.from_tables(nodes, edges, meta={"tokens": ["<s>", " Paris", "\n"]})
    layout = lay_out(graph)
    assert list(layout.rows) == [f"blocks.{2 * k + 1}.hook_resid_pre" for k in reversed(range(6))] + ["embedding"]
    assert [band.title for band in layout.columns.values()] == ["0  <s>", "1  Paris", "2  ↵"]
    roles = nodes.with_columns(pl.col("position").replace_strict({0: "end", 1: "claim", 2: "rest"}))
    told = AttributionGraph.from_tables(roles, edges, meta={"positions": ["rest", "claim", "end", "unused"]})
    assert list(lay_out(told).columns) == ["rest", "claim", "end"]


def drawn(html: str) -> set[str]:
    """Ids of the nodes in the page's drawing."""
    return {(node.findtext(f"{SVG}title") or "").split("\n")[1] for node in svgs(html)[0].findall(f"{SVG}a")}


def test_the_drawing_shows_every_kept_node_and_the_strongest_edges() -> None:
    graph = random_graph(4, layers=4, width=16, positions=3, density=0.8)
    html = render(graph, title="t", keep=Keep(nodes=0.7, edges=1))
    part = prune(graph, Keep(nodes=0.7, edges=1))
    assert drawn(html) == set(part.digraph)
    paths = svgs(html)[0].findall(f"{SVG}path")
    assert DRAWN_EDGES <= len(paths) <= DRAWN_EDGES + len(part.digraph)
    widths = [float(path.get("stroke-width", "0")) for path in paths]
    assert widths == sorted(widths)
    contributions = [data["contribution"] for _, _, data in part.digraph.edges(data=True)]
    strongest = max(contributions, key=abs)
    assert (paths[-1].get("class") or "").endswith("up" if strongest > 0 else "down")
    assert f"contribution {signed(strongest)}," in (paths[-1].findtext(f"{SVG}title") or "")
    drawn_from = {path.get("data-s") for path in paths}
    assert len(drawn_from) == len(part.digraph) - 1  # every node but the target has an edge out
    found, latents = influence(graph).nodes, graph.ranked([NodeKind.LATENT])
    share = sum(found[name] for name in latents if name in part.digraph) / sum(found[name] for name in latents)
    errors = sum(found[name] for name in graph.ranked([NodeKind.ERROR]))
    text = re.sub(r"\s+", " ", Page(html).text)
    assert f"holding {share:.0%} of the latents' influence" in text
    assert f"Paths from error nodes carry {errors:.0%} of it." in text
    assert f"{len(paths):,} of {graph.digraph.number_of_edges():,} edges are drawn" in text
    for site, value in graph.error_share().items():
        assert f"error {value:.0%}" in html, site


def test_the_page_is_pruned_by_default() -> None:
    graph = random_graph(12, layers=3, width=8)
    assert drawn(render(graph, title="t")) == set(prune(graph).digraph) < set(graph.digraph)
    assert drawn(render(graph, title="t", keep=Keep(nodes=1, edges=1))) == set(prune(graph, Keep(1, 1)).digraph)


def test_a_graph_of_thousands_of_nodes_opens_small_and_soon() -> None:
    """2,000 nodes and 20,000 edges. What is not drawn is the least influential, errors too, and the page says so."""
    graph = random_graph(0, layers=12, width=110, positions=50, density=0.12)
    assert len(graph.digraph) > 1950
    assert graph.digraph.number_of_edges() > 20_000
    start = time.perf_counter()
    html = render(graph, title="t")
    assert time.perf_counter() - start < 10  # .5 s alone on a core
    assert len(html) < 300_000
    names, whole = drawn(html), prune(graph)
    of = {kind: [n for n in names if whole.digraph.nodes[n]["kind"] in kind] for kind in (SOURCES, ("latent",))}
    assert 20 < len(of["latent",]) <= DRAWN_LATENTS
    assert 20 < len(of[SOURCES]) <= DRAWN_SOURCES
    value = dict(whole.digraph.nodes(data="influence"))
    for kinds, shown, most in ((SOURCES, of[SOURCES], DRAWN_SOURCES), (("latent",), of["latent",], DRAWN_LATENTS)):
        ranked = sorted((n for n, k in whole.digraph.nodes(data="kind") if k in kinds), key=lambda n: -value[n])
        assert set(shown) <= set(ranked[:most])
    hidden = len(graph.ranked([NodeKind.ERROR])) - sum(name.endswith("error") for name in names)
    assert f"{hidden:,} error nodes of less influence are not drawn" in re.sub(r"\s+", " ", Page(html).text)
    links = {(path.get("data-s"), path.get("data-t")) for path in svgs(html)[0].findall(f"{SVG}path")}
    assert {source for source, _ in links} == {str(k) for k in range(1, len(names))}


def test_supernodes_are_one_box_with_their_members_in_the_table() -> None:
    graph = random_graph(11, layers=2, width=8, positions=1)
    latents = prune(graph).ranked([NodeKind.LATENT])
    site = graph.digraph.nodes[latents[0]]["site"]
    members = tuple(name for name in latents if graph.digraph.nodes[name]["site"] == site)[:3]
    for k, name in enumerate(members):
        graph.digraph.nodes[name]["label"] = f"{ATTACK}{k}"
    group = Supernode(f"{site}/0/group-1", ATTACK, members)
    page = render(graph, title="t", supernodes=[group])
    assert drawn(page) == set(prune(graph).digraph) - set(members) | {group.id}
    box = next(each for each in svgs(page)[0].findall(f"{SVG}a") if "supernode" in (each.get("class") or ""))
    total = sum(graph.digraph.nodes[name]["attribution"] for name in members)
    assert f"attribution {signed(total)}" in (box.findtext(f"{SVG}title") or "")
    text = Page(page).text
    assert all(f"{3 * chr(0xFFFD)}{k}" in text for k in range(3))
    assert "several latents that are alike" in text
    assert [name for name, _ in Page(page).elements].count("img") == 0
    assert "several latents that are alike" not in Page(render(graph, title="t")).text
    again = render(quotient(graph, [group]), title="t", keep=Keep(1, 1))
    assert group.id in drawn(again)  # a graph that was grouped before can be drawn too


def test_links_lead_to_rows_and_back() -> None:
    page = Page(render(random_graph(5), title="t"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"])[1:] for name, attributes in page.elements if attributes.get("href")]
    assert len(links) > 10
    assert set(links) <= set(ids)


def test_flags_table() -> None:
    html = render(random_graph(6), title="t", flags=[FLAG, FLAG | {"fact": "other", "flagged": False, "effect": 1.0}])
    text = re.sub(r"\s+", " ", Page(html).text)
    assert "1 of 2 tested facts are flagged" in text
    assert html.count('class="badge"') == 1
    head = html.split("Hidden facts")[1].split("</thead>")[0]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", head) == [
        "Fact", "Effect", "Hidden share", "p", "q", "Carriers", "Removal", "Swap", "prompt",
    ]  # fmt: skip
    for shown in ("−0.500", "25%", "&lt; 0.001", "0.040", "a, b", "−0.400", "p-1"):
        assert shown in html
    bars = [svg.find(f"{SVG}rect") for svg in svgs(html)[1:5:2]]
    lengths = [float(bar.get("width", "0")) for bar in bars if bar is not None]
    assert lengths[0] == pytest.approx(lengths[1] / 2, abs=0.1)


def test_interval_bars_have_the_right_lengths() -> None:
    graph = random_graph(7)
    for _, data in graph.digraph.nodes(data=True):
        data |= {"attribution": 0.1, "low": 0.0, "high": 0.1}
    name = graph.ranked([NodeKind.LATENT])[0]
    graph.digraph.nodes[name].update(attribution=-1.0, low=-2.0, high=0.5)
    row = render(graph, title="t").split("<h2>Nodes</h2>")[1].split("<tbody>")[1].split("</tr>")[0]
    bar = svgs(row)[0]
    rect, whisker = bar.find(f"{SVG}rect"), bar.find(f"{SVG}line[@class='whisker']")
    assert rect is not None
    assert whisker is not None
    half = float(bar.get("width", "0")) / 2  # the largest end, 2, fills half the width
    assert rect.get("class") == "down"
    assert float(rect.get("width", "0")) == pytest.approx(half / 2, abs=0.1)
    assert float(whisker.get("x1", "nan")) == pytest.approx(0, abs=0.1)
    assert float(whisker.get("x2", "nan")) == pytest.approx(half * 1.25, abs=0.1)


def test_the_page_of_a_set_says_what_recurs() -> None:
    """The bar is the held-out mean, to which the interval belongs; the attribution beside it is that of the set."""
    graph = random_graph(7)
    graph.meta["held_out_prompts"] = 12
    for name, data in graph.digraph.nodes(data=True):
        if name != TARGET:
            data |= {"attribution": 0.1, "held_out": 0.0, "low": 0.0, "high": 0.0, "frequency": 0.0, "tier": "noise"}
    name = graph.ranked([NodeKind.LATENT])[0]
    graph.digraph.nodes[name].update(
        attribution=5.0, held_out=1.0, low=0.5, high=2.0, frequency=0.75, tier="consensus"
    )  # fmt: skip
    html = render(graph, title="t")
    row = html.split("<h2>Nodes</h2>")[1].split("<tbody>")[1].split("</tr>")[0]
    assert "12 held-out prompts" in html
    for shown in ("+5.00", "+0.500 to +2.00", "75%", "consensus"):
        assert shown in row
    bar = svgs(row)[0]
    rect = bar.find(f"{SVG}rect")
    assert rect is not None
    assert float(rect.get("width", "0")) == pytest.approx(float(bar.get("width", "0")) / 4, abs=0.1)
    assert "held out +1.00 [+0.500, +2.00], consensus 75%" in html
    alone = render(random_graph(7), title="t")
    assert "Held-out" not in alone


def test_a_graph_of_nothing_still_makes_a_page() -> None:
    digraph = nx.DiGraph()
    nodes, edges = random_tables(8)
    digraph.add_nodes_from(AttributionGraph.from_tables(nodes.clear(), edges.clear()).digraph.nodes(data=True))
    html = render(AttributionGraph(digraph), title="empty")
    assert svgs(html)
    assert "No fact was tested" in html


def test_the_same_graph_gives_the_same_page() -> None:
    graph = random_graph(9)
    again = AttributionGraph.from_json(graph.to_json())
    assert render(graph, title="t") == render(again, title="t")


@given(text=st.text(max_size=60), width=st.floats(20, 300))
def test_fit_never_exceeds_its_room(text: str, width: float) -> None:
    shown = fit(text, width)
    assert len(shown) == 0 or len(fit(shown, width)) == len(shown)
    if shown.isascii():
        assert len(shown) * CHARACTER <= width
    if not shown.endswith("…"):
        assert shown == " ".join(text.split())


def test_numbers_read_well() -> None:
    assert [signed(v) for v in (None, 0.0, -0.25, 1.5, 12345.6, math.nan)] == [
        "", "+0.00", "−0.250", "+1.50", "+12,346", "–",
    ]  # fmt: skip
    assert [probability(v) for v in (None, 0.0002, 0.05, math.nan)] == ["", "< 0.001", "0.050", ""]
    assert plain([1, "a", None, True, {"k": 0.5}]) == "1, a, , yes, k 0.5"
