"""The page in a real browser: every view opens on a real run, what is selected is followed, nothing leaves the page.

Chromium (Debian's package) and Playwright drive it. Without them the tests skip, unless MEDIATION_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree

import polars as pl
import pytest

from circuits.graph import AttributionGraph
from circuits.pruning import Keep, prune
from circuits.viewer.page import render
from circuits.viewer.payload import payload
from mediation.runs import Run
from tests.circuits.wide_runs import wide_run

try:
    from playwright.sync_api import Browser, Download, Page, sync_playwright
except ImportError:
    sync_playwright = None  # type: ignore[assignment]

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
).split()
VIEWS = ("prompts", "graph", "node", "meta", "facts")
ATTACK = (
    '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\'"&amp;{b}\u2028\u2029\x00\ud800'
)
SEEN = "<script>window.hacked=1</script>"  # as text, where it does no harm


def absent(reason: str) -> None:
    """Skips, or fails where everything must be there."""
    if os.environ.get("MEDIATION_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if sync_playwright is None or CHROMIUM is None:
        absent("needs Chromium and the playwright package")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Opened:
    """A page in a tab of its own. It fails at the end if the tab logged an error or asked for anything."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.file, self.wrong = file, []  # type: tuple[Path, list[str]]
        self.page: Page = browser.new_page(viewport={"width": 1400, "height": 900}, **options)
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append("a dialog"))
        self.page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        if request.url.split("#")[0] != self.file.as_uri() and not request.url.startswith(("data:", "blob:")):
            self.wrong.append(f"asked for {request.url[:200]}")

    def open(self, **state: Any) -> Page:
        self.page.goto("about:blank")
        self.page.goto(f"{self.file.as_uri()}#{urlencode({k: _hash(v) for k, v in state.items()})}")
        self.page.wait_for_selector("main *")
        return self.page

    @property
    def text(self) -> str:
        return self.page.inner_text("main")

    @property
    def hash(self) -> str:
        return self.page.evaluate("location.hash")

    def at(self, key: str) -> dict[str, float]:
        """Where the graph's node of this key is on the screen."""
        spot = "key => { const box = document.querySelector('.layer'); const at = box.locate(key);"
        spot += " const r = box.getBoundingClientRect(); return at && {x: r.left + at[0], y: r.top + at[1]}; }"
        found = self.page.evaluate(spot, key)
        assert found, key
        return found

    def saved(self, button: str) -> bytes:
        with self.page.expect_download() as waited:
            self.page.click(f"header button:text-is('{button}')")
        download: Download = waited.value
        return Path(download.path()).read_bytes()

    def rows(self) -> list[dict[str, str]]:
        """The figures behind the view."""
        return list(csv.DictReader(io.StringIO(self.saved("CSV").decode())))


def _hash(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Opened]]:
    pages: list[Opened] = []

    def make(file: Path, **options: Any) -> Opened:
        pages.append(Opened(browser, file, **options))
        return pages[-1]

    yield make
    for each in pages:
        each.page.close()
        assert not each.wrong


def written(folder: Path, shown: dict[str, Any]) -> Path:
    file = folder / "page.html"
    file.write_text(render(shown), encoding="utf-8")
    return file


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_opens_on_a_real_run(full: Path, opened: Callable[..., Opened], theme: str) -> None:
    tab = opened(full / "index.html", color_scheme=theme)
    shows = {
        "prompts": ["What these numbers can bear", "Faithfulness of circuits", "hidden"],
        "graph": ["of the latents' influence", "Strongest nodes"],
        "node": ["Choose a latent"],
        "meta": ["What the latents of this prompt were carrying", "Proof: a hidden fact", "Carriers", "Logit lens"],
        "facts": ["tested facts are flagged", "follows"],
    }
    for view, words in shows.items():
        page = tab.open(view=view, mode="set")
        page.wait_for_timeout(150)
        for word in words:
            assert word in tab.text, (view, word)
        assert not re.search(r"undefined|NaN|\[object", tab.text), view
        assert page.get_attribute("nav a[aria-current]", "href") is not None
    for mode in ("prompt", "contrast"):
        tab.open(view="graph", mode=mode, group="meta")
        assert "influence" in tab.text or "difference" in tab.text
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (theme == "dark")
    tab.page.keyboard.press("t")
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    assert f"theme={'light' if theme == 'dark' else 'dark'}" in tab.hash


