"""`mediation inspect --latent` and `--meta-latent` as a user meets them, and the CSV export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from circuits.graph import TARGET, AttributionGraph
from circuits.opened import open_run
from mediation.cli import main
from mediation.labels import load_labels
from tests.conftest import META as SITE
from tests.test_cli import MODEL, ROWS, refused, write


def one_line(text: str) -> str:
    return " ".join(text.split())


def strongest(run: Path) -> int:
    """The strongest latent of the split site that has a label and is on in a prompt."""
    opened = open_run(run)
    named = load_labels(run.parent / "organism" / "saes" / SITE)
    latents = opened.nodes().filter(site=SITE).drop_nulls("latent")["latent"].to_list()
    return next(each for each in latents if each in named and opened.latent(SITE, each).on_in)


def test_a_latent_as_json_is_what_python_gives(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latent = strongest(full)
    for site in (SITE, "1.resid_pre", "model.layers.0"):
        main(["inspect", str(full), "--latent", f"{site}/{latent}", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found.pop("run") == str(full)
        assert found == json.loads(json.dumps(open_run(full).latent(SITE, latent).to_dict()))
    assert {"described", "roles", "by_prompt", "passages", "exact", "inputs", "outputs", "parts"} <= found.keys()


def test_people_see_a_latent_as_tables_and_a_tree(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latent = strongest(full)
    main(["inspect", str(full), "--latent", f"{SITE}/{latent}"])
    text = one_line(capsys.readouterr().out)
    found = open_run(full).latent(SITE, latent)
    assert f"Latent {latent} of {SITE}: {found.called}" in text
    assert "Strongest contexts (activation)" in text
    assert f"Logit lens: promotes {found.described.logits_up[0].strip()}" in text
    assert found.by_prompt["prompt"][0] in text
    assert "feeds (contribution to the behaviour" in text
    assert f"{found.outputs['contribution'][0]:+.3f} {found.outputs['label'][0]}" in text
    assert "What it is made of" in text
    total = found.parts["attribution"].sum()  # type: ignore[index]
    assert f"sum - 1.000 {total:+.3f}" in text
    for row in found.roles.iter_rows(named=True):
        assert f"{row['attribution']:+.3f}" in text


def test_people_see_a_meta_latent_with_its_tests(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(full)
    fact = run.hidden_facts().row(0, named=True)
    main(["inspect", str(full), "--meta-latent", str(fact["meta"]), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == {"run": str(full)} | json.loads(json.dumps(run.meta_latent(fact["meta"]).to_dict()))
    main(["inspect", str(full), "--meta-latent", str(fact["meta"])])
    text = one_line(capsys.readouterr().out)
    assert f"Meta-latent {fact['meta']} at {SITE}: {fact['fact']}" in text
    assert "Through which latents" in text
    assert f"{fact['removal']:+.2f}" in text
    assert "Carriers" in text


def test_labels_and_tokens_are_shown_as_they_are(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markup in a label, an escape sequence in a token: text, and nothing else."""
    run, saes = shutil.copytree(full, tmp_path / "run"), tmp_path / "saes"
    shutil.copytree(full.parent / "organism" / "saes" / SITE, saes)
    labels = pl.read_parquet(saes / "labels.parquet")
    labels.with_columns(
        label=pl.lit("[/red] [bold]x"), logits_up=pl.lit(["[link=evil]y", "\x1b[31mz"])
    ).write_parquet(saes / "labels.parquet")  # fmt: skip
    info = json.loads((run / "run.json").read_text())
    info["dictionaries"][SITE]["folder"] = str(saes)
    (run / "run.json").write_text(json.dumps(info))
    main(["inspect", str(run), "--latent", f"{SITE}/{strongest(full)}"])
    text = capsys.readouterr().out
    assert "[/red] [bold]x" in text
    assert "[link=evil]y" in text
    assert "\\x1b[31mz" in text
    assert "\x1b" not in text


def test_the_tables_as_csv_are_the_graph(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(full, tmp_path / "run")
    every = ["--nodes", "1", "--edges", "1"]
    for prompt in ([], ["--prompt", open_run(run).prompts()["prompt"][0]]):
        main(["inspect", str(run), *prompt, *every, "--export", "csv", "--export", "parquet", "--json"])
        files = json.loads(capsys.readouterr().out)["files"]
        nodes, edges = (pl.read_csv(Path(files["csv"]) / f"{name}.csv") for name in ("nodes", "edges"))
        graph = AttributionGraph.from_tables(nodes, edges)
        expected = open_run(run).graph(prompt[1] if prompt else None)
        assert set(graph.digraph) == set(expected.digraph)
        assert set(graph.digraph.edges) == set(expected.digraph.edges)
        for name, data in expected.digraph.nodes(data=True):
            assert graph.digraph.nodes[name]["label"] == data["label"]
            if name != TARGET and data["attribution"] is not None:
                assert graph.digraph.nodes[name]["attribution"] == pytest.approx(data["attribution"])
        assert len(pl.read_parquet(Path(files["parquet"]) / "edges.parquet")) == len(edges)


def test_bad_input_is_one_sentence(full: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, latent = str(full), f"{SITE}/{strongest(full)}"
    assert "SITE/ID" in refused(capsys, "inspect", run, "--latent", "17")
    assert "SITE/ID" in refused(capsys, "inspect", run, "--latent", f"{SITE}/error")
    assert "its sites are" in refused(capsys, "inspect", run, "--latent", "9.resid_pre/17")
    assert "on in no prompt" in refused(capsys, "inspect", run, "--latent", f"{SITE}/999999")
    assert "one at a time" in refused(capsys, "inspect", run, "--latent", latent, "--prompt", "x")
    assert "without --latent" in refused(capsys, "inspect", run, "--latent", latent, "--export", "csv")
    assert "without --meta-latent" in refused(capsys, "inspect", run, "--meta-latent", "1", "--group", "edges")
    assert "--latent or --group" in refused(capsys, "inspect", run, "--meta-latent", "1", "--meta", run)
    assert "run's folder" in refused(capsys, "inspect", "--dictionary", run, "--meta-latent", "1")
    assert "run.json" in refused(capsys, "inspect", str(tmp_path), "--latent", latent)
    other = open_run(full).nodes().filter(site="blocks.2.hook_resid_pre").drop_nulls("latent")["latent"][0]
    meta = str(full.parent / "organism" / "meta" / SITE)
    assert "another dictionary" in refused(capsys, "inspect", run, "--latent", f"2.resid_pre/{other}", "--meta", meta)


def test_a_head_has_no_folder_and_no_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    options = ["--saes", "heads:0", "--steps", "2", "--sample", "4", "--out", run, "--json"]
    main(["trace", write(tmp_path, ROWS[:2]), "--model", MODEL, *options])
    capsys.readouterr()
    main(["inspect", run, "--latent", "blocks.0.attn.hook_z/1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["parts"] is None
    assert found["described"]["label"] is None
    assert any("folder of its dictionary is not there" in note for note in found["notes"])
    assert found["by_prompt"]
    assert found["roles"][0]["low"] is None  # two prompts bear no interval
    assert "mediation flag" in refused(capsys, "inspect", run, "--meta-latent", "1")
