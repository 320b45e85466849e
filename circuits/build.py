"""The attribution graph of a run: top latents, what feeds them, and the behaviour, over a prompt set.

Algorithm
1. Take the strongest (role, latent) of each site of the run, as the discovery prompts have them.
2. On every prompt, each of their nodes is a target, and so is the behaviour: their in-edges come from all
   the sites, and the token embeddings, that reach them directly (circuits.edges): the behaviour's along the path to
   the baseline, or in the linear semantics, which needs none, at the clean prompt. A sample of the edges is
   patched exactly (circuits.calibration). One shard of edges per batch, so that a killed run resumes. It names
   nodes by position; of each target it holds the KEEP strongest in-edges, and of the behaviour also those from
   the graph's nodes (circuits.prompt_graph reads them).
3. Positions become roles, so that prompts of different wording make one graph, with means over the set and, from
   the evaluation prompts, frequencies, intervals and tiers (circuits.consensus).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import ceil

import polars as pl
import torch
from torch import Tensor

from circuits.calibration import calibrate_edges, kept_sample, missed_important
from circuits.consensus import consensus_tables
from circuits.edges import Edges, Sources, Targets, edges, embeddings_apart, mean_embedding
from circuits.graph import AttributionGraph
from circuits.prompt_graph import ENDS, known_source, node_ids, with_roles
from mediation.dictionaries import Dictionary
from mediation.estimators.common import behaviour_gradient
from mediation.frozen import Semantics
from mediation.labels import load_labels
from mediation.nodes import SiteState, site_states
from mediation.prompts import Baseline, Batch, Half
from mediation.runs import Run
from mediation.statistics import agreement
from mediation.subject import SubjectModel
from mediation.trace import Prepared, TraceSettings, prompt_ids, role_of, set_effect, top_latents, trust

KEEP = 200  # strongest in-edges kept of each target of each prompt
KEPT_PART = 4  # one of the graph's own nodes is patched exactly for so many of all nodes
CALIBRATION = ("estimator_vs_exact", "edges_vs_exact", "important_missed")
TOKENS = {"prompt": pl.String, "position": pl.Int64, "role": pl.String, "token": pl.Int64}


def build_graph(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prepared: Prepared,
    run: Run,
    settings: TraceSettings,
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> AttributionGraph:
    """Steps 1 to 3. Writes graph_nodes, tokens/, edges/, edge_calibration/ and graph.json into the run."""
    ordered = sorted(dictionaries, key=lambda dictionary: dictionary.site.depth)
    nodes = graph_nodes(run, ordered, settings, model)
    run.write_table("graph_nodes", nodes.select("id", "kind", "site", "role", "latent", "name", "label"))
    embedding = mean_embedding(model, prepared.batches) if settings.baseline is Baseline.MEAN else None
    with run.timed("edges"):
        for number, batch in enumerate(prepared.batches):
            if not run.has_shard("edges", name := f"{number:05d}"):
                run.write_shard("tokens", name, token_table(batch, prepared, model))
                found, measured, effects = _batch_edges(model, ordered, batch, prepared, nodes, settings, embedding)
                run.write_shard("edge_calibration", name, measured)
                run.write_shard("kept_calibration", name, effects)
                run.write_shard("edges", name, found)
            progress(number + 1, len(prepared.batches))
    run.record(trust=calibration(run, nodes))
    effect, figures, held_out = set_effect(run, seed=settings.seed), trust(run), prompt_ids(run, Half.EVALUATION)
    order = run.read("nodes").group_by("role").agg(pl.col("position").mean()).sort("position", "role")
    meta = {
        "behaviour": settings.behaviour.value,
        "total_effect": effect["mean"],
        "prompts": effect["prompts"],
        "held_out_prompts": len(held_out) if len(held_out) < effect["prompts"] else 0,
        "positions": order["role"].to_list(),
        "error_share": figures["error_share"],
        "calibration": {name: run.info["trust"][name] for name in CALIBRATION},
        "warnings": figures["warnings"],
    }
    tables = consensus_tables(run, nodes.drop("low", "high"), estimator=settings.estimator.value, seed=settings.seed)
    graph = AttributionGraph.from_tables(*tables, meta=meta)
    graph = graph.prune(len(nodes))
    run.write_text("graph.json", graph.to_json())
    return graph


def calibration(run: Run, nodes: pl.DataFrame) -> dict[str, object]:
    """How the edges agree with those patched exactly, and how much the graph of `nodes` can have missed."""
    sample = run.read("edge_calibration")
    agreed = agreement(sample["weight"].to_numpy(), sample["exact_effect"].to_numpy())
    held_out = pl.col("prompt").is_in(prompt_ids(run, Half.EVALUATION))
    sampled, everything = (run.read(kind).filter(held_out) for kind in ("calibration", "nodes"))
    missed = missed_important(sampled, run.read("kept_calibration")["exact_effect"], everything, nodes)
    return {"edges_vs_exact": asdict(agreed), "important_missed": asdict(missed)}


def token_table(batch: Batch, prepared: Prepared, model: SubjectModel) -> pl.DataFrame:
    """Role, token and its text at every position of the batch's prompts."""
    rows = [
        (prepared.prompts[example.prompt].id, position, role_of(example, position), token)
        for example in batch.examples
        for position, token in enumerate(example.clean)
    ]
    table = pl.DataFrame(rows, schema=TOKENS, orient="row").unique(maintain_order=True)
    texts = [str(t) if model.tokenizer is None else model.tokenizer.decode([t]) for t in table["token"]]
    return table.with_columns(text=pl.Series(texts, dtype=pl.String))


