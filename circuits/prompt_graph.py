"""What a run holds of single prompts: their own graphs, with positions, and their edges by role.

Shards: `edges` names nodes by position, `{site}/{position}/{latent}`; `tokens` says which role and text each
position of a prompt has; `graph_nodes` lists the latents, by role, whose in-edges the run computed.

Algorithm of `prompt_graph`
1. The prompt's edges; a prompt of two sequences (answers of several tokens) is their sum.
2. Its nodes are the ends of these edges, with the prompt's own attributions. In-edges were computed for the set's
   latents; any other latent, however strong here, is a source.
3. Nodes that do not reach the behaviour are left out.

`prompt_flows` gives the edges of all prompts at once with their influence (circuits.pruning). Edges run from a site to
a deeper one, so one pass over the sites, deepest first, has every node's influence when its in-edges are met.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from circuits.edges import EMBEDDING_SITE
from circuits.graph import TARGET, AttributionGraph, NodeKind
from mediation.errors import MediationError
from mediation.estimators import Estimator
from mediation.runs import Run
from mediation.sites import Site
from mediation.trace import NODE_KEYS, error_shares, prompt_table

LISTED = 5  # ids named to someone who asks for a prompt that is not there
EMBEDDINGS = EMBEDDING_SITE.name
ENDS = ("source", "target")


def node_ids(place: str) -> pl.Expr:
    """Ids of rows of the node tables, with the column `place` (position or role) in the middle."""
    latent = pl.when(pl.col("latent").is_null()).then(pl.lit("error")).otherwise(pl.col("latent").cast(pl.String))
    return pl.concat_str([pl.col("site"), pl.col(place).cast(pl.String), latent], separator="/")


def with_roles(edges: pl.DataFrame, tokens: pl.DataFrame) -> pl.DataFrame:
    """The same rows with roles for positions in the ids of both ends.

    edges: prompt, source, target, ...; tokens: prompt, position (integer) and role of every position.
    """
    roles = tokens.select("prompt", "role", at=pl.col("position").cast(pl.String)).unique()
    for end in ENDS:
        parts = pl.col(end).str.split("/").list
        edges = edges.with_columns(at=parts.get(1, null_on_oob=True))
        edges = edges.join(roles, on=["prompt", "at"], how="left", maintain_order="left")
        named = [parts.get(0), pl.col("role"), parts.get(2, null_on_oob=True)]
        edges = edges.with_columns(pl.concat_str(named, separator="/", ignore_nulls=True).alias(end))
        edges = edges.drop("at", "role")
    return edges


def role_edges(run: Run) -> pl.DataFrame:
    """All edges of the run by role: prompt, source, target, weight, contribution, summed over positions."""
    edges = with_roles(run.read("edges"), run.read("tokens"))
    return edges.group_by("prompt", *ENDS, maintain_order=True).agg(pl.col("weight", "contribution").sum())


def prompt_graph(run: Run, prompt_id: str) -> AttributionGraph:
    """One prompt's own graph: nodes with token positions, attributions and activations of this prompt alone.

    `meta` holds prompt, behaviour, total_effect, tokens (texts) and roles by position, and error_share.
    Raises MediationError when the run has no such prompt or no edges.
    """
    mine = pl.col("prompt") == prompt_id
    effects = prompt_table(run).filter(mine)
    if effects.is_empty():
        ids = run.read("prompts")["prompt"].unique(maintain_order=True).to_list()
        more = f" and {len(ids) - LISTED} more" if len(ids) > LISTED else ""
        raise MediationError(
            f"The run in {run.path} has no prompt '{prompt_id}'; its ids are {', '.join(ids[:LISTED])}{more}."
        )
    edges = run.read("edges").filter(mine).group_by(ENDS, maintain_order=True).agg(
        pl.col("weight", "contribution").sum()
    )  # fmt: skip
    tokens = run.read("tokens").filter(mine).group_by("position", maintain_order=True).agg(
        pl.col("role").first(), pl.col("text").unique(maintain_order=True).str.join("|")
    ).sort("position")  # fmt: skip
    estimator = run.settings.get("estimator", Estimator.IG.value)
    nodes = run.read("nodes").filter(mine).group_by(NODE_KEYS, maintain_order=True).agg(
        pl.col("clean").first(), *(pl.col(name).sum() for name in dict.fromkeys([estimator, "ig"]))
    )  # fmt: skip
    meta = {
        "prompt": prompt_id,
        "behaviour": run.settings.get("behaviour"),
        "total_effect": effects["clean"][0] - effects["baseline"][0],
        "tokens": tokens["text"].to_list(),
        "roles": tokens["role"].to_list(),
        "error_share": error_shares(nodes),
    }
    table = pl.concat([_nodes(nodes, tokens, run.read("graph_nodes"), estimator), _embeddings(tokens)], how="diagonal")
    table = table.filter(pl.col("id").is_in(pl.concat([edges["source"], edges["target"]]).unique().implode()))
    graph = AttributionGraph.from_tables(table, edges, meta=meta).prune(len(table))
    return AttributionGraph(graph.digraph, meta)


def prompt_flows(run: Run) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Nodes (prompt, id, influence) and edges (prompt, source, target, weight, contribution, influence) of every
    prompt's own graph, by position; what does not reach the behaviour is left out."""
    edges = run.read("edges").group_by("prompt", *ENDS, maintain_order=True).agg(pl.col("weight", "contribution").sum())
    ends = [edges.select("prompt", id=end) for end in ENDS]
    nodes = pl.concat(ends).unique(maintain_order=True).with_row_index("node")
    source, target = (
        each.join(nodes, on=["prompt", "id"], how="left", maintain_order="left")["node"].to_numpy() for each in ends
    )
    places = nodes["id"].str.split("/").list.first()
    order = {"embed": -1, TARGET: 2**31} | {
        name: Site.parse(name).canonical().depth for name in places.unique() if name not in ("embed", TARGET)
    }
    depth = places.replace_strict(order, return_dtype=pl.Int64).to_numpy()
    size = np.abs(edges["contribution"].to_numpy())
    into = np.bincount(target, weights=size, minlength=len(nodes))
    share = np.divide(size, into[target], out=np.zeros_like(size), where=into[target] > 0)
    influence = (depth == order[TARGET]).astype(np.float64)
    through = np.zeros_like(size)
    for level in sorted(set(depth.tolist()), reverse=True):
        here = np.flatnonzero(depth[target] == level)
        through[here] = influence[target[here]] * share[here]
        influence += np.bincount(source[here], weights=through[here], minlength=len(nodes))
    return (
        nodes.select("prompt", "id", influence=pl.Series(influence)).filter(pl.col("influence") > 0),
        edges.with_columns(influence=pl.Series(through)).filter(pl.col("influence") > 0),
    )