def test_a_run_without_labels_flags_or_proof_says_so_with_the_command(
    bare: Path, opened: Callable[..., Opened]
) -> None:
    tab = opened(bare / "index.html")
    for view, command in (("prompts", "mediation prove"), ("meta", "mediation flag"), ("facts", "mediation flag")):
        tab.open(view=view)
        assert command in tab.text
    graph = AttributionGraph.load(bare / "graph.json")
    name = next(name for name, data in graph.digraph.nodes(data=True) if data["kind"] == "latent")
    site, position, latent = name.split("/")
    sites = [each["name"] for each in payload(Run.open(bare), graph, prompts_file="prompts.jsonl")["sites"]]
    tab.open(view="node", node=f"{sites.index(site)}/{position}/{latent}")
    assert "mediation label" in tab.text
    assert "mediation flag" in tab.text


def test_selections_are_followed_from_view_to_view(full: Path, opened: Callable[..., Opened]) -> None:
    tab = opened(full / "index.html")
    page = tab.open(view="prompts")
    page.click("tbody tr[tabindex] >> nth=2")  # a prompt: its own graph
    page.wait_for_selector(".canvas")
    assert "prompt=2" in tab.hash
    assert "mode=prompt" in tab.hash
    page.click("button:text-is('Whole set')")
    first = page.evaluate("document.querySelector('aside .list button span').firstChild.textContent")
    page.click("aside .list button >> nth=0")
    assert page.inner_text("aside h3 >> nth=0") == first
    page.click("button:text-is('Open node')")
    assert "view=node" in tab.hash
    assert "Attribution by prompt" in tab.text
    assert "Strongest contexts" in tab.text
    page.go_back()
    page.wait_for_selector(".canvas")
    assert page.inner_text("aside h3 >> nth=0") == first
    page.click("nav >> text=Hidden facts")  # from the claim to its proof
    page.select_option("main select", "flagged")
    fact = page.inner_text("tbody tr >> nth=0 >> td >> nth=0").split("\n")[0].removesuffix("hidden").strip()
    page.click("tbody tr >> nth=0")
    assert page.inner_text("main h2 >> nth=0") == fact
    assert "Proof: a hidden fact" in tab.text
    before = page.inner_text("main h2 >> nth=0"), page.inner_text(".figures")
    page.reload()
    page.wait_for_selector(".figures")
    assert (page.inner_text("main h2 >> nth=0"), page.inner_text(".figures")) == before  # the address holds the state


def test_the_proof_shows_what_was_measured(full: Path, opened: Callable[..., Opened]) -> None:
    flags = pl.read_parquet(full / "flags.parquet").filter("flagged").sort("removal", descending=True)
    best = flags.row(0, named=True)
    tab = opened(full / "index.html")
    ids = [json.loads(line)["id"] for line in (full / "prompts.jsonl").read_text().splitlines()]
    tab.open(view="meta", meta=best["meta"], prompt=ids.index(best["prompt"]))
    shown = f"{best['removal']:+.3g}".replace("-", "−")
    assert shown in tab.text
    assert "mean removal" in tab.page.content()
    rows = [row for row in tab.rows() if row["prompt"] == best["prompt"]]
    removal = [float(row["value"]) for row in rows if row["row"] == "removal" and row["value"]]
    assert removal == pytest.approx([best["removal"]], rel=1e-3)
    assert sum(row["row"] == "control" for row in rows) == 399


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8, 1.0])
def test_the_slider_keeps_what_pruning_keeps(full: Path, opened: Callable[..., Opened], share: float) -> None:
    graph = AttributionGraph.load(full / "graph.json")
    part = prune(graph, Keep(share, share))
    tab = opened(full / "index.html")
    page = tab.open(view="graph", mode="set", group="none")
    for name in ("Share of the latents' influence kept", "Share of the edges' influence kept"):
        page.fill(f'input[aria-label="{name}"]', str(share))
    rows = tab.rows()
    assert sum(row["row"] == "node" for row in rows) == len(part.digraph)
    assert sum(row["row"] == "edge" for row in rows) == part.digraph.number_of_edges()
    labels = sorted(row["label"] for row in rows if row["kind"] == "latent")
    assert labels == sorted(data["label"] for _, data in part.digraph.nodes(data=True) if data["kind"] == "latent")
    pruned = part.meta["pruned"]
    assert f"{100 * pruned['influence'] / pruned['of_influence']:.0f} % of the latents' influence" in tab.text
    assert f"keep={share:g}" in tab.hash or share == 0.8


