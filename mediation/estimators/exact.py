"""Activation patching of single nodes: the effect that the other estimators estimate.

Algorithm
1. For node i at (row, position): x <- x - (f_i - f'_i) w_i there; for an error node x <- x - (eps - eps').
2. Run the model onwards, from a residual site on, and take m(clean) - m(patched). Nodes of any rows share a forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mediation.estimators.common import EstimatorSettings, NodeScores, behaviour
from mediation.nodes import SiteState
from mediation.prompts import Batch
from mediation.sites import RESIDUAL
from mediation.subject import SubjectModel


def exact(
    model: SubjectModel, batch: Batch, states: Sequence[SiteState], settings: EstimatorSettings
) -> list[NodeScores]:
    """Measured effect of every latent node and every free error node of the states (see `SiteState.subset`)."""
    clean = behaviour(model, batch)
    results = []
    for state in states:
        error_row, error_position = state.free.nonzero(as_tuple=True)
        rows = torch.cat([state.row, error_row])
        positions = torch.cat([state.position, error_position])
        effects = []
        for part in torch.arange(len(rows), device=rows.device).split(settings.chunk) if len(rows) else ():
            patch = _patch(state, part, error_row, error_position)
            effects.append(clean[rows[part]] - _patched(model, batch, state, rows[part], positions[part], patch))
        effect = torch.cat(effects) if effects else torch.zeros(0, device=rows.device)
        n = len(state.row)
        error = torch.zeros_like(state.free, dtype=torch.float32)
        error[error_row, error_position] = effect[n:]
        results.append(NodeScores(effect[:n], error))
    return results


def _patch(state: SiteState, part: Tensor, error_row: Tensor, error_position: Tensor) -> Tensor:
    """What each node of `part` adds to the residual over its baseline, [len(part), d]."""
    n = len(state.row)
    latents = part[part < n]
    errors = part[part >= n] - n
    return torch.cat(
        [
            state.delta[latents].unsqueeze(1) * state.decoder[state.index[latents]],
            state.error[error_row[errors], error_position[errors]],
        ]
    )


def _patched(
    model: SubjectModel, batch: Batch, state: SiteState, rows: Tensor, positions: Tensor, patch: Tensor
) -> Tensor:
    """The behaviour with one node per sequence set to its baseline, [len(rows)]."""
    index, site = torch.arange(len(rows), device=rows.device), state.dictionary.site
    patched = state.x[rows].index_put((index, positions), -patch, accumulate=True)
    start = site if site.stream in RESIDUAL else None
    return behaviour(model, batch.rows(rows), {site: lambda _: patched}, start=start)