def _nodes(nodes: pl.DataFrame, tokens: pl.DataFrame, chosen: pl.DataFrame, estimator: str) -> pl.DataFrame:
    """Latents and errors of one prompt; a latent is called by its label, else by the token it stands at."""
    names = chosen.drop_nulls("name").select("site", "latent", "name").unique()
    where = pl.lit(" on '") + pl.col("text").str.strip_chars() + "'"
    called = pl.col("latent").cast(pl.String) + pl.coalesce(pl.lit(" ") + pl.col("name"), where)
    error = pl.col("latent").is_null()
    return (
        nodes.join(names, on=["site", "latent"], how="left", maintain_order="left")
        .join(tokens.select("position", "text"), on="position", how="left", maintain_order="left")
        .select(
            node_ids("position").alias("id"),
            pl.when(error).then(pl.lit("error")).otherwise(pl.lit("latent")).alias("kind"),
            "site",
            "position",
            "latent",
            pl.col(estimator).alias("attribution"),
            pl.lit(None, dtype=pl.Float64).alias("low"),
            pl.lit(None, dtype=pl.Float64).alias("high"),
            pl.col("clean").alias("activation"),
            pl.when(error).then(pl.lit("error")).otherwise(called).alias("label"),
        )
    )


def _embeddings(tokens: pl.DataFrame) -> pl.DataFrame:
    return tokens.select(
        pl.concat_str([pl.lit("embed"), pl.col("position").cast(pl.String)], separator="/").alias("id"),
        pl.lit(NodeKind.EMBEDDING.value).alias("kind"),
        pl.lit(EMBEDDINGS).alias("site"),
        "position",
        pl.concat_str([pl.lit("token '"), pl.col("text").str.strip_chars(), pl.lit("'")]).alias("label"),
    )


def known_source(nodes: pl.DataFrame) -> pl.Expr:
    """Whether an edge by role comes from one of the set's `nodes` (their ids) or from an embedding."""
    return pl.col("source").is_in(nodes["id"].implode()) | pl.col("source").str.starts_with("embed/")


def known_target(nodes: pl.DataFrame) -> pl.Expr:
    """Whether it goes into one of the set's nodes or the behaviour."""
    return pl.col("target").is_in(nodes["id"].implode()) | (pl.col("target") == TARGET)
