"""The graph measured: a sample is patched exactly, and compared with what the graph says and what it left out.

Algorithm, for the edge from u to d
1. Hold every source's site at its clean value, as the edge's definition does; at u's site take away u's change
   (f_u - f'_u) w_u, at u's position only.
2. Run the model, as it is, to d's place: d's value there has moved by what the paths from u to d, and no
   others, carry. The clean value minus the moved one is the exact edge.
3. The sample is stratified by |edge|, so that small edges are in it; many patches share a forward.
Source: path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023), between latents.

Algorithm of `missed_important`, for nodes
1. The run's sample of patched nodes: in it are all nodes of all sizes with nearly the same chance, since its
   strata are equal parts of each batch. Only latents, and only evaluation prompts: the graph's latents were chosen
   on the others.
2. A node is kept when its (site, role, latent) is in the graph. It is important when its exact |effect| is at
   least the median of that of all kept ones. Of K kept and L left-out nodes, with a share p of the latter
   important, the graph misses p L of p L + K / 2 important nodes.
3. The median is not known, but the sample says what it is at least: an order statistic of the kept ones. How many
   of the left-out ones reach that bounds p (Clopper and Pearson 1934). Each may be wrong in 2.5 % of samples, so
   that the bound on the share missed is wrong in at most 5 %.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from scipy import stats
from torch import Tensor

from circuits.edges import Edges, Plan, Targets
from mediation.prompts import Batch
from mediation.statistics import share_at_most, stratified_sample
from mediation.subject import SubjectModel

LEVEL = 0.95  # of the bound on what a graph misses


def exact_edges(
    model: SubjectModel, batch: Batch, targets: Sequence[Targets], found: Edges, chosen: Tensor, *, chunk: int = 32
) -> Tensor:
    """Measured effects [n] of the edges `chosen` (long [n]) of `found`, whose `targets` these are.

    A forward holds `chunk` patched copies of prompts.
    """
    measured = torch.zeros(len(chosen), device=found.weight.device)
    first = 0
    for each in targets:
        here = ((found.target[chosen] >= first) & (found.target[chosen] < first + len(each))).nonzero()[:, 0]
        for part in here.split(chunk) if len(here) else ():
            index = chosen[part]
            local = each.take(found.target[index] - first)
            measured[part] = found.value[found.target[index]] - _patched(model, batch, local, found, index)
        first += len(each)
    return measured


def _patched(model: SubjectModel, batch: Batch, targets: Targets, found: Edges, index: Tensor) -> Tensor:
    """Values [n] of n targets of one place, each on its own copy with one source at its baseline."""
    rows = targets.row
    held = [sources.x[rows] for sources in found.sources]
    for copy, edge in enumerate(index.tolist()):
        source, position = int(found.source[edge]), int(found.position[edge])
        change = found.sources[source].vector(int(rows[copy]), position, int(found.latent[edge]))
        held[source][copy, position] -= change
    copies = torch.arange(len(index), device=rows.device)
    plan = Plan.of(list(found.sources), [targets.on_rows(copies)])
    part = batch.rows(rows)
    values, _ = plan.run(model, part, grad=False, held=held)
    return plan.read(values, part)


def calibrate_edges(
    model: SubjectModel,
    batch: Batch,
    targets: Sequence[Targets],
    found: Edges,
    n: int,
    *,
    seed: int = 0,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """A stratified sample of n edges (long), and their exact effects [n]."""
    sample = stratified_sample(found.weight.double().cpu().numpy(), n, seed=seed)
    chosen = torch.from_numpy(sample).to(found.weight.device)
    return chosen, exact_edges(model, batch, targets, found, chosen, chunk=chunk)


@dataclass(frozen=True)
class Missed:
    """Important nodes among those patched, by the median of the patched kept ones, and those not in the graph.

    `kept` counts the graph's nodes in the sample; without any there is nothing to compare with, and no bound.
    at_most: 95 % upper bound of the share of all important nodes that are not in the graph.
    """

    important: int
    missed: int
    kept: int
    at_most: float | None


def missed_important(
    sample: pl.DataFrame, nodes: pl.DataFrame, graph: pl.DataFrame, prompts: Collection[str]
) -> Missed:
    """How much a graph can have missed.

    sample: prompt, site, role, latent, exact_effect of nodes patched exactly. nodes: prompt, site, role, latent of
    all nodes. graph: site, role, latent of the graph's. prompts: ids of those that did not choose them.
    """
    chosen = graph.select("site", "role", "latent", kept=pl.lit(True)).unique()

    def marked(table: pl.DataFrame) -> pl.DataFrame:
        latents = table.filter(pl.col("latent").is_not_null() & pl.col("prompt").is_in(list(prompts)))
        joined = latents.join(chosen, on=["site", "role", "latent"], how="left")
        return joined.with_columns(pl.col("kept").fill_null(False))

    patched, everything = marked(sample), marked(nodes)["kept"]
    size, inside = patched["exact_effect"].abs().to_numpy(), patched["kept"].to_numpy()
    kept, left_out = np.sort(size[inside]), size[~inside]
    if not len(kept):
        return Missed(0, 0, 0, None)
    middle = kept[len(kept) // 2]
    below = int(stats.binom.ppf((1 - LEVEL) / 2, len(kept), 0.5))  # so few are below the median, or fewer, rarely
    least = kept[below - 1] if below else 0.0
    share = share_at_most(int((left_out >= least).sum()), len(left_out), level=(1 + LEVEL) / 2)
    missed = share * int((~everything).sum())
    bound = missed / (missed + int(everything.sum()) / 2)
    return Missed(int((size >= middle).sum()), int((left_out >= middle).sum()), len(kept), bound)
