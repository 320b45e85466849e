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
1. Stretches. A residual site hides everything before it, so places that have the same last residual site before
   them form a stretch of the model that is run by itself: from that site's clean value (the layers before it are
   passed over) to its last place. Only one stretch's activations are held at a time.
2. Jobs. A target at position t sees no further than t. The targets of a prompt in a stretch are split by position
   where shorter sequences pay for one more forward pass; then those of like length are joined, prompts beside
   prompts, where one larger pass is cheaper than two small ones.
3. One forward of a job's prompts, each once, with all sites cut. Positions before a prompt's first source, such as
   a chat template's, are the same in every pass and take no gradient: they are run once (`SubjectModel.prefix`), and
   passes begin after them.
4. For each place, seeds e_d at (turn, row, position of d), at most `chunk` gradients of a prompt at a time, are pulled
   back to the sites in reach by one backward pass batched over turns: all turns share the activations.
5. Contract what arrives at each site with its sources, gathering only active decoder rows.
   With `steps`, 3 to 5 are those of every point of the path, and the gradients' mean is contracted (for circuits,
   Hanna et al. 2024).
6. Multiply by dm/df_d = g_d . w_d for what the edge contributes to the behaviour. One more forward, with
   all sources at their baseline, tells d's own change; the difference is the gap.

Cost of a target t positions after the first source, whose segment (layers between it and the sites that reach it)
holds P weights, with n sources in reach and width d: the floor is 2 P t operations for the backward products (weights
need no gradient), 4 t^2 d for each layer of attention, and 2 n d for the contraction. The forward adds 2 P t for each
prompt of a job. In bytes: a pass reads the segment's weights once and a contraction the decoder's active rows once, so
that passes over some hundred positions are bound by arithmetic. Reverse mode is the cheaper one: forward mode takes one
pass for each source, and the latents on at all positions of a site outnumber the targets of a graph.

Sources: Marks et al. 2024 (edges with errors as sources); Ameisen et al. 2025 and circuit-tracer (batched
gradient injection, one prompt replicated); packing different prompts follows arXiv 2604.17761.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from enum import StrEnum

import numpy as np
import polars as pl
import torch
from torch import Tensor

from circuits.graph import TARGET, NodeKind, latent_id
from mediation.behaviours import keep_positions, score
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.estimators.integrated_gradients import straight_path
from mediation.frozen import Frozen, Semantics
from mediation.nodes import SiteState, first_free, free_positions
from mediation.prompts import Baseline, Batch
from mediation.sites import RESIDUAL, Site, Stream
from mediation.subject import Forward, Prefix, SubjectModel

EMBEDDING_SITE = Site(0, Stream.RESID_PRE)
REST = -1  # "latent" of the source that is a whole vector: the error node, or the token embedding
GATHERED = 2**25  # values of decoder rows gathered at a time while contracting (128 MiB)
PLACES = ("source", "position", "latent")
SEEDS = 2**26  # values that are seeded at a time (256 MiB): logits at many positions are wide
SHORT = 96  # up to this many positions, attention in plain products is faster than the fused kernel
STARTING = {"cpu": 32, "cuda": 4096}  # positions whose arithmetic takes as long as starting a pass's operations
SPLITS = 64  # lengths considered for the jobs of one prompt


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
class EdgeRows:
    """Finished edges [m]: target, numbered over all targets; source, position, latent and weight as in `Edges`."""

    target: Tensor
    source: Tensor
    position: Tensor
    latent: Tensor
    weight: Tensor

    def frame(self) -> pl.DataFrame:
        """One row for each edge, 20 bytes wide."""
        columns = {each.name: getattr(self, each.name).cpu().numpy() for each in fields(self)}
        return pl.DataFrame(columns).with_columns(pl.all().exclude("weight").cast(pl.Int32))


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


def embeddings_apart(dictionaries: Sequence[Dictionary]) -> bool:
    """Whether no dictionary is at the token embeddings, so that these are sources of their own."""
    return all(each.site.canonical() != EMBEDDING_SITE for each in dictionaries)


def mean_embedding(model: SubjectModel, batches: Sequence[Batch]) -> Tensor:
    """What the first block is given on average, [d]: the mean baseline of embeddings, over all nodes' positions.

    Read off the model and not its table: some families scale the embeddings, or add positions to them.
    """
    total, count = torch.zeros(model.d_model, dtype=torch.float64, device=model.device), 0
    for batch in batches:
        x = model.forward(batch.clean, batch.mask, read=[EMBEDDING_SITE], logits=False).sites[EMBEDDING_SITE]
        here = x[free_positions(batch, Baseline.MEAN)]
        total, count = total + here.sum(dim=0, dtype=torch.float64), count + len(here)
    return (total / count).float()


