"""One graph for a set of prompts: what each node and edge is worth, how often it matters, and how sure that is.

Algorithm
1. Roles align positions: a prompt's node is (site, role, latent) and its value the attribution summed over the
   role's positions; an edge's value is its contribution, summed alike. What is absent from a prompt counts zero.
2. `attribution`, `weight` and `contribution` are means over all prompts: they describe this set, and add up.
3. Every claim beyond it is measured on the evaluation prompts, of which nodes were not chosen (they come from the
   discovery prompts): `held_out` is the mean there, `low` and `high` its bootstrap interval over prompts.
4. `frequency` is the share of evaluation prompts whose own graph keeps the node or edge: the fewest nodes that hold
   KEEP.nodes of all influence there, and the fewest edges that hold KEEP.edges (circuits.pruning, where error nodes
   and embeddings stay in any case; here they compete too, so that their frequency says something).
5. Two criteria: the interval excludes zero; it is kept in at least OFTEN of the prompts. Tier: consensus meets
   both, noise neither, contingent one. Contingent is thus what acts alike in few prompts, or in many with a sign
   that depends on the prompt. Fewer than FEWEST evaluation prompts bear neither interval nor tier.

An embedding's value is what its edges carry. Intervals are for one node or edge, not for all at once: among those
worth nothing one in twenty has an interval that excludes zero. Claims about many belong to `circuits.contrast`.

Sources: influence and both shares as in Ameisen et al. 2025 and circuit-tracer; frequency over resampled selections
is stability selection (Meinshausen and Bühlmann 2010), whose bound on false selections needs more than half of
them and takes .6 to .9 in practice: OFTEN is the lowest of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import polars as pl

from circuits.graph import TARGET, NodeKind
from circuits.prompt_graph import EMBEDDINGS, ENDS, known_source, known_target, node_ids, role_edges
from circuits.pruning import Keep, fewest, flow, one_hot
from mediation.prompts import Half
from mediation.runs import Run
from mediation.statistics import Floats, bootstrap_interval
from mediation.trace import prompt_ids

KEEP = Keep()  # shares of a prompt's influence that its kept nodes and its kept edges hold
OFTEN = 0.6  # of the prompts
FEWEST = 6  # prompts: so many values are all of one sign by chance in 1 case of 32, five in 1 of 16


class Tier(StrEnum):
    """How far a node or edge goes beyond the prompts it was found on."""

    CONSENSUS = "consensus"
    """Its mean is not zero, and most prompts' graphs keep it."""
    CONTINGENT = "contingent"
    """One of the two: it acts in some prompts only, or its sign depends on the prompt."""
    NOISE = "noise"
    """Neither."""


@dataclass(frozen=True)
class Doubt:
    """Of m nodes or edges: mean over the prompts, its interval, how often kept; [m] each. tier: None, or m tiers."""

    held_out: Floats
    low: Floats
    high: Floats
    frequency: Floats
    tier: list[Tier] | None

    def columns(self) -> list[pl.Series]:
        """As columns of a table; nulls where there are too few prompts."""
        floats = {"held_out": self.held_out, "low": self.low, "high": self.high, "frequency": self.frequency}
        tiers = pl.Series("tier", self.tier or [None] * len(self.low), dtype=pl.String)
        return [*(pl.Series(name, values).fill_nan(None) for name, values in floats.items()), tiers]


