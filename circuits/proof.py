"""`mediation prove`: does the model do it with the circuit alone? Circuits against baselines at every size.

1. Rank nodes and edges on discovery prompts (circuits.rankings), for the dictionaries and for the basis at their sites.
2. On evaluation prompts, which share no text with them, run every ranking's circuit of every size, and the model
   without it (circuits.ablation), for nodes and for edges. The complement of edges is the candidates' other edges.
   The basis is compared at equal numbers of nodes or edges; where it has fewer, all of them are kept.
3. Faithfulness and completeness at every size, CPR and CMD over linear and logarithmic size (circuits.faithfulness).
4. For each baseline, the difference in logarithmic CPR and CMD and the sizes at which it is closer to the model than
   the circuit is, each where the paired bootstrap interval over evaluation prompts excludes zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from circuits.ablation import Cut, Errors, Nodes, error_nodes, run_edges, run_nodes
from circuits.edges import mean_embedding
from circuits.faithfulness import Curve, interval, prompt_weights, sizes
from circuits.graph import TARGET
from circuits.rankings import (
    EdgeScores,
    NodeScores,
    basis,
    by_chance,
    by_size,
    edges_by_contribution,
    edges_by_ends,
    edges_by_paths,
    node_ids,
    place_index,
    score_edges,
    score_nodes,
)
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.estimators.common import behaviour
from mediation.nodes import MeanState, mean_state
from mediation.prompts import Baseline, DiscoverySet, EvaluationSet, PromptSet
from mediation.statistics import Floats
from mediation.subject import SubjectModel
from mediation.trace import Prepared, TraceSettings, prepare, seconds_per_token

DRAWS = 2  # random orders that are averaged
CIRCUIT, NEURONS = "circuit", "neurons"
Progress = Callable[[int, int], None]


class Kind(StrEnum):
    """What a circuit is a set of."""

    NODES = "nodes"
    EDGES = "edges"


@dataclass(frozen=True)
class ProofSettings:
    """Settings of a proof beside those of its trace, whose `top` is the number of candidates of a site for edges."""

    errors: Errors = Errors.KEPT
    seed: int = 0
    kinds: tuple[Kind, ...] = tuple(Kind)


@dataclass(frozen=True)
class Placed:
    """Prompts prepared, with the place of every token, by batch."""

    prepared: Prepared
    places: list[Tensor]


@dataclass(frozen=True)
class Ranking:
    """Orders of node or edge indices, first what a circuit takes first; measurements of several (chance) are averaged.

    there: bool [n + 1, n], which edges there are; an edge's index is that into the flattened matrix.
    """

    name: str
    kind: Kind
    orders: list[Tensor]
    nodes: Nodes
    there: Tensor | None = None

    def members(self, order: Tensor, ids: Sequence[str]) -> list[tuple[str, str | None]]:
        """(node, None) or (source, target) of each of an order, `ids` being those of all nodes."""
        if self.kind is Kind.NODES:
            return [(ids[each], None) for each in order.tolist()]
        named = [*ids, TARGET]
        return [(named[edge % len(ids)], named[edge // len(ids)]) for edge in order.tolist()]


@dataclass(frozen=True)
class Discovery:
    """What the discovery prompts say of one set of sites: scores, rankings, and the means the mean baseline needs."""

    dictionaries: list[Dictionary]
    means: dict[str, MeanState] | None
    mean_embedding: Tensor | None
    nodes: NodeScores
    links: EdgeScores | None
    rankings: list[Ranking]

    def ids(self, ranking: Ranking, places: Sequence[str]) -> list[str]:
        """Ids of a ranking's nodes."""
        return node_ids(ranking.nodes, [each.site.name for each in self.dictionaries], places)


