"""Direct effects between nodes at any mix of sites, many prompts and targets in one backward pass.

The edge from source u to target d is E = (f_u - f'_u) w_u . J^T e_d. Here e_d is what d reads (a latent's
encoder row with gates and thresholds held, a direction, a logit, the behaviour) and J the Jacobian, at the
clean prompt, of d's place with respect to u's site along the paths that cross no other dictionary: every
other site's latents and errors are held. Since x = sum_i f_i w_i + b + eps at a site, holding all of them is
holding the site's value; so every site is cut (`SubjectModel.forward`), and one backward pass from d stops
at all the sites that reach it directly. A residual site cuts everything before it, an attention or MLP
output only its own branch. Errors and embeddings are sources only; outputs are targets only.

Two semantics. *gradient*: J is the model's own, so E is first order and the in-edges of d sum to its change
up to curvature. *linear*: J is that of the model made linear at the clean prompt (`mediation.frozen`:
attention patterns, norms' divisors and MLP factors held), so the in-edges sum to d's change exactly, and with
`constant` (dictionary biases, held positions, the model's biases) to d's own value.

Algorithm
1. Pack. Every copy of a prompt carries one target of each place in one backward; a prompt with more targets
   gets more copies, so that `chunk` copies serve all prompts and places with as few passes as they allow.
2. One forward of the copies with all sites cut, stopped after the last place; it serves all places.
3. For each place, each pass seeds e_d at (copy, position of d) and pulls it back to the sites in reach: the
   layers between them and no others.
4. Contract what arrives at each site with its sources, gathering only active decoder rows.
5. Multiply by dm/df_d = g_d . w_d for what the edge contributes to the behaviour. One more forward, with
   all sources at their baseline, tells d's own change; the difference is the gap.

Cost of N targets whose segments (layers between a place and the sites that reach it) hold P weights, with T
tokens a prompt, n sources in reach and width d: the floor is 2 P T N operations for the backward products
(weights need no gradient), 4 T^2 d N for each layer of attention, and 2 n d N for the contraction. The forward
adds 2 P_model T for each copy, which serves as many targets as there are passes over all places.

Sources: Marks et al. 2024 (edges with errors as sources); Ameisen et al. 2025 and circuit-tracer (batched
gradient injection, one prompt replicated); packing different prompts follows arXiv 2604.17761.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import polars as pl
import torch
from torch import Tensor

from circuits.graph import TARGET, NodeKind, latent_id
from mediation.behaviours import keep_positions, score
from mediation.errors import MediationError
from mediation.frozen import Frozen
from mediation.nodes import SiteState, free_positions
from mediation.prompts import Baseline, Batch
from mediation.sites import Site, Stream
from mediation.subject import Forward, SubjectModel

EMBEDDING_SITE = Site(0, Stream.RESID_PRE)
REST = -1  # "latent" of the source that is a whole vector: the error node, or the token embedding
GATHERED = 2**24  # values of decoder rows gathered at a time while contracting (64 MiB)
HELD = 2**24  # values of pulled-back gradients at one site that wait for their contraction (64 MiB)


class Semantics(StrEnum):
    """Which Jacobian an edge uses."""

    GRADIENT = "gradient"
    """The model as it is. First order: right for small changes, and where the model is not curved. The default."""
    LINEAR = "linear"
    """Attention patterns, norms' divisors and MLP factors held: edges add up exactly; what moves those is not seen.
    Only a log-probability's normaliser, and the soft-cap of Gemma 2's logits, stay curved."""


class Output(StrEnum):
    """Places of targets at the model's end."""

    LOGITS = "logits"
    BEHAVIOUR = "behaviour"


Place = Site | Output


