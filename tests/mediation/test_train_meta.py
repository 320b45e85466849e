"""`mediation train meta`, and the benchmark's scoring, against planted rows in SAELens folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import one_hot

from mediation import metabench
from mediation.cli import main
from mediation.dictionaries import Dictionary
from mediation.errors import FidelityWarning, MediationError
from mediation.metabench import Setting, methods, named_right, plant, run_bench
from mediation.metalatents import MetaDictionary
from mediation.sites import Site, Stream
from mediation.training.meta import read_rows, train_meta
from tests.test_cli import refused

SMALL = Setting((2, 4, 8), rows=240, noise=0.2)


def dictionary(folder: Path, rows: Tensor, density: Tensor | None = None) -> str:
    sae = StandardSAE(StandardSAEConfig(d_in=rows.shape[1], d_sae=len(rows)))
    sae.W_dec.data = rows.clone()
    sae.save_model(folder)
    if density is not None:
        save_file({"sparsity": density.log10()}, folder / "sparsity.safetensors")
    return str(folder)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mediation.training.meta.STEPS", 60)


def test_facts_end_in_a_folder_saelens_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = plant(SMALL, 1)
    base = dictionary(tmp_path / "sae", planted.rows)
    main(["train", "meta", base, "--out", str(tmp_path / "meta"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "factored"
    assert sorted(result["attributes"]) == [2, 4, 8]
    assert result["held_out"]["factored"] > result["held_out"]["sparse"]
    assert result["gap_to_null"] > 0.3
    assert not result["density_known"]
    assert SAE.load_from_disk(tmp_path / "meta").cfg.architecture() == "jumprelu"
    meta = MetaDictionary.load(tmp_path / "meta")
    assert meta.base_hash == read_rows([base]).base_hash
    kept = ("rows", "seed", "held_out", "variance_explained", "null_variance_explained", "weights", "codes_per_row")
    assert {name: meta.metadata[name] for name in kept} == {name: result[name] for name in kept}
    assert meta.metadata.dictionaries == {meta.base_hash: "sae"}
    assert named_right(planted, meta.codes(planted.rows), meta.directions, seed=0)[1] > 0.95
    assert {path.name for path in tmp_path.iterdir()} == {"sae", "meta"}


def test_dead_rows_are_dropped_and_dictionaries_pooled(tmp_path: Path) -> None:
    rows = plant(SMALL, 1).rows
    density = torch.full((240,), 1e-3)
    density[:25] = 1e-6
    first = dictionary(tmp_path / "saes" / "a", rows, density)
    dictionary(tmp_path / "saes" / "b", rows, density)
    one, both = read_rows([first]), read_rows([tmp_path / "saes"])
    assert (len(one.rows), one.dead, one.density_known) == (215, 25, True)
    assert torch.allclose(one.rows, rows[25:], atol=1e-5)
    assert (len(both.rows), both.dead, both.base_hash) == (430, 50, None)
    MetaDictionary.train(rows, width=4, k=1, steps=2, restarts=1).save(tmp_path / "saes" / "a-meta")
    assert len(read_rows([tmp_path / "saes"]).rows) == 430  # rows of a meta-dictionary are no latents
    bare = dictionary(tmp_path / "c", torch.cat([torch.zeros(3, 128), rows[3:]]))
    assert (len(read_rows([bare]).rows), read_rows([bare]).density_known) == (237, False)


def test_width_k_and_use_mean_a_sparse_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = plant(SMALL, 2).rows
    density = torch.full((240,), 2e-5)
    density[100:] = 0.1
    base = dictionary(tmp_path / "sae", rows, density)
    out = str(tmp_path / "meta")
    main(["train", "meta", base, "--out", out, "--width", "30", "--k", "3", "--weights", "use", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["method"], result["width"], result["weights"]) == ("batchtopk", 30, "use")
    assert result["codes_per_row"] == pytest.approx(3, abs=0.05)
    meta = MetaDictionary.load(tmp_path / "meta")
    assert meta.variance_explained(rows[100:]) > meta.variance_explained(rows[:100])


def test_pooled_rows_belong_to_their_dictionaries_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = plant(SMALL, 1).rows
    folders = [dictionary(tmp_path / name, rows + 0.01 * n) for n, name in enumerate("abc")]
    main(["train", "meta", *folders[:2], "--out", str(tmp_path / "meta"), "--json"])
    capsys.readouterr()
    meta = MetaDictionary.load(tmp_path / "meta")
    assert sorted(meta.metadata.dictionaries.values()) == ["a", "b"]
    for folder in folders[:2]:
        meta.check(Dictionary.load(folder, site=Site(0, Stream.RESID_PRE)))
    with pytest.raises(MediationError, match="another dictionary"):
        meta.check(Dictionary.load(folders[2], site=Site(0, Stream.RESID_PRE)))


def test_a_row_drawn_twice_is_neither_held_out_nor_turned_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighted by use, rows repeat. All rows are orthogonal here: what is held out shares nothing with what is kept."""
    density = torch.logspace(-4, -0.5, 240)
    base = dictionary(tmp_path / "sae", torch.eye(240), density)
    trained: list[Tensor] = []
    real = MetaDictionary.train.__func__  # type: ignore[attr-defined]

    def train(cls: type[MetaDictionary], rows: Tensor, **chosen: object) -> MetaDictionary:
        trained.append(rows)
        return real(cls, rows, **chosen)

    monkeypatch.setattr(MetaDictionary, "train", classmethod(train))
    result = train_meta([base], tmp_path / "meta", width=40, k=1, weights="use")
    assert result["held_out"]["sparse"] < 0.05 < result["variance_explained"]
    distinct = [len(rows.unique(dim=0)) for rows in trained[-2:]]  # the training on all rows, and the null's
    assert distinct[0] == distinct[1] < 200


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = plant(SMALL, 3).rows
    base, narrow = dictionary(tmp_path / "a", rows), dictionary(tmp_path / "b", rows[:, :64])
    out = str(tmp_path / "meta")
    assert "no folder" in refused(capsys, "train", "meta", str(tmp_path / "none"), "--out", out)
    assert "different widths (64, 128)" in refused(capsys, "train", "meta", base, narrow, "--out", out)
    assert "already holds" in refused(capsys, "train", "meta", base, "--out", base)
    assert "sparsity.safetensors" in refused(capsys, "train", "meta", base, "--out", out, "--weights", "use")
    assert "uniform, use" in refused(capsys, "train", "meta", base, "--out", out, "--weights", "all")
    assert "1 <= k < width" in refused(capsys, "train", "meta", base, "--out", out, "--width", "4", "--k", "4")
    save_file({"sparsity": torch.zeros(7)}, tmp_path / "a" / "sparsity.safetensors")
    assert "240 latents" in refused(capsys, "train", "meta", base, "--out", out)
    assert not (tmp_path / "meta").exists()


