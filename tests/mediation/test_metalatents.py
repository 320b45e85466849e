"""Oracles: planted atoms, SAELens' own encode, and sums that must close."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from mediation.dictionaries import Dictionary
from mediation.errors import FidelityWarning, MediationError
from mediation.metalatents import (
    Decomposition,
    MatchingPursuit,
    MetaDictionary,
    Parts,
    linear_split,
    rotated,
)

ATOMS, DIM, PER_ROW = 64, 128, 3


def planted(seed: int, rows: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms [64, 128], which of them each row uses, and rows [n, 128] of 3 atoms each."""
    # Far from the trainer's seeds: from the same one it would start at the atoms themselves.
    generator = torch.Generator().manual_seed(1000 + seed)
    atoms = normalize(torch.randn(ATOMS, DIM, generator=generator), dim=1)
    used = torch.rand(rows, ATOMS, generator=generator).topk(PER_ROW, dim=1).indices
    sizes = 0.5 + 0.5 * torch.rand(rows, PER_ROW, generator=generator)
    codes = torch.zeros(rows, ATOMS).scatter_(1, used, sizes)
    return atoms, codes > 0, normalize(codes @ atoms, dim=1)


def random_rows(seed: int, n: int, d: int) -> Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(scope="module")
def trained() -> MetaDictionary:
    return MetaDictionary.train(planted(0)[2], width=96, k=PER_ROW, steps=600, restarts=1, base_hash="abc")


def support_f1(codes: Tensor, directions: Tensor, atoms: Tensor, support: Tensor) -> float:
    """Codes are given to the atom nearest to their direction; F1 of 'row uses atom'."""
    nearest = (directions @ atoms.T).argmax(1)
    found = torch.zeros(support.shape).index_add_(1, nearest, codes) > 0
    return (2 * (found & support).sum() / (found.sum() + support.sum())).item()


@pytest.mark.parametrize("width", [64, 96])
def test_planted_atoms_are_recovered_at_the_defaults(width: int) -> None:
    atoms, support, rows = planted(1)
    meta = MetaDictionary.train(rows, width=width, k=PER_ROW)
    similarity = (atoms @ meta.directions.T).max(1).values
    assert similarity.mean() >= 0.99
    assert support_f1(meta.codes(rows), meta.directions, atoms, support) >= 0.99
    assert meta.variance_explained(rows) >= 0.99
    # Held-out rows are as good: the threshold is not tuned to the rows it was set on.
    generator = torch.Generator().manual_seed(99)
    held_out = torch.zeros(500, ATOMS).scatter_(
        1, torch.rand(500, ATOMS, generator=generator).topk(PER_ROW, dim=1).indices, 0.75
    )
    codes = meta.codes(normalize(held_out @ atoms, dim=1))
    assert support_f1(codes, meta.directions, atoms, held_out > 0) >= 0.99


def test_rotated_rows_keep_norms_and_lose_what_is_shared(trained: MetaDictionary) -> None:
    rows = 3 * planted(0)[2]
    null = rotated(rows, seed=0)
    assert torch.allclose(null.norm(dim=1), rows.norm(dim=1), rtol=1e-5)
    assert (normalize(null, dim=1) * normalize(rows, dim=1)).sum(1).abs().mean() < 0.15
    assert torch.equal(null, rotated(rows, seed=0))
    assert not torch.equal(null, rotated(rows, seed=1))
    of_null = MetaDictionary.train(null, width=96, k=PER_ROW, steps=600, restarts=1)
    gap = trained.variance_explained(rows / 3) - of_null.variance_explained(null / 3)
    assert gap > 0.5


def test_directions_are_unit_and_codes_sparse_and_non_negative(trained: MetaDictionary) -> None:
    rows = planted(0)[2]
    codes = trained.codes(rows)
    assert torch.allclose(trained.directions.norm(dim=1), torch.ones(96), atol=1e-5)
    assert codes.min() >= 0
    assert (codes > 0).sum(1).float().mean() == pytest.approx(PER_ROW, abs=0.01)


def test_codes_do_not_depend_on_the_batch(trained: MetaDictionary) -> None:
    rows = planted(0)[2][:50]
    one_by_one = torch.cat([trained.codes(row[None]) for row in rows])
    assert torch.allclose(one_by_one, trained.codes(rows), atol=1e-5)


