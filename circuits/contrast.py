"""Two runs compared: which nodes and edges differ between two sets of prompts, or two models, beyond chance.

Algorithm
1. Take the union of the nodes of both runs' graphs (chosen on each run's discovery prompts) and, on the evaluation
   prompts of each, their attributions by role; a node that a prompt does not have counts zero. A prompt that either
   run chose nodes on is left out of both.
2. Where the runs share prompts (by id), these make pairs, and the others are left out; else the runs are two samples.
3. Difference of means, first run minus second, and its permutation p-value (mediation.statistics): in pairs, each
   pair may change sides; in two samples, prompts may change sets. Exact where there are few prompts.
4. Edges between these nodes alike, by their contribution; one that is not among a prompt's strongest in-edges of its
   target (circuits.build) counts zero. In-edges are known only of the nodes in a run's own graph: an edge into a node
   that one run's graph lacks was not measured there, and is listed without p. Runs with other sites cut paths
   elsewhere, so that their edges mean other things: then there are no edges.
5. Benjamini and Hochberg's q-values, once over the nodes and once over the edges.

Few prompts bear no small p: k pairs give at least 2^(1-k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from circuits.consensus import edge_values, node_values
from circuits.graph import TARGET
from circuits.prompt_graph import ENDS, known_source, known_target, role_edges
from mediation.errors import MediationError
from mediation.prompts import Half
from mediation.runs import Run
from mediation.statistics import Difference, Floats, benjamini_hochberg, mean_difference
from mediation.trace import prompt_ids

ALPHA = 0.05  # false discovery rate at which a difference is counted
SAME = ("baseline", "behaviour", "estimator", "semantics")  # settings without which values of two runs do not compare
NODES = ("id", "kind", "site", "role", "latent", "label")
WHICH = ("first", "second")
NO_EDGES = pl.DataFrame(
    schema={"prompt": pl.String, **dict.fromkeys(ENDS, pl.String), "graphs": pl.String, "contribution": pl.Float64}
)


@dataclass(frozen=True)
class Contrast:
    """First run minus second.

    nodes: id, kind, site, role, latent, label, graphs, first, second, difference, p, q; edges: source, target, graphs,
    first, second (mean contributions), difference, p, q. Ordered by p, then by size. `graphs` says whether "both" runs
    have it in their graph, or the "first" or "second". p and q are null for edges that one run did not measure.
    prompts: of the first and second run. smallest_p: the least p that so many prompts allow. notes: what is left out.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    paired: bool
    prompts: tuple[int, int]
    exact: bool
    smallest_p: float
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Plain values for scripts: the figures, and of the tables what was tested."""
        tested = {"nodes": self.nodes, "edges": self.edges}
        return {
            "paired": self.paired,
            "prompts": list(self.prompts),
            "exact": self.exact,
            "smallest_p": self.smallest_p,
            "significant": {name: int((table["q"] <= ALPHA).sum()) for name, table in tested.items()},
            **{name: table.drop_nulls("p").to_dicts() for name, table in tested.items()},
            "notes": list(self.notes),
        }


def contrast(first: Run, second: Run, *, seed: int = 0) -> Contrast:
    """Steps 1 to 5.

    Raises MediationError when the runs share no site, or a site has different dictionaries or the runs other
    baselines, behaviours or estimators, or when no evaluation prompt is left.
    """
    sites, same_cuts = _common_sites(first, second)
    prompts, notes = _prompts(first, second)
    runs, paired = (first, second), prompts[0] == prompts[1]
    graphs = [run.read("graph_nodes").filter(pl.col("site").is_in(sites)) for run in runs]
    nodes = _union([graph.select(NODES) for graph in graphs], ["id"])
    estimator = first.settings["estimator"]
    values = [node_values(run, nodes["id"].to_list(), ids, estimator) for run, ids in zip(runs, prompts, strict=True)]
    node_table, difference = _tested(nodes, values, np.ones(len(nodes), dtype=bool), paired, seed)
    edges, links = NO_EDGES.select(*ENDS, "graphs"), [NO_EDGES, NO_EDGES]
    if same_cuts:
        links = [role_edges(run) for run in runs]
        edges = _union([_inside(each, graph) for each, graph in zip(links, graphs, strict=True)], list(ENDS))
    else:
        notes.append("Edges are not compared: the runs have other sites, which cut paths elsewhere.")
    shared = pl.concat([nodes.filter(pl.col("graphs") == "both")["id"], pl.Series([TARGET])])
    measured = edges["target"].is_in(shared.implode()).to_numpy()
    values = [edge_values(each, edges.select(ENDS), ids) for each, ids in zip(links, prompts, strict=True)]
    edge_table, _ = _tested(edges, values, measured, paired, seed)
    if not measured.all():
        notes.append(
            f"{(~measured).sum()} edges go into nodes that only one run has in its graph; the other did not measure "
            "them, so they are not tested."
        )
    counts = (len(prompts[0]), len(prompts[1]))
    return Contrast(node_table, edge_table, paired, counts, difference.exact, difference.smallest, tuple(notes))


def _common_sites(first: Run, second: Run) -> tuple[list[str], bool]:
    """The sites both runs have, and whether they are all sites of both."""
    try:
        a, b = (run.settings["hashes"]["dictionaries"] for run in (first, second))
        changed = [name for name in SAME if first.settings[name] != second.settings[name]]
    except KeyError as error:
        raise MediationError(f"One of the runs is not that of a trace (its settings lack {error}).") from error
    if changed:
        said = ", ".join(f"{name} {first.settings[name]} and {second.settings[name]}" for name in changed)
        raise MediationError(f"The runs were made with different settings ({said}); trace both with the same.")
    sites = [site for site in a if site in b]
    if not sites:
        raise MediationError(
            f"The runs have no site in common ({', '.join(a)}; {', '.join(b)}); trace both with the same dictionaries."
        )
    other = [site for site in sites if a[site] != b[site]]
    if other:
        raise MediationError(
            f"The runs have different dictionaries at {', '.join(other)}, whose latents do not compare; trace both "
            "with the same."
        )
    return sites, set(a) == set(b)


def _prompts(first: Run, second: Run) -> tuple[tuple[list[str], list[str]], list[str]]:
    """Sorted ids of the prompts to compare, of both runs, and what was left out."""
    runs, notes = (first, second), []
    held_out = [set(prompt_ids(run, Half.EVALUATION)) for run in runs]
    choosing = [set(run.read("prompts").filter(pl.col("half") == Half.DISCOVERY)["prompt"]) for run in runs]
    used = [mine - theirs for mine, theirs in zip(held_out, reversed(choosing), strict=True)]
    shared = used[0] & used[1]
    if shared:
        used = [shared, shared]
    left = sum(len(mine - now) for mine, now in zip(held_out, used, strict=True))
    if left:
        notes.append(f"{left} held-out prompts have no partner in the other run, or chose its nodes: left out.")
    if not all(used):
        raise MediationError(
            "No held-out prompt of one run is left: the other run chose its nodes on all of them; trace both with the "
            "same --seed or give the prompts other ids."
        )
    return (sorted(used[0]), sorted(used[1])), notes


def _inside(edges: pl.DataFrame, graph: pl.DataFrame) -> pl.DataFrame:
    """The distinct edges within a run's own graph."""
    return edges.filter(known_source(graph) & known_target(graph)).select(ENDS).unique(maintain_order=True)


