"""Which nodes and edges a circuit takes first, and the rankings it has to beat; from discovery prompts alone.

1. Nodes: every (site, place, latent) that changes on some prompt, with its mean attribution over the prompts (by the
   estimator at hand) and its mean activation, |f - f'|. The circuit takes them by |attribution|.
2. Edges run between candidates: the strongest nodes of each site by |attribution|, the token embeddings and the
   behaviour. Each has its mean contribution over the prompts, averaged along the path to the baseline (circuits.edges):
   where either of two inputs would do, neither has a gradient at the clean prompt.
3. A circuit of edges takes whole paths: an edge counts what the strongest path through it carries, from an embedding
   (or an error node, where these are kept) to the behaviour. What a node carries is divided over its in-edges by their
   shares of |contribution|, as in circuits.graph; the best ways in and out of every node are found in execution order.
   So no edge comes without a way to it and from it; by contribution alone, small circuits have loose ends.
4. Baselines for nodes: activation, and chance. For edges: by |contribution| alone; between the nodes with the strongest
   attribution, or activation (an edge counts as much as its weaker end, then its stronger one); and chance.
5. The basis: neurons where an MLP writes, coordinates at all other sites, ranked in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.ablation import EMBEDDING, Nodes
from circuits.edges import EMBEDDING_SITE, REST, Edges, Sources, Targets, edges, embeddings_apart
from circuits.graph import embedding_id, latent_id
from mediation.dictionaries import Coordinates, Dictionary
from mediation.errors import MediationError
from mediation.estimators import ESTIMATORS
from mediation.estimators.common import behaviour_gradient
from mediation.loading import ARCHITECTURES
from mediation.neurons import Neurons
from mediation.nodes import site_states
from mediation.prompts import Batch
from mediation.sites import Stream
from mediation.subject import SubjectModel
from mediation.trace import Prepared, TraceSettings, role_of

LINK_STEPS = 3  # points of the path over which edges are averaged; with the clean prompt alone half of an or's are lost


@dataclass(frozen=True)
class NodeScores:
    """Mean attribution and mean |f - f'| of n nodes, [n] each."""

    nodes: Nodes
    attribution: Tensor
    activation: Tensor


@dataclass(frozen=True)
class EdgeScores:
    """Edges between n candidates and the behaviour: row d (the last is the behaviour), column u.

    contribution [n + 1, n], mean over prompts; there: bool, which edges a prompt had; errors [n + 1]: the sum of
    |contribution| from error nodes. ends: of the candidates, their own scores.
    """

    ends: NodeScores
    contribution: Tensor
    there: Tensor
    errors: Tensor

    @property
    def number(self) -> int:
        """How many edges there are."""
        return int(self.there.sum())


def place_index(batches: Sequence[Batch], names: dict[str, int]) -> list[Tensor]:
    """The place of every token, long [B, T] of each batch: its role, numbered by `names`, which grows."""
    found = []
    for batch in batches:
        places = torch.zeros_like(batch.clean)
        for row, example in enumerate(batch.examples):
            for position in range(len(example)):
                places[row, position] = names.setdefault(role_of(example, position), len(names))
        found.append(places)
    return found


def node_ids(nodes: Nodes, sites: Sequence[str], places: Sequence[str]) -> list[str]:
    """The ids of `circuits.graph`, from the names of the sites and places."""
    rows = zip(nodes.site.tolist(), nodes.place.tolist(), nodes.latent.tolist(), strict=True)
    return [
        embedding_id(places[place]) if site == EMBEDDING else latent_id(sites[site], places[place], latent)
        for site, place, latent in rows
    ]


def basis(model: SubjectModel, dictionaries: Sequence[Dictionary]) -> list[Dictionary]:
    """Step 5, at the same sites."""
    separate = ARCHITECTURES[model.architecture].mlp_out == "mlp"  # else a norm follows, and neurons write nothing
    return [
        Neurons(model, each.site.layer)
        if each.site.stream is Stream.MLP_OUT and separate
        else Coordinates(each.site, model.width(each.site), str(model.device))
        for each in dictionaries
    ]