def graph_nodes(
    run: Run,
    dictionaries: Sequence[Dictionary],
    settings: TraceSettings,
    model: SubjectModel,
) -> pl.DataFrame:
    """Step 1: the graph's latents and error nodes with their set-level attribution and interval.

    A latent is called by its label (mediation.labels; the column `name`), or where it has none by the token it is
    most on at.
    """
    discovery = prompt_ids(run, Half.DISCOVERY)
    nodes = top_latents(
        run, settings.top, by_site=True, estimator=settings.estimator, seed=settings.seed, chosen_on=discovery
    )
    nodes = nodes.filter(pl.col("site").is_in([dictionary.site.name for dictionary in dictionaries]))

    labels = {dictionary.site.name: load_labels(dictionary.folder) for dictionary in dictionaries}

    names = [labels[site].get(latent) for site, latent in nodes.select("site", "latent").iter_rows()]

    def label(name: str | None, latent: int | None, token: int) -> str:
        if latent is None:
            return "error"
        if name is not None:
            return f"{latent} {name}"
        word = model.tokenizer.decode([token]).strip() if model.tokenizer is not None else str(token)
        return f"{latent} on '{word}'"

    called = map(label, names, nodes["latent"], nodes["token"])
    return nodes.with_columns(
        id=node_ids("role"),
        kind=pl.when(pl.col("latent").is_null()).then(pl.lit("error")).otherwise(pl.lit("latent")),
        position=pl.col("role"),
        name=pl.Series(names, dtype=pl.String),
        label=pl.Series(list(called), dtype=pl.String),
    )


