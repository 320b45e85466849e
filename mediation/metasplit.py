"""The linear meta split of a run: every latent's attribution, divided over its meta-latents.

A_i = (f_i - f'_i) g.w_i and w_i = b + sum_j z_ij u_j + r_i, so A_i = parts + bias + residual exactly
(DESIGN 3.4). g is the path-averaged gradient, so that the parts add up to the run's `ig` attribution.
Arithmetic is in double precision; the largest relative error met is recorded in the run.
"""

from __future__ import annotations

import polars as pl
import torch

from mediation.dictionaries import Dictionary
from mediation.estimators.integrated_gradients import path_gradient
from mediation.metalatents import Decomposition, LinearSplit, Parts, linear_split
from mediation.nodes import SiteState, site_states
from mediation.prompts import Batch
from mediation.runs import Run
from mediation.subject import SubjectModel
from mediation.trace import Prepared, TraceSettings

NODES = 4096  # nodes split at a time: bounds the [nodes, n_meta] block


def meta_split(
    model: SubjectModel,
    dictionary: Dictionary,
    decomposition: Decomposition,
    prepared: Prepared,
    run: Run,
    settings: TraceSettings,
) -> float:
    """Write meta/ shards (prompt, position, latent, meta, attribution; meta -1 = bias, -2 = residual).

    Returns the largest |sum of parts - attribution| / |attribution| over all nodes.
    """
    worst = 0.0
    with run.timed("meta split"):
        for number, batch in enumerate(prepared.batches):
            (state,) = site_states(model, batch, [dictionary], settings.baseline, prepared.means)
            gradient = path_gradient(model, batch, state, settings.steps).double()
            tables = []
            for nodes in torch.arange(len(state.row), device=state.row.device).split(NODES):
                part = state.subset(nodes, state.free)
                split, error = split_nodes(part, gradient, decomposition)
                worst = max(worst, error)
                tables.append(_table(split, part, batch, prepared))
            run.write_shard("meta", f"{number:05d}", pl.concat(tables))
    return worst


def split_nodes(state: SiteState, gradient: torch.Tensor, decomposition: Decomposition) -> tuple[LinearSplit, float]:
    """The split of a state's nodes, and its largest error relative to the node's attribution."""
    used, index = state.latent.unique(return_inverse=True)
    rows = state.dictionary.decoder[used]
    directions, bias = decomposition.directions.double(), decomposition.bias.double()
    codes = decomposition.codes(rows, used).double()
    residual = rows.double() - codes @ directions - bias
    g, delta = gradient[state.row, state.position], state.delta.double()
    split = linear_split(delta, g, Parts(codes[index], bias, residual[index]), directions)
    whole = delta * (g * rows[index].double()).sum(dim=1)
    total = split.meta.sum(dim=1) + split.bias + split.residual
    moved = whole != 0
    error = ((total - whole).abs() / whole.abs())[moved]
    return split, float(error.max()) if len(error) else 0.0


def _table(split: LinearSplit, state: SiteState, batch: Batch, prepared: Prepared) -> pl.DataFrame:
    node, meta = split.meta.nonzero(as_tuple=True)
    every = torch.arange(len(state.row), device=node.device)
    nodes = torch.cat([node, every, every])
    kinds = torch.cat([meta, torch.full_like(every, -1), torch.full_like(every, -2)])
    values = torch.cat([split.meta[node, meta], split.bias, split.residual])
    prompts = [prepared.prompts[example.prompt].id for example in batch.examples]
    return pl.DataFrame(
        {
            "prompt": [prompts[row] for row in state.row[nodes].tolist()],
            "position": state.position[nodes].cpu().numpy(),
            "latent": state.latent[nodes].cpu().numpy(),
            "meta": kinds.cpu().numpy(),
            "attribution": values.cpu().numpy(),
        }
    )
