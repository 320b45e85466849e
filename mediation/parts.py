"""Parts: what the latents of one prompt add to a site, pooled by meta-latent.

Algorithm, for one prompt and one site
1. Every active latent contributes (f_i - f'_i) w_i, and w_i = b + sum_j z_ij u_j + r_i exactly.
2. Pool over latents: P_j(t) = sum_i (f_i - f'_i) z_ij is meta-latent j's coefficient at position t,
   kept apart for carriers (latents that *are* the fact, cos(w_i, u_j) >= tau) and all others.
3. Screen: A_j = sum_t P_j(t) g(t).u_j with g the path-averaged gradient. This is the linear split
   summed over latents, so meta-latents + bias + residual = the latents' attribution to rounding error.
4. Decide: the Shapley values of the strongest parts (mediation.shapley), measured by taking
   coalitions of parts out of the residual stream and running the model on.

Parts are taken out at all positions of the prompt at once: a fact read at two tokens is one fact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mediation.estimators.common import behaviour
from mediation.metalatents import Decomposition
from mediation.nodes import SiteState
from mediation.prompts import Batch
from mediation.shapley import Shapley, shapley
from mediation.subject import SubjectModel

PATCH_ELEMENTS = 2**25  # numbers in the patches of one forward (128 MiB)


@dataclass
class PooledParts:
    """The latents' difference at one site, by meta-latent. R rows (a prompt's examples), T positions.

    `coefficient` and `carried` [R, T, n_meta]: P_j through non-carriers and through carriers;
    `bias` [R, T, d] and `residual` [R, T, d]: what the meta-latents do not explain;
    `carrier_on` [n_meta]: whether a carrier of j is active on the clean prompt.
    """

    directions: Tensor
    coefficient: Tensor
    carried: Tensor
    bias: Tensor
    residual: Tensor
    carrier_on: Tensor

    def screen(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """A_j through non-carriers and through carriers, each [n_meta]; `gradient` is [R, T, d]."""
        onto = gradient @ self.directions.T
        return (self.coefficient * onto).sum(dim=(0, 1)), (self.carried * onto).sum(dim=(0, 1))

    def hidden(self, meta: int) -> Tensor:
        """What meta-latent `meta` adds through non-carriers, [R, T, d]."""
        return self.coefficient[..., meta, None] * self.directions[meta]

    def whole(self, meta: int) -> Tensor:
        """What meta-latent `meta` adds through non-carriers and carriers, [R, T, d]."""
        return (self.coefficient + self.carried)[..., meta, None] * self.directions[meta]

    def rest(self, metas: list[int]) -> Tensor:
        """What all other meta-latents add, [R, T, d]."""
        coefficient = self.coefficient + self.carried
        coefficient[..., metas] = 0.0
        return coefficient @ self.directions


def pooled_parts(state: SiteState, decomposition: Decomposition, carrier_cosine: float) -> PooledParts:
    """Steps 1 and 2. `state` holds the rows of one prompt."""
    used, index = state.latent.unique(return_inverse=True)
    rows = state.dictionary.decoder[used]
    parts = decomposition.decompose(rows, used)
    carrier = rows @ decomposition.directions.T >= carrier_cosine
    n_rows, n_positions = state.free.shape
    flat = state.row * n_positions + state.position

    def pool(values: Tensor) -> Tensor:
        """sum_i delta_i values_i at every position; values [n_used, m] -> [R, T, m]."""
        weights = torch.sparse_coo_tensor(
            torch.stack([flat, index]), state.delta, (n_rows * n_positions, len(used)), check_invariants=True
        )
        return (weights @ values).view(n_rows, n_positions, -1)

    clean_on = torch.zeros(len(used), dtype=torch.bool, device=rows.device)
    clean_on[index[state.clean != 0]] = True
    return PooledParts(
        decomposition.directions,
        pool(torch.where(carrier, 0.0, parts.codes)),
        pool(torch.where(carrier, parts.codes, 0.0)),
        pool(parts.bias.expand_as(rows).contiguous()),
        pool(parts.residual),
        (carrier & clean_on[:, None]).any(dim=0),
    )


class Surgeon:
    """Takes patches out of one prompt's residual stream at one site and measures the behaviour's loss."""

    def __init__(self, model: SubjectModel, batch: Batch, state: SiteState, chunk: int) -> None:
        self.model, self.batch, self.site = model, batch, state.dictionary.site
        size = batch.clean.numel() * model.d_model
        self.chunk = max(1, min(chunk // len(batch), PATCH_ELEMENTS // size))
        self.clean = behaviour(model, batch).sum()

    def effect(self, patches: Tensor) -> Tensor:
        """m(clean) - m(x - patch) for every patch; patches [S, R, T, d] -> [S]."""
        return torch.cat([self._effect(part) for part in patches.split(self.chunk)])

    def effect_of_coalitions(self, masks: Tensor, parts: Tensor) -> Tensor:
        """Effect of taking out the parts each mask names; masks [S, n], parts [n, R, T, d] -> [S]."""
        flat = parts.flatten(1)
        effects = [self._effect((mask.to(flat) @ flat).view(-1, *parts.shape[1:])) for mask in masks.split(self.chunk)]
        return torch.cat(effects)

    def _effect(self, patches: Tensor) -> Tensor:
        n = len(patches)
        rows = torch.arange(len(self.batch), device=patches.device).repeat(n)
        m = behaviour(self.model, self.batch.rows(rows), {self.site: lambda x: x - patches.flatten(0, 1)})
        return self.clean - m.view(n, -1).sum(dim=1)


def shapley_split(surgeon: Surgeon, pooled: PooledParts, metas: list[int], *, permutations: int, seed: int) -> Shapley:
    """Step 4: values of the parts [*metas, other meta-latents, bias, residual], in that order.

    They sum to the exact effect of all latents of the site.
    """
    parts = torch.stack([*map(pooled.whole, metas), pooled.rest(metas), pooled.bias, pooled.residual])
    return shapley(
        lambda masks: surgeon.effect_of_coalitions(masks, parts),
        len(parts),
        permutations=permutations,
        seed=seed,
    )
