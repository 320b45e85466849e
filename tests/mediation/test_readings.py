"""Readings: planted readouts come back, codes are exact, scale does not matter; the joint diagonaliser is optimal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from mediation.errors import MediationError
from mediation.readings import Readings, joint_diagonaliser, reading_space

DIM = 20


def planted(n: int = 4000, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of three questions over 9 readouts [9, d] that are not orthogonal; each question reads its own three
    and, weakly, one that all share.
    """
    generator = torch.Generator().manual_seed(seed)
    readouts = normalize(torch.randn(10, DIM, generator=generator), dim=1)
    found = {}
    for number in range(3):
        power = torch.full((10,), 0.02)
        power[3 * number : 3 * number + 3] = torch.tensor([1.0, 0.8, 0.6])
        power[9] = 0.5
        found["abc"[number]] = (torch.randn(n, 10, generator=generator) * power) @ readouts
    return found, readouts


def test_planted_readouts_come_back_with_their_questions() -> None:
    gradients, readouts = planted()
    readings = Readings.learn(gradients, width=10)
    onto = readings.directions @ readouts.T  # a direction that one readout alone reads
    for number in range(9):
        best = onto[:, number].abs().argmax()
        assert readings.use[best].argmax() == number // 3
        assert readings.use[best].max() > 0.95
    shared = onto[:, 9].abs().argmax()
    assert readings.use[shared].max() < 0.45


def test_what_one_question_reads_the_others_do_not() -> None:
    """Parts of a row that belong to one question hardly move the others'; with a random turn they do."""
    gradients, _ = planted()
    rows = torch.randn(50, DIM, generator=torch.Generator().manual_seed(1))
    readings = Readings.learn(gradients, width=10)
    codes = readings.codes(rows)
    own = readings.use > 0.9

    def power(question: str, parts: Tensor) -> float:
        return (parts @ gradients[question].T).square().mean().item()

    for number, question in enumerate("abc"):
        part = (codes * own[:, number]) @ readings.directions
        leak = max(power(other, part) for other in "abc" if other != question)
        assert power(question, part) > 50 * leak


def test_rows_are_codes_and_residual_and_codes_are_linear() -> None:
    gradients, _ = planted()
    rows = torch.randn(7, DIM, generator=torch.Generator().manual_seed(2))
    readings = Readings.learn(gradients, width=6)
    parts = readings.decompose(rows)
    torch.testing.assert_close(parts.codes @ readings.directions + parts.residual + parts.bias, rows)
    # Nothing that is read of the reading space is left over.
    torch.testing.assert_close(readings.codes(parts.residual), torch.zeros(7, 6), atol=1e-4, rtol=0)
    torch.testing.assert_close(readings.codes(3 * rows[:1] - rows[1:2]), 3 * parts.codes[:1] - parts.codes[1:2])
    torch.testing.assert_close(readings.directions.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(readings.use.sum(1), torch.ones(6))


def test_the_residual_is_what_is_read_least() -> None:
    """Of all spaces of that width, the reading space leaves the least power of the gradients outside."""
    gradients, _ = planted()
    moments, whiten = reading_space(gradients, 6)
    basis = torch.linalg.qr(whiten).Q
    total = moments.sum(0)
    inside = (basis.T @ total @ basis).trace()
    torch.testing.assert_close(inside, torch.linalg.eigvalsh(total)[-6:].sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whiten.T @ total @ whiten, torch.eye(6), atol=1e-3, rtol=0)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 5))
def test_the_size_of_a_questions_gradients_does_not_matter(scale: float, seed: int) -> None:
    gradients, _ = planted(200, seed)
    first = Readings.learn(gradients, width=4, starts=1)
    second = Readings.learn(gradients | {"b": scale * gradients["b"]}, width=4, starts=1)
    torch.testing.assert_close(first.use, second.use, atol=2e-2, rtol=0)


def test_matrices_that_share_axes_are_made_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    matrices = torch.stack([axes @ torch.diag(torch.rand(6, generator=generator)) @ axes.T for _ in range(4)])
    rotation = joint_diagonaliser(matrices, seed=1)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(6), atol=1e-5, rtol=0)
    turned = rotation.T @ matrices @ rotation
    off = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert off.square().sum() < 1e-3 * turned.square().sum()


def test_no_rotation_of_two_dimensions_does_better() -> None:
    """Against all angles of the plane."""
    generator = torch.Generator().manual_seed(3)
    half = torch.randn(3, 2, 4, generator=generator)
    matrices = half @ half.mT

    def value(rotation: Tensor) -> float:
        return (rotation.T @ matrices @ rotation).diagonal(dim1=1, dim2=2).square().sum().item()

    angles = torch.linspace(0, torch.pi, 721)
    best = max(value(torch.tensor([[c, -s], [s, c]])) for c, s in zip(angles.cos(), angles.sin(), strict=True))
    assert value(joint_diagonaliser(matrices)) >= best - 1e-3 * best


def test_too_few_groups_or_dimensions_are_refused() -> None:
    gradients, _ = planted(50)
    with pytest.raises(MediationError, match="two groups"):
        Readings.learn({"a": gradients["a"]}, width=2)
    with pytest.raises(MediationError, match="span 10 dimensions"):
        Readings.learn(gradients, width=11)
