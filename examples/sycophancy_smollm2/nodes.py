"""Nodes of a contrast: attribution on discovery prompts, and what sets of them do on evaluation prompts.

A node is (site, place, latent), where a place is a part of the prompt (`facts.roles`), so that one set of nodes can be
taken to other prompts, other contrasts and other questions. A *contrast* is a pair of conditions, clean and corrupt.

1. Attribution by `atp` (mediation.estimators), its mean over prompts; error nodes are kept apart.
2. A set of nodes is tested by two interventions on prompts that did not choose it (circuits.ablation):
   removal: the clean prompt with the set at its corrupt values; swap: the corrupt prompt with the set at its clean
   values. All else, errors among it, is left to the model. Shares of the contrast's total effect: 1 - (m(removed) -
   m(corrupt)) / TE, and (m(swapped) - m(corrupt)) / TE. Where nodes that work together carry all of it, both are 1.
3. Controls of a set of k nodes: others drawn at random, as many at every site and place (`matched`); others drawn at
   random until their |attribution| sums to that of the set (`of_mass`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from circuits.ablation import Cut, Nodes, run_nodes
from circuits.faithfulness import interval, prompt_weights
from circuits.rankings import place_index
from mediation.dictionaries import Dictionary
from mediation.estimators.common import behaviour, contract, states_and_gradients
from mediation.prompts import Baseline, Batch, DiscoverySet, EvaluationSet, PromptSet, batches, tokenize
from mediation.statistics import Floats
from mediation.subject import SubjectModel

BATCH = 12
Places = dict[str, int]
Tick = Callable[[], None]


@dataclass(frozen=True)
class Attribution:
    """Means over the prompts of one contrast.

    sites: of each, attribution [places, d_sae] and |f - f'| alike; errors [S, places]; size and error_size [S]: of
    single prompts' nodes, the sum of |attribution| over latents, and over error nodes. total: the total effect.
    """

    names: list[str]
    sites: list[Tensor]
    activation: list[Tensor]
    errors: Tensor
    size: Tensor
    error_size: Tensor
    total: float
    prompts: int

    def __add__(self, other: Attribution) -> Attribution:
        """The same over both sets of prompts."""
        n = self.prompts + other.prompts
        a, b = self.prompts / n, other.prompts / n

        def mean(mine: Tensor, theirs: Tensor) -> Tensor:
            return a * mine + b * theirs

        return Attribution(
            self.names,
            [mean(*pair) for pair in zip(self.sites, other.sites, strict=True)],
            [mean(*pair) for pair in zip(self.activation, other.activation, strict=True)],
            mean(self.errors, other.errors),
            mean(self.size, other.size),
            mean(self.error_size, other.error_size),
            a * self.total + b * other.total,
            n,
        )

    @property
    def nodes(self) -> Nodes:
        """Every node that changes on some prompt."""
        where = [each.nonzero(as_tuple=True) for each in self.activation]
        site = [torch.full_like(at[0], number) for number, at in enumerate(where)]
        return Nodes(torch.cat(site), torch.cat([at[0] for at in where]), torch.cat([at[1] for at in where]))

    def of(self, nodes: Nodes, values: Sequence[Tensor] | None = None) -> Tensor:
        """Attribution of these nodes, or other values given by site, [n]."""
        values = values or self.sites
        found = torch.zeros(len(nodes))
        for number, each in enumerate(values):
            here = nodes.site == number
            found[here] = each[nodes.place[here], nodes.latent[here]]
        return found

    @property
    def error_share(self) -> list[float]:
        """Of each site, the error nodes' share of the sum of |attribution|."""
        return (self.error_size / (self.size + self.error_size)).tolist()