def _batch_edges(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    batch: Batch,
    prepared: Prepared,
    nodes: pl.DataFrame,
    settings: TraceSettings,
    embedding: Tensor | None,
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Step 2 for one batch: in-edges of the chosen nodes and of the behaviour, by prompt.

    A sample of the edges is measured, and one of the chosen nodes on prompts that did not choose them.
    """
    states = site_states(model, batch, list(dictionaries), settings.baseline, prepared.means)
    _, gradients = behaviour_gradient(model, batch, [d.site for d in dictionaries])
    sources = [Sources.of(state) for state in states]
    if embeddings_apart(dictionaries):
        sources.append(Sources.embeddings(model, batch, settings.baseline, embedding))
    chosen = [_chosen(state, batch, nodes) for state in states]
    targets = [Targets.latents(*each) for each in zip(states, gradients, chosen, strict=True)]
    between = edges(model, batch, sources, targets, semantics=settings.semantics, chunk=settings.chunk, keep=KEEP)
    steps = settings.steps if settings.semantics is Semantics.GRADIENT else None
    into = edges(model, batch, sources, [Targets.behaviour(batch)], semantics=settings.semantics, steps=steps)
    blocks = [(between, targets), (into, [Targets.behaviour(batch)])]
    wanted = ceil(settings.sample * prepared.share(batch))
    measured = [_measured(model, batch, found, these, wanted, settings) for found, these in blocks]
    tokens = token_table(batch, prepared, model)
    links = [_by_prompt(between, batch, prepared), _strongest(_by_prompt(into, batch, prepared), tokens, nodes)]
    choosing = [prepared.halves[prepared.prompts[each.prompt].id] is Half.DISCOVERY for each in batch.examples]
    held_out = ~torch.tensor(choosing, device=batch.clean.device)
    fresh = [each[held_out[state.row[each]]] for state, each in zip(states, chosen, strict=True)]
    some = ceil(settings.sample * len(states) * prepared.share(batch) / KEPT_PART)
    effects = kept_sample(model, batch, states, fresh, some, settings.estimators, seed=settings.seed)
    kept = pl.DataFrame({"exact_effect": effects.double().cpu().numpy()})
    return pl.concat(links), pl.concat(measured), kept


def _measured(
    model: SubjectModel, batch: Batch, found: Edges, targets: Sequence[Targets], n: int, settings: TraceSettings
) -> pl.DataFrame:
    """A stratified sample of n edges: target (of a prompt), weight, exact_effect."""
    chosen, exact = calibrate_edges(model, batch, targets, found, n, seed=settings.seed, chunk=settings.chunk)
    return pl.DataFrame(
        {
            "target": pl.Series([found.names[k] for k in found.target[chosen].tolist()], dtype=pl.String),
            "weight": found.weight[chosen].double().cpu().numpy(),
            "exact_effect": exact.double().cpu().numpy(),
        }
    )


def _chosen(state: SiteState, batch: Batch, nodes: pl.DataFrame) -> Tensor:
    """Indices of the state's nodes whose (role, latent) is in the graph."""
    here = nodes.filter((pl.col("site") == state.dictionary.site.name) & pl.col("latent").is_not_null())
    wanted = set(zip(here["role"], here["latent"], strict=True))
    found = zip(state.row.tolist(), state.position.tolist(), state.latent.tolist(), strict=True)
    roles = [[role_of(example, p) for p in range(len(example))] for example in batch.examples]
    chosen = [k for k, (row, position, latent) in enumerate(found) if (roles[row][position], latent) in wanted]
    return torch.tensor(chosen, dtype=torch.long, device=state.row.device)


def _by_prompt(block: Edges, batch: Batch, prepared: Prepared) -> pl.DataFrame:
    """One block's edges under their prompts' ids: prompt, source, target, weight, contribution."""
    prompts = pl.Series("prompt", [prepared.prompts[example.prompt].id for example in batch.examples])
    frame = block.table()
    return (
        frame.with_columns(prompt=prompts.gather(frame["row"]))
        .group_by("prompt", *ENDS, maintain_order=True)  # two sequences of one prompt may share the batch
        .agg(pl.col("weight", "contribution").cast(pl.Float64).sum())
    )


def _strongest(links: pl.DataFrame, tokens: pl.DataFrame, nodes: pl.DataFrame) -> pl.DataFrame:
    """Of the behaviour's in-edges, the KEEP strongest of each prompt and all those from the graph's nodes."""
    rank = links.select(pl.col("weight").abs().rank("ordinal", descending=True).over("prompt")).to_series()
    known = with_roles(links, tokens).select(known_source(nodes)).to_series()
    return links.filter((rank <= KEEP) | known)