def test_pointing_pinning_and_grouping(full: Path, opened: Callable[..., Opened]) -> None:
    tab = opened(full / "index.html")
    page = tab.open(view="graph", mode="set", group="none", keep=1)
    latents = [row for row in tab.rows() if row["kind"] == "latent"]
    cell = next(row["place"] for row in latents if sum(each["place"] == row["place"] for each in latents) > 2)
    chosen = [row for row in latents if row["place"] == cell][:2]
    spot = tab.at(chosen[0]["key"])
    page.mouse.move(spot["x"], spot["y"])
    page.wait_for_function("label => document.querySelector('aside h3').textContent === label", arg=chosen[0]["label"])
    assert "Feeds" in page.inner_text("aside")
    page.keyboard.down("Shift")
    for row in chosen:
        page.mouse.click(**tab.at(row["key"]))
    page.keyboard.up("Shift")
    page.fill("[aria-label='Name of the group']", "my own")
    page.click("button:text-is('Group')")
    assert "2 × my own" in [row["label"] for row in tab.rows()]
    total = sum(float(row["attribution"]) for row in chosen)
    (group,) = (row for row in tab.rows() if row["label"] == "2 × my own")
    assert float(group["attribution"]) == pytest.approx(total)
    before = tab.rows()
    page.reload()
    page.wait_for_selector(".canvas")
    assert tab.rows() == before
    page.select_option("label:has-text('Group') select", "meta")
    assert any("×" in row["label"] and "=" in row["label"] for row in tab.rows())


def test_the_graph_is_walked_with_the_keyboard(full: Path, opened: Callable[..., Opened]) -> None:
    tab = opened(full / "index.html")
    page = tab.open(view="graph", mode="set", group="none")
    page.focus(".canvas")
    seen = []
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
        seen.append(page.inner_text("aside h3 >> nth=0"))
    assert len(set(seen[:3])) == 3
    page.keyboard.press("Escape")
    assert "node=" not in tab.hash
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Attribution by prompt")
    for number, view in enumerate(VIEWS, 1):
        page.keyboard.press(str(number))
        assert f"view={view}" in tab.hash
    page.keyboard.press("?")
    assert page.is_visible("dialog")


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_can_be_saved(full: Path, opened: Callable[..., Opened], view: str) -> None:
    tab = opened(full / "index.html")
    state: dict[str, Any] = {"view": view, "mode": "set"}
    if view == "node":
        tab.open(view="graph", mode="set")
        state["node"] = next(row["key"] for row in tab.rows() if row["kind"] == "latent")
    tab.open(**state)
    tab.page.wait_for_timeout(200)
    picture = tab.saved("PNG")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    assert int.from_bytes(picture[16:20]) >= 1400  # twice as fine as the screen
    drawing = ElementTree.fromstring(tab.saved("SVG"))
    assert drawing.tag.endswith("svg")
    if view == "graph":
        assert len(drawing.findall(".//{http://www.w3.org/2000/svg}path")) > 20
    else:
        words = {
            "prompts": "Total effect",
            "node": "Attribution by prompt",
            "meta": "Carriers",
            "facts": "Hidden facts",
        }
        assert words[view] in "".join(drawing.itertext())
    assert tab.rows()


def poisoned(value: Any, key: str = "") -> Any:
    """The payload with an attack in every text that comes from prompts, tokens, labels, runs or dictionaries."""
    kept = ("kind", "tier", "half", "role", "source", "created", "estimator", "baseline", "graphs")
    if isinstance(value, dict):
        return {name: each if name in kept else poisoned(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each, key) for each in value]
    return ATTACK + value if isinstance(value, str) else value


