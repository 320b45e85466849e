"""An opened run against its own tables: every figure is that of the files, and what is split is conserved."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.consensus import consensus_tables
from circuits.evidence import latent_evidence
from circuits.graph import TARGET, AttributionGraph
from circuits.opened import OpenedRun, open_run
from circuits.pruning import Keep, influence
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.labels import read_labels
from mediation.metalatents import MetaDictionary
from mediation.removal import q_values
from mediation.statistics import benjamini_hochberg, permutation_p
from mediation.trace import set_effect
from tests.circuits.planted_runs import HIGH, LOW, graph_nodes, planted_run
from tests.circuits.test_page import CHROMIUM, FLAGS, absent, sync_playwright
from tests.conftest import META as SITE
from tests.setups import random_dictionary
from tests.test_cli import ROWS

PROMPTS = 32  # of the run


@pytest.fixture(scope="module")
def run(full: Path) -> OpenedRun:
    return open_run(full)


@pytest.fixture(scope="module")
def latents(run: OpenedRun) -> list[tuple[str, int]]:
    """Latents of the set's graph, all of the site that was split and a few of the other."""
    nodes = run.nodes().drop_nulls("latent").unique(["site", "latent"], maintain_order=True)
    found = nodes.select("site", "latent").rows()
    return [each for each in found if each[0] == SITE][:8] + [each for each in found if each[0] != SITE][:4]


def copied(run: OpenedRun, folder: Path) -> OpenedRun:
    return open_run(shutil.copytree(run.path, folder / "copy"))


def test_prompts_are_the_users_in_their_order_with_what_was_measured(run: OpenedRun) -> None:
    table, rows = run.prompts(), ROWS[:PROMPTS]
    assert table["prompt"].to_list() == [row["id"] for row in rows]
    assert table["text"].to_list() == [row["clean"] for row in rows]
    assert table["fact"].to_list() == [row["fact"] for row in rows]
    assert np.allclose(table["total_effect"], table["clean"] - table["baseline"])
    assert table["total_effect"].mean() == pytest.approx(run.effect()["mean"])
    assert run.effect() == set_effect(run.run)
    assert set(table["half"]) == {"discovery", "evaluation"}
    # The worst site of each prompt, from the raw table.
    for prompt, gap in table.select("prompt", "gap").head(5).iter_rows():
        sums = run.read("prompts").filter(prompt=prompt)
        assert gap == pytest.approx((sums["ig"] - sums["clean"] + sums["baseline"]).abs().max())


def test_tables_are_those_of_the_graph(run: OpenedRun) -> None:
    graph, nodes, edges = run.graph(), run.nodes(), run.edges()
    assert graph.to_json() == (run.path / "graph.json").read_text()
    assert set(nodes["id"]) == set(graph.digraph) - {TARGET}
    assert len(edges) == graph.digraph.number_of_edges()
    through = influence(graph).nodes
    for row in nodes.iter_rows(named=True):
        data = graph.digraph.nodes[row["id"]]
        assert row["influence"] == through[row["id"]]
        assert all(row[name] == data[name] for name in ("kind", "site", "latent", "attribution", "held_out", "tier"))
    assert nodes["attribution"].abs().is_sorted(descending=True)
    assert edges["contribution"].abs().is_sorted(descending=True)
    few = run.graph(keep=Keep(nodes=0.3))
    assert 1 < len(few.digraph) < len(graph.digraph)


def test_one_prompts_graph_has_its_own_numbers(run: OpenedRun) -> None:
    prompt = run.prompts()["prompt"][3]
    graph, nodes = run.graph(prompt), run.nodes(prompt)
    assert graph.meta["prompt"] == prompt
    assert nodes["position"].dtype == pl.Int64
    assert "tier" not in nodes.columns
    raw = run.read("nodes").filter(pl.col("prompt") == prompt)
    for row in nodes.drop_nulls("latent").head(10).iter_rows(named=True):
        here = raw.filter(site=row["site"], position=row["position"], latent=row["latent"])
        assert row["attribution"] == pytest.approx(here["ig"].sum())
        assert row["activation"] == here["clean"][0]
    assert set(run.edges(prompt).columns) == {"source", "target", "weight", "contribution"}