def consensus_tables(run: Run, nodes: pl.DataFrame, *, estimator: str, seed: int = 0) -> tuple[pl.DataFrame, ...]:
    """Node and edge tables of the whole set, for `AttributionGraph.from_tables`; steps 1 to 5.

    nodes: id, kind, site, position (a role), latent, attribution, label of the set's latents and error nodes.
    """
    everyone, held_out = run.read("prompts")["prompt"].unique().sort().to_list(), prompt_ids(run, Half.EVALUATION)
    links = role_edges(run).filter(known_source(nodes) & known_target(nodes))
    mean = links.group_by(ENDS, maintain_order=True).agg(pl.col("weight", "contribution").sum() / len(everyone))
    table = pl.concat([nodes, _roots(mean)], how="diagonal")
    edges = edge_values(links, mean.select(ENDS), held_out)
    index = {name: k for k, name in enumerate([*table["id"], TARGET])}
    source, target = (np.array([index[name] for name in mean[end]], dtype=np.int64) for end in ENDS)
    values = node_values(run, table["id"].to_list(), held_out, estimator)
    rooted = (table["kind"] == NodeKind.EMBEDDING).to_numpy()
    values[:, rooted] = (edges @ one_hot(source, len(index)))[:, :-1][:, rooted]
    of_nodes, of_edges = flow(edges, source, target, len(index))
    split = len(held_out) < len(everyone)
    found = [
        doubt(each, fewest(amount, share), judged=split, seed=seed)
        for each, amount, share in ((values, of_nodes[:, :-1], KEEP.nodes), (edges, of_edges, KEEP.edges))
    ]
    return table.with_columns(found[0].columns()), mean.with_columns(found[1].columns())


def _roots(mean: pl.DataFrame) -> pl.DataFrame:
    """The embeddings, by role, that the edges start from."""
    roots = mean.filter(pl.col("source").str.starts_with("embed/"))
    return roots.group_by(pl.col("source").alias("id"), maintain_order=True).agg(
        kind=pl.lit(NodeKind.EMBEDDING.value),
        site=pl.lit(EMBEDDINGS),
        position=pl.col("source").first().str.slice(len("embed/")),
        attribution=pl.col("contribution").sum(),
        label=pl.lit("token embedding"),
    )


def node_values(run: Run, ids: Sequence[str], prompts: Sequence[str], estimator: str) -> Floats:
    """Attributions [prompts, ids] of nodes by role, summed over the role's positions; zero where there is none."""
    nodes = run.read("nodes").select("prompt", node_ids("role").alias("id"), value=estimator)
    return _matrix(nodes, pl.DataFrame({"id": pl.Series(ids, dtype=pl.String)}), prompts)


def edge_values(edges: pl.DataFrame, ends: pl.DataFrame, prompts: Sequence[str]) -> Floats:
    """Contributions [prompts, ends] of edges by role (`role_edges`); zero where there is none.

    ends: columns source and target.
    """
    return _matrix(edges.select("prompt", *ENDS, value="contribution"), ends, prompts)


def _matrix(rows: pl.DataFrame, items: pl.DataFrame, prompts: Sequence[str]) -> Floats:
    """Sums of `value` by prompt and item, [prompts, items]; `items` are distinct rows of the other columns."""
    order = pl.DataFrame({"prompt": pl.Series(prompts, dtype=pl.String)}).with_row_index("row")
    found = rows.join(order, on="prompt").join(items.with_row_index("column"), on=items.columns)
    values = np.zeros((len(prompts), len(items)))
    np.add.at(values, (found["row"].to_numpy(), found["column"].to_numpy()), found["value"].to_numpy())
    return values


def doubt(values: Floats, selected: np.ndarray, *, judged: bool = True, seed: int = 0) -> Doubt:
    """Step 5 from values [P, m] and bool [P, m] of the same prompts.

    Not `judged`, or with fewer than FEWEST prompts, there are no intervals (nan) and no tiers.
    """
    mean, frequency = values.mean(axis=0), selected.mean(axis=0)
    if not judged or len(values) < FEWEST:
        nothing = np.full(len(mean), np.nan)
        return Doubt(mean, nothing, nothing, frequency, None)
    low, high = bootstrap_interval(values, seed=seed)
    met = ((low > 0) | (high < 0)).astype(int) + (frequency >= OFTEN)
    tiers = (Tier.NOISE, Tier.CONTINGENT, Tier.CONSENSUS)
    return Doubt(mean, low, high, frequency, [tiers[count] for count in met])
