"""Single-precision matrix products at the processor's speed.

PyTorch's CPU builds hand fp32 products to MKL, which keeps to half-width vectors on processors that are not Intel's.
oneDNN, in the same builds, does not: 500 against 200 GFLOP/s at [1024, 576] x [576, 1536] on 2 cores of an AMD EPYC.
PyTorch turns to it only where bf16 arithmetic is allowed inside fp32 products. On processors without matrix tiles
oneDNN has no use for that permission and computes in fp32; on others it would round.

1. Give the permission.
2. Compare products of several shapes with their fp64 values. Where any is worse than fp32 can be, take it back.
"""

from __future__ import annotations

import torch

SHAPES = ((1, 64, 64), (32, 512, 96), (512, 768, 256))  # rows, summed over, columns
WORST = 2e-6  # relative error, in the norm: fp32 has 1e-7 to 5e-7 here, bf16 2e-3


def use_fast_products() -> bool:
    """Let fp32 products on this process's CPU run through oneDNN, if they stay fp32 there; whether they do."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    exact = all(_error(*shape) < WORST for shape in SHAPES)
    if not exact:
        matmul.fp32_precision = before
    return exact


def _error(rows: int, inner: int, columns: int) -> float:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    true = x.double() @ y.double()
    return float(((x @ y) - true).norm() / true.norm())
