"""Meta-latents of what is read: directions of the residual that some questions read and others do not.

A decoder row says what a latent writes; a fact is used when something reads it. A meta-SAE divides rows by what they
share with each other, and most of what the model goes on to use can end in its residual. Here rows are divided by what
groups of prompts read of them. Needs gradients at the place where the latents sit, for prompts in groups (the question
asked), and no labels of facts.

1. For each group q the second moment of its gradients, M_q = E[g g^T], scaled to trace 1; M = sum_q M_q.
2. The reading space: the `width` leading eigenvectors of M. What lies outside is the residual.
3. Whiten gradients there, and rotate so that all M_q become as diagonal as they can at once: maximise
   sum_q sum_j (R_j^T M_q R_j)^2 (joint approximate diagonalisation, Cardoso and Souloumiac 1996). The objective is
   convex in R, so that moving to the polar factor of its gradient never lowers it (Journee et al. 2010). Best of
   several starts.
4. In these coordinates s_j = g.u_j are uncorrelated within every group as far as possible. Directions u_j [d], and
   readers v_j with v_j.u_k = 1 where j = k, else 0: a row is w = sum_j (v_j.w) u_j + residual, linear in w, signed.
5. `use` [n_meta, n_groups]: R_j^T M_q R_j as a share of its sum over groups: who reads direction j.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mediation.errors import MediationError
from mediation.metalatents import Decomposition

STARTS, ROUNDS = 3, 500
SETTLED = 1e-6  # relative gain of the objective in a round at which it stops


class Readings(Decomposition):
    """Directions learned from gradients.

    directions [n_meta, d] of unit norm, readers [n_meta, d], bias [d] (zero), groups, use [n_meta, n_groups].
    """

    def __init__(self, directions: Tensor, readers: Tensor, use: Tensor, groups: tuple[str, ...]) -> None:
        size = directions.norm(dim=1, keepdim=True)
        self.directions, self.readers = directions / size, readers * size
        self.bias = torch.zeros_like(directions[0])
        self.use, self.groups = use, groups

    @classmethod
    def learn(cls, gradients: Mapping[str, Tensor], *, width: int, seed: int = 0, starts: int = STARTS) -> Readings:
        """Steps 1 to 5 on gradients [n, d] by group; width: number of meta-latents."""
        moments, whiten = reading_space(gradients, width)
        rotation = joint_diagonaliser(torch.stack([whiten.T @ moment @ whiten for moment in moments]), seed, starts)
        return cls.of(whiten @ rotation, moments, tuple(gradients))

    @classmethod
    def of(cls, columns: Tensor, moments: Tensor, groups: tuple[str, ...]) -> Readings:
        """Steps 4 and 5 for independent directions, the columns of [d, n_meta], and moments [n_groups, d, d]."""
        power = torch.einsum("dj,qde,ej->jq", columns, moments, columns)
        readers = torch.linalg.pinv(columns.double()).to(columns)
        return cls(columns.T.contiguous(), readers, power / power.sum(1, keepdim=True), groups)

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        """Codes [n, n_meta], of either sign; `own` has no meaning here."""
        return rows.to(self.readers) @ self.readers.T


def reading_space(gradients: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2: moments [n_groups, d, d] of trace 1, and W [d, width] so that W^T M W is the identity."""
    if len(gradients) < 2:
        raise MediationError("What questions read is told apart from two groups of prompts on; give more groups.")
    moments = torch.stack([each.T @ each / each.square().sum() for each in map(Tensor.double, gradients.values())])
    power, axes = torch.linalg.eigh(moments.sum(0))
    rank = int((power > 1e-9 * power[-1]).sum())
    if not 1 <= width <= rank:
        raise MediationError(f"These gradients span {rank} dimensions, and {width} were asked for; give fewer.")
    return moments.float(), (axes[:, -width:] / power[-width:].sqrt()).float()


def rotated_readings(gradients: Mapping[str, Tensor], width: int, generator: torch.Generator) -> Readings:
    """The null of `Readings.learn`: the same space, whitened alike, turned at random."""
    moments, whiten = reading_space(gradients, width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return Readings.of(whiten @ turn, moments, tuple(gradients))


def joint_diagonaliser(matrices: Tensor, seed: int = 0, starts: int = STARTS) -> Tensor:
    """Step 3: the rotation R [k, k] that makes R^T A R as diagonal as it can for all symmetric A in [n, k, k]."""
    generator = torch.Generator().manual_seed(seed)
    best, best_value = None, -torch.inf
    for _ in range(starts):
        rotation = torch.linalg.qr(torch.randn(matrices.shape[1:], generator=generator).to(matrices)).Q
        value = -torch.inf
        for _ in range(ROUNDS):
            moved = matrices @ rotation
            diagonal = (rotation * moved).sum(1)  # [n, k]
            before, value = value, float(diagonal.square().sum())
            if value - before <= SETTLED * value:
                break
            u, _, v = torch.linalg.svd((moved * diagonal[:, None]).sum(0))
            rotation = u @ v
        if value > best_value:
            best, best_value = rotation, value
    assert best is not None
    return best