@dataclass(frozen=True)
class Proof:
    """What was measured: a curve of every ranking, by kind."""

    curves: dict[Kind, list[Curve]]
    members: pl.DataFrame  # kind, rank, source, target (null for a node): what the circuit takes, in its order
    edge_nodes: int  # nodes that edges run between, embeddings among them

    def table(self, *, seed: int) -> pl.DataFrame:
        """One row per kind, ranking and size: faithfulness and completeness with intervals, and mean behaviours."""
        rows = []
        for kind, curves in self.curves.items():
            weights = prompt_weights(len(curves[0].clean), seed=seed)
            for curve in curves:
                ends = [interval(each) for each in (curve.faithfulness(weights), curve.completeness(weights))]
                (low, high), (rest_low, rest_high) = ends
                for index, size in enumerate(curve.sizes):
                    rows.append(
                        {
                            "kind": kind.value, "ranking": curve.name, "size": size, "of": curve.of,
                            "faithfulness": curve.faithfulness()[index], "low": low[index], "high": high[index],
                            "completeness": curve.completeness()[index],
                            "completeness_low": rest_low[index], "completeness_high": rest_high[index],
                            "circuit": curve.circuit[index].mean(), "complement": curve.complement[index].mean(),
                            "clean": curve.clean.mean(), "empty": curve.empty.mean(),
                        }
                    )  # fmt: skip
        return pl.DataFrame(rows)

    def summary(self, *, seed: int) -> dict[str, Any]:
        """By kind: prompts, candidates, CPR and CMD of every ranking, and how each baseline compares."""
        found: dict[str, Any] = {}
        for kind, curves in self.curves.items():
            weights = prompt_weights(len(curves[0].clean), seed=seed)
            own = curves[0]
            scores = {curve.name: _areas(curve, weights) for curve in curves}
            against = {curve.name: _compare(own, curve, weights) for curve in curves[1:]}
            found[kind.value] = {
                "prompts": len(own.clean), "of": own.of,
                "clean": float(own.clean.mean()), "empty": float(own.empty.mean()),
                "scores": scores, "against": against,
            }  # fmt: skip
        if Kind.EDGES in self.curves:
            found[Kind.EDGES.value]["between"] = self.edge_nodes
        return found


def prove(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    discovery: DiscoverySet,
    evaluation: EvaluationSet,
    traced: TraceSettings,
    settings: ProofSettings,
    *,
    progress: Progress = lambda done, of: None,
) -> Proof:
    """Steps 1 to 3. `traced` says baseline, behaviour, estimator, batch and chunk sizes, and candidates of a site.

    Raises MediationError where no latent changes, or the evaluation prompts have no total effect to explain.
    """
    names: dict[str, int] = {}
    discovered = place_prompts(model, dictionaries, discovery, traced, names)
    evaluated = place_prompts(model, dictionaries, evaluation, traced, names)
    circuit = discover(model, dictionaries, discovered, traced, settings)
    neurons = discover(model, basis(model, dictionaries), discovered, traced, settings, name=NEURONS)
    ranked = {kind: [each for each in circuit.rankings if each.kind is kind] for kind in settings.kinds}
    of = {kind: len(each[0].orders[0]) for kind, each in ranked.items()}
    steps = {kind: sizes(number) for kind, number in of.items()}
    work = [(found, each) for found in (circuit, neurons) for each in found.rankings]
    total = sum(2 * len(each.orders) * len(steps[each.kind]) for _, each in work)
    done = iter(range(1, total + 1))
    curves: dict[Kind, list[Curve]] = {kind: [] for kind in settings.kinds}
    for found in (circuit, neurons):
        cuts = [
            Cut.of(model, batch, found.dictionaries, traced.baseline, place,
                   means=found.means, mean_embedding=found.mean_embedding)
            for batch, place in zip(evaluated.prepared.batches, evaluated.places, strict=True)
        ]  # fmt: skip
        for ranking in found.rankings:
            kind = ranking.kind
            curve = _curve(
                ranking, cuts, steps[kind], of[kind], len(names), len(evaluation), traced.chunk, settings.errors,
                lambda: progress(next(done), total),
            )  # fmt: skip
            curves[kind].append(curve)
    members = [
        pl.DataFrame(
            ranked[kind][0].members(ranked[kind][0].orders[0], circuit.ids(ranked[kind][0], list(names))),
            schema=["source", "target"], orient="row",
        ).select(pl.lit(kind.value).alias("kind"), pl.int_range(1, pl.len() + 1).alias("rank"), "source", "target")
        for kind in settings.kinds
    ]  # fmt: skip
    between = 0 if circuit.links is None else len(circuit.links.ends.nodes)
    return Proof(curves, pl.concat(members, how="vertical_relaxed"), between)


