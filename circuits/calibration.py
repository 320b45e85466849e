"""The graph measured: a sample is patched exactly, and compared with what the graph says and what it left out.

Algorithm, for the edge from u to d
1. Hold every source's site at its clean value, as the edge's definition does; at u's site take away u's change
   (f_u - f'_u) w_u, at u's position only.
2. Run the model, as it is, to d's place: d's value there has moved by what the paths from u to d, and no
   others, carry. The clean value minus the moved one is the exact edge.
3. The sample is stratified by |edge|, so that small edges are in it; many patches share a forward.
Source: path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023), between latents.

Algorithm of `missed_important`, for latents on evaluation prompts, as the graph's were chosen on the others
1. A node is kept when its (site, role, latent) is in the graph. It is important when its exact |effect| is at
   least the median of that of all kept ones. Of K kept and L left-out nodes, with a share p of the latter
   important, the graph misses p L of p L + K / 2 important nodes.
2. The median is at least an order statistic of a random sample of kept nodes (`kept_sample`).
3. p is bounded by how many left-out nodes of the run's sample reach that (Clopper and Pearson 1934). In it all
   nodes of a site have nearly the same chance, since its strata are equal parts of each batch, but sites do not:
   some are left unused, at random, where a site has more than its part.
4. Steps 2 and 3 may each be wrong in 2.5 % of samples, so that the bound is wrong in at most 5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from circuits.edges import Edges, Plan, Targets
from mediation.estimators import EstimatorSettings, exact
from mediation.nodes import SiteState
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
    """Of the left-out nodes patched, those with at least the median effect of the kept ones patched.

    at_most: 95 % upper bound of the share of all important nodes that are not in the graph; None where no kept node
    was patched, so that there is nothing to compare with.
    """

    left_out: int
    missed: int
    kept: int
    median: float | None
    at_most: float | None


def kept_sample(
    model: SubjectModel,
    batch: Batch,
    states: Sequence[SiteState],
    chosen: Sequence[Tensor],
    n: int,
    settings: EstimatorSettings,
    *,
    seed: int = 0,
) -> Tensor:
    """Exact effects [at most n] of a random sample of the nodes `chosen` (long, for each state)."""
    starts = [0, *np.cumsum([len(each) for each in chosen]).tolist()]
    drawn = np.random.default_rng(seed).permutation(starts[-1])[:n]
    parts = []
    for state, mine, start, end in zip(states, chosen, starts, starts[1:], strict=False):
        here = mine[torch.from_numpy(np.sort(drawn[(drawn >= start) & (drawn < end)]) - start).to(mine.device)]
        if len(here):
            (measured,) = exact(model, batch, [state.subset(here, torch.zeros_like(state.free))], settings)
            parts.append(measured.latents)
    return torch.cat(parts) if parts else torch.zeros(0)


def missed_important(
    sample: pl.DataFrame, kept: ArrayLike, nodes: pl.DataFrame, graph: pl.DataFrame, *, seed: int = 0
) -> Missed:
    """How much a graph can have missed, all on prompts that did not choose it.

    sample: site, role, latent, exact_effect of nodes patched exactly. kept: exact effects of a random sample of the
    graph's nodes. nodes: site, role, latent of all nodes. graph: site, role, latent of the graph's.
    """
    inside = graph.select("site", "role", "latent").unique()
    left_out, everything = (
        table.filter(pl.col("latent").is_not_null()).join(inside, on=inside.columns, how="anti")
        for table in (sample, nodes)
    )
    size = np.sort(np.abs(np.asarray(kept, dtype=np.float64)))
    if not len(size):
        return Missed(len(left_out), 0, 0, None, None)
    below = int(stats.binom.ppf((1 - LEVEL) / 2, len(size), 0.5))  # so few are below the median, or fewer, rarely
    least, median = size[below - 1] if below else 0.0, float(np.median(size))
    drawn = _evenly(left_out, everything, seed)["exact_effect"].abs()
    share = share_at_most(int((drawn >= least).sum()), len(drawn), level=(1 + LEVEL) / 2)
    in_graph = len(nodes.join(inside, on=inside.columns))
    missed = share * len(everything)
    bound = missed / (missed + in_graph / 2) if missed else 0.0
    return Missed(len(left_out), int((left_out["exact_effect"].abs() >= median).sum()), len(size), median, bound)


def _evenly(sample: pl.DataFrame, everything: pl.DataFrame, seed: int) -> pl.DataFrame:
    """As much of the sample as has every site in its proportion of everything."""
    sizes = everything.group_by("site").len()
    found = dict(sample.group_by("site").len().iter_rows())
    rate = min((found.get(site, 0) / size for site, size in sizes.iter_rows()), default=0.0)
    parts = [
        sample.filter(pl.col("site") == site).sample(int(rate * size + 1e-9), seed=seed)
        for site, size in sizes.sort("site").iter_rows()
    ]
    return pl.concat(parts) if parts else sample.clear()