def attribute(
    model: SubjectModel, dictionaries: Sequence[Dictionary], prompts: DiscoverySet, places: Places, tick: Tick
) -> Attribution:
    """Step 1. `places` numbers the parts of prompts; a new name gets the next number, so that it must have them all."""
    shape = [(len(places), each.d_sae) for each in dictionaries]
    sites, activation = ([torch.zeros(each) for each in shape] for _ in range(2))
    errors = torch.zeros(len(dictionaries), len(places))
    sizes = torch.zeros(2, len(dictionaries))
    total = 0.0
    for batch in batches(tokenize(prompts, model), BATCH):
        (place,) = place_index([batch], places)
        states, gradients = states_and_gradients(model, batch, dictionaries, Baseline.CORRUPT)
        total += float((behaviour(model, batch) - behaviour(model, batch, corrupt=True)).sum())
        for number, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
            scores = contract(state, gradient)
            at = (place[state.row, state.position], state.latent)
            sites[number].index_put_(at, scores.latents, accumulate=True)
            activation[number].index_put_(at, state.delta.abs(), accumulate=True)
            errors[number].index_add_(0, place[state.free], scores.error[state.free])
            sizes[0, number] += scores.latents.abs().sum()
            sizes[1, number] += scores.error.abs().sum()
        tick()
    n = len(prompts)
    means = ([each / n for each in group] for group in (sites, activation))
    names = [each.site.name for each in dictionaries]
    return Attribution(names, *means, errors / n, sizes[0] / n, sizes[1] / n, total / n, n)


# Sets of nodes ---------------------------------------------------------------------------------------------


def strongest(attribution: Attribution, k: int) -> Nodes:
    """The k nodes of the largest |attribution|, the largest first."""
    nodes = attribution.nodes
    return nodes.take(attribution.of(nodes).abs().argsort(descending=True, stable=True)[:k])