def test_roles_carry_the_total_effect_but_for_the_gap(run: OpenedRun) -> None:
    table = run.by_role()
    assert (table["low"] <= table["attribution"]).all()
    assert (table["attribution"] <= table["high"]).all()
    assert table["site"].unique(maintain_order=True).to_list() == run.sites
    for site in run.sites:
        mine = run.read("prompts").filter(site=site).group_by("prompt").agg(pl.col("ig").sum())
        assert table.filter(site=site)["attribution"].sum() == pytest.approx(mine["ig"].mean())
        errors = run.read("nodes").filter((pl.col("site") == site) & pl.col("latent").is_null())["ig"].sum() / PROMPTS
        assert table.filter(site=site, kind="error")["attribution"].sum() == pytest.approx(errors)
    # A role's interval is the bootstrap interval of its sums.
    person = table.filter(site=SITE, role="person", kind="latent").row(0, named=True)
    sums = run.read("nodes").filter((pl.col("site") == SITE) & (pl.col("role") == "person")).drop_nulls("latent")
    values = sums.group_by("prompt", maintain_order=True).agg(pl.col("ig").sum())["ig"].to_numpy()
    draws = np.random.default_rng(7).choice(values, (4000, len(values))).mean(axis=1)
    assert [person["low"], person["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.3)


def test_a_latents_figures_are_those_of_the_graph(run: OpenedRun, latents: list[tuple[str, int]]) -> None:
    digraph = run.graph().digraph
    for site, latent in latents:
        found = run.latent(site, latent)
        assert len(found.roles)
        for row in found.roles.iter_rows(named=True):
            data = digraph.nodes.get(f"{site}/{row['role']}/{latent}")
            by_prompt = found.by_prompt.filter(role=row["role"])["attribution"].sum() / found.prompts
            assert row["attribution"] == pytest.approx(by_prompt)
            if data is not None:
                for name in ("attribution", "held_out", "low", "high"):
                    assert row[name] == pytest.approx(data[name]), name
                assert (row["frequency"], row["tier"]) == (data["frequency"], data["tier"])
        for links, end, other in ((found.inputs, 1, 0), (found.outputs, 0, 1)):
            measured = {(row["role"], row["node"]): row for row in links.iter_rows(named=True)}
            for edge in digraph.edges:
                place = edge[end].split("/")
                if place[0] == site and place[-1] == str(latent):
                    row = measured[place[1], edge[other]]
                    assert row["contribution"] == pytest.approx(digraph.edges[edge]["contribution"])
                    assert row["weight"] == pytest.approx(digraph.edges[edge]["weight"])
            assert links["contribution"].abs().is_sorted(descending=True)
        assert found.on_in == found.by_prompt.filter(pl.col("clean") != 0)["prompt"].n_unique()


def test_a_latents_evidence_is_that_of_its_folder_and_of_the_runs_tables(
    run: OpenedRun, latents: list[tuple[str, int]]
) -> None:
    table = read_labels(run.path.parent / "organism" / "saes" / SITE)
    assert table is not None
    named = table.drop_nulls("label")["index"].to_list()
    site, latent = next(each for each in latents if each[0] == SITE and each[1] in named)
    found = run.latent(site, latent)
    row = table.filter(index=latent).row(0, named=True)
    assert found.called == found.described.label == row["label"]
    assert found.described.score == row["score"]
    assert found.described.density == row["density"]
    assert found.described.logits_up == row["logits_up"]
    assert [each.values for each in found.described.contexts] == [each["values"] for each in row["contexts"]]
    raw = run.read("nodes").filter(site=site, latent=latent)
    peak = found.passages[0]
    assert peak.values[peak.position] == raw["clean"].max()
    assert peak.prompt in raw.filter(clean=raw["clean"].max())["prompt"].to_list()
    tokens = run.read("tokens").filter(prompt=peak.prompt).sort("position")["text"].to_list()
    assert peak.tokens == tokens
    sampled = run.read("calibration").filter(site=site, latent=latent)
    patched = {(row["prompt"], row["role"]): row["exact_effect"] for row in sampled.iter_rows(named=True)}
    nodes = raw.group_by("prompt", "role").len().rows_by_key(["prompt", "role"], unique=True)
    for each in found.by_prompt.iter_rows(named=True):  # a person stands at one or two positions
        key = each["prompt"], each["role"]
        assert (each["exact"] is not None) == (len(sampled.filter(prompt=key[0], role=key[1])) == nodes[key])
        if nodes[key] == 1 and key in patched:
            assert each["exact"] == patched[key]
    assert found.exact["exact_effect"].sort().to_list() == sampled["exact_effect"].sort().to_list()
    effects = {(each["site"], each["latent"]): each["nie"] for each in run.info["effects"]}
    assert (found.effects is None) == ((site, latent) not in effects)
    assert any(run.latent(*each).effects is not None for each in latents)
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(latent) in repr(found)


def test_a_latent_outside_the_graph_has_no_tier_and_says_why_it_has_no_inputs(run: OpenedRun) -> None:
    known = run.nodes().filter(site=SITE)["latent"].to_list()
    weak = run.read("nodes").filter((pl.col("site") == SITE) & (pl.col("clean") != 0)).drop_nulls("latent")
    weak = weak.filter(~pl.col("latent").is_in(known))
    found = run.latent("1.resid_pre", weak["latent"][0])
    assert found.roles["tier"].null_count() == len(found.roles)
    assert found.roles["low"].null_count() == 0
    assert found.inputs.is_empty()
    assert any("set's graph" in note for note in found.notes)


def test_parts_are_conserved_and_are_those_of_the_row(run: OpenedRun, latents: list[tuple[str, int]]) -> None:
    """Against the weights themselves, and against the attributions that the trace stored."""
    organism = run.path.parent / "organism"
    dictionary = Dictionary.load(organism / "saes" / SITE)
    meta = MetaDictionary.load(organism / "meta" / SITE)
    nodes = run.read("nodes").filter(site=SITE)
    for _, latent in [each for each in latents if each[0] == SITE]:
        parts = run.parts(SITE, latent)
        assert parts["share"].sum() == pytest.approx(1, abs=1e-9)
        assert parts["part"].to_list()[-2:] == ["bias", "residual"] or set(parts["part"][-2:]) == {"bias", "residual"}
        row = dictionary.decoder[latent]
        for part in parts.drop_nulls("meta").iter_rows(named=True):
            u = meta.directions[part["meta"]]
            assert part["share"] == pytest.approx(float(part["code"] * (row @ u) / (row @ row)), abs=1e-5)
        total = nodes.filter(latent=latent)["ig"].sum() / PROMPTS
        assert parts["attribution"].sum() == pytest.approx(total, abs=1e-5)
        prompt = nodes.filter(latent=latent)["prompt"][0]
        own = run.parts("1.resid_pre", latent, prompt=prompt)["attribution"].sum()
        assert own == pytest.approx(nodes.filter(latent=latent, prompt=prompt)["ig"].sum(), abs=1e-5)


def test_without_the_dictionary_the_stored_split_is_shown_and_another_dictionary_is_refused(
    run: OpenedRun, latents: list[tuple[str, int]], tmp_path: Path
) -> None:
    latent = latents[0][1]
    moved = copied(run, tmp_path)
    info = json.loads((moved.path / "run.json").read_text())
    info["dictionaries"][SITE]["folder"] = str(tmp_path / "gone")
    (moved.path / "run.json").write_text(json.dumps(info))
    parts = moved.parts(SITE, latent)
    assert parts["share"].null_count() == len(parts)
    expected = run.parts(SITE, latent).filter(pl.col("attribution") != 0)
    names = ["part", "meta", "attribution"]
    assert parts.filter(pl.col("attribution") != 0).select(names).equals(expected.select(names))
    with pytest.raises(MediationError, match="not there"):
        moved.parts(SITE, latent, meta=run.path.parent / "organism" / "meta")
    assert moved.latent(SITE, latent).described.label is None
    info["dictionaries"][SITE]["folder"] = str(tmp_path / "other")
    (moved.path / "run.json").write_text(json.dumps(info))
    random_dictionary(tmp_path / "other", SITE, d_in=128)
    with pytest.raises(MediationError, match="is not the one that the run"):
        moved.parts(SITE, latent)


def test_a_meta_latents_parts_add_up_over_prompts_and_latents(run: OpenedRun) -> None:
    facts, split = run.hidden_facts(), run.read("meta")
    for meta in facts["meta"].unique(maintain_order=True).head(4):
        found = run.meta_latent(meta)
        mine = split.filter(meta=meta)
        assert found.attribution == pytest.approx(mine["attribution"].sum() / PROMPTS)
        assert found.through["attribution"].sum() == pytest.approx(found.attribution)
        assert found.by_prompt["attribution"].sum() == pytest.approx(PROMPTS * found.attribution)
        peak = found.passages[0]
        assert sum(peak.values) == pytest.approx(mine.filter(prompt=peak.prompt)["attribution"].sum())
        assert found.tests.select("prompt", "removal", "q").equals(
            facts.filter(meta=meta).select("prompt", "removal", "q")
        )
        assert found.called == facts.filter(meta=meta)["fact"][0]
        assert found.described.members
        # Whether a carrier fired is read off the run's own nodes.
        for row in found.carriers.iter_rows(named=True):
            on = run.read("nodes").filter((pl.col("site") == SITE) & (pl.col("latent") == row["latent"]))
            assert row["on_in"] == on.filter(pl.col("clean") != 0)["prompt"].n_unique()
            assert row["carrier"] == (row["cosine"] >= run.info["flags"]["settings"]["carrier_cosine"])
        json.dumps(found.to_dict(), allow_nan=False)


def test_tests_have_the_p_and_q_of_their_controls(run: OpenedRun) -> None:
    """The stored p-values, recomputed from what each control did."""
    tests, facts = run.tests(), run.hidden_facts()
    assert len(tests)
    for row in tests.iter_rows(named=True):
        assert row["p"] == pytest.approx(float(permutation_p(row["removal"], np.array(row["controls"]))))
        mine = facts.filter(group=row["group"], kind=row["kind"])
        assert row["prompts"] == len(mine)
        assert row["flagged"] == mine["flagged"].sum()
        assert row["removal"] == pytest.approx(mine["removal"].abs().mean())
    alone = benjamini_hochberg(tests["p"].to_numpy())  # q also counts what could have been tested and was not
    candidates = round(tests["q"][0] / alone[0] * len(tests))
    assert candidates >= len(tests)
    assert tests["q"].to_list() == pytest.approx(q_values(tests["p"].to_numpy(), candidates).tolist())
    assert tests["q"].is_sorted()
    assert facts["flagged"].sum() == run.read("flags")["flagged"].sum() > 0


def test_the_page_is_shown_in_a_frame_that_reaches_nothing_else(run: OpenedRun, tmp_path: Path) -> None:
    shown = run._repr_html_()
    frame = re.fullmatch(r'<iframe srcdoc="([^"]*)" sandbox="([^"]*)" [^<>]*></iframe>', shown)
    assert frame is not None
    assert html.unescape(frame[1]) == (run.path / "index.html").read_text(encoding="utf-8")
    assert frame[2].split() == ["allow-scripts", "allow-downloads"]
    bare = shutil.copytree(run.path, tmp_path / "<b>run")
    (bare / "index.html").unlink()
    text = open_run(bare)._repr_html_()
    assert "mediation inspect" in text
    assert "<b>run" not in text
    assert f"{PROMPTS} prompts" in repr(run)


def test_what_is_not_there_is_named_in_a_sentence(run: OpenedRun, tmp_path: Path) -> None:
    with pytest.raises(MediationError, match=r"run\.json"):
        open_run(tmp_path)
    with pytest.raises(MediationError, match="its sites are blocks"):
        run.latent("blocks.7.hook_resid_pre", 1)
    with pytest.raises(MediationError, match="its sites are blocks"):
        run.parts("nowhere", 1)
    strongest = run.read("nodes").filter(site=SITE).drop_nulls("latent").group_by("latent").agg(pl.col("ig").sum())
    known = strongest.sort(pl.col("ig").abs(), descending=True)["latent"][0]
    with pytest.raises(MediationError, match=f"on in no prompt.*are {known},"):
        run.latent(SITE, 10**6)
    with pytest.raises(MediationError, match="strong ones are"):
        run.meta_latent(10**6)
    with pytest.raises(MediationError, match=r"prompts\(\)"):
        run.parts(SITE, 1, prompt="nobody")
    with pytest.raises(MediationError, match="No meta-dictionary is known"):
        run.parts("blocks.2.hook_resid_pre", 1)
    bare = copied(run, tmp_path)
    shutil.rmtree(bare.path / "meta")
    with pytest.raises(MediationError, match="mediation flag"):
        bare.meta_latent(1)
    latent = bare.nodes().filter(site=SITE).drop_nulls("latent")["latent"][0]
    found = bare.latent(SITE, latent)
    # The meta-dictionary lies beside the dictionary, so that the row is taken apart; the attribution is not.
    assert found.parts is not None
    assert found.parts["attribution"].null_count() == len(found.parts)
    assert found.parts["share"].sum() == pytest.approx(1)
    assert any("was not split" in note for note in found.notes)
    AttributionGraph.load(bare.path / "graph.json")


VALUES = st.lists(st.tuples(*[st.integers(-40, 40).map(lambda k: k / 8)] * 3), min_size=2, max_size=9)


@settings(max_examples=12, deadline=None)
@given(values=VALUES, shards=st.integers(1, 3))
def test_planted_values_come_back_whatever_the_shards(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[float, float, float]], shards: int
) -> None:
    """Latent a of each prompt is worth x, over two positions, and feeds c by y and the behaviour by z."""
    names = [f"p{k}" for k in range(len(values))]
    nodes = {p: {"a": x, "c": 1.0} for p, (x, _, _) in zip(names, values, strict=True)}
    edges = {p: {("a", "c"): y, ("a", "target"): z} for p, (_, y, z) in zip(names, values, strict=True)}
    run = planted_run(tmp_path_factory.mktemp("planted") / "run", nodes, edges, shards=shards, seed=0)
    patched = {"prompt": "p1", "site": LOW, "position": 1, "latent": 1, "role": "subject", "exact_effect": 2.0}
    run.write_shard("calibration", "0", pl.DataFrame([patched | {"ig": 1.0, "atp": 1.0}]))
    graph = AttributionGraph.from_tables(*consensus_tables(run, graph_nodes(["a", "c"]), estimator="ig", seed=0))
    found = latent_evidence(run, graph, LOW, 1)
    x, y, z = np.array(values).T
    assert dict(found.by_prompt.select("prompt", "attribution").iter_rows()) == dict(zip(names, x, strict=True))
    assert found.by_prompt["exact"].null_count() == len(names)  # one of two positions was patched
    (row,) = found.roles.to_dicts()
    assert row["attribution"] == pytest.approx(x.mean())
    assert row["held_out"] == pytest.approx(x[1::2].mean())  # odd ids are held out
    assert row["low"] is None  # fewer than six of them
    outputs = dict(found.outputs.select("node", "contribution").iter_rows())
    assert outputs == pytest.approx({f"{HIGH}/end/3": y.mean(), "target": z.mean()})
    assert found.inputs.is_empty()
    into = latent_evidence(run, graph, HIGH, 3).inputs
    assert into.select("node", "contribution").rows() == [(f"{LOW}/subject/1", pytest.approx(y.mean()))]


def test_the_page_works_in_the_frame(run: OpenedRun, tmp_path: Path) -> None:
    """In Chromium, as a notebook shows it: drawn, and views followed."""
    if sync_playwright is None or CHROMIUM is None:
        absent("needs Chromium and the playwright package")
    cell, wrong = tmp_path / "cell.html", []  # type: tuple[Path, list[str]]
    cell.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{run._repr_html_()}", encoding="utf-8")
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS).new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(cell.as_uri())
        frame = page.frames[1]
        frame.wait_for_selector("main *", timeout=60_000)
        frame.click("header nav >> text=Hidden facts")
        frame.wait_for_timeout(500)
        text = frame.inner_text("main")
    assert wrong == []
    assert run.hidden_facts()["fact"][0] in text
