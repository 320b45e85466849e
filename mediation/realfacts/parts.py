"""The difference between two entities at one site, taken apart, and what each part does to the answer.

For a pair of entities with residuals x and x' at the entity's token, latents f and f', decoder rows w_i:
1. x - x' = sum_i (f_i - f'_i) w_i + error, and w_i = b + sum_j z_ij u_j + r_i exactly, so that
   x - x' = sum_j P_j u_j + bias + residual + error with P_j = sum_i (f_i - f'_i) z_ij.
2. The effect of a part p is margin(x) - margin(x - p), measured. The effect of the whole difference over the total
   effect is what the entity's token carries.
3. Screen: P_j g.u_j with g the gradient averaged along the path from x' to x. Only the strongest parts by the screen,
   over all questions of the pair, are measured one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mediation.dictionaries import Dictionary
from mediation.metalatents import Decomposition
from mediation.realfacts.asking import Asked, Pairs, spread

CLEAR = 1.2  # times its fair share of what is read of a part, from which a question has it in its pool


@dataclass
class PairParts:
    """n pairs' differences by part: whole, latents, error, bias, residual [n, d]; coefficient [n, m] along unit
    directions [m, d]. latents = coefficient @ directions + bias + residual; whole = latents + error.
    """

    whole: Tensor
    latents: Tensor
    error: Tensor
    coefficient: Tensor
    directions: Tensor
    bias: Tensor
    residual: Tensor

    def parts(self, chosen: Tensor) -> Tensor:
        """The chosen parts [n, k] as vectors [n, k, d]."""
        return self.coefficient.gather(1, chosen)[..., None] * self.directions[chosen]

    def only(self, kept: Tensor) -> Tensor:
        """Sum of the parts that `kept` [n, m] or [m] marks, [n, d]."""
        return (self.coefficient * kept) @ self.directions


def latent_parts(dictionary: Dictionary, x: Tensor, other: Tensor) -> PairParts:
    """Step 1 with every latent a part of its own; x and other [n, d]."""
    coefficient = dictionary.encode(x) - dictionary.encode(other)
    latents, whole = coefficient @ dictionary.decoder, x - other
    nothing = torch.zeros_like(whole)
    return PairParts(whole, latents, whole - latents, coefficient, dictionary.decoder, nothing, nothing)


def average_parts(dictionary: Dictionary, x: Tensor, reference: Tensor) -> PairParts:
    """The same against the average of entities `reference` [m, d]: mean residual, mean values of latents."""
    coefficient = dictionary.encode(x) - dictionary.encode(reference).mean(0)
    latents, whole = coefficient @ dictionary.decoder, x - reference.mean(0)
    nothing = torch.zeros_like(whole)
    return PairParts(whole, latents, whole - latents, coefficient, dictionary.decoder, nothing, nothing)


def meta_parts(latents: PairParts, decomposition: Decomposition) -> PairParts:
    """Step 1 for the latents of `latent_parts`; a row that is one of the directions is not used for itself."""
    used = latents.coefficient.any(0).nonzero()[:, 0]
    delta = latents.coefficient[:, used]
    parts = decomposition.decompose(latents.directions[used], used)
    return PairParts(
        latents.whole,
        latents.latents,
        latents.error,
        delta @ parts.codes,
        decomposition.directions,
        delta.sum(1, keepdim=True) * parts.bias,
        delta @ parts.residual,
    )


def effects(asked: Asked, pairs: Pairs, question: str, patches: Tensor) -> Tensor:
    """Step 2: margin lost when patches [n, k, d] are taken out of the clean entities, [n, k]; NaN for pairs that the
    question is not asked of.
    """
    where = pairs.asked[question]
    here, patches = pairs.only(where), patches[where]
    n, k, _ = patches.shape
    right, wrong = here.right[question], here.wrong[question]
    x = asked.x[here.clean]
    clean = asked.margin(here.clean, x, right, wrong)
    pair = torch.arange(n, device=x.device).repeat_interleave(k)
    patched = asked.margin(here.clean[pair], x[pair] - patches.flatten(0, 1), right[pair], wrong[pair])
    return spread(clean[:, None] - patched.view(n, k), where)


def screen(split: PairParts, gradient: Tensor) -> Tensor:
    """Step 3: first-order effects [n, m] for path gradients [n, d]."""
    return split.coefficient * (gradient @ split.directions.T)


def strongest(screens: Mapping[str, Tensor], totals: Mapping[str, Tensor], k: int) -> Tensor:
    """Step 3: the k parts of each pair that matter most to its questions, relative to their total effects, [n, k].

    screens [n, m] and totals [n] by question, NaN where it is not asked.
    """
    size = torch.stack([screens[q].abs() / totals[q].abs()[:, None] for q in screens]).nansum(0)
    return size.topk(min(k, size.shape[1]), dim=1).indices
