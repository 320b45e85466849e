"""What the estimators share: the behaviour's value, its gradient at sites, and the sparse contraction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mediation.behaviours import keep_positions, score
from mediation.dictionaries import Dictionary
from mediation.nodes import MeanState, SiteState, site_states
from mediation.prompts import Baseline, Batch
from mediation.sites import Site
from mediation.subject import Prefix, SubjectModel

Edits = Mapping[Site, Callable[[Tensor], Tensor]]
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


@dataclass(frozen=True)
class EstimatorSettings:
    """Settings of all estimators: `steps` of the path integral, `chunk` sequences a forward in `exact`."""

    steps: int = 10
    chunk: int = 64


@dataclass
class NodeScores:
    """Attribution of a state's nodes: `latents` [n], in the state's order, and `error` [B, T]."""

    latents: Tensor
    error: Tensor

    def per_row(self, state: SiteState) -> Tensor:
        """Sum over a row's latents and errors, [B]: what conservation compares with the total effect."""
        total = torch.zeros(len(state.x), dtype=torch.float64, device=state.x.device)
        total.index_add_(0, state.row, self.latents.double())
        return total + self.error.double().sum(dim=1)


def behaviour(
    model: SubjectModel, batch: Batch, edit: Edits | None = None, *, corrupt: bool = False, start: Site | None = None
) -> Tensor:
    """The behaviour m of every row, [B], fp32, with the sites in `edit` rewritten; `start` as in `forward`."""
    tokens = batch.corrupt if corrupt else batch.clean
    assert tokens is not None  # tokenize() has refused prompts without a corrupt side
    kept = keep_positions(batch)
    with torch.no_grad():
        logits = model.forward(tokens, batch.mask, edit=edit, positions=kept, start=start).logits
        assert logits is not None
        return score(logits, batch, kept)


def behaviour_gradient(
    model: SubjectModel,
    batch: Batch,
    sites: Sequence[Site],
    edit: Edits | None = None,
    *,
    start: Site | None = None,
    prefix: Prefix | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """m [B] and its gradient [B, T, d] at each site, from one forward and one backward.

    Rows are independent sequences, so the gradient of the sum over rows is each row's own. `start` and `prefix` are
    what `SubjectModel.forward` may pass over; edits and gradients are then of the positions after the prefix.
    """
    kept = keep_positions(batch)
    begin = 0 if prefix is None else prefix.length
    forward = model.forward(
        batch.clean[:, begin:],
        batch.mask,
        read=sites,
        edit=edit,
        positions=kept - begin,
        start=start,
        prefix=prefix,
        grad=True,
    )
    assert forward.logits is not None
    m = score(forward.logits, batch, kept)
    gradients = torch.autograd.grad(m.sum(), [forward.sites[site] for site in sites])
    return m.detach(), list(gradients)


def states_and_gradients(
    model: SubjectModel,
    batch: Batch,
    dictionaries: Sequence[Dictionary],
    baseline: Baseline,
    means: dict[str, MeanState] | None = None,
) -> tuple[list[SiteState], list[Tensor]]:
    """`site_states` and the behaviour's gradients [B, T, d] there, from the same forward pass of the clean prompts.

    With `contract`, the cheapest node attribution: one forward and one backward pass, one more forward with corrupt
    prompts, and the dictionaries' encoders.
    """
    sites = [dictionary.site for dictionary in dictionaries]
    kept = keep_positions(batch)
    read = [*sites, *(dictionary.reads for dictionary in dictionaries)]
    forward = model.forward(batch.clean, batch.mask, read=read, positions=kept, grad=True)
    assert forward.logits is not None
    m = score(forward.logits, batch, kept)
    gradients = torch.autograd.grad(m.sum(), [forward.sites[site] for site in sites])
    clean = {site: value.detach() for site, value in forward.sites.items()}
    return site_states(model, batch, list(dictionaries), baseline, means, clean), list(gradients)


def contract(state: SiteState, gradient: Tensor) -> NodeScores:
    """A_i = (f_i - f'_i) g.w_i for every node and (eps - eps').g for every error node.

    The products are those of a [positions, rows] matrix at the nodes alone, so that neither gradients nor decoder rows
    are copied for each node.
    """
    place = state.row * gradient.shape[1] + state.position
    order = torch.argsort(place * len(state.decoder) + state.index)
    column, flat = state.index[order], gradient.flatten(0, 1)
    starts = torch.searchsorted(place[order], torch.arange(len(flat) + 1, device=place.device))
    shape = (len(flat), len(state.decoder))
    nodes = torch.sparse_csr_tensor(starts, column, torch.zeros_like(state.delta), shape, check_invariants=False)
    latents = torch.empty_like(state.delta)
    latents[order] = torch.sparse.sampled_addmm(nodes, flat, state.decoder.T, beta=0.0).values()
    latents *= state.delta
    return NodeScores(latents, torch.einsum("btd,btd->bt", state.error, gradient))