def test_training_is_reproducible_and_restarts_keep_the_best() -> None:
    rows = planted(2, rows=300)[2]
    options = {"width": 48, "k": 3, "steps": 60}
    first = MetaDictionary.train(rows, **options)  # type: ignore[arg-type]
    assert torch.equal(first.directions, MetaDictionary.train(rows, **options).directions)  # type: ignore[arg-type]
    singles = [MetaDictionary.train(rows, seed=s, restarts=1, **options) for s in range(3, 6)]  # type: ignore[arg-type]
    best = MetaDictionary.train(rows, seed=1, restarts=3, **options)  # type: ignore[arg-type]
    scores = [single.variance_explained(rows) for single in singles]
    assert len(set(scores)) == 3
    assert best.variance_explained(rows) == max(scores)


def test_rows_are_normalised_and_dead_ones_dropped() -> None:
    rows = planted(3, rows=250)[2]
    scale = 0.1 + torch.rand(250, 1, generator=torch.Generator().manual_seed(0))
    with_dead = torch.cat([torch.zeros(40, DIM), scale * rows])
    clean = MetaDictionary.train(rows, width=48, k=3, steps=30)
    messy = MetaDictionary.train(with_dead, width=48, k=3, steps=30)
    assert torch.allclose(clean.directions, messy.directions, atol=1e-3)
    # 240 rows are alive here, 190 there.
    with pytest.warns(FidelityWarning, match="190 decoder rows"):
        MetaDictionary.train(torch.cat([rows[:190], torch.zeros(60, DIM)]), width=48, k=3, steps=1)