@dataclass(frozen=True)
class Sources:
    """What can push at one site of a batch: B rows, T positions, d = d_model, n latents.

    row, position, latent: long [n], sorted by row and position. delta [n] = f - f'. decoder
    [d_sae, d]: what latents write along; of attention heads, of which every place has its own, [places * units, d], and
    latent modulo units is the head. rest [B, T, d]: the vector that is no latent, eps - eps' or the embedding's change;
    `rest_kind` says which. x, base [B, T, d]: the site's clean value, and what it is with all its sources
    at their baseline. free [B, T]: where sources may be.
    """

    site: Site
    row: Tensor
    position: Tensor
    latent: Tensor
    delta: Tensor
    decoder: Tensor
    rest: Tensor
    rest_kind: NodeKind
    x: Tensor
    base: Tensor
    free: Tensor
    units: int = 1

    @classmethod
    def of(cls, state: SiteState) -> Sources:
        """The active latents and the error nodes of a dictionary's site."""
        order = torch.argsort(state.row * state.x.shape[1] + state.position, stable=True)
        latents = (state.row[order], state.position[order], state.index[order], state.delta[order])
        site, units, error = state.dictionary.site, state.dictionary.d_sae, state.error
        return cls(site, *latents, state.decoder, error, NodeKind.ERROR, state.x, state.baseline_x, state.free, units)

    @classmethod
    def embeddings(cls, model: SubjectModel, batch: Batch, baseline: Baseline, mean: Tensor | None = None) -> Sources:
        """One source per free position: the token's embedding, at blocks.0.hook_resid_pre.

        Its baseline is the corrupt prompt's embedding, zero, or `mean` [d] (needed for the mean baseline).
        """

        def read(tokens: Tensor) -> Tensor:
            site = EMBEDDING_SITE
            return model.forward(tokens, batch.mask, read=[site], logits=False).sites[site]

        x, free = read(batch.clean), free_positions(batch, baseline)
        change = x
        if baseline is Baseline.CORRUPT:
            assert batch.corrupt is not None  # tokenize() has refused prompts without one
            change = x - read(batch.corrupt)
        elif baseline is Baseline.MEAN:
            if mean is None:
                raise ValueError("Embeddings under the mean baseline need their mean over the prompt set.")
            change = x - mean
        none = torch.zeros(0, dtype=torch.long, device=x.device)
        latents = (none, none, none, x.new_zeros(0))
        rest = change * free.unsqueeze(-1)
        return cls(EMBEDDING_SITE, *latents, x.new_zeros(0, x.shape[-1]), rest, NodeKind.EMBEDDING, x, x - rest, free)

    def vector(self, row: int, position: int, latent: int) -> Tensor:
        """What one source adds to the site over its baseline, [d]."""
        if latent == REST:
            return self.rest[row, position]
        found = (self.row == row) & (self.position == position) & (self.latent == latent)
        return self.delta[found].sum() * self.decoder[latent]


