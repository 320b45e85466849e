"""Direct effects between consecutive residual sites, many targets in one backward pass.

The edge from source u to latent d is E = (f_u - f'_u) w_u . J^T e_d, where e_d is d's encoder row (gates
and thresholds held) and J the Jacobian of the model from the upstream site to the downstream one at the
clean prompt. No other dictionary stands between two consecutive sites, so no intermediate latent or
error has to be frozen. Errors and embeddings are sources only; the behaviour is a target only.

Algorithm
1. Pack. Every copy of a prompt carries one target in one backward; a prompt with more targets gets
   more copies, so that `chunk` copies serve all prompts with as few passes as they allow.
2. One forward of the copies, a leaf at the upstream site, stopped after the downstream one: backward
   crosses only the layers between.
3. Each pass seeds e_d at (copy, position of d) and pulls it back: J^T e_d for one target per copy.
4. Contract it with the upstream sources, gathering only active decoder rows, a position at a time.
5. Multiply by dm/df_d = g_d . w_d for what the edge contributes to the behaviour. In-edges of d sum to
   its own pre-activation change e_d . (x - x') up to curvature; the difference is returned as the gap.
Sources: Marks et al. 2024 (edges with errors as sources); Ameisen et al. 2025 and circuit-tracer
(batched gradient injection, one prompt replicated); packing different prompts follows arXiv 2604.17761.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from circuits.graph import TARGET, NodeKind
from mediation.errors import MediationError
from mediation.nodes import SiteState, free_positions
from mediation.prompts import Baseline, Batch
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel

EMBEDDING_SITE = Site(0, Stream.RESID_PRE)
REST = -1  # "latent" of the source that is a whole vector: the error node, or the token embedding


@dataclass(frozen=True)
class Sources:
    """What can push at one site of a batch: B rows, T positions, d = d_model, n latents.

    row, position, latent: long [n], sorted by row and position. delta [n] = f - f'. decoder
    [d_sae, d]. rest [B, T, d]: the vector that is no latent, eps - eps' or the embedding's change;
    `rest_kind` says which. free [B, T]: where sources may be.
    """

    site: Site
    row: Tensor
    position: Tensor
    latent: Tensor
    delta: Tensor
    decoder: Tensor
    rest: Tensor
    rest_kind: NodeKind
    free: Tensor

    @classmethod
    def of(cls, state: SiteState) -> Sources:
        """The active latents and the error nodes of a dictionary's site."""
        order = torch.argsort(state.row * state.x.shape[1] + state.position, stable=True)
        latents = (state.row[order], state.position[order], state.latent[order], state.delta[order])
        dictionary = state.dictionary
        return cls(dictionary.site, *latents, dictionary.decoder, state.error, NodeKind.ERROR, state.free)

    @classmethod
    def embeddings(cls, model: SubjectModel, batch: Batch, baseline: Baseline, mean: Tensor | None = None) -> Sources:
        """One source per free position: the token's embedding, at blocks.0.hook_resid_pre.

        Its baseline is the corrupt prompt's embedding, zero, or `mean` [d] (needed for the mean baseline).
        """

        def read(tokens: Tensor) -> Tensor:
            site = EMBEDDING_SITE
            return model.forward(tokens, batch.mask, read=[site], logits=False).sites[site]

        x, free = read(batch.clean), free_positions(batch, baseline)
        if baseline is Baseline.CORRUPT:
            assert batch.corrupt is not None  # tokenize() has refused prompts without one
            x = x - read(batch.corrupt)
        elif baseline is Baseline.MEAN:
            if mean is None:
                raise ValueError("Embeddings under the mean baseline need their mean over the prompt set.")
            x = x - mean
        none = torch.zeros(0, dtype=torch.long, device=x.device)
        latents = (none, none, none, x.new_zeros(0))
        rest = x * free.unsqueeze(-1)
        return cls(EMBEDDING_SITE, *latents, x.new_zeros(0, x.shape[-1]), rest, NodeKind.EMBEDDING, free)


@dataclass(frozen=True)
class Targets:
    """k downstream latents: row, position, latent long [k], and gain [k] = dm/df_d = g_d . w_d."""

    row: Tensor
    position: Tensor
    latent: Tensor
    gain: Tensor

    @classmethod
    def of(cls, state: SiteState, gradient: Tensor, chosen: Tensor) -> Targets:
        """Nodes `chosen` (long [k], indices into the state's nodes); `gradient` is dm/dx [B, T, d] there."""
        row, position, latent = state.row[chosen], state.position[chosen], state.latent[chosen]
        gain = (gradient[row, position] * state.dictionary.decoder[latent]).sum(-1)
        return cls(row, position, latent, gain)