def test_silent_directions_are_revived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in a narrow cone excite few of the random directions; without the second loss the others stay unused."""
    atoms, _, rows = planted(4, rows=600)
    cone = normalize(rows + 6 * atoms.mean(0), dim=1)

    def alive() -> int:
        meta = MetaDictionary.train(cone, width=ATOMS, k=PER_ROW, steps=400, restarts=1)
        return int((meta.codes(cone) > 0).any(0).sum())

    revived = alive()
    monkeypatch.setattr("mediation.metalatents.DEAD_WEIGHT", 0.0)
    assert revived >= 60 > 45 > alive()


def test_centring_helps_rows_that_share_one_direction() -> None:
    _, _, rows = planted(5, rows=600)
    common = 5 * normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(8)), dim=0)
    shifted = normalize(rows + common, dim=1)
    options = {"width": ATOMS, "k": PER_ROW, "steps": 600, "restarts": 1}
    plain = MetaDictionary.train(shifted, **options)  # type: ignore[arg-type]
    centred = MetaDictionary.train(shifted, center=True, **options)  # type: ignore[arg-type]
    assert not plain.bias.any()
    assert torch.allclose(centred.bias, shifted.mean(0), atol=1e-6)
    assert centred.variance_explained(shifted) > plain.variance_explained(shifted) + 0.1


def test_saved_folder_is_saelens_and_gives_the_same_codes(trained: MetaDictionary, tmp_path: Path) -> None:
    rows = planted(0)[2]
    trained.save(tmp_path / "meta")
    sae = SAE.load_from_disk(tmp_path / "meta")
    assert sae.cfg.architecture() == "jumprelu"
    assert torch.allclose(sae.encode(rows), trained.codes(rows), atol=1e-5)
    assert torch.equal(sae.encode(rows) > 0, trained.codes(rows) > 0)
    assert torch.allclose(sae(rows), rows - trained.decompose(rows).residual, atol=1e-5)
    config = json.loads((tmp_path / "meta" / "cfg.json").read_text())
    assert config["metadata"]["sae_lens_version"]
    assert config["metadata"]["k"] == PER_ROW

    again = MetaDictionary.load(tmp_path / "meta")
    assert torch.equal(again.codes(rows), trained.codes(rows))
    assert torch.equal(again.directions, trained.directions)
    assert torch.equal(again.bias, trained.bias)
    assert (again.name, again.base_hash, again.content_hash) == ("meta", "abc", trained.content_hash)
    assert again.content_hash


def test_a_meta_sae_from_elsewhere_is_brought_to_unit_directions(tmp_path: Path) -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=8))
    with torch.no_grad():
        sae.W_dec.mul_(torch.arange(1.0, 9.0)[:, None])
    sae.save_model(tmp_path)
    meta, rows = MetaDictionary.load(tmp_path), random_rows(0, 30, 16)
    assert torch.allclose(meta.directions.norm(dim=1), torch.ones(8), atol=1e-5)
    assert torch.allclose(rows - meta.decompose(rows).residual, sae(rows), atol=1e-4)


def test_folders_that_are_no_meta_sae_are_refused(tmp_path: Path, trained: MetaDictionary) -> None:
    with pytest.raises(MediationError, match="no folder"):
        MetaDictionary.load(tmp_path / "nowhere")
    trained.save(tmp_path / "meta")
    (tmp_path / "meta" / "sae_weights.safetensors").unlink()
    with pytest.raises(MediationError, match=r"no sae_weights\.safetensors"):
        MetaDictionary.load(tmp_path / "meta")
    StandardSAE(StandardSAEConfig(d_in=8, d_sae=9, normalize_activations="layer_norm")).save_model(tmp_path)
    with pytest.raises(MediationError, match="bias is not constant"):
        MetaDictionary.load(tmp_path)


def test_check_refuses_another_dictionary(tmp_path: Path) -> None:
    def dictionary(d_model: int) -> Dictionary:
        sae = StandardSAE(StandardSAEConfig(d_in=d_model, d_sae=300))
        sae.cfg.metadata.hook_name = "blocks.0.hook_resid_pre"
        sae.save_model(tmp_path / str(d_model))
        return Dictionary.load(tmp_path / str(d_model))

    base, other_width = dictionary(8), dictionary(9)
    rows = base.decoder
    meta = MetaDictionary.train(rows, width=12, k=2, steps=2, base_hash=base.content_hash)
    meta.check(base)
    with pytest.raises(MediationError, match="dimensions"):
        meta.check(other_width)
    MetaDictionary.train(rows, width=12, k=2, steps=2).check(base)
    with pytest.raises(MediationError, match="another dictionary"):
        MetaDictionary.train(rows, width=12, k=2, steps=2, base_hash="other").check(base)


@pytest.mark.parametrize(
    ("rows", "width", "k"),
    [
        (torch.full((300, 8), torch.nan), 10, 2),
        (torch.zeros(300, 8), 10, 2),
        (torch.ones(300), 10, 2),
        (torch.ones(300, 8), 10, 0),
        (torch.ones(300, 8), 10, 10),
    ],
)
def test_impossible_training_is_refused(rows: Tensor, width: int, k: int) -> None:
    with pytest.raises(MediationError):
        MetaDictionary.train(rows, width=width, k=k)


def orthogonal_pursuit(row: Tensor, directions: Tensor, k: int, own: int) -> Tensor:
    """One row, textbook form, least squares by torch.linalg.lstsq in float64."""
    row, directions = row.double(), directions.double()
    support: list[int] = []
    residual, codes = row, torch.zeros(len(directions), dtype=torch.float64)
    for _ in range(k):
        products = directions @ residual
        products[[own, *support]] = -torch.inf
        support.append(int(products.argmax()))
        fit = torch.linalg.lstsq(directions[support].T, row[:, None]).solution[:, 0]
        residual = row - directions[support].T @ fit
        codes[:] = 0
        codes[support] = fit
    return codes


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4))
def test_matching_pursuit_is_the_textbook_one(seed: int, k: int) -> None:
    rows = random_rows(seed, 40, 12)
    own = torch.arange(40)
    codes = MatchingPursuit(rows, k).codes(rows, own)
    expected = torch.stack([orthogonal_pursuit(rows[i], rows, k, i) for i in range(40)])
    assert torch.allclose(codes.double(), expected, atol=1e-4)
    assert not codes.diagonal().any()


def test_matching_pursuit_finds_planted_sums_and_stops() -> None:
    directions = torch.linalg.qr(random_rows(0, 20, 20)).Q
    pairs = list(combinations(range(6), 2))
    rows = torch.stack([0.8 * directions[i] + 0.6 * directions[j] for i, j in pairs])
    codes = MatchingPursuit(directions, k=4).codes(rows)
    expected = torch.zeros(len(pairs), 20)
    for n, (i, j) in enumerate(pairs):
        expected[n, i], expected[n, j] = 0.8, 0.6
    assert torch.allclose(codes, expected, atol=1e-5)
    assert torch.equal((codes.abs() > 1e-6).sum(1), torch.full((len(pairs),), 2))


def test_one_atom_is_the_nearest_row() -> None:
    rows = random_rows(5, 60, 8)
    codes = MatchingPursuit(rows, k=1).codes(rows, torch.arange(60))
    cosines = (rows @ rows.T).fill_diagonal_(-1)
    assert torch.equal(codes.argmax(1), cosines.argmax(1))
    assert torch.allclose(codes.max(1).values, cosines.max(1).values, atol=1e-5)


def test_duplicate_and_zero_directions_do_no_harm() -> None:
    rows = random_rows(6, 10, 8)
    directions = torch.cat([rows, rows, torch.zeros(3, 8)])
    parts = MatchingPursuit(directions, k=5).decompose(rows, torch.arange(10))
    assert parts.codes.isfinite().all()
    assert not parts.codes[:, 20:].any()
    assert parts.residual.norm(dim=1).max() < 1e-4  # the duplicate is not the row itself


def test_matching_pursuit_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, own = random_rows(7, 50, 12), torch.arange(50)
    whole = MatchingPursuit(rows, 3).codes(rows, own)
    monkeypatch.setattr("mediation.metalatents.MAX_DENSE", 7 * 50)
    assert torch.allclose(MatchingPursuit(rows, 3).codes(rows, own), whole, atol=1e-6)


@pytest.mark.parametrize("k", [0, 11])
def test_matching_pursuit_refuses_impossible_k(k: int) -> None:
    with pytest.raises(MediationError):
        MatchingPursuit(random_rows(0, 10, 4), k)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), own_rows=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_parts_and_linear_split_are_exact(seed: int, own_rows: bool, scale: float) -> None:
    n, d = 230, 24
    generator = torch.Generator().manual_seed(seed)
    rows = random_rows(seed, n, d)
    own = torch.arange(n) if own_rows else None
    how: Decomposition = (
        MatchingPursuit(rows, 3) if own_rows else MetaDictionary.train(rows, width=30, k=3, steps=5, seed=seed)
    )
    parts = how.decompose(rows, own)
    whole = parts.codes @ how.directions + parts.bias + parts.residual
    assert (whole - rows).abs().max() < 1e-5
    assert 0 < parts.codes.count_nonzero() <= 3 * n
    error = parts.residual.double().square().sum() / (rows - rows.mean(0)).double().square().sum()
    assert how.variance_explained(rows, own) == pytest.approx(1 - error.item(), rel=1e-4, abs=1e-5)

    delta = torch.randn(n, generator=generator)
    gradient = scale * torch.randn(n, d, generator=generator)
    split = linear_split(delta, gradient, parts, how.directions)
    together = split.meta.sum(1) + split.bias + split.residual
    attribution = delta * (gradient * rows).sum(1)
    assert (together - attribution).abs().max() < 1e-5 * (delta.abs() * gradient.norm(dim=1)).max()
    assert torch.equal(split.meta != 0, parts.codes != 0)


def test_linear_split_by_hand() -> None:
    directions = torch.eye(3)[:2]
    parts = Parts(torch.tensor([[2.0, 0.5]]), torch.tensor([0.0, 0.0, 1.0]), torch.tensor([[0.1, 0.0, 0.2]]))
    split = linear_split(torch.tensor([3.0]), torch.tensor([[1.0, -2.0, 4.0]]), parts, directions)
    assert torch.allclose(split.meta, torch.tensor([[6.0, -3.0]]))
    assert torch.allclose(split.bias, torch.tensor([12.0]))
    assert torch.allclose(split.residual, torch.tensor([2.7]))


def test_only_safetensors_and_json_are_written(trained: MetaDictionary, tmp_path: Path) -> None:
    trained.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].unique().numel() == 1
