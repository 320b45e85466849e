"""Total, direct and indirect effects of mediators (Pearl 2001; Vig et al. 2020), measured.

The treatment is the clean prompt, the control its baseline; the mediator M is a set of nodes.

    TE  = m(clean) - m(baseline)
    TIE = m(clean) - m(clean, M as in baseline)      what is lost without the mediator
    NIE = m(baseline, M as in clean) - m(baseline)   what the mediator alone brings about
    NDE = m(clean, M as in baseline) - m(baseline) = TE - TIE

For the corrupt baseline, m(baseline) is the corrupt prompt's own run. For zero and mean it is the
clean run with the whole site, latents and error, set to its baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mediation.estimators.common import behaviour
from mediation.nodes import SiteState
from mediation.prompts import Baseline, Batch
from mediation.subject import SubjectModel


@dataclass
class Effects:
    """Effects in nats: `te` [B] of every row, the others [B, k] of every row and mediator."""

    te: Tensor
    tie: Tensor
    nie: Tensor
    nde: Tensor


def total_effect(model: SubjectModel, batch: Batch, state: SiteState, baseline: Baseline) -> tuple[Tensor, Tensor]:
    """m(clean) and m(baseline), each [B]."""
    clean = behaviour(model, batch)
    return clean, _at_baseline(model, batch, state, baseline, torch.zeros_like(state.x))


def effects(
    model: SubjectModel, batch: Batch, state: SiteState, baseline: Baseline, mediators: Sequence[Tensor]
) -> Effects:
    """Effects of each mediator, given as indices [<= n] into the state's nodes (all of them move together)."""
    clean, off = total_effect(model, batch, state, baseline)
    te = clean - off
    tie, nie = [], []
    for nodes in mediators:
        patch = torch.zeros_like(state.x)
        rows = state.delta[nodes, None] * state.decoder[state.index[nodes]]
        patch.index_put_((state.row[nodes], state.position[nodes]), rows, accumulate=True)
        tie.append(clean - behaviour(model, batch, {state.dictionary.site: patch.neg().add}))
        nie.append(_at_baseline(model, batch, state, baseline, patch) - off)
    indirect = torch.stack(tie, dim=1) if tie else te.new_zeros(len(te), 0)
    return Effects(te, indirect, torch.stack(nie, dim=1) if nie else indirect, te[:, None] - indirect)


def _at_baseline(model: SubjectModel, batch: Batch, state: SiteState, baseline: Baseline, added: Tensor) -> Tensor:
    site = state.dictionary.site
    if baseline is Baseline.CORRUPT:
        return behaviour(model, batch, {site: lambda x: x + added}, corrupt=True)
    where = state.free.unsqueeze(-1)
    return behaviour(model, batch, {site: lambda x: torch.where(where, state.baseline_x, x) + added})
