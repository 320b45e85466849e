"""A behaviour: one number per prompt that says how strongly the model does the thing under study.

1. Log-probability of a continuation a_1..a_L of a prompt of n tokens (chain rule):
   log p(a | prompt) = sum_k log softmax(logits at position n-1+k-1)[a_k].
2. Logit difference: m = log p(answer | prompt) - log p(wrong answer | prompt). When both are one token they
   are read at one position and the normaliser cancels, so m = logit[answer] - logit[wrong] exactly
   (Wang et al. 2022, Interpretability in the Wild).
3. Both are sums over targets (position, token, sign), which `mediation.prompts.tokenize` writes down and
   `score` evaluates: m = sum_k sign_k * log p(token_k at position_k). A normaliser enters with the sum of the
   signs at its position, hence not at all where they sum to zero.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mediation.prompts import Batch


class Behaviour(StrEnum):
    """What is measured on each prompt."""

    LOGIT_DIFF = "logit_diff"
    """log p(answer) - log p(wrong answer): says why this answer and not that one. The default."""
    LOGPROB = "logprob"
    """log p(answer): also moved by everything that lowers or raises all other words."""


def keep_positions(batch: Batch) -> Tensor:
    """Positions whose logits `score` needs: sorted, unique, LongTensor [n_keep]."""
    return batch.target_positions[batch.target_signs != 0].unique(sorted=True)


def score(logits: Tensor, batch: Batch, kept: Tensor) -> Tensor:
    """The behaviour of each example, in nats, fp32 and differentiable.

    logits [B, n_keep, vocab] are the model's outputs at the positions `kept` [n_keep] (sorted; every target
    position is among them, as in `keep_positions`). Returns [B]; a prompt's behaviour is the sum over its
    examples.
    """
    logits = logits.float()
    column = torch.searchsorted(kept, batch.target_positions)
    row = torch.arange(len(logits), device=logits.device).unsqueeze(1)
    picked = logits[row, column, batch.target_tokens]
    # `where`, because a padded target may pick a logit of -inf and 0 * -inf is nan.
    picked = torch.where(batch.target_signs != 0, picked, torch.zeros_like(picked))
    scores = (picked * batch.target_signs).sum(1)

    net_sign = torch.zeros(logits.shape[:2], device=logits.device).scatter_add_(1, column, batch.target_signs)
    if net_sign.any():
        rows, columns = net_sign.nonzero(as_tuple=True)
        normaliser = logits[rows, columns].logsumexp(-1) * net_sign[rows, columns]
        scores = scores.index_add(0, rows, -normaliser)
    return scores
