"""BatchTopK and Matryoshka training steps that touch only the latents that fire.

A dense step costs six products with [batch, d_sae]; of its entries k in d_sae are not zero. Here
1. the threshold that k latents a row pass on average is measured on the first rows of the (shuffled) batch;
   an exact top-k over the whole batch costs more than all products together (after BatchTopK, Bussmann et al. 2024);
2. one dense product, in blocks of rows and in bf16 where asked for, finds which (row, latent) pass it: the pattern;
3. everything else, values, reconstruction and all gradients, are sparse products in fp32 over the pattern;
4. dead latents are revived (Gao et al. 2024) on the first rows alone.
The optimiser, schedules and statistics stay SAELens'.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sae_lens.saes import BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

SAMPLED_ROWS = 256  # rows on which the threshold is measured and dead latents are revived
BLOCK_ROWS = 512  # rows of the dense product held at a time


@dataclass
class Pattern:
    """Which latents fire on which rows: sorted by row, `crow` [rows + 1] as in compressed sparse rows."""

    row: Tensor
    latent: Tensor
    crow: Tensor
    d_sae: int

    @classmethod
    def of(cls, row: Tensor, latent: Tensor, n_rows: int, d_sae: int) -> Pattern:
        return cls(row, latent, _offsets(row, n_rows), d_sae)

    def matrix(self, values: Tensor) -> Tensor:
        """[rows, d_sae] with these values."""
        shape = (len(self.crow) - 1, self.d_sae)
        return torch.sparse_csr_tensor(self.crow, self.latent, values, shape, check_invariants=False)

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order of the pairs by latent, their rows in it, and where each latent's begin: two gradients need it."""
        order = self.latent.argsort(stable=True)
        return order, self.row[order], _offsets(self.latent, self.d_sae)

    def transposed(self, values: Tensor) -> Tensor:
        """[d_sae, rows] with these values."""
        order, row, crow = self._by_latent
        shape = (self.d_sae, len(self.crow) - 1)
        return torch.sparse_csr_tensor(crow, row, values[order], shape, check_invariants=False)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """left[row] . right[:, latent] for every pair; left [rows, d], right [d, d_sae]."""
        empty = self.matrix(left.new_zeros(len(self.row)))
        return torch.sparse.sampled_addmm(empty, left, right, beta=0.0).values()

    def among(self, low: int, high: int) -> tuple[Pattern, Tensor]:
        """The pattern of latents low to high, and the mask of the values that belong to it."""
        mask = (self.latent >= low) & (self.latent < high)
        return Pattern.of(self.row[mask], self.latent[mask], len(self.crow) - 1, self.d_sae), mask


def _offsets(index: Tensor, n: int) -> Tensor:
    return torch.cat([index.new_zeros(1), torch.bincount(index, minlength=n).cumsum(0)])


class Encode(torch.autograd.Function):
    """Pre-activations on a pattern: x [rows, d] @ w [d, d_sae] + b [d_sae] -> [pairs]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.pattern = pattern
        return pattern.products(x, w) + b[pattern.latent]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        pattern = ctx.pattern
        b = torch.zeros_like(w[0]).index_add_(0, pattern.latent, gradient)
        to_x = pattern.matrix(gradient) @ w.T if ctx.needs_input_grad[0] else None
        return to_x, (pattern.transposed(gradient) @ x).T, b, None  # type: ignore[return-value]


class Decode(torch.autograd.Function):
    """Reconstruction from values [pairs] on a pattern: sum of value * w[latent], w [d_sae, d] -> [rows, d]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, w: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, w)
        ctx.pattern = pattern
        return pattern.matrix(values) @ w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        values, w = ctx.saved_tensors
        gradient = gradient.contiguous()
        return ctx.pattern.products(gradient, w.T), ctx.pattern.transposed(values) @ gradient, None