def test_no_text_is_ever_markup(full: Path, tmp_path: Path, opened: Callable[..., Opened]) -> None:
    shown = payload(Run.open(full), AttributionGraph.load(full / "graph.json"), prompts_file="prompts.jsonl")
    nasty = shown | {name: poisoned(shown[name]) for name in ("title", "latents", "metas", "facts")}
    nasty["prompts"] = poisoned(shown["prompts"]) | {
        "sites": shown["prompts"]["sites"],
        "half": shown["prompts"]["half"],
    }
    nasty["graph"] = shown["graph"] | {
        "nodes": shown["graph"]["nodes"] | {"label": poisoned(shown["graph"]["nodes"]["label"])}
    }
    nasty["run"] = shown["run"] | {"model": ATTACK, "groups": poisoned(shown["run"]["groups"]), "path": ATTACK}
    tab = opened(written(tmp_path, nasty))
    latent = shown["latents"][0]
    role = shown["graph"]["nodes"]["position"][latent["nodes"][0]]
    key = f"{latent['site']}/{role}/{latent['latent']}"
    states: list[dict[str, Any]] = [{"view": view, "node": key} for view in VIEWS]
    states += [{"view": "graph", "mode": "prompt"}]
    states += [{"view": "graph", "mine": [{"label": ATTACK.strip("\ud800"), "members": [key, key]}]}]
    for state in states:
        page = tab.open(**state)
        page.wait_for_timeout(150)
        assert SEEN in tab.text, state
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.querySelectorAll('main script, main img, main iframe').length") == 0
    tab.open(view="facts")
    ElementTree.fromstring(tab.saved("SVG"))
    assert tab.saved("PNG").startswith(b"\x89PNG")
    assert all(not cell.startswith(("=", "+", "@")) for row in tab.rows() for cell in row.values())
    assert tab.page.evaluate("window.hacked") is None


def test_the_policy_stops_what_the_page_did_not_bring(full: Path, opened: Callable[..., Opened]) -> None:
    tab = opened(full / "index.html")
    page = tab.open(view="prompts")
    add = "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s);"
    page.evaluate(f"() => {{ {add} }}")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'stopped')") == "stopped"
    assert any("Content Security Policy" in each for each in tab.wrong)
    tab.wrong = [each for each in tab.wrong if "Content Security Policy" not in each and "127.0.0.1:9" not in each]


def large_graph(shown: dict[str, Any], nodes: int = 2_000, edges: int = 20_000) -> dict[str, Any]:
    """The payload with a random graph of this size in place of the set's."""
    rng = random.Random(0)
    sites, roles = 12, [f"role {k}" for k in range(24)]
    kind, site, position = ["target"], [None], [None]
    for role in roles:
        kind, site, position = [*kind, "embedding"], [*site, None], [*position, role]
    while len(kind) < nodes:
        kind.append("error" if rng.random() < 0.12 else "latent")
        site.append(len(kind) % sites)
        position.append(rng.choice(roles))
    level = [sites if k == "target" else -1 if s is None else s for k, s in zip(kind, site, strict=True)]
    at: dict[int, list[int]] = {}
    for k, each in enumerate(level):
        at.setdefault(each, []).append(k)
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < edges:
        source = rng.randrange(1, nodes)
        above = rng.choice(at[min(level[source] + rng.choice((1, 1, 1, 2, sites)), sites)])
        if kind[above] != "error":
            pairs.add((source, above))
    value = {pair: rng.gauss(0, 1) ** 3 for pair in pairs}
    ordered = sorted(pairs, key=lambda pair: -abs(value[pair]))
    size = [0.0] * nodes
    for (source, _), each in value.items():
        size[source] += abs(each)
    nothing = [None] * nodes
    table = {
        "id": [str(k) for k in range(nodes)], "kind": kind, "site": site, "position": position,
        "latent": [k if each == "latent" else None for k, each in enumerate(kind)],
        "label": [f"{k} some concept" for k in range(nodes)], "attribution": [rng.gauss(0, 1) ** 3 for _ in kind],
        "influence": size, **dict.fromkeys(("low", "high", "held_out", "frequency", "tier"), nothing),
    }  # fmt: skip
    contribution = [value[pair] for pair in ordered]
    links = {"source": [s for s, _ in ordered], "target": [t for _, t in ordered], "weight": contribution,
             "contribution": contribution, "influence": [abs(each) for each in contribution]}  # fmt: skip
    sites_ = [{"name": f"blocks.{k}.hook_resid_pre", "title": f"layer {k} resid_pre"} for k in range(sites)]
    graph = {"nodes": table, "edges": links, "of": {"nodes": nodes, "edges": edges}, "positions": roles, "groups": []}
    return shown | {"graph": graph, "sites": sites_, "latents": [], "metas": None, "facts": None}


