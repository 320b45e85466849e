"""Shapley values of a measured effect: divides it over parts so that the shares sum to the whole.

Shapley (1953). Few parts are done exactly; many by sampled orders in antithetic pairs, an order and its
reverse (Mitchell et al., "Sampling permutations for Shapley value estimation", JMLR 2022).

Exact, n parts:
1. Evaluate all 2^n coalitions in one call.
2. share_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (value(S + i) - value(S)).

Sampled:
1. Draw orders in pairs; along each order add the parts one at a time.
2. Evaluate the distinct coalitions met, in one call.
3. An order gives each part the change at its entry. These changes telescope, so every order, and their
   mean, sums to value(all) - value(none).
4. The spread over pairs gives the standard error; the two orders of a pair are not independent, pairs are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from mediation.errors import MediationError

MAX_EXACT = 6  # parts up to which all 2^n coalitions are measured


@dataclass
class Shapley:
    """values and stderr [n_parts, ...], in units of the effect; stderr is 0 where values are exact."""

    values: Tensor
    stderr: Tensor


def shapley(
    value: Callable[[Tensor], Tensor],
    n_parts: int,
    *,
    max_exact: int = MAX_EXACT,
    permutations: int = 32,
    seed: int = 0,
) -> Shapley:
    """Divide value(all) - value(none) over the parts.

    value takes coalitions as booleans [s, n_parts], distinct and all the needed ones at once (chunk inside
    it), and returns their effects [s, ...]. Up to `max_exact` parts take 2^n_parts coalitions; more take
    `permutations` orders (even, at least 4).
    """
    if n_parts < 1:
        raise MediationError("There is nothing to divide the effect over; give at least one part.")
    if n_parts <= max_exact:
        return _exact(value, n_parts)
    if permutations < 4 or permutations % 2:
        raise MediationError(f"Sampled orders come in pairs, two at least; give 4, 6, ... and not {permutations}.")
    return _sampled(value, n_parts, permutations, seed)


def _exact(value: Callable[[Tensor], Tensor], n: int) -> Shapley:
    masks = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1 == 1
    effects = value(masks)
    size = masks.sum(1).tolist()
    # A coalition enters share_i with a plus as S + i when i is in it, and with a minus as S when not.
    joined = torch.tensor([1 / (n * comb(n - 1, s - 1)) if s else 0.0 for s in size], dtype=torch.float64)
    absent = torch.tensor([1 / (n * comb(n - 1, s)) if s < n else 0.0 for s in size], dtype=torch.float64)
    weights = torch.where(masks.T, joined, -absent).to(effects.device)
    values = torch.tensordot(weights, effects.double(), dims=1).to(effects.dtype)
    return Shapley(values, torch.zeros_like(values))


def _sampled(value: Callable[[Tensor], Tensor], n: int, permutations: int, seed: int) -> Shapley:
    generator = torch.Generator().manual_seed(seed)
    forward = torch.stack([torch.randperm(n, generator=generator) for _ in range(permutations // 2)])
    orders = torch.stack([forward, forward.flip(1)], dim=1)  # [pairs, 2, n]
    entry = orders.argsort(-1)  # when each part enters
    steps = torch.arange(n + 1)
    met = entry[..., None, :] < steps[:, None]  # [pairs, 2, n + 1, n]
    masks, index = met.flatten(0, 2).unique(dim=0, return_inverse=True)

    effects = value(masks)
    along = effects.double()[index.view(met.shape[:-1]).to(effects.device)]  # [pairs, 2, n + 1, ...]
    changes = along.diff(dim=2)
    where = entry.to(effects.device).view(*entry.shape, *[1] * (changes.dim() - 3)).expand_as(changes)
    pairs = changes.gather(2, where).mean(1)  # [pairs, n, ...]
    stderr = pairs.std(0) / len(pairs) ** 0.5
    return Shapley(pairs.mean(0).to(effects.dtype), stderr.to(effects.dtype))
