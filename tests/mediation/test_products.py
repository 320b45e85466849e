"""Products in oneDNN stay single precision, and are given back where they would not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mediation import products
from mediation.products import use_fast_products

MATMUL = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = MATMUL.fp32_precision
    yield
    MATMUL.fp32_precision = before


def test_products_are_single_precision_whatever_was_decided() -> None:
    kept = use_fast_products()
    assert MATMUL.fp32_precision == "bf16" if kept else MATMUL.fp32_precision != "bf16"
    generator = torch.Generator().manual_seed(1)
    for shape in ((7, 300, 20), (1000, 576, 400), (3, 5, 640, 60)):
        x, y = torch.randn(shape[:-1], generator=generator), torch.randn(shape[-2:], generator=generator)
        true = x.double() @ y.double()
        assert ((x @ y) - true).norm() < 3e-6 * true.norm()


def test_a_processor_that_rounds_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = MATMUL.fp32_precision

    def rounding(*shape: int) -> float:
        return 2e-3 if MATMUL.fp32_precision == "bf16" else 1e-7

    monkeypatch.setattr(products, "_error", rounding)
    assert not use_fast_products()
    assert MATMUL.fp32_precision == before