def slowness(page: Page) -> float:
    """How many times slower this machine is now than one at rest, by a loop that takes such a one .15 s."""
    loop = (
        "() => { const t = performance.now(); let s = 1; for (let k = 0; k < 1e8; k++) s = Math.imul(s, 1664525) + k;"
    )
    taken = [page.evaluate(loop + " return s === 7 ? 0 : performance.now() - t; }") for _ in range(3)]
    return max(1.0, max(taken) / 150)


TIMED = """async () => {
  const box = document.querySelector('.layer'), r = box.getBoundingClientRect();
  const found = {hover: [], slider: []};
  const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  const spots = [...Array(12).keys()].flatMap(s => [...Array(24).keys()].map(p => box.locate(`${s}/role ${p}/error`)));
  for (const at of spots.filter(Boolean).slice(0, 20)) {
    const before = performance.now();
    const there = {clientX: r.left + at[0], clientY: r.top + at[1], bubbles: true};
    box.firstElementChild.dispatchEvent(new MouseEvent('mousemove', there));
    await frame();
    found.hover.push(performance.now() - before);
  }
  const slider = document.querySelector('input[type=range]');
  for (const value of [.95, .9, .8, .7, .6, .5, .7, .9, 1]) {
    const before = performance.now();
    slider.value = value;
    slider.dispatchEvent(new Event('input', {bubbles: true}));
    await frame();
    found.slider.push(performance.now() - before);
  }
  return found;
}"""


def test_two_thousand_nodes_and_twenty_thousand_edges(
    full: Path, tmp_path: Path, opened: Callable[..., Opened]
) -> None:
    """Without a graphics card; bounds are for a machine at rest, and grow as this one is slower."""
    shown = payload(Run.open(full), AttributionGraph.load(full / "graph.json"), prompts_file="prompts.jsonl")
    tab = opened(written(tmp_path, large_graph(shown)))
    page = tab.open(view="graph", keep=1, links=1)
    page.wait_for_selector("canvas")
    assert "20,000 of 20,000 edges" in tab.text
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    times = page.evaluate(TIMED)
    hover, slider = (sorted(times[name])[len(times[name]) // 2] for name in ("hover", "slider"))
    print(f"first paint {painted:.0f} ms, hover {hover:.0f} ms, slider {slider:.0f} ms (medians)")
    slow = slowness(page)
    assert painted < 4_000 * slow
    assert hover < 200 * slow
    assert slider < 1_000 * slow


def test_two_hundred_prompts_of_a_real_models_size(tmp_path: Path, opened: Callable[..., Opened]) -> None:
    run = wide_run(tmp_path / "run")
    shown = payload(run, AttributionGraph.load(run.path / "graph.json"), prompts_file="prompts.jsonl")
    file = written(tmp_path, shown)
    size = file.stat().st_size / 1e6
    assert size < 20
    tab = opened(file)
    page = tab.open(view="prompts")
    opening = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"{size:.1f} MB, first paint {opening:.0f} ms")
    assert opening < 3_000 * slowness(page)
    assert "200 prompts of 200" in tab.text
    tab.open(view="graph", mode="prompt", prompt=199)
    assert "latents' influence" in tab.text
    tab.open(view="meta")
    assert "What the latents of this prompt were carrying" in tab.text


def test_the_build_is_reproducible(tmp_path: Path) -> None:
    """The script and style that ship are those that the sources make."""
    npm = shutil.which("npm")
    if npm is None:
        absent("needs Node and npm")
    shutil.copytree(REPOSITORY / "viewer", tmp_path / "viewer", ignore=shutil.ignore_patterns("node_modules"))
    run = {"cwd": tmp_path / "viewer", "capture_output": True, "text": True}
    installed = subprocess.run([str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund"], **run)
    if installed.returncode:
        absent(f"needs the packages of viewer/package-lock.json: {installed.stderr[-300:]}")
    for arguments in (["run", "check"], ["run", "build", "--", str(tmp_path / "dist")]):
        made = subprocess.run([str(npm), *arguments], **run)
        assert made.returncode == 0, made.stdout + made.stderr
    committed = REPOSITORY / "circuits" / "viewer" / "dist"
    names = {file.name for file in committed.iterdir()}
    assert names == {"page.js", "page.css", "LICENSES.txt"}
    for name in names:
        assert (tmp_path / "dist" / name).read_bytes() == (committed / name).read_bytes(), f"run `make page`: {name}"
