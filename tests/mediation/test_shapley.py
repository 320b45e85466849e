"""Oracle: the definition, an average over all n! orders of the change at each part's entry."""

from __future__ import annotations

from itertools import permutations as orders_of

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mediation.errors import MediationError
from mediation.shapley import shapley


class Game:
    """A random set function with optional batch dimensions; remembers what it was asked."""

    def __init__(self, n: int, seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(2**n, *shape, generator=generator, dtype=dtype)
        self.calls: list[Tensor] = []

    def __call__(self, masks: Tensor) -> Tensor:
        self.calls.append(masks)
        return self.at(masks)

    def at(self, masks: Tensor) -> Tensor:
        return self.table[(masks.long() << torch.arange(masks.shape[-1])).sum(-1)]


def brute_force(game: Game, n: int) -> Tensor:
    shares = torch.zeros(n, *game.table.shape[1:], dtype=game.table.dtype)
    orders = list(orders_of(range(n)))
    for order in orders:
        mask = torch.zeros(n, dtype=torch.bool)
        for part in order:
            before = game.at(mask)
            mask = mask.clone()
            mask[part] = True
            shares[part] += (game.at(mask) - before) / len(orders)
    return shares


def total(game: Game, n: int) -> Tensor:
    return game.at(torch.ones(n, dtype=torch.bool)) - game.at(torch.zeros(n, dtype=torch.bool))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 5), seed=st.integers(0, 10_000), shape=st.sampled_from([(), (3,), (2, 2)]))
def test_exact_is_the_average_over_all_orders(n: int, seed: int, shape: tuple[int, ...]) -> None:
    game = Game(n, seed, *shape)
    result = shapley(game, n)
    assert torch.allclose(result.values, brute_force(game, n), atol=1e-12)
    assert not result.stderr.any()
    assert len(game.calls) == 1
    assert game.calls[0].shape == (2**n, n)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    max_exact=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_efficiency(n: int, seed: int, max_exact: int, dtype: torch.dtype) -> None:
    game = Game(n, seed, 2, dtype=dtype)
    result = shapley(game, n, max_exact=max_exact, permutations=6, seed=seed)
    assert result.values.dtype == dtype
    assert torch.allclose(result.values.sum(0), total(game, n), atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("max_exact", [0, 10])
def test_additive_games_give_back_their_terms(max_exact: int) -> None:
    terms = torch.tensor([1.0, -2.0, 0.5, 4.0, 0.0, 3.0, -1.0], dtype=torch.float64)
    result = shapley(lambda masks: masks.double() @ terms + 7, 7, max_exact=max_exact)
    assert torch.allclose(result.values, terms, atol=1e-12)
    assert torch.allclose(result.stderr, torch.zeros(7, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("max_exact", [0, 10])
def test_a_dummy_part_gets_nothing(max_exact: int) -> None:
    game = Game(5, 3)

    def with_dummy(masks: Tensor) -> Tensor:
        return game.at(torch.cat([masks[:, :2], masks[:, 3:]], dim=1))

    result = shapley(with_dummy, 6, max_exact=max_exact)
    assert result.values[2].abs() < 1e-12
    assert result.values[[0, 1, 3, 4, 5]].abs().min() > 1e-3


def test_symmetric_parts_share_equally_where_either_saturates() -> None:
    either = shapley(lambda masks: masks.any(1).float(), 3)
    assert torch.allclose(either.values, torch.full((3,), 1 / 3))


def test_antithetic_pairs_are_exact_for_pairwise_games() -> None:
    # Where only pairs interact, an order and its reverse give each part both halves of every interaction.
    generator = torch.Generator().manual_seed(0)
    interaction = torch.randn(9, 9, generator=generator, dtype=torch.float64)

    def value(masks: Tensor) -> Tensor:
        on = masks.double()
        return torch.einsum("si,ij,sj->s", on, interaction, on)

    result = shapley(value, 9, max_exact=0, permutations=4)
    expected = interaction.diagonal() + (interaction + interaction.T).fill_diagonal_(0).sum(1) / 2
    assert torch.allclose(result.values, expected, atol=1e-10)
    assert result.stderr.max() < 1e-10


def test_sampled_error_bars_cover_the_truth() -> None:
    inside = []
    for seed in range(60):
        game = Game(7, seed, dtype=torch.float64)
        truth = shapley(game, 7, max_exact=7).values
        sampled = shapley(game, 7, max_exact=0, permutations=64, seed=seed)
        assert (sampled.stderr > 0).all()
        inside.append((sampled.values - truth).abs() < 2.04 * sampled.stderr)  # t(31), 95 %
    # 420 intervals at 95 %, correlated within a game.
    assert 0.90 < torch.stack(inside).double().mean() < 0.99


def test_sampling_asks_once_and_never_twice_for_a_coalition() -> None:
    game = Game(8, 0)
    shapley(game, 8, max_exact=0, permutations=32)
    (masks,) = game.calls
    assert masks.dtype == torch.bool
    assert len(masks) == len(masks.unique(dim=0)) <= 2 + 32 * 7
    again = shapley(game, 8, max_exact=0, permutations=32)
    assert torch.equal(again.values, shapley(game, 8, max_exact=0, permutations=32).values)
    other = shapley(game, 8, max_exact=0, permutations=32, seed=1)
    assert not torch.equal(other.values, again.values)


@pytest.mark.parametrize(
    "options", [{"n_parts": 0}, {"n_parts": 9, "permutations": 7}, {"n_parts": 9, "permutations": 2}]
)
def test_impossible_requests_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(MediationError):
        shapley(lambda masks: masks.sum(1).float(), **options)