def score_nodes(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prepared: Prepared,
    places: Sequence[Tensor],
    settings: TraceSettings,
) -> NodeScores:
    """Step 1."""
    ordered = sorted(dictionaries, key=lambda each: each.site.depth)
    n_places = 1 + max(int(each.max()) for each in places)
    sums = [torch.zeros(2, n_places, each.d_sae, device=model.device) for each in ordered]
    for batch, place in zip(prepared.batches, places, strict=True):
        states = site_states(model, batch, ordered, settings.baseline, prepared.means)
        scores = ESTIMATORS[settings.estimator](model, batch, states, settings.estimators)
        for total, state, score in zip(sums, states, scores, strict=True):
            at = (place[state.row, state.position], state.latent)
            total[0].index_put_(at, score.latents, accumulate=True)
            total[1].index_put_(at, state.delta.abs(), accumulate=True)
    where = [each[1].nonzero(as_tuple=True) for each in sums]
    site = [torch.full_like(at[0], number) for number, at in enumerate(where)]
    nodes = Nodes(torch.cat(site), torch.cat([at[0] for at in where]), torch.cat([at[1] for at in where]))
    if not len(nodes):
        raise MediationError("No latent changes between these prompts and their baseline, so there is no circuit.")
    values = torch.cat([each[:, at[0], at[1]] for each, at in zip(sums, where, strict=True)], dim=1)
    values = values / len(prepared.prompts)
    return NodeScores(nodes, values[0], values[1])


def score_edges(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prepared: Prepared,
    places: Sequence[Tensor],
    scores: NodeScores,
    settings: TraceSettings,
    mean_embedding: Tensor | None,
) -> EdgeScores:
    """Step 2, with `settings.top` candidates a site."""
    ordered = sorted(dictionaries, key=lambda each: each.site.depth)
    embedded = embeddings_apart(ordered)
    first = int(embedded)
    n_places = 1 + max(int(each.max()) for each in places)
    chosen = _strongest(scores, len(ordered), settings.top)
    nodes = scores.nodes.take(chosen)
    ends = [scores.attribution[chosen], scores.activation[chosen]]
    if embedded:
        every = torch.arange(n_places, device=chosen.device)
        lone = torch.full_like(every, EMBEDDING)
        nodes = Nodes(
            torch.cat([lone, nodes.site]), torch.cat([every, nodes.place]), torch.cat([lone * 0 + REST, nodes.latent])
        )
        ends = [torch.cat([torch.zeros(n_places, device=chosen.device), each]) for each in ends]
    # node of (source, place, latent); the column of the whole vector, the last, is an embedding's node or none
    tables = [torch.full((n_places, each.d_sae + 1), -1, device=chosen.device) for each in ordered]
    if embedded:
        tables.insert(0, torch.full((n_places, 1), -1, device=chosen.device))
    for number, table in enumerate(tables):
        here = (nodes.site + first == number).nonzero()[:, 0]
        table[nodes.place[here], nodes.latent[here]] = here
    n = len(nodes)
    found = EdgeScores(
        NodeScores(nodes, ends[0], ends[1]),
        torch.zeros(n + 1, n, device=chosen.device),
        torch.zeros(n + 1, n, dtype=torch.bool, device=chosen.device),
        torch.zeros(n + 1, device=chosen.device),
    )
    for batch, place in zip(prepared.batches, places, strict=True):
        states = site_states(model, batch, ordered, settings.baseline, prepared.means)
        sources = [Sources.of(state) for state in states]
        sites = [each.site for each in ordered]
        if embedded:
            sources.insert(0, Sources.embeddings(model, batch, settings.baseline, mean_embedding))
            sites.insert(0, EMBEDDING_SITE)
        _, gradients = behaviour_gradient(model, batch, sites)
        if embedded:
            change = sources[0].rest
            emits = [(change * gradients[0]).sum(dim=-1), change.norm(dim=-1)]
            for value, emitted in zip(ends, emits, strict=True):
                value.index_add_(0, place[sources[0].free], emitted[sources[0].free])
        picked, into = [], []
        for state, gradient, table in zip(states, gradients[first:], tables[first:], strict=True):
            node = table[place[state.row, state.position], state.latent]
            picked.append(Targets.latents(state, gradient, (node >= 0).nonzero()[:, 0]))
            into.append(node[node >= 0])
        between = edges(model, batch, sources, picked, chunk=settings.chunk, steps=LINK_STEPS)
        _add(found, between, torch.cat(into), tables, place)
        last = torch.full((len(batch),), n, device=chosen.device)
        _add(found, edges(model, batch, sources, [Targets.behaviour(batch)], steps=settings.steps), last, tables, place)
    for total in (found.contribution, found.errors, *([each[:n_places] for each in ends] if embedded else ())):
        total /= len(prepared.prompts)
    return found


