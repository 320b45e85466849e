"""The attribution graph of a run: top latents, what feeds them, and the behaviour, over a prompt set.

Algorithm
1. Take the strongest (role, latent) of each site of the run, from the node tables.
2. On every prompt, each of their nodes is a target, and so is the behaviour: their in-edges come from all
   the sites, and the token embeddings, that reach them directly (circuits.edges). A sample of the edges is
   patched exactly (circuits.calibration). One shard of edges per batch, so that a killed run resumes.
3. Positions become roles, so that prompts of different wording can be added up; an edge's weight and
   contribution are means over all prompts, counting zero where it is absent.
4. Keep edges between kept nodes, error nodes, embeddings and the behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import polars as pl
import torch
from torch import Tensor

from circuits.calibration import calibrate_edges
from circuits.edges import EMBEDDING_SITE, Edges, Sources, Targets, behaviour_edges, edges
from circuits.graph import TARGET, AttributionGraph, NodeKind
from mediation.dictionaries import Dictionary
from mediation.estimators.common import behaviour_gradient
from mediation.labels import load_labels
from mediation.nodes import SiteState, site_states
from mediation.prompts import Baseline, Batch
from mediation.runs import Run
from mediation.statistics import agreement
from mediation.subject import SubjectModel
from mediation.trace import Prepared, TraceSettings, role_of, set_effect, top_latents, trust

KEEP = 200  # strongest in-edges kept of each target of each prompt


def build_graph(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prepared: Prepared,
    run: Run,
    settings: TraceSettings,
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> AttributionGraph:
    """Steps 1 to 4. Writes edges/, edge_calibration/ and graph.json into the run."""
    ordered = sorted(dictionaries, key=lambda dictionary: dictionary.site.depth)
    nodes = graph_nodes(run, ordered, settings, model)
    with run.timed("edges"):
        for number, batch in enumerate(prepared.batches):
            if not run.has_shard("edges", name := f"{number:05d}"):
                found, measured = _batch_edges(model, ordered, batch, prepared, nodes, settings)
                run.write_shard("edge_calibration", name, measured)
                run.write_shard("edges", name, found)
            progress(number + 1, len(prepared.batches))
    sample = run.read("edge_calibration")
    agreed = agreement(sample["weight"].to_numpy(), sample["exact_effect"].to_numpy())
    run.record(trust={"edges_vs_exact": asdict(agreed)})
    effect = set_effect(run, seed=settings.seed)
    order = run.read("nodes").group_by("role").agg(pl.col("position").mean()).sort("position")
    meta = {
        "behaviour": settings.behaviour.value,
        "total_effect": effect["mean"],
        "prompts": effect["prompts"],
        "positions": order["role"].to_list(),
        "error_share": trust(run)["error_share"],
    }
    graph = AttributionGraph.from_tables(*_tables(nodes, run.read("edges"), len(prepared.prompts)), meta=meta)
    graph = graph.prune(len(nodes))
    run.write_text("graph.json", graph.to_json())
    return graph


def graph_nodes(
    run: Run,
    dictionaries: Sequence[Dictionary],
    settings: TraceSettings,
    model: SubjectModel,
) -> pl.DataFrame:
    """Step 1: the graph's latents and error nodes with their set-level attribution and interval.

    A latent is called by its label (mediation.labels), or where it has none by the token it is most on at.
    """
    nodes = top_latents(run, settings.top, by_site=True, estimator=settings.estimator, seed=settings.seed)
    nodes = nodes.filter(pl.col("site").is_in([dictionary.site.name for dictionary in dictionaries]))

    labels = {dictionary.site.name: load_labels(dictionary.folder) for dictionary in dictionaries}

    def label(site: str, latent: int | None, token: int) -> str:
        if latent is None:
            return "error"
        if latent in labels[site]:
            return f"{latent} {labels[site][latent]}"
        word = model.tokenizer.decode([token]).strip() if model.tokenizer is not None else str(token)
        return f"{latent} on '{word}'"

    rows = nodes.select("site", "latent", "token").iter_rows()
    ending = pl.when(pl.col("latent").is_null()).then(pl.lit("error")).otherwise(pl.col("latent").cast(pl.String))
    return nodes.with_columns(
        id=pl.concat_str([pl.col("site"), pl.col("role"), ending], separator="/"),
        kind=pl.when(pl.col("latent").is_null()).then(pl.lit("error")).otherwise(pl.lit("latent")),
        position=pl.col("role"),
        label=pl.Series([label(*row) for row in rows], dtype=pl.String),
    )


def _batch_edges(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    batch: Batch,
    prepared: Prepared,
    nodes: pl.DataFrame,
    settings: TraceSettings,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Step 2 for one batch: every in-edge of the chosen nodes, with positions as roles; a sample measured."""
    states = site_states(model, batch, list(dictionaries), settings.baseline, prepared.means)
    _, gradients = behaviour_gradient(model, batch, [d.site for d in dictionaries])
    sources = [Sources.of(state) for state in states]
    if all(dictionary.site.canonical() != EMBEDDING_SITE for dictionary in dictionaries):
        sources.append(_embeddings(model, batch, prepared, settings.baseline))
    targets = [
        Targets.latents(state, gradient, _chosen(state, batch, nodes))
        for state, gradient in zip(states, gradients, strict=True)
    ]
    between = edges(model, batch, sources, targets, chunk=settings.chunk, keep=KEEP)
    into = behaviour_edges(model, batch, sources, steps=settings.steps)
    blocks = [(between, targets), (into, [Targets.behaviour(batch)])]
    share = -(-settings.sample * len(batch) // sum(map(len, prepared.batches)))
    measured = [_measured(model, batch, found, these, share, settings) for found, these in blocks]
    return pl.concat([_by_role(found, batch, prepared) for found, _ in blocks]), pl.concat(measured)


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


def _embeddings(model: SubjectModel, batch: Batch, prepared: Prepared, baseline: Baseline) -> Sources:
    mean = None
    if baseline is Baseline.MEAN:
        table = model.module.get_input_embeddings().weight
        tokens = torch.cat([each.clean[each.mask.bool()] for each in prepared.batches])
        mean = table[tokens].mean(dim=0)
    return Sources.embeddings(model, batch, baseline, mean)


def _chosen(state: SiteState, batch: Batch, nodes: pl.DataFrame) -> Tensor:
    """Indices of the state's nodes whose (role, latent) is in the graph."""
    here = nodes.filter((pl.col("site") == state.dictionary.site.name) & pl.col("latent").is_not_null())
    wanted = set(zip(here["role"], here["latent"], strict=True))
    found = zip(state.row.tolist(), state.position.tolist(), state.latent.tolist(), strict=True)
    roles = [[role_of(example, p) for p in range(len(example))] for example in batch.examples]
    chosen = [k for k, (row, position, latent) in enumerate(found) if (roles[row][position], latent) in wanted]
    return torch.tensor(chosen, dtype=torch.long, device=state.row.device)


def _by_role(block: Edges, batch: Batch, prepared: Prepared) -> pl.DataFrame:
    """Step 3 for one block: prompt, source, target, weight, contribution, summed over positions of a role."""
    frame = block.table()
    ids = pl.DataFrame(
        [
            {"row": row, "position": str(position), "role": role_of(example, position)}
            for row, example in enumerate(batch.examples)
            for position in range(len(example))
        ]
    )
    for end in ("source", "target"):
        parts = frame[end].str.split("/").list
        at = parts.get(1, null_on_oob=True)
        named = frame.select("row").with_columns(position=at).join(ids, on=["row", "position"], how="left")
        head, tail = parts.get(0), parts.get(2, null_on_oob=True)
        renamed = pl.concat_str([head, named["role"], tail], separator="/", ignore_nulls=True)
        frame = frame.with_columns(pl.select(renamed).to_series().alias(end))
    prompts = pl.Series("prompt", [prepared.prompts[example.prompt].id for example in batch.examples])
    return (
        frame.with_columns(prompt=prompts.gather(frame["row"]))
        .group_by("prompt", "source", "target", maintain_order=True)
        .agg(pl.col("weight", "contribution").sum())
        .with_columns(pl.col("weight", "contribution").cast(pl.Float64))
    )


def _tables(nodes: pl.DataFrame, links: pl.DataFrame, n_prompts: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Steps 3 and 4: node and edge tables of the whole set."""
    mean = links.group_by("source", "target", maintain_order=True).agg(
        pl.col("weight", "contribution").sum() / n_prompts
    )
    roots = mean.filter(pl.col("source").str.starts_with("embed/"))["source"].unique(maintain_order=True)
    embeddings = pl.DataFrame({"id": roots}).with_columns(
        kind=pl.lit(NodeKind.EMBEDDING.value),
        site=pl.lit("blocks.0.hook_resid_pre"),
        position=pl.col("id").str.slice(len("embed/")),
        label=pl.lit("token embedding"),
    )
    columns = ["id", "kind", "site", "position", "latent", "attribution", "low", "high", "label"]
    table = pl.concat([nodes.select(columns), embeddings], how="diagonal")
    known = [*table["id"], TARGET]
    return table, mean.filter(pl.col("source").is_in(known) & pl.col("target").is_in(known))