@dataclass(frozen=True)
class EdgeBlock:
    """In-edges of k targets from one upstream site; m edges.

    target: long [m], index of the target (of the batch's row, for the behaviour). position, latent: long
    [m], the source, with latent = REST for the error or embedding. weight [m]: E. contribution [m]:
    E * dm/df_d. change [k]: the target's own change. total [k]: the sum of all its in-edges, also of
    those that `keep` left out. downstream and targets are None for the behaviour, whose k is B.
    """

    upstream: Site
    rest_kind: NodeKind
    downstream: Site | None
    targets: Targets | None
    target: Tensor
    position: Tensor
    latent: Tensor
    weight: Tensor
    contribution: Tensor
    change: Tensor
    total: Tensor

    @property
    def gap(self) -> Tensor:
        """Sum of in-edges minus the target's own change, [k]: what curvature costs."""
        return self.total - self.change

    def table(self) -> pl.DataFrame:
        """Columns row, source, target, weight, contribution, with the ids of `AttributionGraph`.

        `row` is the batch's row: ids are unique within one prompt.
        """
        own = pl.format(f"{self.upstream.name}/{{}}/{{}}", "position", "latent")
        rest = "embed/{}" if self.rest_kind is NodeKind.EMBEDDING else f"{self.upstream.name}/{{}}/error"
        source = pl.when(pl.col("latent") == REST).then(pl.format(rest, "position")).otherwise(own)
        columns = {"position": self.position, "latent": self.latent, "to": self.target}
        columns |= {"weight": self.weight, "contribution": self.contribution, "row": self.target}
        target = pl.lit(TARGET)
        if self.targets is not None and self.downstream is not None:
            columns["row"] = self.targets.row[self.target]
            columns["to_position"] = self.targets.position[self.target]
            columns["to_latent"] = self.targets.latent[self.target]
            target = pl.format(f"{self.downstream.name}/{{}}/{{}}", "to_position", "to_latent")
        frame = pl.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
        return frame.select("row", source.alias("source"), target.alias("target"), "weight", "contribution")


def edges(
    model: SubjectModel,
    batch: Batch,
    sources: Sources,
    downstream: SiteState,
    targets: Targets,
    *,
    chunk: int = 32,
    keep: int | None = None,
) -> EdgeBlock:
    """In-edges of the targets at `downstream` from the sources of the residual site before it.

    `chunk` is how many copies of prompts one forward and backward hold: it sets memory and speed, not the
    result. `keep` leaves only the strongest in-edges of each target (the totals still count them all).
    Raises MediationError for sites that are not residual or not in order.
    """
    site = downstream.dictionary.site
    _check(sources.site, site, chunk)
    found = _Collector(sources, targets.gain, keep)
    encoder = downstream.dictionary.encoder
    for copies, passes in _pack(targets.row.tolist(), chunk):
        at = torch.tensor(copies, device=batch.clean.device)
        read = (sources.site, site)
        run = model.forward(batch.clean[at], batch.mask[at], read=read, grad=True, logits=False)
        x_up, x_down = run.sites[sources.site], run.sites[site]
        for number, chosen in enumerate(passes):
            seeds = torch.zeros_like(x_down)
            for copy, target in chosen.items():
                seeds[copy, targets.position[target]] = encoder[targets.latent[target]]
            last = number == len(passes) - 1
            (pulled,) = torch.autograd.grad(x_down, x_up, grad_outputs=seeds, retain_graph=not last)
            of_row: dict[int, dict[int, int]] = defaultdict(dict)
            for copy, target in chosen.items():
                of_row[copies[copy]][copy] = target
            for row, held in of_row.items():
                last_position = targets.position[list(held.values())]
                found.add(row, list(held.values()), pulled[list(held)], last_position)
    difference = (downstream.x - downstream.baseline_x)[targets.row, targets.position]
    change = (encoder[targets.latent] * difference).sum(-1)
    return found.block(site, targets, change)


def behaviour_edges(sources: Sources, gradient: Tensor, change: Tensor, *, keep: int | None = None) -> EdgeBlock:
    """In-edges of the behaviour from its last site: their weight is the node's own attribution.

    `gradient` is dm/dx [B, T, d] at the site; `change` [B] the total effect m(clean) - m(baseline).
    """
    found = _Collector(sources, torch.ones_like(change), keep)
    end = torch.tensor([gradient.shape[1]], device=gradient.device)
    for row in range(len(gradient)):
        found.add(row, [row], gradient[row : row + 1], end)
    return found.block(None, None, change)


