"""How much of a behaviour a circuit brings about by itself, and how much is left without it; at every size.

1. Faithfulness of a circuit C: (m(C) - m(empty)) / (m(clean) - m(empty)), with m the mean behaviour over prompts and
   everything outside C at its baseline (circuits.ablation). The empty circuit has no node, nor any error node. 1: the
   circuit does what the model does; it may be above 1 or below 0 (Wang et al. 2022; Marks et al. 2024).
2. Completeness is the same ratio for the model without C, all else kept: near 0 where nothing that matters is outside
   the circuit, and 1 where the circuit is not needed (Marks et al. 2024, who plot it so).
3. A ranking of N nodes or edges gives nested circuits, its first k. Sizes are the shares of N of Mueller et al. 2025
   (MIB: .1 % to 100 %), continued downwards in the same steps to a single one.
4. CPR, the circuit performance ratio, is the integral of faithfulness over the share k / N from .001 to 1, and CMD, the
   circuit-model distance, that of |1 - faithfulness|, both by the trapezoid rule (Mueller et al. 2025). Sizes from half
   of all nodes up make up half of either. The logarithmic ones integrate over log k from one node to all, divided
   by its range: a circuit that is perfect at every size has CPR 1 and CMD 0, and sparse circuits count.
5. Intervals: prompts are resampled whole, and every ratio and area is computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mediation.errors import MediationError
from mediation.statistics import Floats

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RESAMPLES = 1000


def sizes(n: int) -> list[int]:
    """Sizes of the circuits of n nodes or edges: 0, 1, ... n, by step 3."""
    if n < 1:
        raise MediationError("There is nothing to make a circuit of; give prompts on which latents change.")
    lower = [share / 1000**power for power in range(1, 1 + math.ceil(math.log(n, 1000))) for share in MIB_SHARES[:-1]]
    found = {round(share * n) for share in (*lower, *MIB_SHARES)}
    return sorted(found | {0, 1, n})


@dataclass(frozen=True)
class Curve:
    """Measured behaviours of one ranking's circuits, in nats.

    sizes [K]: how many of the `of` ranked nodes or edges are kept. circuit, complement [K, prompts]: m of the circuit,
    and of the model without it. clean, empty [prompts].
    """

    name: str
    sizes: Sequence[int]
    of: int
    circuit: Floats
    complement: Floats
    clean: Floats
    empty: Floats

    def faithfulness(self, weights: Floats | None = None) -> Floats:
        """[K], or [draws, K] for `weights` [draws, prompts] of the prompts."""
        return self._ratio(self.circuit, weights)

    def completeness(self, weights: Floats | None = None) -> Floats:
        """[K], or [draws, K]: the same for the model without the circuit."""
        return self._ratio(self.complement, weights)

    def cpr(self, weights: Floats | None = None, *, log: bool = False) -> Any:
        """Circuit performance ratio, a number or [draws]."""
        return self._area(self.faithfulness(weights), log)

    def cmd(self, weights: Floats | None = None, *, log: bool = False) -> Any:
        """Circuit-model distance, a number or [draws]."""
        return self._area(np.abs(1 - self.faithfulness(weights)), log)

    def _ratio(self, measured: Floats, weights: Floats | None) -> Floats:
        if weights is None:
            weights = np.full(len(self.clean), 1 / len(self.clean))
        whole = weights @ (self.clean - self.empty)
        part = weights @ (measured - self.empty).T
        with np.errstate(divide="ignore", invalid="ignore"):
            return part / whole[..., np.newaxis]

    def _area(self, values: Floats, log: bool) -> Any:
        number = np.asarray(self.sizes, dtype=np.float64)
        if not log:
            chosen = number >= max(1, round(MIB_SHARES[0] * self.of))
            return np.trapezoid(values[..., chosen], number[chosen] / self.of, axis=-1)
        chosen = number > 0
        along = np.log(number[chosen])
        if along[-1] == along[0]:  # a single node
            return values[..., -1]
        return np.trapezoid(values[..., chosen], along, axis=-1) / (along[-1] - along[0])


def prompt_weights(n: int, *, seed: int = 0) -> Floats:
    """Weights [RESAMPLES, n] of n prompts drawn with replacement; the same for all curves, which pairs them."""
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return draws / n


def interval(draws: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Percentile interval over axis 0; both ends are nan where a resample has no total effect."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