@dataclass(frozen=True)
class Targets:
    """k targets at one place: linear functionals of its value at one row and position each.

    row, position: long [k]. vector [k, width] with the width of the place (d_model, the vocabulary, or 1
    for the behaviour). gain [k]: dm/d(target). names: the targets' ids.
    """

    place: Place
    row: Tensor
    position: Tensor
    vector: Tensor
    gain: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def latents(cls, state: SiteState, gradient: Tensor, chosen: Tensor) -> Targets:
        """Pre-activations of the state's nodes `chosen` (long [k]); `gradient` is dm/dx [B, T, d] where they write."""
        row, position, latent = state.row[chosen], state.position[chosen], state.latent[chosen]
        dictionary = state.dictionary
        gain = (gradient[row, position] * state.decoder[state.index[chosen]]).sum(-1)
        where = zip(position.tolist(), latent.tolist(), strict=True)
        names = tuple(latent_id(dictionary.site.name, *each) for each in where)
        return cls(dictionary.reads, row, position, state.readers(chosen), gain, names)

    @classmethod
    def directions(cls, site: Site, row: Tensor, position: Tensor, vector: Tensor, names: Sequence[str]) -> Targets:
        """Projections of a site's value on `vector` [k, d_model], at any rows and positions."""
        return cls(site, row, position, vector, torch.ones_like(vector[:, 0]), tuple(names))

    @classmethod
    def logits(
        cls, model: SubjectModel, row: Tensor, position: Tensor, token: Tensor, against: Tensor | None = None
    ) -> Targets:
        """Logits of `token` at the positions, minus those of `against`, all long [k]."""
        index = torch.arange(len(row), device=row.device)
        vector = torch.zeros(len(row), model.vocab_size, device=row.device)
        vector[index, token] += 1
        if against is not None:
            vector[index, against] -= 1
        minus = [""] * len(row) if against is None else [f"-{each}" for each in against.tolist()]
        named = zip(position.tolist(), token.tolist(), minus, strict=True)
        names = tuple(f"logit/{at}/{one}{other}" for at, one, other in named)
        return cls(Output.LOGITS, row, position, vector, torch.ones_like(vector[:, 0]), names)

    @classmethod
    def behaviour(cls, batch: Batch) -> Targets:
        """The behaviour of every row: a logit difference, or the log-probability of an answer of any length."""
        row = torch.arange(len(batch), device=batch.clean.device)
        last = batch.mask.sum(dim=1) - 1
        one = torch.ones(len(batch), device=row.device)
        return cls(Output.BEHAVIOUR, row, last, one[:, None], one, (TARGET,) * len(batch))

    def take(self, index: Tensor) -> Targets:
        """Some of them, in the order of `index` (long)."""
        columns = {name: getattr(self, name)[index] for name in ("row", "position", "vector", "gain")}
        return replace(self, **columns, names=tuple(self.names[each] for each in index.tolist()))

    def on_rows(self, row: Tensor) -> Targets:
        """The same targets on other rows, long [k], of a batch of copies."""
        return replace(self, row=row)


@dataclass(frozen=True)
class Edges:
    """In-edges of k targets; m edges.

    target: long [m], which target. source: long [m], which of the `sources`. position, latent: long [m], the
    node there, with latent = REST for the error or embedding. weight [m]: E. contribution [m]: E * dm/df_d.
    Of every target, [k]: its row and name; total, the sum of all its in-edges, also of those that `keep` left
    out; value, its own value at the clean prompt; constant, its value with all sources at their baseline.
    """

    sources: tuple[Sources, ...]
    row: Tensor
    names: tuple[str, ...]
    target: Tensor
    source: Tensor
    position: Tensor
    latent: Tensor
    weight: Tensor
    contribution: Tensor
    total: Tensor
    value: Tensor
    constant: Tensor

    @property
    def change(self) -> Tensor:
        """What the targets change when all sources go to their baseline, [k]."""
        return self.value - self.constant

    @property
    def gap(self) -> Tensor:
        """Sum of in-edges minus the target's change, [k]: what curvature costs; rounding only in linear semantics."""
        return self.total - self.change

    def table(self) -> pl.DataFrame:
        """Columns row, source, target, weight, contribution, with the ids of `AttributionGraph`.

        `row` is the batch's row: ids are unique within one prompt.
        """
        columns = {"position": self.position, "latent": self.latent, "row": self.row[self.target]}
        columns |= {"weight": self.weight, "contribution": self.contribution}
        frame = pl.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
        heads = np.array([_head(each) for each in self.sources], dtype=object)
        units = np.array([each.units for each in self.sources])
        tail = (
            pl.when(pl.col("latent") != REST)
            .then((pl.col("latent") % pl.col("units")).cast(pl.String))
            .when(pl.col("head") != "embed")
            .then(pl.lit("error"))
        )
        frame = frame.with_columns(
            head=pl.Series(heads[self.source.cpu().numpy()], dtype=pl.String),
            units=pl.Series(units[self.source.cpu().numpy()]),
            target=pl.Series(np.array(self.names, dtype=object)[self.target.cpu().numpy()], dtype=pl.String),
        )
        source = pl.concat_str([pl.col("head"), pl.col("position"), tail], separator="/", ignore_nulls=True)
        return frame.select("row", source.alias("source"), "target", "weight", "contribution")