class _Collector:
    """Contracts pulled-back gradients with one site's sources and gathers the edges."""

    def __init__(self, sources: Sources, gain: Tensor, keep: int | None) -> None:
        self.sources, self.gain, self.keep = sources, gain, keep
        bounds = torch.arange(len(sources.rest) + 1, device=sources.row.device)
        self.starts = torch.searchsorted(sources.row, bounds).tolist()
        self.pieces: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.total = torch.zeros_like(gain)

    def add(self, row: int, targets: list[int], pulled: Tensor, last: Tensor) -> None:
        """`pulled` [c, T, d] are the gradients of c targets of one row; `last` [c] or [1] their positions."""
        mine = slice(self.starts[row], self.starts[row + 1])
        rest_position = self.sources.free[row].nonzero()[:, 0]
        position = torch.cat([self.sources.position[mine], rest_position])
        latent = torch.cat([self.sources.latent[mine], torch.full_like(rest_position, REST)])
        rest = torch.einsum("ctd,td->ct", pulled, self.sources.rest[row])[:, rest_position]
        weights = torch.cat([self._latents(mine, pulled), rest], dim=1)
        before = position <= last.unsqueeze(1)
        self.total[targets] = torch.where(before, weights, 0.0).sum(dim=1)
        for target, weight, allowed in zip(targets, weights, before.expand_as(weights), strict=True):
            kept = allowed.nonzero()[:, 0]
            if self.keep is not None:
                kept = kept[weight[kept].abs().argsort(descending=True, stable=True)[: self.keep]]
            self.pieces.append((torch.full_like(kept, target), position[kept], latent[kept], weight[kept]))

    def _latents(self, mine: slice, pulled: Tensor) -> Tensor:
        """(f_u - f'_u) w_u . pulled at u's position, [c, n]: no more than one position's rows at a time."""
        position, latent = self.sources.position[mine], self.sources.latent[mine]
        here, counts = torch.unique_consecutive(position, return_counts=True)
        parts = [
            pulled[:, at] @ self.sources.decoder[rows].T
            for at, rows in zip(here.tolist(), latent.split(counts.tolist()), strict=True)
        ]
        if not parts:
            return pulled.new_zeros(len(pulled), 0)
        return torch.cat(parts, dim=1) * self.sources.delta[mine]

    def block(self, downstream: Site | None, targets: Targets | None, change: Tensor) -> EdgeBlock:
        """All edges so far, ordered by target."""
        long = torch.zeros(0, dtype=torch.long, device=self.gain.device)
        empty = (long, long, long, self.gain.new_zeros(0))
        columns = [torch.cat(column) for column in zip(empty, *self.pieces, strict=True)]
        order = torch.argsort(columns[0], stable=True)
        target, position, latent, weight = (column[order] for column in columns)
        contribution = weight * self.gain[target]
        edge = (target, position, latent, weight, contribution)
        ends = (self.sources.site, self.sources.rest_kind, downstream, targets)
        return EdgeBlock(*ends, *edge, change=change, total=self.total)


def _pack(rows: list[int], chunk: int) -> Iterator[tuple[list[int], list[dict[int, int]]]]:
    """Copies of rows (at most `chunk`) and, per pass, which copy carries which target.

    Rows are taken by their number of targets, so that those sharing a pass keep it full.
    """
    targets: dict[int, list[int]] = defaultdict(list)
    for target, row in enumerate(rows):
        targets[row].append(target)
    ordered = sorted(targets, key=lambda row: (-len(targets[row]), row))
    for start in range(0, len(ordered), chunk):
        group = ordered[start : start + chunk]
        depth = -(-sum(len(targets[row]) for row in group) // chunk)
        while sum(-(-len(targets[row]) // depth) for row in group) > chunk:
            depth += 1
        copies: list[int] = []
        passes: list[dict[int, int]] = [{} for _ in range(depth)]
        for row in group:
            for begin in range(0, len(targets[row]), depth):
                for number, target in enumerate(targets[row][begin : begin + depth]):
                    passes[number][len(copies)] = target
                copies.append(row)
        yield copies, passes


def _check(upstream: Site, downstream: Site, chunk: int) -> None:
    for site in (upstream, downstream):
        if site.stream not in (Stream.RESID_PRE, Stream.RESID_POST):
            raise MediationError(
                f"Edges run between residual sites, not at {site}: use dictionaries of the residual stream."
            )
    if upstream.depth >= downstream.depth:
        raise MediationError(
            f"Edges cannot run from {upstream} to {downstream}: give the site that comes first as upstream."
        )
    if chunk < 1:
        raise MediationError(f"The chunk of prompts in one backward is {chunk}: give 1 or more.")
