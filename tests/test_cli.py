"""The command line as a user meets it: real processes, real files, every kind of bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import polars as pl
import pytest

import mediation
from circuits.graph import AttributionGraph
from mediation.cli import main

DEFAULT = Path(mediation.__file__).parent / "organisms" / "default"
MODEL, SAES = str(DEFAULT / "model"), str(DEFAULT / "saes")
ROWS = [json.loads(line) for line in (DEFAULT / "prompts.jsonl").read_text().splitlines()]


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mediation.cli", *arguments],
        capture_output=True, text=True, cwd=cwd, env=os.environ | {"COLUMNS": "200"}, check=False,
    )  # fmt: skip


def write(folder: Path, rows: list[dict] | str) -> str:
    path = folder / "prompts.jsonl"
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run in this process; demand exit code 2 and one sentence on standard error, nothing on standard output."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    lines = [line for line in err.splitlines() if line.startswith("mediation: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert out == ""
    return lines[0]


def test_help_answers_in_under_a_second() -> None:
    command("--help")  # compiles the byte code on a fresh clone
    start = time.perf_counter()
    result = command("--help")
    assert time.perf_counter() - start < 1.0
    assert result.returncode == 0
    for name in ("demo", "trace", "inspect", "prove", "contrast", "flag", "label", "organism", "train", "bench"):
        assert name in result.stdout


def test_heads_and_neurons_are_traced_without_a_dictionary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    units = ("--saes", "heads", "--saes", "neurons:1")
    prompts = write(tmp_path, ROWS[:8])
    main(["trace", prompts, "--model", MODEL, *units, "--steps", "4", "--out", str(tmp_path / "run"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert {"blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"} < result["conservation_gap"].keys()
    # Nothing is left over: the two kinds of units are exact.
    assert max(result["error_share"].values()) < 1e-5
    assert min(each["variance_explained"] for each in result["fidelity"].values()) > 0.9999
    message = refused(capsys, "trace", prompts, "--model", MODEL, "--saes", "heads:1,9", "--out", str(tmp_path / "no"))
    assert "has no layer '9': its layers are 0 to 2" in message
    assert not (tmp_path / "no").exists()


def test_a_budget_too_small_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("trace", write(tmp_path, ROWS[:2]), "--model", MODEL, "--saes", SAES, "--out", str(tmp_path / "run"))
    assert "tokens and needs" in refused(capsys, *options, "--memory", "10MB")
    assert "--memory is 'much'" in refused(capsys, *options, "--memory", "much")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_own_batches_however_little_memory_is_free_by_now(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    options = ["trace", write(tmp_path, ROWS[:4]), "--model", MODEL, "--saes", SAES, "--sample", "4", "--steps", "2"]
    main([*options, "--out", str(out), "--json"])
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("circuits.memory.free", lambda device: 0)
    assert "tokens and needs" in refused(capsys, *options, "--out", str(tmp_path / "new"))
    main([*options, "--out", str(out), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["top_latents"] == first["top_latents"]


class TestBadInput:
    """One sentence, exit code 2, nothing half written."""

    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        return tmp_path / "run"

    def trace(
        self,
        capsys: pytest.CaptureFixture[str],
        out: Path,
        prompts: str,
        model: str = MODEL,
        saes: str = SAES,
    ) -> str:
        message = refused(capsys, "trace", prompts, "--model", model, "--saes", saes, "--out", str(out))
        assert not out.exists()
        return message

    def test_missing_prompts(self, capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
        assert "none.jsonl" in self.trace(capsys, out, str(tmp_path / "none.jsonl"))

    def test_malformed_json_names_its_line(self, capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
        text = "".join(json.dumps(row) + "\n" for row in ROWS[:2]) + "{broken\n"
        assert "3" in self.trace(capsys, out, write(tmp_path, text))

    def test_unequal_lengths_show_both_tokenisations(
        self, capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path
    ) -> None:
        longer = ROWS[0] | {"corrupt": ROWS[0]["corrupt"] + " " + ROWS[0]["clean"].split()[0]}
        message = self.trace(capsys, out, write(tmp_path, [ROWS[1], longer]))
        assert "Row 2" in message
        assert ROWS[0]["clean"].split()[0] in message

    def test_unknown_model_folder(self, capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
        message = self.trace(capsys, out, write(tmp_path, ROWS[:2]), model=str(tmp_path / "no-model"))
        assert "no-model" in message

    def test_dictionary_of_another_width(self, capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
        from tests.setups import random_dictionary

        random_dictionary(tmp_path / "other", "blocks.1.hook_resid_pre", d_in=24)
        message = self.trace(capsys, out, write(tmp_path, ROWS[:2]), saes=str(tmp_path / "other"))
        assert "24" in message

    def test_empty_answer(self, capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
        assert "answer" in self.trace(capsys, out, write(tmp_path, [ROWS[0] | {"answer": ""}]))
        assert "answer" in self.trace(capsys, out, write(tmp_path, [ROWS[0] | {"answer": " "}]))

    def test_empty_set_and_repeated_ids(self, capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
        assert "empty" in self.trace(capsys, out, write(tmp_path, ""))
        assert "id" in self.trace(capsys, out, write(tmp_path, [ROWS[0], ROWS[0]]))

    def test_sae_folder_without_weights(self, capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
        (tmp_path / "sae").mkdir()
        shutil.copy(next(Path(SAES).glob("*/cfg.json")), tmp_path / "sae")
        message = self.trace(capsys, out, write(tmp_path, ROWS[:2]), saes=str(tmp_path / "sae"))
        assert "sae_weights.safetensors" in message

    def test_unknown_choice(self, capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
        prompts = write(tmp_path, ROWS[:2])
        message = refused(
            capsys,
            "trace",
            prompts,
            "--model",
            MODEL,
            "--saes",
            SAES,
            "--out",
            str(out),
            "--baseline",
            "none",
        )
        assert "corrupt, zero, mean" in message

    def test_a_folder_that_is_no_run(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "run.json" in refused(capsys, "inspect", str(tmp_path))
        meta = str(next((DEFAULT / "meta").iterdir()))
        assert "run.json" in refused(capsys, "flag", str(tmp_path), "--meta", meta)
        assert list(tmp_path.iterdir()) == []

    def test_no_permission(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """Root may write anywhere, so the place is one where nobody can make a folder."""
        place = Path("/proc/nowhere")
        if not Path("/proc").is_dir():
            pytest.skip("needs a /proc")
        prompts = write(tmp_path, ROWS[:2])
        message = refused(capsys, "trace", prompts, "--model", MODEL, "--saes", SAES, "--out", str(place / "run"))
        assert "/proc/nowhere" in message

    def test_no_organism(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "world.json" in refused(capsys, "bench", "planted", "--organism", str(tmp_path))

    def test_organism_into_a_full_folder(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("keep")
        assert "already" in refused(capsys, "organism", "--out", str(tmp_path))
        assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, float]:
    """The demo as a newcomer runs it, in a process of its own."""
    folder = tmp_path_factory.mktemp("demo")
    start = time.perf_counter()
    result = command("demo", "--json", "--out", str(folder / "run"))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), folder / "run", time.perf_counter() - start


def test_demo_prints_one_object_with_everything(demo: tuple[dict, Path, float]) -> None:
    found, run, seconds = demo
    assert found["total_effect"] > 5
    assert found["estimator_vs_exact"]["pearson"] > 0.7
    assert found["estimator_vs_exact"]["atp"]["n"] >= 100
    edges = json.loads((run / "run.json").read_text())["trust"]["edges_vs_exact"]
    assert edges["n"] >= 100
    assert edges["pearson"] > 0.5  # .69 over 3,000 edges; a sample of 260 scatters around it
    assert found["conservation_gap"] < 0.02
    assert found["meta_split_max_relative_error"] < 1e-5
    assert found["hidden_facts"]
    for fact in found["hidden_facts"]:
        assert {"fact", "expected_fact", "effect", "hidden_share", "p", "q"} <= fact.keys()
        assert fact["q"] <= 0.05
        assert fact["hidden_share"] >= 0.5
    right = [fact["fact"].split("=")[0] == fact["expected_fact"].split("=")[0] for fact in found["hidden_facts"]]
    assert sum(right) >= 0.8 * len(right)
    assert seconds < 60
    assert found["peak_memory_mb"] < 1500
    assert (run / "index.html").exists()
    assert (run / "graph.graphml").exists()


def test_inspect_shows_paths_and_flag_can_be_run_again(
    demo: tuple[dict, Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    found, run, _ = demo
    main(["inspect", str(run), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["paths"][: len(found["paths"])] == found["paths"]
    assert all(path["nodes"][-1] == "target" for path in shown["paths"])
    meta = str(next((DEFAULT / "meta").iterdir()))
    main(["flag", str(run), "--meta", meta, "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["hidden_facts"] == found["hidden_facts"]


def test_inspect_prunes_groups_and_exports(
    demo: tuple[dict, Path, float], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo[1], run)
    whole = AttributionGraph.load(run / "graph.json")
    formats = [word for name in ("neuronpedia", "dot", "parquet") for word in ("--export", name)]
    main(["inspect", str(run), "--nodes", "1", "--edges", "1", "--group", "meta", *formats, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["kept"]["kept"] == found["kept"]["of"] == len(whole.digraph)
    assert set(found["files"]) == {"neuronpedia", "dot", "parquet"}
    data = json.loads(Path(found["files"]["neuronpedia"]).read_text())
    assert len(data["nodes"]) == len(whole.digraph)
    assert len(data["links"]) == whole.digraph.number_of_edges()
    assert data["metadata"]["scan"] == "model"
    assert len(found["groups"]) == len(data["qParams"]["supernodes"]) > 0
    assert all("=" in group["label"] and len(group["members"]) > 1 for group in found["groups"])
    assert found["groups"][0]["label"] in (run / "index.html").read_text()
    (logit,) = (node for node in data["nodes"] if node["feature_type"] == "logit")
    assert float(logit["clerp"].split("(p=")[1].split(")")[0]) > 0.9  # the organism knows its answers
    main(["inspect", str(run), "--top", "3", "--group", "edges"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"of {len(whole.digraph)} nodes" in text
    assert "graph.graphml" in text
    assert sum(line.startswith("<node ") for line in (run / "graph.graphml").read_text().split("    ")) < len(
        whole.digraph
    )
    assert AttributionGraph.load(run / "graph.json").to_json() == whole.to_json()


def test_inspect_refuses_what_it_cannot_show(
    demo: tuple[dict, Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(demo[1])
    assert "meta, edges" in refused(capsys, "inspect", run, "--group", "names")
    assert "graphml, dot, parquet, csv, neuronpedia" in refused(capsys, "inspect", run, "--export", "png")
    assert "at most 1" in refused(capsys, "inspect", run, "--nodes", "80")
    assert "1 or more" in refused(capsys, "inspect", run, "--top", "0")
    assert "--group meta" in refused(capsys, "inspect", run, "--meta", MODEL)
    assert "run's folder" in refused(capsys, "inspect", "--dictionary", SAES, "--export", "dot")
    assert "run's folder" in refused(capsys, "inspect", "--dictionary", SAES, "--serve")
    assert "no-run is not a run" in refused(capsys, "inspect", run, "--against", "no-run")
    assert "no-meta" in refused(capsys, "inspect", run, "--group", "meta", "--meta", "no-meta")


def test_inspect_shows_one_prompts_own_graph(
    demo: tuple[dict, Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run, _ = demo
    main(["inspect", str(run), "--prompt", ROWS[0]["id"], "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["prompt"] == ROWS[0]["id"]
    ends = {path["nodes"][0] for path in shown["paths"]}
    assert all(end.split("/")[1].isdigit() for end in ends)
    page, graphml = Path(shown["page"]), Path(shown["files"]["graphml"])
    assert page.name.startswith("prompt-opinion-")
    assert ROWS[0]["clean"].split()[0] in page.read_text()
    assert "<graphml" in graphml.read_text()
    assert page != run / "index.html"
    main(["inspect", str(run), "--prompt", ROWS[0]["id"]])
    assert "Strongest paths" in capsys.readouterr().out
    assert ROWS[0]["id"] in refused(capsys, "inspect", str(run), "--prompt", "nobody")
    assert "run's folder" in refused(capsys, "inspect", "--dictionary", "x", "--prompt", "nobody")


def test_inspect_serves_the_page_until_interrupted(demo: tuple[dict, Path, float]) -> None:
    started = subprocess.Popen(
        [sys.executable, "-u", "-m", "mediation.cli", "inspect", str(demo[1]), "--serve"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert started.stdout is not None
    try:
        address = next(found[0] for line in started.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        with urllib.request.urlopen(address, timeout=30) as answer:
            page = answer.read().decode()
        assert page == (demo[1] / "index.html").read_text()  # sixty prompts: the file holds them all
        started.send_signal(signal.SIGINT)
        assert started.wait(timeout=30) == 0
    finally:
        started.kill()


def test_inspect_says_what_recurs_and_what_may_be_missed(
    demo: tuple[dict, Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run, _ = demo
    main(["inspect", str(run), "--json"])
    shown = json.loads(capsys.readouterr().out)
    graph = json.loads((run / "graph.json").read_text())
    assert graph["graph"]["held_out_prompts"] == 30
    assert sum(shown["tiers"]["nodes"].values()) == len(graph["nodes"]) - 1
    assert sum(shown["tiers"]["edges"].values()) == len(graph["edges"])
    missed = shown["important_missed"]
    assert 0 < missed["missed"] < missed["left_out"]
    assert missed["kept"] > 20
    assert 0 < missed["at_most"] <= 1
    assert shown["warnings"] == []
    assert '"held_out":30' in (run / "index.html").read_text()
    main(["inspect", str(run)])
    printed = capsys.readouterr().out
    for text in ("30 held-out prompts", "contingent", "it misses at most", "edges against exact patching"):
        assert text in printed
    loud = {site: 0.5 for site in graph["graph"]["error_share"]}
    graph["graph"]["error_share"] = loud
    copy = run.parent / "loud"
    shutil.copytree(run, copy)
    (copy / "graph.json").write_text(json.dumps(graph))
    main(["inspect", str(copy), "--json"])
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == len(loud)
    main(["inspect", str(copy)])
    printed = capsys.readouterr().out
    assert all(f"50% of the attribution at {site} is on error nodes" in printed for site in loud)


def test_contrast_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts of one kind against the same with clean and corrupt exchanged: what pushes one way pushes the other."""
    turned = [
        row | {"clean": row["corrupt"], "corrupt": row["clean"], "answer": row["wrong_answer"],
               "wrong_answer": row["answer"], "roles": {}}
        for row in ROWS[:24]
    ]  # fmt: skip
    runs = []
    for name, rows in (("as", ROWS[:24]), ("turned", turned)):
        folder = tmp_path / name
        folder.mkdir()
        runs.append(str(folder / "run"))
        main(["trace", write(folder, rows), "--model", MODEL, "--saes", SAES, "--out", runs[-1], "--sample", "8"])
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    main(["contrast", *runs, "--out", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["paired"]
    assert "recurs" in printed
    assert 2 <= found["prompts"][0] == found["prompts"][1] <= 12
    tables = {name: pl.read_parquet(out / f"{name}.parquet") for name in ("nodes", "edges")}
    assert len(found["nodes"]) == len(tables["nodes"]) > 40
    assert all(row["p"] >= found["smallest_p"] - 1e-12 for row in found["nodes"])
    for row in found["nodes"]:
        assert row["difference"] == pytest.approx(row["first"] - row["second"], abs=1e-9)
    main(["contrast", *runs])
    printed = capsys.readouterr().out
    assert "pairs of held-out prompts" in printed
    assert "false discovery rate" in printed
    assert "run.json" in refused(capsys, "contrast", runs[0], str(tmp_path))
    assert "choose another folder" in refused(capsys, "contrast", *runs, "--out", "/proc/nowhere/out")


def test_a_killed_trace_resumes_to_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write(tmp_path, ROWS[:12])
    options = [
        "trace",
        prompts,
        "--model",
        MODEL,
        "--saes",
        SAES,
        "--batch-size",
        "4",
        "--sample",
        "16",
        "--json",
    ]
    main([*options, "--out", str(tmp_path / "whole")])
    whole = json.loads(capsys.readouterr().out)
    main([*options, "--out", str(tmp_path / "killed")])
    capsys.readouterr()
    for shard in ("nodes/00001", "prompts/00001", "prompts/00002", "edges/00002"):
        (tmp_path / "killed" / f"{shard}.parquet").unlink()
    (tmp_path / "killed" / "nodes" / ".00001.parquet.1.tmp").write_bytes(b"half")
    untouched = (tmp_path / "killed" / "nodes" / "00000.parquet").stat().st_mtime_ns
    main([*options, "--out", str(tmp_path / "killed")])
    resumed = json.loads(capsys.readouterr().out)
    assert (tmp_path / "killed" / "nodes" / "00000.parquet").stat().st_mtime_ns == untouched
    for name in ("total_effect", "top_latents", "conservation_gap", "estimator_vs_exact", "edges_vs_exact"):
        assert resumed[name] == whole[name], name
    assert (tmp_path / "killed" / "graph.json").read_text() == (tmp_path / "whole" / "graph.json").read_text()
    assert not list((tmp_path / "killed").glob("**/*.tmp"))


def test_batch_size_does_not_change_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write(tmp_path, ROWS[:10])
    figures = []
    for size in ("1", "3", "16"):
        main(
            ["trace", prompts, "--model", MODEL, "--saes", SAES, "--out", str(tmp_path / size), "--batch-size", size,
             "--sample", "0", "--json"]
        )  # fmt: skip
        figures.append(json.loads(capsys.readouterr().out))
    for other in figures[1:]:
        assert other["total_effect"]["mean"] == pytest.approx(figures[0]["total_effect"]["mean"], abs=1e-4)
        assert [row["latent"] for row in other["top_latents"][:5]] == [
            row["latent"] for row in figures[0]["top_latents"][:5]
        ]
        for a, b in zip(other["top_latents"], figures[0]["top_latents"], strict=True):
            assert abs(a["attribution"]) == pytest.approx(abs(b["attribution"]), abs=1e-3)


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_other_baselines_need_no_corrupt_prompt(
    baseline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{key: value for key, value in row.items() if key != "corrupt"} for row in ROWS[:6]]
    main(
        ["trace", write(tmp_path, rows), "--model", MODEL, "--saes", SAES, "--out", str(tmp_path / "run"),
         "--baseline", baseline, "--steps", "40", "--json"]
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert max(found["conservation_gap"].values()) < 0.02
