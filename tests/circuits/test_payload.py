"""What the page shows: everything adds up, and agrees with what the rest of the package computes."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.graph import AttributionGraph, NodeKind
from circuits.prompt_graph import prompt_flows, prompt_graph
from circuits.pruning import influence
from circuits.viewer.page import render, server
from circuits.viewer.payload import EDGES, LATENTS, PARTS, SUMMED, payload
from mediation.runs import Run
from mediation.statistics import permutation_p
from mediation.trace import prompt_table


@pytest.fixture(scope="session")
def shown(full: Path) -> dict[str, Any]:
    run = Run.open(full)
    return payload(run, AttributionGraph.load(full / "graph.json"), prompts_file="prompts.jsonl")


def test_influence_of_all_prompts_at_once_is_that_of_each_prompts_graph(full: Path) -> None:
    run = Run.open(full)
    nodes, edges = prompt_flows(run)
    for prompt in run.read("prompts")["prompt"].unique().sort()[:6]:
        found = influence(prompt_graph(run, prompt))
        mine = dict(nodes.filter(pl.col("prompt") == prompt).select("id", "influence").iter_rows())
        assert set(mine) == {name for name, value in found.nodes.items() if value > 0}
        assert mine == pytest.approx({name: found.nodes[name] for name in mine}, abs=1e-9)
        links = edges.filter(pl.col("prompt") == prompt).select("source", "target", "influence")
        assert {(s, t): value for s, t, value in links.iter_rows()} == pytest.approx(
            {edge: value for edge, value in found.edges.items() if value > 0}, abs=1e-9
        )


def test_shares_of_every_prompt_sum_to_its_total_effect(shown: dict[str, Any], full: Path) -> None:
    prompts, totals = shown["prompts"], prompt_table(Run.open(full))
    for at, (name, clean, baseline) in enumerate(zip(*(prompts[k] for k in ("id", "clean", "baseline")), strict=True)):
        for site, shares in prompts["sites"].items():
            parts = [shares[each][at] for each in ("shown", "errors", "others", "gap")]
            assert sum(parts) == pytest.approx(clean - baseline, abs=1e-2)
            (found,) = totals.filter((pl.col("prompt") == name) & (pl.col("site") == site))["ig"]
            assert sum(parts[:3]) == pytest.approx(found, abs=1e-2)


def test_heat_is_the_attribution_of_each_token(shown: dict[str, Any], full: Path) -> None:
    nodes = Run.open(full).read("nodes")
    at, site = 3, shown["sites"][1]["name"]
    mine = nodes.filter((pl.col("prompt") == shown["prompts"]["id"][at]) & (pl.col("site") == site))
    expected = [mine.filter(pl.col("position") == k)["ig"].sum() for k in range(len(shown["prompts"]["tokens"][at]))]
    assert shown["prompts"]["heat"][at][1] == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_parts_sum_to_the_whole(shown: dict[str, Any], full: Path) -> None:
    """Of a node of the set, and of all latents of a prompt, with what is not named as one part more."""
    nodes = Run.open(full).read("nodes")
    site, n = shown["metas"]["site"], len(shown["prompts"]["id"])
    name = shown["sites"][site]["name"]
    checked = 0
    for each in shown["latents"]:
        for role, parts in (each["split"] or {}).items():
            mine = nodes.filter(
                (pl.col("site") == name) & (pl.col("latent") == each["latent"]) & (pl.col("role") == role)
            )
            assert sum(parts["value"]) == pytest.approx(mine["ig"].sum() / n, rel=1e-3, abs=1e-6)
            assert sum(meta >= 0 for meta in parts["meta"]) <= PARTS
            checked += 1
    assert checked > 5
    for prompt, rows in zip(shown["prompts"]["id"], shown["metas"]["prompts"], strict=True):
        mine = nodes.filter((pl.col("site") == name) & (pl.col("prompt") == prompt) & pl.col("latent").is_not_null())
        assert sum(sum(row["value"]) for row in rows) == pytest.approx(mine["ig"].sum(), rel=1e-3, abs=1e-3)
        assert len(rows) <= PARTS + 1
        for row in rows:
            if row["latent"] != SUMMED:
                one = mine.filter((pl.col("latent") == row["latent"]) & (pl.col("position") == row["position"]))
                assert row["on"] == bool(one["clean"][0])
                rounding = 1e-4 * sum(map(abs, row["value"]))
                assert sum(row["value"]) == pytest.approx(one["ig"].sum(), abs=rounding)


def test_controls_give_the_p_of_their_test(shown: dict[str, Any]) -> None:
    rows = shown["facts"]["rows"]
    tests: dict[tuple[str, str], list[int]] = defaultdict(list)
    for k, removal in enumerate(rows["removal"]):
        if removal is not None:
            tests[rows["group"][k], rows["kind"][k]].append(k)
    assert len(tests) >= 3
    for members in tests.values():
        observed = np.mean([abs(rows["removal"][k]) for k in members])
        controls = np.mean([rows["controls"][k] for k in members], axis=0)
        assert len(controls) == 399
        assert rows["p"][members[0]] == pytest.approx(float(permutation_p(observed, controls)))


def test_carriers_say_where_they_fire(shown: dict[str, Any], full: Path) -> None:
    nodes = Run.open(full).read("nodes")
    name = shown["sites"][shown["metas"]["site"]]["name"]
    for each in shown["facts"]["carriers"]:
        on = nodes.filter((pl.col("site") == name) & (pl.col("latent") == each["latent"]) & (pl.col("clean") != 0))
        assert [shown["prompts"]["id"][k] for k in each["on"]] == [
            p for p in shown["prompts"]["id"] if p in set(on["prompt"])
        ]
        assert each["carrier"] == (each["cosine"] >= 0.7)


def test_dossiers_hold_the_runs_own_figures(shown: dict[str, Any], full: Path) -> None:
    run = Run.open(full)
    nodes, sample = run.read("nodes"), run.read("calibration")
    each = next(each for each in shown["latents"] if each["exact"])
    name = shown["sites"][each["site"]]["name"]
    mine = (pl.col("site") == name) & (pl.col("latent") == each["latent"])
    role, values = next((role, values) for role, values in each["by_prompt"].items() if values)
    for at, value in zip(values["at"], values["value"], strict=True):
        own = nodes.filter(mine & (pl.col("role") == role) & (pl.col("prompt") == shown["prompts"]["id"][at]))
        assert value == pytest.approx(own["ig"].sum(), rel=1e-3)
    assert len(each["exact"]) == len(sample.filter(mine))
    peak = nodes.filter(mine)["clean"].max()
    assert max(each["where"][0]["value"]) == pytest.approx(peak, rel=1e-3)
    assert any(each.get("contexts") for each in shown["latents"])
    assert all(each["score"] is None or 0 <= each["score"] <= 1 for each in shown["latents"])


def test_the_sets_graph_is_whole_and_its_edges_come_strongest_first(shown: dict[str, Any], full: Path) -> None:
    graph = AttributionGraph.load(full / "graph.json")
    nodes, edges = shown["graph"]["nodes"], shown["graph"]["edges"]
    found = influence(graph)
    assert dict(zip(nodes["id"], nodes["influence"], strict=True)) == pytest.approx(found.nodes, rel=1e-4)
    pairs = [(nodes["id"][s], nodes["id"][t]) for s, t in zip(edges["source"], edges["target"], strict=True)]
    assert dict(zip(pairs, edges["influence"], strict=True)) == pytest.approx(found.edges, rel=1e-4, abs=1e-12)
    assert edges["influence"] == sorted(edges["influence"], reverse=True)
    for site, kind in zip(nodes["site"], nodes["kind"], strict=True):
        assert (site is None) == (kind in ("target", "embedding"))


def test_a_prompts_graph_is_cut_and_says_so(shown: dict[str, Any], full: Path) -> None:
    run = Run.open(full)
    for at in (0, 5):
        own, whole = shown["own"][str(at)], prompt_graph(run, shown["prompts"]["id"][at])
        kinds = own["nodes"]["kind"]
        assert kinds.count("target") == 1
        assert kinds.count("latent") <= LATENTS
        latents = [value for name, value in influence(whole).nodes.items()
                   if whole.digraph.nodes[name]["kind"] == NodeKind.LATENT]  # fmt: skip
        assert own["of"]["influence"] == pytest.approx(sum(latents), abs=1e-5)
        assert own["of"]["nodes"] >= len(kinds)
        assert max(own["edges"]["source"]) < len(kinds)
    graph = AttributionGraph.load(full / "graph.json")
    name = shown["prompts"]["id"][5]
    asked = payload(run, graph, prompts_file="prompts.jsonl", prompt=name, most=2)
    assert set(asked["own"]) == {"0", "1", "5"}
    assert asked["first"] == 5
    assert len(asked["own"]["5"]["nodes"]["kind"]) == asked["own"]["5"]["of"]["nodes"]


def test_a_run_of_a_trace_alone_has_a_page_too(bare: Path) -> None:
    found = payload(Run.open(bare), AttributionGraph.load(bare / "graph.json"), prompts_file="prompts.jsonl")
    assert found["facts"] is None
    assert found["metas"] is None
    assert not any(each["labels"] for each in found["run"]["fidelity"])
    assert len(found["graph"]["edges"]["source"]) <= EDGES
    json.dumps(found, allow_nan=False)


def test_the_page_is_its_payload_and_two_hashed_blocks(shown: dict[str, Any]) -> None:
    page = render(shown)
    assert page == render(json.loads(json.dumps(shown)))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect" not in policy
    text = page.split('id="payload">')[1].split("</script>")[0]
    assert json.loads(text) == json.loads(json.dumps(shown))
    assert len(re.findall("<script", page)) == 2


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40))
def test_no_text_ends_the_payload(text: str) -> None:
    for nasty in (text, f"</script><!--{text}", f"\ud800{text}\u2028\x00"):
        page = render({"title": nasty, "prompts": [nasty]})
        page.encode()
        found = json.loads(page.split('id="payload">')[1].split("</script>")[0])
        assert found["title"] == re.sub("[\ud800-\udfff]", "\ufffd", nasty)


def test_the_server_gives_its_one_page_to_this_machine_only() -> None:
    served = server("<p>é</p>")
    assert served.server_address[0] == "127.0.0.1"
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        answers = {}
        for path, host in (("/", f"127.0.0.1:{served.server_port}"), ("/", "evil.example"), ("/run.json", "localhost")):
            connection = http.client.HTTPConnection("127.0.0.1", served.server_port, timeout=10)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            answers[path, host] = (answer.status, answer.read().decode())
        assert [status for status, _ in answers.values()] == [200, 404, 404]
        assert [body for _, body in answers.values()] == ["<p>é</p>", "", ""]
    finally:
        served.shutdown()
        served.server_close()