def strongest_heads(attribution: Attribution, k: int, *, weakest: torch.Generator | None = None) -> Nodes:
    """The k heads of the largest |sum of attribution over places|, at all places; or k of the others at random."""
    strength = torch.stack([each.sum(0) for each in attribution.sites])
    order = strength.flatten().abs().argsort(descending=True, stable=True)
    chosen = order[:k] if weakest is None else order[k:][torch.randperm(len(order) - k, generator=weakest)[:k]]
    n_places, width = attribution.sites[0].shape
    site, head = (each.repeat_interleave(n_places) for each in (chosen // width, chosen % width))
    return Nodes(site, torch.arange(n_places).repeat(k), head)


def overlap(a: Nodes, b: Nodes) -> float:
    """Share of the nodes of `a` that are in `b` too."""
    return float(torch.isin(_keys(a), _keys(b)).float().mean())


def matched(attribution: Attribution, chosen: Nodes, generator: torch.Generator) -> Nodes:
    """Step 3: nodes that are not chosen, as many at each site and place as far as there are so many."""
    nodes = attribution.nodes
    rest = nodes.take(~torch.isin(_keys(nodes), _keys(chosen)))
    rest = rest.take(torch.randperm(len(rest), generator=generator))
    picked = []
    cell, wanted = rest.site * 1000 + rest.place, chosen.site * 1000 + chosen.place
    for value, count in zip(*wanted.unique(return_counts=True), strict=True):
        picked.append((cell == value).nonzero()[:, 0][: int(count)])
    return rest.take(torch.cat(picked))


def of_mass(attribution: Attribution, chosen: Nodes, generator: torch.Generator) -> Nodes:
    """Step 3: nodes that are not chosen, drawn until their |attribution| sums to that of the chosen, or all are in."""
    nodes = attribution.nodes
    rest = nodes.take(~torch.isin(_keys(nodes), _keys(chosen)))
    rest = rest.take(torch.randperm(len(rest), generator=generator))
    mass = attribution.of(rest).abs().cumsum(0)
    enough = int((mass < attribution.of(chosen).abs().sum()).sum()) + 1
    return rest.take(torch.arange(min(enough, len(rest))))


def _keys(nodes: Nodes) -> Tensor:
    """A number for each node."""
    return (nodes.site * 1_000 + nodes.place) * 1_000_000 + nodes.latent


# Interventions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tested:
    """Behaviours on the evaluation prompts of a contrast: clean, corrupt [n]; of each set, removed and swapped [n]."""

    clean: Floats
    corrupt: Floats
    removed: dict[str, Floats]
    swapped: dict[str, Floats]

    def figures(self, name: str) -> dict[str, dict[str, float]]:
        """Shares of the total effect of a set, with intervals over prompts."""
        te = self.clean - self.corrupt
        return {
            "removal": ratio(self.clean - self.removed[name], te),
            "swap": ratio(self.swapped[name] - self.corrupt, te),
        }


def ratio(part: Floats, whole: Floats) -> dict[str, float]:
    """Ratio of means over prompts with its bootstrap interval."""
    weights = prompt_weights(len(whole))
    low, high = interval((weights @ part) / (weights @ whole))
    return {"value": float(part.mean() / whole.mean()), "low": float(low), "high": float(high)}


def run_sets(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prompts: EvaluationSet,
    sets: dict[str, Nodes],
    places: Places,
    tick: Tick,
) -> Tested:
    """Step 2."""
    widths = [each.d_sae for each in dictionaries]
    masks = {name: nodes.masks(len(places), widths) for name, nodes in sets.items()}
    ends, found = np.zeros((2, len(prompts))), {name: np.zeros((2, len(prompts))) for name in sets}
    for batch in batches(tokenize(prompts, model), BATCH):
        (place,) = place_index([batch], places)
        index = batch.prompt.numpy()
        for way, given in enumerate((batch, exchanged(batch))):
            ends[way, index] += behaviour(model, given).numpy()
            cut = Cut.of(model, given, dictionaries, Baseline.CORRUPT, place)
            errors = torch.ones(len(dictionaries), len(places), dtype=torch.bool)
            for name, mask in masks.items():
                found[name][way, index] += run_nodes(cut, [~each for each in mask], errors).numpy()
                tick()
    removed, swapped = ({name: each[way] for name, each in found.items()} for way in (0, 1))
    return Tested(ends[0], ends[1], removed, swapped)


def exchanged(batch: Batch) -> Batch:
    """The same pairs with clean and corrupt in each other's place."""
    assert batch.corrupt is not None
    return replace(batch, clean=batch.corrupt, corrupt=batch.clean)


def alone(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prompts: EvaluationSet,
    orders: dict[str, Nodes],
    sizes: Sequence[int],
    places: Places,
    tick: Tick,
) -> dict[str, list[dict[str, float]]]:
    """Faithfulness of the first k nodes of each order (circuits.faithfulness, step 1), errors kept, by size k."""
    widths = [each.d_sae for each in dictionaries]
    found = {name: np.zeros((len(sizes), len(prompts))) for name in orders}
    clean, empty = np.zeros((2, len(prompts)))
    for batch in batches(tokenize(prompts, model), BATCH):
        (place,) = place_index([batch], places)
        index = batch.prompt.numpy()
        cut = Cut.of(model, batch, dictionaries, Baseline.CORRUPT, place)
        errors = torch.ones(len(dictionaries), len(places), dtype=torch.bool)
        none = [torch.zeros(len(places), width, dtype=torch.bool) for width in widths]
        clean[index] = behaviour(model, batch).numpy()
        empty[index] = run_nodes(cut, none, ~errors).numpy()
        for name, order in orders.items():
            for row, size in enumerate(sizes):
                kept = order.take(torch.arange(min(size, len(order)))).masks(len(places), widths)
                found[name][row, index] = run_nodes(cut, kept, errors).numpy()
                tick()
    return {
        name: [{"size": size, **ratio(row - empty, clean - empty)} for size, row in zip(sizes, measured, strict=True)]
        for name, measured in found.items()
    }


def halved(prompts: DiscoverySet) -> tuple[DiscoverySet, DiscoverySet]:
    """Every other prompt, for the agreement of attribution with itself."""
    return DiscoverySet(PromptSet(prompts[::2])), DiscoverySet(PromptSet(prompts[1::2]))