def test_few_rows_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = dictionary(tmp_path / "a", plant(Setting((2, 4), rows=80, noise=0.1), 0).rows)
    with pytest.warns(FidelityWarning, match="80 decoder rows are few") as said:
        main(["train", "meta", base, "--out", str(tmp_path / "meta"), "--json"])
    assert len([each for each in said if each.category is FidelityWarning]) == 1
    assert json.loads(capsys.readouterr().out)["few_rows"]


def test_score_is_one_for_the_truth_and_low_for_false_names() -> None:
    planted = plant(Setting(), 5)
    truth = torch.cat([one_hot(planted.facts[:, a], len(v)).float() for a, v in enumerate(planted.directions)], dim=1)
    directions = torch.cat(planted.directions)
    unit = directions / directions.norm(dim=1, keepdim=True)
    assert named_right(planted, truth * directions.norm(dim=1), unit, seed=0) == (1.0, 1.0)
    nothing = torch.zeros_like(truth)
    assert named_right(planted, nothing, unit, seed=0) == (0.0, 0.0)
    assert named_right(planted, truth, unit.roll(1, dims=0), seed=0)[1] < 0.3


def test_correlation_copies_values_and_rows_are_unit() -> None:
    planted = plant(Setting((8, 8), rows=4000, correlation=0.5), 0)
    same = (planted.facts[:, 0] == planted.facts[:, 1]).float().mean().item()
    assert same == pytest.approx(0.5 + 0.5 / 8, abs=0.03)
    assert torch.allclose(planted.rows.norm(dim=1), torch.ones(4000), atol=1e-5)


def test_benchmark_runs_every_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting((2, 4, 4), rows=200, noise=0.2)
    monkeypatch.setattr(metabench, "QUICK", (setting,))
    monkeypatch.setattr(metabench, "QUICK_SEEDS", (7,))
    seen = []
    result = run_bench(quick=True, progress=lambda stage, done, of: seen.append((done, of)))
    assert seen == [(0, 1)]
    assert set(result["methods"]) == set(methods(setting))
    (row,) = result["settings"]
    assert row["value"]["factored"] > 0.95
    assert row["value"]["factored"] > max(row["value"][name] for name in ("own-row pursuit", "nearest row", "null"))
    monkeypatch.setattr(metabench, "run_bench", lambda **_: result)
    main(["bench", "meta", "--quick", "--json"])
    assert json.loads(capsys.readouterr().out)["settings"] == result["settings"]