def proof_seconds(
    model: SubjectModel, prepared: Prepared, sites: int, traced: TraceSettings, settings: ProofSettings
) -> float:
    """How long `prove` will take on two halves like `prepared`: the time of a forward pass, times counts of passes.

    A circuit of nodes is one pass. One of edges is a pass of the stretch between two sites for every node that has a
    set of sources of its own: as many as there are candidates, or as edges where they are fewer. Ranking takes a
    path's passes for each site, twice where there are edges.
    """
    tokens = sum(batch.clean.numel() for batch in prepared.batches)
    positions = max(batch.clean.shape[1] for batch in prepared.batches)
    nodes = traced.top * sites
    orders = {Kind.NODES: 3 + DRAWS, Kind.EDGES: 5 + DRAWS}
    passes = 3.0 * traced.steps * sites * len(settings.kinds)
    for kind in settings.kinds:
        of = nodes * nodes // 2 if kind is Kind.EDGES else nodes * positions
        copies = [(min(size, nodes) + nodes) / 2 / (sites + 1) if kind is Kind.EDGES else 0 for size in sizes(of)]
        passes += 2 * orders[kind] * sum(1 + each for each in copies)
    return passes * tokens * seconds_per_token(model, prepared)


def place_prompts(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prompts: PromptSet,
    traced: TraceSettings,
    names: dict[str, int],
) -> Placed:
    """Prepare prompts; their places are numbered by `names`, which grows."""
    prepared = prepare(prompts, model, dictionaries, traced)
    return Placed(prepared, place_index(prepared.batches, names))


def discover(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    half: Placed,
    traced: TraceSettings,
    settings: ProofSettings,
    *,
    name: str = CIRCUIT,
) -> Discovery:
    """Step 1. The rankings by attribution and by paths are called `name`; the circuit's come with its baselines."""
    ordered = sorted(dictionaries, key=lambda each: each.site.depth)
    prepared, embedding = half.prepared, None
    if traced.baseline is Baseline.MEAN:
        means = {each.name: mean_state(model, prepared.batches, each) for each in ordered}
        prepared, embedding = replace(prepared, means=means), mean_embedding(model, prepared.batches)
    nodes = score_nodes(model, ordered, prepared, half.places, traced)
    rankings = _node_rankings(name, nodes, settings.seed) if Kind.NODES in settings.kinds else []
    links = None
    if Kind.EDGES in settings.kinds:
        links = score_edges(model, ordered, prepared, half.places, nodes, traced, embedding)
        rankings += _edge_rankings(name, links, settings)
    return Discovery(ordered, prepared.means, embedding, nodes, links, rankings)


def _node_rankings(name: str, scores: NodeScores, seed: int) -> list[Ranking]:
    found = {name: [by_size(scores.attribution)]}
    if name == CIRCUIT:
        found["activation"] = [by_size(scores.activation)]
        found["random"] = [by_chance(len(scores.nodes), seed + draw) for draw in range(DRAWS)]
    return [Ranking(each, Kind.NODES, orders, scores.nodes) for each, orders in found.items()]


def _edge_rankings(name: str, scores: EdgeScores, settings: ProofSettings) -> list[Ranking]:
    found = {name: [edges_by_paths(scores, settings.errors is not Errors.REMOVED)]}
    if name == CIRCUIT:
        found["contribution"] = [edges_by_contribution(scores)]
        found["nodes' attribution"] = [edges_by_ends(scores, scores.ends.attribution)]
        found["activation"] = [edges_by_ends(scores, scores.ends.activation)]
        every = scores.there.flatten().nonzero()[:, 0]
        found["random"] = [every[by_chance(len(every), settings.seed + draw)] for draw in range(DRAWS)]
    return [Ranking(each, Kind.EDGES, orders, scores.ends.nodes, scores.there) for each, orders in found.items()]