def _union(tables: Sequence[pl.DataFrame], keys: list[str]) -> pl.DataFrame:
    """Rows of both tables, once; `graphs` says whether "both" have them, or the "first" or "second"."""
    found = pl.concat([table.with_columns(graphs=pl.lit(name)) for table, name in zip(tables, WHICH, strict=True)])
    others = pl.exclude("graphs", *keys).first()
    which = pl.when(pl.len() == 2).then(pl.lit("both")).otherwise(pl.col("graphs").first())
    return found.group_by(keys, maintain_order=True).agg(others, which.alias("graphs"))


def _tested(
    items: pl.DataFrame, values: Sequence[Floats], measured: NDArray[np.bool_], paired: bool, seed: int
) -> tuple[pl.DataFrame, Difference]:
    """`items` with both means, their difference, p and q; `values` are [prompts, items] of both runs."""
    found = mean_difference(*values, paired=paired, seed=seed)
    p, q = (np.full(len(items), np.nan) for _ in range(2))
    p[measured] = found.p[measured]
    q[measured] = benjamini_hochberg(p[measured])
    columns = {"first": values[0].mean(axis=0), "second": values[1].mean(axis=0), "difference": found.difference}
    table = items.with_columns(**{name: pl.Series(each) for name, each in (columns | {"p": p, "q": q}).items()})
    table = table.with_columns(pl.col("p", "q").fill_nan(None))
    size = pl.col("difference").abs()
    return table.sort("p", -size, nulls_last=True, maintain_order=True), found
