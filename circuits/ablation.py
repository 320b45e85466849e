"""The model run with part of a circuit: some nodes, or some edges, as they are, everything else at its baseline.

Every dictionary's site is x = x' + sum_i (f_i - f'_i) w_i + (eps - eps'), with x', f', eps' at the baseline: the
corrupt prompt's values (resample), the set's mean, or zero. A *place* is a role of the prompts, or a position.

Node circuit: a set of kept (site, place, latent), and of places whose error node is kept
1. Run the clean prompt. At each dictionary's site, in execution order, take apart what has arrived there: upstream has
   been cut, so latents and errors have their current values, not their clean ones.
2. Go on with x' + sum over kept latents of (f_i - f'_i) w_i, and eps - eps' where the error is kept.
A kept latent is kept whether it is on or off, and one that is not goes to its baseline: under the mean, error nodes
are what the dictionaries miss, and not also the means of latents that are off, as they are in mediation.nodes.
What comes before the first site is the model's own; so are the positions that carry no node. An attention head is kept
or cut whole, with all its coordinates.

Edge circuit: a set of kept edges between such nodes, the token embeddings and the behaviour
1. Site after site in execution order. A node's input is the model's own computation from the sites that reach it
   directly (circuits.edges), each held at x' plus the current changes of those sources whose edge to this node is kept.
   Its current value is read off the input; the nodes of one site and prompt have as many inputs as they have different
   sets of sources. So u can push d and not its neighbour e, which no set of nodes can say.
2. Sets are reduced to the sources that have a change on this prompt; those equal then share a copy of the prompt.
   Copies of all prompts are batched.
3. Error nodes are kept or not, as in a node circuit; they are vectors, no edge into or out of them is cut: they read
   everything that is kept, and everything reads them. Embeddings are clean where their edge is kept.
4. The behaviour is read off its own input, the last of these runs.
Keeping every in-edge of the kept nodes is the node circuit; keeping all edges of all nodes is the clean run.

Cost: one forward for a node circuit; for an edge circuit one copy of the prompt for each different set of sources.
Sources: Marks et al. 2024 (node circuits with error nodes); Wang et al. 2022 and Goldowsky-Dill et al. 2023 (path
patching), here for every edge at once and with recomputed values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import Tensor

from circuits.edges import REST, Plan, Sources, Targets, embeddings_apart
from mediation.dictionaries import Coordinates, Dictionary
from mediation.estimators.common import behaviour
from mediation.heads import Heads
from mediation.nodes import ENCODE_TOKENS, At, MeanState, Reference, SiteValue, changes, site_state, site_values
from mediation.prompts import Baseline, Batch
from mediation.sites import Site
from mediation.subject import SubjectModel

EMBEDDING = -1  # "site" of a token embedding


class Errors(StrEnum):
    """Which error nodes a circuit has."""

    KEPT = "kept"
    """All of them, at their current values: the circuit is judged, not the dictionaries. The default."""
    REMOVED = "removed"
    """None: also what the dictionaries miss counts against the circuit."""
    WITH_LATENTS = "with_latents"
    """Those at a site and place where the circuit has a latent."""


@dataclass(frozen=True)
class Nodes:
    """n nodes of a prompt set: site (index of the dictionary, or EMBEDDING), place, latent (REST for an embedding).

    long [n] each, in execution order of the sites.
    """

    site: Tensor
    place: Tensor
    latent: Tensor

    def __len__(self) -> int:
        return len(self.site)

    def take(self, index: Tensor) -> Nodes:
        """Some of them, in the order of `index` (long or bool)."""
        return Nodes(self.site[index], self.place[index], self.latent[index])

    def masks(self, places: int, widths: Sequence[int]) -> list[Tensor]:
        """Of each site, which (place, latent) is among the nodes: bool [places, d_sae]."""
        masks = [torch.zeros(places, width, dtype=torch.bool, device=self.site.device) for width in widths]
        for number, mask in enumerate(masks):
            here = self.site == number
            mask[self.place[here], self.latent[here]] = True
        return masks


@dataclass(frozen=True)
class Cut:
    """A batch of B prompts of T tokens whose dictionary sites can be put together anew from kept parts.

    dictionaries: S of them in execution order, for attention heads the coordinates they are made of; widths: for each,
    how many of its latents are one node, 1 but for heads. references: what gives their baselines; sources: the clean
    state of each site, after the embeddings where no dictionary is at them. places: long [B, T], index of each token's
    place.
    """

    model: SubjectModel
    batch: Batch
    baseline: Baseline
    dictionaries: tuple[Dictionary, ...]
    widths: tuple[int, ...]
    references: tuple[Reference, ...]
    sources: tuple[Sources, ...]
    places: Tensor

    @classmethod
    def of(
        cls,
        model: SubjectModel,
        batch: Batch,
        dictionaries: Sequence[Dictionary],
        baseline: Baseline,
        places: Tensor,
        *,
        means: dict[str, MeanState] | None = None,
        mean_embedding: Tensor | None = None,
    ) -> Cut:
        """Both `means` (by dictionary) and `mean_embedding` [d] are needed for the mean baseline only."""
        given = sorted(dictionaries, key=lambda each: each.site.depth)
        ordered = [_coordinates(each, model) if isinstance(each, Heads) else each for each in given]
        if means is not None:
            means = means | {
                each.name: MeanState(means[heads.name].x, means[heads.name].x)
                for heads, each in zip(given, ordered, strict=True)
                if isinstance(heads, Heads)
            }
        values = site_values(model, batch, ordered, baseline, means)
        pairs = list(zip(ordered, values, strict=True))
        sources = [Sources.of(site_state(value, other, batch, each, baseline)) for each, (value, other) in pairs]
        if embeddings_apart(ordered):
            sources.insert(0, Sources.embeddings(model, batch, baseline, mean_embedding))
        references = tuple(other for _, other in values)
        widths = tuple(each.d_sae // old.d_sae for old, each in zip(given, ordered, strict=True))
        return cls(model, batch, baseline, tuple(ordered), widths, references, tuple(sources), places)

    @property
    def first(self) -> int:
        """Where in the sources the dictionaries' begin: 1 after embeddings, else 0."""
        return len(self.sources) - len(self.dictionaries)

    @property
    def latents(self) -> list[int]:
        """How many nodes each site has at a place: latents, or attention heads."""
        return [each.d_sae // width for each, width in zip(self.dictionaries, self.widths, strict=True)]

    def reference(self, site: int, at: At) -> Reference:
        """What gives the baseline at n (row, position)."""
        other = self.references[site]
        return None if other is None else other.at(at)


def run_nodes(cut: Cut, kept: Sequence[Tensor], errors: Tensor) -> Tensor:
    """The behaviour [B] of the node circuit: of each site the kept latents, bool [places, d_sae], and error nodes.

    errors: bool [S, places]. Of attention heads, d_sae is their number.
    """
    kept = [mask.repeat_interleave(width, dim=1) for mask, width in zip(kept, cut.widths, strict=True)]
    values: dict[Site, Tensor] = {}
    number = {each.site: index for index, each in enumerate(cut.dictionaries)}
    visited = {site for each in cut.dictionaries for site in (each.site, each.reads)}

    def visit(site: Site, x: Tensor) -> Tensor:
        values[site] = x
        if site not in number:
            return x
        index = number[site]
        read = values[cut.dictionaries[index].reads]
        values[site] = _put_together(cut, index, SiteValue(x, read), kept[index], errors[index])
        return values[site]

    return behaviour(cut.model, cut.batch, {site: partial(visit, site) for site in visited})


def _put_together(cut: Cut, index: int, value: SiteValue, kept: Tensor, errors: Tensor) -> Tensor:
    """Step 2 of a node circuit: the site's new value [B, T, d] from its current one."""
    dictionary, sources = cut.dictionaries[index], cut.sources[cut.first + index]
    new = value.x.clone()
    for part in sources.free.nonzero().split(ENCODE_TOKENS):
        at = (part[:, 0], part[:, 1])
        place = cut.places[at]
        here = changes(dictionary, value.at(at), cut.reference(index, at))
        delta = here.latents - here.baseline
        rest = value.x[at] - sources.base[at] - delta @ dictionary.decoder
        chosen = (delta * kept[place]) @ dictionary.decoder
        new[at] = sources.base[at] + chosen + rest * errors[place, None]
    return new


def run_edges(cut: Cut, nodes: Nodes, kept: Tensor, errors: Tensor, *, chunk: int = 32) -> Tensor:
    """The behaviour [B] of the edge circuit.

    kept: bool [n + 1, n], whether the edge into node d (row; the last is the behaviour) from node u (column) is kept.
    errors: bool [S, places]. A forward holds `chunk` copies of prompts.
    """
    nodes, kept = _widened(cut, nodes, kept)
    state = _Current(cut, nodes, errors)
    for index in range(len(cut.dictionaries)):
        here = ((nodes.site == index) & kept.any(dim=0)).nonzero()[:, 0]  # the others move nothing
        state.compute(index, here, kept[here], chunk)
    return state.behaviour(kept[-1], chunk)


def _widened(cut: Cut, nodes: Nodes, kept: Tensor) -> tuple[Nodes, Tensor]:
    """The same circuit with every attention head as its coordinates, which share its edges."""
    widths = torch.tensor([*cut.widths, 1], device=nodes.site.device)[nodes.site]  # the last is the embeddings'
    index = torch.repeat_interleave(widths)
    first = widths.cumsum(0) - widths
    offset = torch.arange(len(index), device=index.device) - first[index]
    latent = torch.where(nodes.site[index] == EMBEDDING, REST, nodes.latent[index] * widths[index] + offset)
    rows = torch.cat([index, index.new_tensor([len(nodes)])])
    return Nodes(nodes.site[index], nodes.place[index], latent), kept[rows][:, index]


def _coordinates(heads: Heads, model: SubjectModel) -> Coordinates:
    return Coordinates(heads.site, model.width(heads.site), str(model.device))


class _Current:
    """Current changes of all nodes and errors, filled in site after site.

    delta: [B, T, n], f - f' of the latents. rest: of each dictionary, [B, T, d], eps - eps' where it is kept.
    """

    def __init__(self, cut: Cut, nodes: Nodes, errors: Tensor) -> None:
        self.cut, self.nodes, self.errors = cut, nodes, errors
        shape = cut.places.shape
        self.source = nodes.site + cut.first  # index into the cut's sources
        self.at = cut.places[..., None] == nodes.place  # [B, T, n]
        self.delta = torch.zeros(*shape, len(nodes), device=cut.places.device)
        self.rest = [torch.zeros_like(each.x) for each in cut.sources[cut.first :]]
        # An embedding is one vector, wholly there or not: 1 where its token can have one.
        embedded = nodes.site == EMBEDDING
        if embedded.any():
            there = cut.sources[0].rest.any(dim=-1)
            self.delta[..., embedded] = (self.at[..., embedded] & there[..., None]).float()

    def compute(self, index: int, here: Tensor, wanted: Tensor, chunk: int) -> None:
        """Current values of the nodes `here` (long [h]) of one site, whose in-edges `wanted` [h, n] are kept."""
        cut, dictionary = self.cut, self.cut.dictionaries[index]
        errors = bool(self.errors[index].any())
        if errors:  # the error node reads everything
            wanted = torch.cat([wanted, wanted.new_ones(1, len(self.nodes))])
        if not len(wanted):
            return
        places = dict.fromkeys((dictionary.reads, dictionary.site))
        plan = Plan.of(list(cut.sources), [_nothing(site) for site in places])
        sets, row, copy = self._sets(plan.reach[0], wanted)
        for part in torch.arange(len(row), device=row.device).split(chunk):
            values = self._run(plan, sets[part], row[part])
            value = SiteValue(x=values[-1], read=values[0])
            mine = copy[row[part]] == part[:, None]  # [c, targets]: whose input this copy is
            self._read(index, here, value, row[part], mine[:, : len(here)])
            if errors:
                self._error(index, value, row[part], mine[:, -1])

    def behaviour(self, wanted: Tensor, chunk: int) -> Tensor:
        """The behaviour [B], whose in-edges `wanted` [n] are kept."""
        plan = Plan.of(list(self.cut.sources), [Targets.behaviour(self.cut.batch)])
        sets, row, copy = self._sets(plan.reach[0], wanted[None])
        found = [
            self._run(plan, sets[part], row[part])[0][:, 0, 0]
            for part in torch.arange(len(row), device=row.device).split(chunk)
        ]
        return torch.cat(found)[copy[:, 0]]

    def _sets(self, reach: list[int], wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step 2: the different sets of sources [C, n], the row [C] of each, and of all targets their set [B, k]."""
        reached = torch.isin(self.source, torch.tensor(reach, device=wanted.device))
        changed = self.delta.any(dim=1)  # [B, n]
        sets, rows, copies, start = [], [], [], 0
        for row, there in enumerate(changed):
            distinct, which = torch.unique(wanted & reached & there, dim=0, return_inverse=True)
            sets.append(distinct)
            rows.append(torch.full((len(distinct),), row, device=wanted.device))
            copies.append(which + start)
            start += len(distinct)
        return torch.cat(sets), torch.cat(rows), torch.stack(copies)

    def _run(self, plan: Plan, sets: Tensor, row: Tensor) -> list[Tensor]:
        """Values of the plan's places, on copies of rows [c] that have the sources in `sets` [c, n]."""
        cut, nodes = self.cut, self.nodes
        held = []
        for number, sources in enumerate(cut.sources):
            here = (self.source == number).nonzero()[:, 0]
            change = self.delta[row][..., here] * sets[:, None, here]  # [c, T, n of this source]
            if number < cut.first:
                value = sources.rest[row] * change.sum(dim=-1, keepdim=True)
            else:
                value = change @ sources.decoder[nodes.latent[here]] + self.rest[number - cut.first][row]
            held.append(sources.base[row] + value)
        values, _ = plan.run(cut.model, cut.batch.rows(row), grad=False, held=held)
        return values

    def _read(self, index: int, here: Tensor, value: SiteValue, row: Tensor, mine: Tensor) -> None:
        """Changes of the nodes `here` off the copies [c] of rows that are their inputs (`mine` [c, h])."""
        latent = self.nodes.latent[here]
        for at, part, change, _ in self._changes(index, value, row, self.at[..., here][row] & mine[:, None]):
            found = torch.where(part, change[:, latent], 0.0)
            self.delta.index_put_((at[0][:, None], at[1][:, None], here[None]), found, accumulate=True)

    def _error(self, index: int, value: SiteValue, row: Tensor, mine: Tensor) -> None:
        there = self.errors[index][self.cut.places[row]] & mine[:, None]
        decoder = self.cut.dictionaries[index].decoder
        base = self.cut.sources[self.cut.first + index].base
        for at, _, change, x in self._changes(index, value, row, there[..., None]):
            self.rest[index][at] = x - base[at] - change @ decoder

    def _changes(
        self, index: int, value: SiteValue, row: Tensor, where: Tensor
    ) -> Iterator[tuple[At, Tensor, Tensor, Tensor]]:
        """Where any of `where` [c, T, k] is: (row, position), `where` there, all changes [m, d_sae], and x."""
        cut = self.cut
        free = cut.sources[cut.first + index].free[row]
        for part in (where.any(dim=-1) & free).nonzero().split(ENCODE_TOKENS):
            copy = (part[:, 0], part[:, 1])
            at = (row[part[:, 0]], part[:, 1])
            here = value.at(copy)
            found = changes(cut.dictionaries[index], here, cut.reference(index, at))
            yield at, where[copy], found.latents - found.baseline, here.x


def _nothing(site: Site) -> Targets:
    """No targets, at a place that is to be read."""
    none = torch.zeros(0, dtype=torch.long)
    return Targets.directions(site, none, none, torch.zeros(0, 1), ())


def error_nodes(policy: Errors, kept: Sequence[Tensor]) -> Tensor:
    """Error nodes, bool [S, places], of a circuit with the latents `kept` (bool [places, d_sae] of each site)."""
    with_latents = torch.stack([each.any(dim=1) for each in kept])
    if policy is Errors.WITH_LATENTS:
        return with_latents
    return torch.full_like(with_latents, policy is Errors.KEPT)
