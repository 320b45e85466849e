"""Oracles: planted attributes of two to sixteen values, their memberships known for every row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import one_hot

from mediation.errors import FidelityWarning, MediationError
from mediation.factored import (
    _Search,
    explained,
    find_values,
    intersection_over_union,
    partitions,
    signal_space,
    train_factored,
    two_means,
    unions_of_others,
)
from mediation.metabench import Planted, Setting, named_right, plant
from mediation.metalatents import MetaDictionary, rotated
from tests.mediation.test_metalatents import planted as sparse_rows
from tests.mediation.test_metalatents import support_f1

MIXED = Setting()


def memberships(planted: Planted) -> Tensor:
    columns = [one_hot(planted.facts[:, a], len(each)) for a, each in enumerate(planted.directions)]
    return torch.cat(columns, dim=1).bool()


def belongs(planted: Planted) -> Tensor:
    """The attribute of each of the planted values."""
    sizes = torch.tensor([len(each) for each in planted.directions])
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes)


def as_families(attribute: Tensor, members: Tensor) -> set[frozenset[tuple[bool, ...]]]:
    """Attributes as sets of sets of rows, whatever their order."""
    return {
        frozenset(tuple(column) for column in members[:, attribute == number].T.tolist())
        for number in attribute.unique().tolist()
    }


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(MIXED, 1)


@pytest.fixture(scope="module")
def trained(planted: Planted) -> MetaDictionary:
    return train_factored(planted.rows, base_hash="abc")


def test_every_attribute_is_found_whole(planted: Planted) -> None:
    values = find_values(planted.rows)
    kept = values.attribute >= 0
    found = as_families(values.attribute[kept], values.members[:, kept])
    assert found == as_families(belongs(planted), memberships(planted))


def test_facts_are_named_right_where_a_sparse_meta_sae_fails(planted: Planted, trained: MetaDictionary) -> None:
    attribute, value = named_right(planted, trained.codes(planted.rows), trained.directions, seed=0)
    assert attribute >= 0.99
    assert value >= 0.98
    sparse = MetaDictionary.train(planted.rows, width=63, k=6, steps=500, restarts=1)
    assert named_right(planted, sparse.codes(planted.rows), sparse.directions, seed=0)[1] < 0.8


def test_correlated_attributes_and_trained_embeddings() -> None:
    for setting in (Setting(correlation=0.3), Setting(trained=True)):
        planted = plant(setting, 2)
        meta = train_factored(planted.rows)
        assert named_right(planted, meta.codes(planted.rows), meta.directions, seed=0)[1] >= 0.9, setting


def test_new_rows_are_read_from_the_saved_file_alone(tmp_path: Path, planted: Planted) -> None:
    whole = plant(Setting(rows=768, noise=0.2), 3)
    known, new = whole.rows[:512], whole.rows[512:]
    meta = train_factored(known, base_hash="abc")
    meta.save(tmp_path / "meta")
    sae = SAE.load_from_disk(tmp_path / "meta")
    assert sae.cfg.architecture() == "jumprelu"
    assert torch.allclose(sae.encode(new), meta.codes(new), atol=1e-5)
    assert torch.allclose(sae(new), new - meta.decompose(new).residual, atol=1e-5)
    again = MetaDictionary.load(tmp_path / "meta")
    assert torch.equal(again.codes(new), meta.codes(new))
    assert again.base_hash == "abc"
    assert again.metadata.attribute == meta.metadata.attribute
    overlap = intersection_over_union(memberships(whole)[512:], meta.codes(new) > 0)
    assert overlap.max(1).values.mean() > 0.97


def test_split_is_exact_and_codes_are_not_negative(planted: Planted, trained: MetaDictionary) -> None:
    parts = trained.decompose(planted.rows)
    whole = parts.codes @ trained.directions + parts.bias + parts.residual
    assert (whole - planted.rows).abs().max() < 1e-6
    assert parts.codes.min() >= 0
    assert torch.allclose(trained.directions.norm(dim=1), torch.ones(trained.d_meta), atol=1e-5)
    assert trained.variance_explained(planted.rows) > 0.85


def test_two_valued_attribute_is_two_opposite_directions(trained: MetaDictionary) -> None:
    attribute = torch.tensor(trained.metadata.attribute)
    (pair,) = [number for number in attribute.unique().tolist() if (attribute == number).sum() == 2]
    first, second = trained.directions[attribute == pair]
    assert (first @ second).item() == pytest.approx(-1, abs=1e-3)


def test_order_rotation_and_length_of_rows_do_not_matter(planted: Planted, trained: MetaDictionary) -> None:
    generator = torch.Generator().manual_seed(0)
    clear = plant(Setting(noise=0.1), 4)
    turn = torch.linalg.qr(torch.randn(clear.rows.shape[1], clear.rows.shape[1], generator=generator)).Q
    order = torch.randperm(len(clear.rows), generator=generator)
    values = find_values((clear.rows @ turn)[order])
    kept = values.attribute >= 0
    found = as_families(values.attribute[kept], values.members[order.argsort()][:, kept])
    assert found == as_families(belongs(clear), memberships(clear))
    scaled = train_factored((0.1 + torch.rand(len(planted.rows), 1, generator=generator)) * planted.rows)
    assert torch.allclose(scaled.codes(planted.rows), trained.codes(planted.rows), atol=1e-3)


def test_same_seed_same_meta_dictionary(planted: Planted, trained: MetaDictionary) -> None:
    assert torch.equal(train_factored(planted.rows).directions, trained.directions)


def test_sparse_facts_without_attributes_are_found_too() -> None:
    atoms, support, rows = sparse_rows(1, rows=600)
    meta = train_factored(rows)
    assert (atoms @ meta.directions.T).max(1).values.mean() > 0.95
    assert support_f1(meta.codes(rows), meta.directions, atoms, support) > 0.95


def test_rows_that_share_nothing_yield_next_to_nothing(planted: Planted, trained: MetaDictionary) -> None:
    null = rotated(planted.rows, seed=0)
    try:
        explained_by_null = train_factored(null).variance_explained(null)
    except MediationError:
        explained_by_null = 0.0
    assert explained_by_null < 0.2 < trained.variance_explained(planted.rows) - explained_by_null


def test_few_rows_warn_and_none_are_refused() -> None:
    with pytest.warns(FidelityWarning, match="100 decoder rows"):
        train_factored(plant(Setting((4, 4), rows=100, noise=0.1), 0).rows)
    with pytest.raises(MediationError):
        train_factored(torch.zeros(300, 8))


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_signal_space_has_the_planted_rank(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(400, 10, generator=generator) @ torch.randn(10, 64, generator=generator)
    rows = signal / signal.norm(dim=1).mean() + noise * torch.randn(400, 64, generator=generator) / 8
    whiten = signal_space(rows)
    assert 10 <= whiten.shape[1] <= 12
    q = (rows - rows.mean(0)) @ whiten
    assert torch.allclose(q.T @ q / len(rows), torch.eye(whiten.shape[1]), atol=1e-3)


def test_unions_partitions_and_explained_by_hand() -> None:
    thirds = one_hot(torch.arange(90) % 3).bool()
    halves = one_hot(torch.arange(90) // 45).bool()
    union = thirds[:, 0] | thirds[:, 1]
    sets = torch.cat([thirds, halves, union[:, None]], dim=1)
    assert unions_of_others(sets).tolist() == [False] * 5 + [True]
    assert partitions(sets[:, :5])[0] == [0, 1, 2]
    assert [3, 4] in partitions(sets[:, :5])
    assert partitions(sets[:, :2])[0] == [0, 1]  # the third value is what they leave over
    assert explained(sets[:, [5, 3]], thirds).tolist() == pytest.approx([1, 0], abs=1e-5)


def test_a_family_leaves_values_of_other_attributes_out() -> None:
    """One rare value meets each rare value of another attribute in no more rows than chance lets them."""
    generator = torch.Generator().manual_seed(0)
    first, second = (one_hot(torch.randperm(960, generator=generator) % 24).bool() for _ in range(2))
    families = partitions(torch.cat([first, second], dim=1))
    assert families[:2] == [list(range(24)), list(range(24, 48))] or families[:2] == [
        list(range(24, 48)),
        list(range(24)),
    ]


def test_merged_values_are_divided_and_wrong_rows_put_right(planted: Planted) -> None:
    search = _Search(planted.rows, 0)
    generator = torch.Generator().manual_seed(1)
    merged = []
    for attribute, directions in enumerate(planted.directions):
        facts = planted.facts[:, attribute].clone()
        wrong = torch.rand(len(facts), generator=generator) < 0.05
        facts[wrong] = torch.randint(len(directions), (int(wrong.sum()),), generator=generator)
        members = one_hot(facts, len(directions)).bool()
        if len(directions) > 4:  # the last two values are taken for one
            members = torch.cat([members[:, :-2], members[:, -2:].any(1, keepdim=True)], dim=1)
        merged.append(members)
    right = [one_hot(planted.facts[:, a], len(each)).bool() for a, each in enumerate(planted.directions)]
    found = search.divided(search.refined(merged))
    assert [members.shape[1] for members in found] == [len(each) for each in planted.directions]
    for members, truth in zip(found, right, strict=True):
        assert intersection_over_union(truth, members).max(1).values.min() > 0.99
    assert [members.shape[1] for members in search.divided(right)] == [len(each) for each in planted.directions]


def test_two_means_by_hand() -> None:
    low, share = two_means(torch.tensor([5.0, -1.0, 4.0, 0.0, 6.0, 1.0]))
    assert low.tolist() == [False, True, False, True, False, True]
    assert share == pytest.approx(1 - 4 / 41.5)  # of 41.5 around the mean, 4 are left around the two means
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert two_means(normal)[1] == pytest.approx(2 / torch.pi, abs=0.01)