def _strongest(scores: NodeScores, sites: int, n: int) -> Tensor:
    """The n strongest nodes of each site, in the order of the sites."""
    found = []
    for site in range(sites):
        here = (scores.nodes.site == site).nonzero()[:, 0]
        found.append(here[torch.argsort(-scores.attribution[here].abs(), stable=True)[:n]])
    return torch.cat(found)


def _add(scores: EdgeScores, found: Edges, node: Tensor, tables: Sequence[Tensor], place: Tensor) -> None:
    """Add the edges of a batch, whose targets are the nodes `node` (long [k])."""
    into = node[found.target]
    at = place[found.row[found.target], found.position]
    source = torch.full_like(into, -1)
    for number, table in enumerate(tables):
        here = found.source == number
        latent, units = found.latent[here], found.sources[number].units
        source[here] = table[at[here], torch.where(latent == REST, REST, latent % units)]
    known = source >= 0
    scores.contribution.index_put_((into[known], source[known]), found.contribution[known], accumulate=True)
    scores.there[into[known], source[known]] = True
    error = (found.latent == REST) & ~known
    scores.errors.index_add_(0, into[error], found.contribution[error].abs())


# Rankings: indices, first what a circuit takes first ---------------------------------------------------------


def by_size(values: Tensor) -> Tensor:
    """Indices [n] of `values` [n], the largest |value| first."""
    return torch.argsort(-values.abs(), stable=True)


def by_chance(n: int, seed: int) -> Tensor:
    """A random order of n."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def edges_by_contribution(scores: EdgeScores) -> Tensor:
    """Indices into the flattened [n + 1, n] of the edges there are, the largest |contribution| first."""
    return _of_there(scores, scores.contribution.abs())


def edges_by_ends(scores: EdgeScores, strength: Tensor) -> Tensor:
    """As `edges_by_contribution`, by the weaker end, then the stronger; `strength` [n], the behaviour's is infinite."""
    own = strength.abs()
    into = torch.cat([own, own.new_full((1,), torch.inf)])[:, None]
    weaker, stronger = torch.minimum(into, own), torch.maximum(into, own)
    edge = scores.there.flatten().nonzero()[:, 0].cpu().numpy()
    keys = (stronger.flatten().cpu().numpy()[edge], weaker.flatten().cpu().numpy()[edge])
    return torch.from_numpy(edge[np.lexsort(keys)[::-1].copy()])


def edges_by_paths(scores: EdgeScores, errors_kept: bool) -> Tensor:
    """Step 3: as `edges_by_contribution`, by what the strongest path through an edge carries."""
    return _of_there(scores, path_strength(scores, errors_kept))


def path_strength(scores: EdgeScores, errors_kept: bool) -> Tensor:
    """The share of the behaviour's input that the strongest path through each edge carries, [n + 1, n]."""
    size, site = scores.contribution.abs(), scores.ends.nodes.site
    total = size.sum(dim=1) + scores.errors
    share = size / total.clamp_min(torch.finfo(size.dtype).tiny)[:, None]
    way_in = torch.zeros_like(size[0])
    for number in site.unique(sorted=True).tolist():
        here = (site == number).nonzero()[:, 0]
        best = (share[here] * way_in).max(dim=1).values
        if errors_kept:
            best = torch.maximum(best, scores.errors[here] / total[here].clamp_min(torch.finfo(size.dtype).tiny))
        way_in[here] = torch.where(scores.there[here].any(dim=1), best, 1.0)  # one without in-edges is a root
    way_out = torch.zeros_like(total)
    way_out[-1] = 1.0
    for number in site.unique(sorted=True).flip(0).tolist():
        here = (site == number).nonzero()[:, 0]
        way_out[here] = (share[:, here] * way_out[:, None]).max(dim=0).values
    return way_in * share * way_out[:, None]


def _of_there(scores: EdgeScores, values: Tensor) -> Tensor:
    edge = scores.there.flatten().nonzero()[:, 0]
    return edge[by_size(values.flatten()[edge])]