def edges(
    model: SubjectModel,
    batch: Batch,
    sources: Sequence[Sources],
    targets: Sequence[Targets],
    *,
    semantics: Semantics = Semantics.GRADIENT,
    chunk: int = 32,
    keep: int | None = None,
    steps: int | None = None,
    sink: Callable[[EdgeRows], None] | None = None,
) -> Edges:
    """In-edges of all targets from the sources that reach them directly.

    Sources are cut from one another; a target's own site, if it is among them, too. `chunk` is how many
    gradients of a prompt one backward carries: it sets memory and speed, not the result. `keep` leaves
    only the strongest in-edges of each target (the totals still count them all). `steps` averages J along the
    straight path of all sources from baseline to clean, by so many Gauss-Legendre points: in-edges then sum to the
    target's change, and inputs of which one would do share it. It costs as many forwards and backwards. `sink` is
    given finished rows as they come, to be written away where all edges are too many to hold; what is returned then
    has none of them, only what is known of each target.
    Raises MediationError for two sources at one site and for a chunk below 1.
    """
    ordered = _ordered(sources)
    if chunk < 1:
        raise MediationError(f"The chunk of gradients in one backward is {chunk}: give 1 or more.")
    if steps is not None and semantics is Semantics.LINEAR:
        raise MediationError("Edges of the linear semantics are the same all along the path: leave steps out.")
    path = [(1.0, 1.0)] if steps is None else straight_path(steps)
    plan = Plan.of(ordered, targets)
    found = _Collector(ordered, targets, keep)
    begins = first_sources(ordered, batch)
    prefix = _prefix(model, batch, begins)
    for job in _jobs(plan, batch, begins, chunk):
        found.new_job()
        part = _first_positions(batch.rows(job.rows), job.length)
        before = prefix.take(job.rows, job.begin) if prefix is not None and job.begin else None
        local = Plan.of(ordered, [targets[place].take(some).on_rows(row) for place, some, row in job.targets], before)
        walls = [each.x[job.rows, : job.length] if index == job.wall else None for index, each in enumerate(ordered)]
        names = [some + found.offsets[place] for place, some, _ in job.targets]
        means: dict[int, dict[int, Tensor]] = {}  # of every pass, over the points of the path so far
        with _attention(model, job.length):
            if steps is not None:
                values, _ = local.run(model, part, grad=False, held=walls)
                found.value[torch.cat(names)] = local.read(values, part)
            for number, (point, weight) in enumerate(path):
                held = walls
                if steps is not None:
                    held = [torch.lerp(each.base, each.x, point)[job.rows, : job.length] for each in ordered]
                with _model(model, semantics):
                    values, leaves = local.run(model, part, grad=True, held=held)
                if steps is None:
                    found.value[torch.cat(names)] = local.read(values, part)
                for turns, (place, some, turn, pulled) in enumerate(local.passes(values, leaves, part, chunk)):
                    if steps is not None:
                        mean = means.pop(turns, {})
                        pulled = {i: mean.get(i, 0.0) + weight * gradient for i, gradient in pulled.items()}
                    if number + 1 < len(path):
                        means[turns] = pulled
                        continue
                    found.add(local.targets[place].take(some), names[place][some], turn, job.rows, pulled, job.begin)
                    if sink is not None:
                        found.hand_over(sink)
    return found.edges(plan.constants(model, batch, semantics))


def _ordered(sources: Sequence[Sources]) -> list[Sources]:
    """The sources in execution order."""
    names = [each.site.canonical() for each in sources]
    for name in names:
        if names.count(name) > 1:
            raise MediationError(f"Two groups of sources sit at {name}: give one for each site.")
    return sorted(sources, key=lambda each: each.site.depth)


def _model(model: SubjectModel, semantics: Semantics) -> AbstractContextManager[None]:
    return Frozen(model).record() if semantics is Semantics.LINEAR else nullcontext()


def _attention(model: SubjectModel, length: int) -> AbstractContextManager[None]:
    return model.attention("eager") if length <= SHORT else nullcontext()


def first_sources(sources: Sequence[Sources], batch: Batch) -> Tensor:
    """Long [B]: where each row's passes begin, at its first source or before."""
    if not sources:
        return torch.zeros_like(batch.prompt)
    return first_free(batch, torch.stack([each.free for each in sources]).any(dim=0))


