"""Random layered attribution graphs for tests."""

from __future__ import annotations

import random

import polars as pl

from circuits.graph import AttributionGraph, embedding_id, error_id, latent_id

NODE_SCHEMA = {
    "id": pl.String, "kind": pl.String, "site": pl.String, "position": pl.Int64, "latent": pl.Int64,
    "attribution": pl.Float64, "low": pl.Float64, "high": pl.Float64, "label": pl.String,
}  # fmt: skip
EDGE_SCHEMA = {
    "source": pl.String,
    "target": pl.String,
    "weight": pl.Float64,
    "contribution": pl.Float64,
}


def random_tables(
    seed: int, *, layers: int = 3, width: int = 4, positions: int = 2, density: float = 0.6
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tables of nodes and edges: embeddings, `layers` sites of `width` latents and errors, the target."""
    rng = random.Random(seed)
    nodes: list[dict[str, object]] = []
    ranks: list[list[str]] = []

    def add(identity: str, kind: str, site: str | None, position: int, latent: int | None) -> str:
        value = rng.gauss(0, 1)
        label = f"concept {latent}" if latent is not None and rng.random() < 0.7 else None
        spread = abs(rng.gauss(0, 0.2))
        row = (identity, kind, site, position, latent, value, value - spread, value + spread, label)
        nodes.append(dict(zip(NODE_SCHEMA, row, strict=True)))
        return identity

    ranks.append([add(embedding_id(p), "embedding", None, p, None) for p in range(positions)])
    for layer in range(layers):
        site = f"blocks.{2 * layer + 1}.hook_resid_pre"
        rank = [add(error_id(site, p), "error", site, p, None) for p in range(positions)]
        for latent in rng.sample(range(4096), width):
            p = rng.randrange(positions)
            rank.append(add(latent_id(site, p, latent), "latent", site, p, latent))
        ranks.append(rank)
    edges = []
    for below, above in zip(ranks, [*ranks[1:], ["target"]], strict=True):
        for source in below:
            for target in above:
                if not target.endswith("error") and (above == ["target"] or rng.random() < density):
                    edges.append((source, target, rng.gauss(0, 1), rng.gauss(0, 1)))
    return pl.DataFrame(nodes, schema=NODE_SCHEMA), pl.DataFrame(edges, schema=EDGE_SCHEMA, orient="row")


def random_graph(seed: int, **shape: float) -> AttributionGraph:
    """The graph of `random_tables`, its total effect 1.5 logits."""
    nodes, edges = random_tables(seed, **shape)  # type: ignore[arg-type]
    meta = {"behaviour": "logit difference", "total_effect": 1.5, "tokens": ["<s>", " Paris"]}
    return AttributionGraph.from_tables(nodes, edges, meta=meta)