def _head(sources: Sources) -> str:
    return "embed" if sources.rest_kind is NodeKind.EMBEDDING else sources.site.name


def edges(
    model: SubjectModel,
    batch: Batch,
    sources: Sequence[Sources],
    targets: Sequence[Targets],
    *,
    semantics: Semantics = Semantics.GRADIENT,
    chunk: int = 32,
    keep: int | None = None,
) -> Edges:
    """In-edges of all targets from the sources that reach them directly.

    Sources are cut from one another; a target's own site, if it is among them, too. `chunk` is how many
    copies of prompts one forward and backward hold: it sets memory and speed, not the result. `keep` leaves
    only the strongest in-edges of each target (the totals still count them all).
    Raises MediationError for two sources at one site and for a chunk below 1.
    """
    ordered = _ordered(sources)
    if chunk < 1:
        raise MediationError(f"The chunk of prompts in one backward is {chunk}: give 1 or more.")
    plan = Plan.of(ordered, targets)
    found = _Collector(ordered, plan, keep)
    for copies, passes in _pack([each.row.tolist() for each in targets], chunk):
        part = batch.rows(torch.tensor(copies, device=batch.clean.device))
        with _model(model, semantics):
            values, leaves = plan.run(model, part, grad=True)
        for number, of_place in enumerate(passes):
            together = max(1, HELD // (part.clean.numel() * model.d_model))
            for start in range(0, len(of_place), together):
                some = of_place[start : start + together]
                pulled = [plan.pull(number, values[number], leaves, chosen, part) for chosen in some]
                found.add(number, copies, some, pulled)
            for chosen in of_place:
                found.read(number, values[number], chosen, part)
    return found.edges(plan.constants(model, batch, semantics))


def behaviour_edges(
    model: SubjectModel, batch: Batch, sources: Sequence[Sources], *, steps: int, keep: int | None = None
) -> Edges:
    """In-edges of every row's behaviour, from the gradient averaged along the path of all sources together.

    All sites move from baseline to clean in a straight line, by Gauss-Legendre points (as the estimator `ig`
    does at one site), so the in-edges sum to the total effect. Cost: `steps` forwards and backwards.
    """
    ordered = _ordered(sources)
    targets = Targets.behaviour(batch)
    plan = Plan.of(ordered, [targets])
    points, weights = np.polynomial.legendre.leggauss(steps)
    every = {row: row for row in range(len(batch))}
    mean: dict[int, Tensor] = {}
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        on_path = [torch.lerp(each.base, each.x, float(point)) for each in ordered]
        values, leaves = plan.run(model, batch, grad=True, held=on_path)
        for index, gradient in plan.pull(0, values[0], leaves, every, batch).items():
            mean[index] = mean.get(index, 0.0) + float(weight) * gradient
    found = _Collector(ordered, plan, keep)
    found.add(0, list(every), [every], [mean])
    (clean,), _ = plan.run(model, batch, grad=False)
    found.read(0, clean, every, batch)
    return found.edges(plan.constants(model, batch, Semantics.GRADIENT))


def _ordered(sources: Sequence[Sources]) -> list[Sources]:
    """The sources in execution order."""
    names = [each.site.canonical() for each in sources]
    for name in names:
        if names.count(name) > 1:
            raise MediationError(f"Two groups of sources sit at {name}: give one for each site.")
    return sorted(sources, key=lambda each: each.site.depth)


def _model(model: SubjectModel, semantics: Semantics) -> AbstractContextManager[None]:
    return Frozen(model).record() if semantics is Semantics.LINEAR else nullcontext()


@dataclass(frozen=True)
class Plan:
    """What is cut, what is read, and which sites reach each place."""

    sources: list[Sources]
    targets: Sequence[Targets]
    reach: list[list[int]]  # of each place, indices of the sources

    @classmethod
    def of(cls, sources: list[Sources], targets: Sequence[Targets]) -> Plan:
        reach = []
        for each in targets:
            place = each.place
            before = [i for i, s in enumerate(sources) if isinstance(place, Output) or s.site.depth < place.depth]
            walls = [i for i in before if sources[i].site.stream in (Stream.RESID_PRE, Stream.RESID_POST)]
            reach.append([i for i in before if not walls or i >= walls[-1]])
        return cls(sources, targets, reach)

    def run(
        self, model: SubjectModel, batch: Batch, *, grad: bool, held: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Values of the places [batch, columns, width] and leaves of the sources, from one forward.

        `held` are values that the sites go on with, in place of the model's own.
        """
        first = min((index for reach in self.reach for index in reach), default=len(self.sources))
        cut = [each.site for each in self.sources[first:]]  # what comes before reaches nothing
        places = [each.place for each in self.targets]
        read = [place for place in dict.fromkeys(places) if isinstance(place, Site) and place not in cut]
        edit = None if held is None else {s: lambda _, v=v: v for s, v in zip(cut, held[first:], strict=True)}
        ends = any(isinstance(place, Output) for place in places)
        deepest = max((place.depth for place in places if isinstance(place, Site)), default=0)
        cut = [site for site in cut if ends or site.depth <= deepest]
        kept = self._kept(batch) if ends else None
        run = model.forward(
            batch.clean, batch.mask, read=read, cut=cut, edit=edit, positions=kept, grad=grad, logits=ends
        )
        leaves = [run.leaves.get(each.site, each.x) for each in self.sources]
        return [_value(place, run, batch, kept) for place in places], leaves

    def _kept(self, batch: Batch) -> Tensor:
        """Positions whose logits are needed, sorted."""
        wanted = [each.position for each in self.targets if each.place is Output.LOGITS]
        if any(each.place is Output.BEHAVIOUR for each in self.targets):
            wanted.append(keep_positions(batch))
        return torch.cat(wanted).unique(sorted=True)

    def columns(self, number: int, batch: Batch) -> Tensor:
        """Where in the place's value the targets' positions are, long [k]."""
        targets = self.targets[number]
        if targets.place is Output.BEHAVIOUR:
            return torch.zeros_like(targets.position)
        if targets.place is Output.LOGITS:
            return torch.searchsorted(self._kept(batch), targets.position)
        return targets.position

    def pull(
        self, number: int, value: Tensor, leaves: Sequence[Tensor], chosen: Mapping[int, int], batch: Batch
    ) -> dict[int, Tensor]:
        """Gradients [copies, T, d] at the sources in reach of one target per copy (`chosen`: copy -> target)."""
        inputs = [i for i in self.reach[number] if leaves[i].requires_grad]
        if not inputs or not value.requires_grad:
            return {}
        copies = torch.tensor(list(chosen), device=value.device)
        targets = torch.tensor(list(chosen.values()), device=value.device)
        seeds = torch.zeros_like(value)
        seeds[copies, self.columns(number, batch)[targets]] = self.targets[number].vector[targets].to(value)
        gradients = torch.autograd.grad(
            value, [leaves[i] for i in inputs], grad_outputs=seeds, retain_graph=True, allow_unused=True
        )
        return {i: gradient for i, gradient in zip(inputs, gradients, strict=True) if gradient is not None}

    def constants(self, model: SubjectModel, batch: Batch, semantics: Semantics) -> Tensor:
        """Values of all targets with all sources at their baseline, [k] over all places."""
        base = [each.base for each in self.sources]
        if semantics is Semantics.LINEAR:
            frozen = Frozen(model)
            with frozen.record():
                self.run(model, batch, grad=False)
            with frozen.replay():
                values, _ = self.run(model, batch, grad=False, held=base)
        else:
            values, _ = self.run(model, batch, grad=False, held=base)
        return self.read(values, batch)

    def read(self, values: Sequence[Tensor], batch: Batch) -> Tensor:
        """The targets' functionals of their places' values, [k] over all places."""
        parts = [
            self.read_place(number, value, self.targets[number].row, torch.arange(len(self.targets[number])), batch)
            for number, value in enumerate(values)
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def read_place(self, number: int, value: Tensor, rows: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """Values [n] of n targets (long) of one place, each on a row of its value."""
        vector = self.targets[number].vector[targets]
        return (value.detach()[rows, self.columns(number, batch)[targets]] * vector.to(value)).sum(-1)


def _value(place: Place, run: Forward, batch: Batch, kept: Tensor | None) -> Tensor:
    if isinstance(place, Site):
        return run.sites[place]
    assert run.logits is not None
    assert kept is not None
    if place is Output.LOGITS:
        return run.logits
    return score(run.logits, batch, kept)[:, None, None]


class _Collector:
    """Contracts pulled-back gradients with the sources of their sites and gathers the edges."""

    def __init__(self, sources: list[Sources], plan: Plan, keep: int | None) -> None:
        self.sources, self.plan, self.keep = sources, plan, keep
        self.starts = []
        for each in sources:
            bounds = torch.arange(len(each.rest) + 1, device=each.row.device)
            self.starts.append(torch.searchsorted(each.row, bounds).tolist())
        sizes = [len(each) for each in plan.targets]
        self.offsets = np.cumsum([0, *sizes]).tolist()
        self.device = sources[0].x.device if sources else torch.device("cpu")
        self.total = torch.zeros(self.offsets[-1], device=self.device)
        self.value = torch.zeros_like(self.total)
        self.pieces: list[tuple[Tensor, ...]] = []

    def add(
        self,
        number: int,
        copies: list[int],
        chosen: Sequence[Mapping[int, int]],
        pulled: Sequence[Mapping[int, Tensor]],
    ) -> None:
        """Gradients `pulled` [copies, T, d], by source, of the targets `chosen` (copy -> target), for some passes."""
        of_row: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for turn, each in enumerate(chosen):
            for copy, target in each.items():
                of_row[copies[copy]].append((turn * len(copies) + copy, target))
        together = {index: torch.cat([each[index] for each in pulled]) for index in pulled[0]}
        for row, held in of_row.items():
            if together:
                at, targets = map(list, zip(*held, strict=True))
                self._add_row(number, row, targets, {index: each[at] for index, each in together.items()})

    def read(self, number: int, value: Tensor, chosen: Mapping[int, int], batch: Batch) -> None:
        """The own values of the targets `chosen` (copy -> target), from the value of their place."""
        copies, targets = (torch.tensor(list(each), device=self.device) for each in (chosen, chosen.values()))
        found = self.plan.read_place(number, value, copies, targets, batch)
        self.value[targets + self.offsets[number]] = found

    def _add_row(self, number: int, row: int, targets: list[int], pulled: Mapping[int, Tensor]) -> None:
        parts = [self._weights(index, row, gradient) for index, gradient in pulled.items()]
        source, position, latent = (torch.cat([part[column] for part in parts]) for column in range(3))
        weights = torch.cat([part[3] for part in parts], dim=1)
        kept = position <= self.plan.targets[number].position[targets].unsqueeze(1)
        named = torch.tensor(targets, device=self.device) + self.offsets[number]
        weights = torch.where(kept, weights, 0.0)
        self.total[named] = weights.sum(dim=1)
        if self.keep is not None and self.keep < weights.shape[1]:
            strongest = torch.where(kept, weights.abs(), -1.0).topk(self.keep, dim=1).indices
            kept = kept & torch.zeros_like(kept).scatter_(1, strongest, True)
        target, at = kept.nonzero(as_tuple=True)
        self.pieces.append((named[target], source[at], position[at], latent[at], weights[target, at]))

    def _weights(self, index: int, row: int, pulled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Source, position and latent [n] of a row's sources at one site, and their edges [c, n]."""
        sources = self.sources[index]
        mine = slice(self.starts[index][row], self.starts[index][row + 1])
        at = sources.free[row].nonzero()[:, 0]
        rest = torch.einsum("ctd,td->ct", pulled, sources.rest[row])[:, at]
        position = torch.cat([sources.position[mine], at])
        latent = torch.cat([sources.latent[mine], torch.full_like(at, REST)])
        weights = torch.cat([_latents(sources, mine, pulled), rest], dim=1)
        return torch.full_like(position, index), position, latent, weights

    def edges(self, constant: Tensor) -> Edges:
        """All edges so far, ordered by target."""
        long = torch.zeros(0, dtype=torch.long, device=self.device)
        empty = (long, long, long, long, self.total.new_zeros(0))
        columns = [torch.cat(column) for column in zip(empty, *self.pieces, strict=True)]
        order = torch.argsort(columns[0], stable=True)
        target, source, position, latent, weight = (column[order] for column in columns)
        every = self.plan.targets
        gain = torch.cat([self.total.new_zeros(0), *(each.gain for each in every)])
        return Edges(
            sources=tuple(self.sources),
            row=torch.cat([long, *(each.row for each in every)]),
            names=tuple(name for each in every for name in each.names),
            target=target,
            source=source,
            position=position,
            latent=latent,
            weight=weight,
            contribution=weight * gain[target],
            total=self.total,
            value=self.value,
            constant=constant,
        )


def _latents(sources: Sources, mine: slice, pulled: Tensor) -> Tensor:
    """(f_u - f'_u) w_u . pulled at u's position, [c, n], for the latents `mine` of one row.

    Positions are padded to the same number of latents, a bounded number of positions at a time.
    """
    position, latent = sources.position[mine], sources.latent[mine]
    if not len(position):
        return pulled.new_zeros(len(pulled), 0)
    here, index, counts = torch.unique_consecutive(position, return_inverse=True, return_counts=True)
    place = torch.arange(len(position), device=position.device) - (counts.cumsum(0) - counts)[index]
    padded = latent.new_zeros(len(here), int(counts.max()))
    padded[index, place] = latent
    step = max(1, GATHERED // (padded.shape[1] * pulled.shape[2]))
    parts = [
        torch.bmm(sources.decoder[rows], pulled[:, at].permute(1, 2, 0))
        for at, rows in zip(here.split(step), padded.split(step), strict=True)
    ]
    return torch.cat(parts)[index, place].T * sources.delta[mine]


def _pack(rows: Sequence[list[int]], chunk: int) -> Iterator[tuple[list[int], list[list[dict[int, int]]]]]:
    """Copies of rows (at most `chunk`) and, for each place, its passes: which copy carries which target.

    `rows[place]` are the rows of the place's targets. Rows with many targets go together and get more
    copies, so that passes are full.
    """
    of_row: dict[int, list[list[int]]] = defaultdict(lambda: [[] for _ in rows])
    for place, of_place in enumerate(rows):
        for target, row in enumerate(of_place):
            of_row[row][place].append(target)
    count = {row: sum(map(len, targets)) for row, targets in of_row.items()}
    most = {row: max(map(len, targets)) for row, targets in of_row.items()}
    ordered = sorted(count, key=lambda row: (-count[row], row))
    for start in range(0, len(ordered), chunk):
        group = ordered[start : start + chunk]
        load = -(-sum(count[row] for row in group) // chunk)
        while sum(-(-count[row] // load) for row in group) > chunk:
            load += 1
        copies: list[int] = []
        passes: list[list[dict[int, int]]] = [[] for _ in rows]
        for row in group:
            wide = min(most[row], -(-count[row] // load))
            for place, targets in enumerate(of_row[row]):
                for number, target in enumerate(targets):
                    while len(passes[place]) <= number // wide:
                        passes[place].append({})
                    passes[place][number // wide][len(copies) + number % wide] = target
            copies += [row] * wide
        yield copies, passes