def _prefix(model: SubjectModel, batch: Batch, begins: Tensor) -> Prefix | None:
    longest = int(begins.max())
    return model.prefix(batch.clean[:, :longest]) if longest else None


def _first_positions(batch: Batch, length: int) -> Batch:
    """The batch's first `length` positions; of behaviours, only those within them may be scored."""
    return replace(batch, clean=batch.clean[:, :length], mask=batch.mask[:, :length])


@dataclass(frozen=True)
class Plan:
    """What is cut, what is read, and which sites reach each place.

    reach: of each place, indices of the sources. prefix: positions that passes leave out; values and gradients are of
    those after it, while sources and targets count from the prompt's start.
    """

    sources: list[Sources]
    targets: Sequence[Targets]
    reach: list[list[int]]
    prefix: Prefix | None = None

    @classmethod
    def of(cls, sources: list[Sources], targets: Sequence[Targets], prefix: Prefix | None = None) -> Plan:
        reach = []
        for each in targets:
            place = each.place
            before = [i for i, s in enumerate(sources) if isinstance(place, Output) or s.site.depth < place.depth]
            walls = [i for i in before if sources[i].site.stream in RESIDUAL]
            reach.append([i for i in before if not walls or i >= walls[-1]])
        return cls(sources, targets, reach, prefix)

    @property
    def begin(self) -> int:
        """The first position that is run."""
        return 0 if self.prefix is None else self.prefix.length

    def run(
        self, model: SubjectModel, batch: Batch, *, grad: bool, held: Sequence[Tensor | None] | None = None
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Values of the places [batch, columns, width] and leaves of the sources, from one forward.

        `held` are values that the sites go on with, in place of the model's own, at all positions. Where that is so of
        a residual site that is the first to reach any place, the model starts there.
        """
        begin = self.begin
        first = min((index for reach in self.reach for index in reach), default=len(self.sources))
        places = [each.place for each in self.targets]
        ends = any(isinstance(place, Output) for place in places)
        deepest = max((place.depth for place in places if isinstance(place, Site)), default=0)
        cut = {  # what comes before the first reaches nothing
            index: each.site
            for index, each in enumerate(self.sources)
            if index >= first and (ends or each.site.depth <= deepest)
        }
        edit = {
            site: lambda _, v=v: v[:, begin:]
            for i, site in cut.items()
            if held is not None and (v := held[i]) is not None
        }
        start = cut.get(first) if all(self.reach) else None
        kept = self._kept(batch) if ends else None
        run = model.forward(
            batch.clean[:, begin:],
            batch.mask,
            read=[place for place in dict.fromkeys(places) if isinstance(place, Site)],
            cut=list(cut.values()),
            edit=edit,
            positions=None if kept is None else kept - begin,
            start=start if start in edit and start is not None and start.stream in RESIDUAL else None,
            prefix=self.prefix,
            grad=grad,
            logits=ends,
        )
        leaves = {index: run.leaves[site] for index, site in cut.items()}
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
        return targets.position - self.begin

    def passes(
        self, values: Sequence[Tensor], leaves: Mapping[int, Tensor], batch: Batch, chunk: int
    ) -> Iterator[tuple[int, Tensor, Tensor, dict[int, Tensor]]]:
        """Of every backward pass: the place, which of its targets (long [n]), their turns (long [n]), and `pull`."""
        for number, value in enumerate(values):
            most = max(1, min(chunk // len(batch), SEEDS // value.numel()))
            for some, turn in _passes(self.targets[number].row, most):
                yield number, some, turn, self.pull(number, value, leaves, some, turn, batch)

    def pull(
        self, number: int, value: Tensor, leaves: Mapping[int, Tensor], some: Tensor, turn: Tensor, batch: Batch
    ) -> dict[int, Tensor]:
        """Gradients [turns, B, T, d] at the sources in reach, of some targets (long [n]) of one place.

        Targets of one turn (long [n]) are on different rows and share a copy of the batch's gradients; all
        turns share the activations.
        """
        inputs = [i for i in self.reach[number] if i in leaves]
        if not inputs or not value.requires_grad:
            return {}
        targets = self.targets[number]
        seeds = value.new_zeros(int(turn.max()) + 1, *value.shape)
        seeds[turn, targets.row[some], self.columns(number, batch)[some]] = targets.vector[some].to(value)
        with warnings.catch_warnings():  # of a fused attention kernel that takes turns one by one
            warnings.filterwarnings("ignore", "There is a performance drop")
            gradients = torch.autograd.grad(
                value,
                [leaves[i] for i in inputs],
                seeds,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
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
            (value.detach()[each.row, self.columns(number, batch)] * each.vector.to(value)).sum(-1)
            for number, (each, value) in enumerate(zip(self.targets, values, strict=True))
        ]
        return torch.cat(parts) if parts else torch.zeros(0)


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

    def __init__(self, sources: list[Sources], targets: Sequence[Targets], keep: int | None) -> None:
        self.sources, self.targets, self.keep = sources, targets, keep
        self.starts = []
        for each in sources:
            bounds = torch.arange(len(each.rest) + 1, device=each.row.device)
            self.starts.append(torch.searchsorted(each.row, bounds).tolist())
        self.offsets = np.cumsum([0, *map(len, targets)]).tolist()
        self.device = sources[0].x.device if sources else torch.device("cpu")
        self.total = torch.zeros(self.offsets[-1], device=self.device)
        self.value = torch.zeros_like(self.total)
        self.pieces: list[EdgeRows] = []
        self.laid_out: dict[tuple[int, int], _RowSources] = {}
        self.room = GATHERED

    def add(
        self, targets: Targets, names: Tensor, turn: Tensor, rows: Tensor, pulled: Mapping[int, Tensor], begin: int
    ) -> None:
        """Gradients `pulled` [turns, B, T, d], by source, of n targets on rows of a job, from position `begin` on.

        names: long [n], the targets' numbers over all places; rows: long [B], the batch's rows.
        """
        if not pulled:
            return
        for row in targets.row.unique().tolist():
            mine = (targets.row == row).nonzero()[:, 0]
            gradients = {index: each[turn[mine], row] for index, each in pulled.items()}
            self._add_row(names[mine], targets.position[mine], int(rows[row]), gradients, begin)

    def _add_row(self, names: Tensor, last: Tensor, row: int, pulled: Mapping[int, Tensor], begin: int) -> None:
        parts = [self._sources_of(index, row, begin, begin + each.shape[1]) for index, each in pulled.items()]
        source, position, latent = (torch.cat([getattr(part, name) for part in parts]) for name in PLACES)
        weights = torch.cat([part.weights(each) for part, each in zip(parts, pulled.values(), strict=True)], dim=1)
        reached = position <= last.unsqueeze(1)
        weights = torch.where(reached, weights, 0.0)
        self.total[names] = weights.sum(dim=1)
        if self.keep is None or self.keep >= weights.shape[1]:
            target, at = reached.nonzero(as_tuple=True)
        else:
            strongest = torch.where(reached, weights.abs(), -1.0).topk(self.keep, dim=1).indices.sort(dim=1).values
            target, column = reached.gather(1, strongest).nonzero(as_tuple=True)
            at = strongest[target, column]
        self.pieces.append(EdgeRows(names[target], source[at], position[at], latent[at], weights[target, at]))

    def _sources_of(self, index: int, row: int, begin: int, end: int) -> _RowSources:
        """Made once for all targets of a job, with their decoder rows as far as there is room for them."""
        if (index, row) not in self.laid_out:
            mine = slice(*self.starts[index][row : row + 2])
            made = _RowSources.of(self.sources[index], index, row, mine, begin, end)
            size = sum(group.latent.numel() for group in made.padded) * self.sources[index].decoder.shape[1]
            if size <= self.room:
                made.gather()
                self.room -= size
            self.laid_out[index, row] = made
        return self.laid_out[index, row]

    def new_job(self) -> None:
        """Forget what was laid out for the last one."""
        self.laid_out.clear()
        self.room = GATHERED

    def hand_over(self, sink: Callable[[EdgeRows], None]) -> None:
        """Give the edges so far away."""
        for piece in self.pieces:
            sink(piece)
        self.pieces.clear()

    def edges(self, constant: Tensor) -> Edges:
        """All edges so far, ordered by target."""
        long = torch.zeros(0, dtype=torch.long, device=self.device)
        empty = EdgeRows(long, long, long, long, self.total.new_zeros(0))
        columns = [torch.cat(column) for column in zip(*map(_columns, [empty, *self.pieces]), strict=True)]
        order = torch.argsort(columns[0], stable=True)
        target, source, position, latent, weight = (column[order] for column in columns)
        gain = torch.cat([self.total.new_zeros(0), *(each.gain for each in self.targets)])
        return Edges(
            sources=tuple(self.sources),
            row=torch.cat([long, *(each.row for each in self.targets)]),
            names=tuple(name for each in self.targets for name in each.names),
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


def _columns(rows: EdgeRows) -> list[Tensor]:
    return [getattr(rows, each.name) for each in fields(rows)]


@dataclass
class _RowSources:
    """Sources of one row at one site from position `begin` on, laid out for the contraction: m latents, then errors.

    source, position, latent: long [n]. delta: [m]. padded: groups of positions with about as many latents on, since
    some have ten times as many as others. column: long [m], where each latent is among the groups' columns, laid one
    after another.
    """

    sources: Sources
    row: int
    begin: int
    source: Tensor
    position: Tensor
    latent: Tensor
    delta: Tensor
    padded: list[_Padded]
    column: Tensor

    @classmethod
    def of(cls, sources: Sources, number: int, row: int, mine: slice, begin: int, end: int) -> _RowSources:
        mine = slice(mine.start, mine.start + int(torch.searchsorted(sources.position[mine], end)))
        position, latent = sources.position[mine], sources.latent[mine]
        here, index, counts = torch.unique_consecutive(position, return_inverse=True, return_counts=True)
        place = torch.arange(len(position), device=position.device) - (counts.cumsum(0) - counts)[index]
        column, groups, start = torch.empty_like(position), [], 0
        level = counts.float().log2().ceil()
        for each in level.unique():
            some = (level == each).nonzero()[:, 0]
            within = (level == each)[index]
            at, most = torch.searchsorted(some, index[within]), int(counts[some].max())
            padded = latent.new_zeros(len(some), most)
            padded[at, place[within]] = latent[within]
            column[within] = start + at * most + place[within]
            groups.append(_Padded(here[some], padded))
            start += padded.numel()
        free = sources.free[row, :end].nonzero()[:, 0]
        every = torch.cat([position, free])
        names = torch.cat([latent, torch.full_like(free, REST)])
        number_of_all = torch.full_like(every, number)
        return cls(sources, row, begin, number_of_all, every, names, sources.delta[mine], groups, column)

    def gather(self) -> None:
        """Keep the decoder rows of all latents."""
        for group in self.padded:
            group.gathered = self.sources.decoder[group.latent]

    def weights(self, pulled: Tensor) -> Tensor:
        """(f_u - f'_u) w_u . pulled [c, T, d] at u's position, and of errors, [c, n]."""
        begin = self.begin
        free = self.position[len(self.delta) :] - begin
        rest = torch.einsum("ctd,td->ct", pulled, self.sources.rest[self.row, begin : begin + pulled.shape[1]])[:, free]
        if not len(self.delta):
            return rest
        parts = [part for group in self.padded for part in group.products(self.sources.decoder, pulled, begin)]
        return torch.cat([torch.cat(parts)[self.column].T * self.delta, rest], dim=1)


@dataclass
class _Padded:
    """Latents [p, most] on at positions `here` [p], padded with latent 0; gathered: their decoder rows, if kept."""

    here: Tensor
    latent: Tensor
    gathered: Tensor | None = None

    def products(self, decoder: Tensor, pulled: Tensor, begin: int) -> Iterator[Tensor]:
        """Decoder rows times pulled [c, T, d] at their positions, [p * most, c] in pieces."""
        step = (
            len(self.here)
            if self.gathered is not None
            else max(1, GATHERED // (self.latent.shape[1] * pulled.shape[2]))
        )
        for start in range(0, len(self.here), step):
            some = slice(start, start + step)
            rows = self.gathered if self.gathered is not None else decoder[self.latent[some]]
            yield torch.bmm(rows, pulled[:, self.here[some] - begin].permute(1, 2, 0)).flatten(0, 1)


# Jobs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What one forward pass serves.

    wall: index of the source to start from, or -1. rows: long [B] of the batch. begin, length: the first position that
    is run, and where the last ends. targets: for places, their number, which of their targets (long [k]) and the job's
    row (long [k]) of each.
    """

    wall: int
    rows: Tensor
    begin: int
    length: int
    targets: list[tuple[int, Tensor, Tensor]]


@dataclass(frozen=True)
class _Unit:
    """Targets of one row and of like position in one stretch: indices `chosen` of it, and how many at each place."""

    begin: int
    length: int
    row: int
    chosen: np.ndarray
    counts: np.ndarray


def _jobs(plan: Plan, batch: Batch, begins: Tensor, chunk: int) -> Iterator[_Job]:
    """All targets, each in one job (step 2); cost is counted in positions that a pass goes over.

    begins: long [B], where each row's first source is. Targets before it have no sources: they need their value only.
    """
    starting = STARTING.get(batch.clean.device.type, STARTING["cuda"])
    stretches: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for number, reach in enumerate(plan.reach):
        # A behaviour needs its row's whole length, and is scored on rows that have one among the targets only.
        behaviour = plan.targets[number].place is Output.BEHAVIOUR
        stretches[reach[0] if reach else -1, behaviour].append(number)
    for (wall, _), numbers in stretches.items():
        sizes = [len(plan.targets[number]) for number in numbers]
        place = np.repeat(np.arange(len(numbers)), sizes)
        index = np.concatenate([np.arange(size) for size in sizes])
        row = torch.cat([plan.targets[number].row for number in numbers]).cpu().numpy()
        end = torch.cat([plan.targets[number].position for number in numbers]).cpu().numpy() + 1
        units = []
        for each in np.unique(row):
            mine = np.flatnonzero(row == each)
            begin = min(int(begins[each]), int(end[mine].min()) - 1)
            for some in _split(end[mine] - begin, starting * (1 + len(numbers))):
                chosen = mine[some]
                counts = np.bincount(place[chosen], minlength=len(numbers))
                units.append(_Unit(begin, int(end[chosen].max()), int(each), chosen, counts))
        units.sort(key=lambda unit: (unit.length, unit.counts.sum(), unit.row))
        for group in _joined(units, starting, chunk):
            rows = np.concatenate([np.full(len(unit.chosen), at) for at, unit in enumerate(group)])
            chosen = np.concatenate([unit.chosen for unit in group])
            device = batch.clean.device
            targets = [
                (
                    number,
                    torch.from_numpy(index[chosen[place[chosen] == at]]).to(device),
                    torch.from_numpy(rows[place[chosen] == at]).to(device),
                )
                for at, number in enumerate(numbers)
                if (place[chosen] == at).any()
            ]
            taken = torch.tensor([unit.row for unit in group], device=device)
            yield _Job(wall, taken, min(unit.begin for unit in group), group[-1].length, targets)


def _split(ends: np.ndarray, starting: float) -> list[np.ndarray]:
    """Indices of the targets of one row in groups, so that the passes of all groups cost the least.

    A group costs `starting`, and its longest end times one pass forward and one backward for each target.
    """
    step = -(-int(ends.max()) // SPLITS)
    lengths, group, counts = np.unique(-(-ends // step) * step, return_inverse=True, return_counts=True)
    before = np.concatenate([[0], counts.cumsum()])
    best, cut = np.zeros(len(before)), np.zeros(len(before), dtype=int)
    for j in range(1, len(before)):
        costs = best[:j] + starting + lengths[j - 1] * (1 + before[j] - before[:j])
        cut[j] = costs.argmin()
        best[j] = costs[cut[j]]
    groups = []
    while j > 0:
        groups.append(np.flatnonzero((group >= cut[j]) & (group < j)))
        j = cut[j]
    return groups


def _joined(units: list[_Unit], starting: float, chunk: int) -> Iterator[list[_Unit]]:
    """Units side by side in one job, as long as that costs less than a job each."""

    def cost(rows: int, run: int, counts: np.ndarray) -> float:
        passes = -(-counts // max(1, chunk // rows))
        return starting * (1 + passes.sum()) + rows * run * (1 + counts.sum())

    group: list[_Unit] = []
    counts, begin, spent = np.zeros(0), 0, 0.0
    for unit in units:
        alone = cost(1, unit.length - unit.begin, unit.counts)
        if group:
            most, first = np.maximum(counts, unit.counts), min(begin, unit.begin)
            together = cost(len(group) + 1, unit.length - first, most)
            if len(group) < chunk and together <= spent + alone:
                group, counts, begin, spent = [*group, unit], most, first, together
                continue
            yield group
        group, counts, begin, spent = [unit], unit.counts, unit.begin, alone
    if group:
        yield group


def _passes(row: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Which targets (long [n]) go in a pass of at most `most` turns, and the turn of each; one of a row in a turn."""
    order = torch.argsort(row, stable=True)
    sizes = torch.unique_consecutive(row[order], return_counts=True)[1]
    turn = torch.empty_like(row)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    turn[order] = torch.arange(len(row), device=row.device) - first
    for start in range(0, int(turn.max()) + 1, most):
        some = ((turn >= start) & (turn < start + most)).nonzero()[:, 0]
        yield some, turn[some] - start