class SparseBatchTopK(BatchTopKTrainingSAE):
    """SAELens' BatchTopK with the steps above."""

    bf16 = False
    threshold: Tensor
    topk_threshold: Tensor
    steps_averaged = 0

    @property
    def widths(self) -> list[int]:
        """Latents up to each of these must reconstruct on their own."""
        return [self.cfg.d_sae]

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        centred = x - self.b_dec
        sample, pattern = self._pattern(centred.detach())
        # The encoder's input is centred on b_dec, whose gradient flows through both encoder and decoder.
        values = Encode.apply(centred, self.W_enc, self.b_enc, pattern).relu()
        out, low, losses = self.b_dec.expand_as(x), 0, {}
        for width in self.widths:
            level, mask = pattern.among(low, width) if len(self.widths) > 1 else (pattern, slice(None))
            out = out + Decode.apply(values[mask], self.W_dec, level)
            losses[f"mse_loss_{width}"] = (out - x).square().sum(dim=1).mean()
            low = width
        few = slice(SAMPLED_ROWS)
        losses["auxiliary_reconstruction_loss"] = self._revival(
            centred[few], (x - out)[few].detach(), step_input.dead_neuron_mask
        )
        self._remember_threshold()
        fired = torch.sparse_coo_tensor(
            torch.stack([pattern.row, pattern.latent]), values.detach(), (len(x), self.cfg.d_sae), is_coalesced=True,
            check_invariants=False,
        )  # fmt: skip
        loss = torch.stack(list(losses.values())).sum()
        return TrainStepOutput(
            sae_in=x, sae_out=out, feature_acts=fired, hidden_pre=sample, loss=loss, losses=losses, metrics={}
        )

    def _revival(self, x: Tensor, residual: Tensor, dead: Tensor | None) -> Tensor:
        """Step 4: SAELens' `calculate_topk_aux_loss`, with the columns of dead latents alone.

        x, residual [rows, d]: centred input and what the others leave over; dead: bool [d_sae].
        """
        index = torch.zeros(0) if dead is None else dead.nonzero()[:, 0]
        if not len(index):
            return x.new_zeros(())
        most = x.shape[1] // 2
        hidden = x @ self.W_enc[:, index] + self.b_enc[index]
        top = hidden.topk(min(most, len(index)), sorted=False)
        acts = torch.zeros_like(hidden).scatter(-1, top.indices, top.values)
        loss = (acts @ self.W_dec[index] - residual).square().sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(index) / most, 1.0) * loss

    @torch.no_grad()
    def _pattern(self, x: Tensor) -> tuple[Tensor, Pattern]:
        """Steps 1 and 2: the pre-activations that the threshold was measured on, and the pattern."""
        dtype = torch.bfloat16 if self.bf16 else x.dtype
        encoder, bias, x = self.W_enc.to(dtype), self.b_enc.to(dtype), x.to(dtype)
        sample = torch.addmm(bias, x[:SAMPLED_ROWS], encoder).float()
        self.threshold = sample.flatten().topk(int(self.cfg.k * len(sample)), sorted=False).values.min().relu()
        found = []
        for start in range(0, len(x), BLOCK_ROWS):
            passed = torch.addmm(bias, x[start : start + BLOCK_ROWS], encoder) > self.threshold
            row, latent = passed.nonzero(as_tuple=True)
            found.append((row + start, latent))
        rows, latents = (torch.cat(parts) for parts in zip(*found, strict=True))
        return sample, Pattern.of(rows, latents, len(x), self.cfg.d_sae)

    @torch.no_grad()
    def _remember_threshold(self) -> None:
        """The threshold at inference: SAELens' moving average, without its bias towards the zero it begins at."""
        self.steps_averaged += 1
        rate = max(self.cfg.topk_threshold_lr, 1 / self.steps_averaged)
        self.topk_threshold = (1 - rate) * self.topk_threshold + rate * self.threshold.double()


class SparseMatryoshka(SparseBatchTopK, MatryoshkaBatchTopKTrainingSAE):
    """SAELens' Matryoshka BatchTopK with the steps above."""

    @property
    def widths(self) -> list[int]:
        return self.cfg.matryoshka_widths