def _curve(
    ranking: Ranking,
    cuts: Sequence[Cut],
    steps: Sequence[int],
    of: int,
    n_places: int,
    n_prompts: int,
    chunk: int,
    policy: Errors,
    tick: Callable[[], None],
) -> Curve:
    """Steps 2 and 3 for one ranking."""
    widths = cuts[0].latents
    measured = np.zeros((2, len(steps), n_prompts))
    for order in ranking.orders:
        for index, size in enumerate(steps):
            for side, run in enumerate(_circuits(ranking, order[:size], n_places, widths, policy, chunk)):
                measured[side, index] += _over_prompts(cuts, run, n_prompts) / len(ranking.orders)
                tick()
    clean = _over_prompts(cuts, lambda cut: behaviour(cut.model, cut.batch), n_prompts)
    none = _circuits(ranking, torch.zeros(0, dtype=torch.long), n_places, widths, Errors.REMOVED, chunk)
    empty = _over_prompts(cuts, next(none), n_prompts)
    if not abs((clean - empty).mean()) > 0:
        raise MediationError(
            "On the evaluation prompts the behaviour is the same with every latent at its baseline: nothing to explain."
        )
    return Curve(ranking.name, steps, of, measured[0], measured[1], clean, empty)


def _circuits(
    ranking: Ranking, chosen: Tensor, n_places: int, widths: Sequence[int], policy: Errors, chunk: int
) -> Iterator[Callable[[Cut], Tensor]]:
    """How to run the circuit of the `chosen` nodes or edges, and the model without it."""
    if ranking.kind is Kind.NODES:
        kept = ranking.nodes.take(chosen).masks(n_places, widths)
        errors = error_nodes(policy, kept)
        yield lambda cut: run_nodes(cut, kept, errors)
        others = ~errors if policy is Errors.WITH_LATENTS else errors
        yield lambda cut: run_nodes(cut, [~each for each in kept], others)
        return
    assert ranking.there is not None
    links = torch.zeros_like(ranking.there).flatten()
    links[chosen] = True
    links = links.view(ranking.there.shape)
    errors = error_nodes(policy, ranking.nodes.take(links.any(dim=0)).masks(n_places, widths))
    yield lambda cut: run_edges(cut, ranking.nodes, links, errors, chunk=chunk)
    others, rest = ~errors if policy is Errors.WITH_LATENTS else errors, ranking.there & ~links
    yield lambda cut: run_edges(cut, ranking.nodes, rest, others, chunk=chunk)


def _over_prompts(cuts: Sequence[Cut], run: Callable[[Cut], Tensor], n: int) -> Floats:
    """A behaviour of every prompt, [n]: the sum over its examples."""
    found = torch.zeros(n, dtype=torch.float64)
    for cut in cuts:
        found.index_add_(0, cut.batch.prompt.cpu(), run(cut).double().cpu())
    return found.numpy()


def _areas(curve: Curve, weights: Floats) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, area in (("cpr", curve.cpr), ("cmd", curve.cmd)):
        for log in (False, True):
            found[name + ("_log" if log else "")] = _measured(area(log=log), area(weights, log=log))
    return found


def _compare(own: Curve, other: Curve, weights: Floats) -> dict[str, Any]:
    """Step 4: positive differences are in the circuit's favour."""
    gain = own.cpr(weights, log=True) - other.cpr(weights, log=True)
    closer = other.cmd(weights, log=True) - own.cmd(weights, log=True)
    off = [np.abs(1 - each.faithfulness(weights)) for each in (own, other)]
    low, high = interval(off[1] - off[0])
    return {
        "cpr_log": _measured(own.cpr(log=True) - other.cpr(log=True), gain),
        "cmd_log": _measured(other.cmd(log=True) - own.cmd(log=True), closer),
        "circuit_closer_at": [size for size, each in zip(own.sizes, low, strict=True) if each > 0],
        "baseline_closer_at": [size for size, each in zip(own.sizes, high, strict=True) if each < 0],
    }


def _measured(value: Floats, draws: Floats) -> dict[str, float | None]:
    """A number with its interval, for JSON."""
    low, high = interval(draws)
    named = {"value": float(value), "low": float(low), "high": float(high)}
    return {name: each if math.isfinite(each) else None for name, each in named.items()}
