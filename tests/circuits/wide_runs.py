"""A run on disk of the size that a real model's has, of random values: prompts, positions and sites as asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl

from circuits.graph import AttributionGraph
from mediation.prompts import Half
from mediation.runs import Run

ON, KNOWN, INTO = 32, 20, 60  # latents on at a token, latents of a site in the set's graph, in-edges of each
ROLES = ("subject", "rest", "end")


def wide_run(folder: Path, *, prompts: int = 200, tokens: int = 40, sites: int = 3, seed: int = 0) -> Run:
    """Tables as a trace, `build_graph` and flags write them, and the set's graph."""
    rng = np.random.default_rng(seed)
    names = [f"blocks.{6 * k + 3}.hook_resid_pre" for k in range(sites)]
    settings = {"model": "wide", "saes": ["saes"], "baseline": "corrupt", "behaviour": "logit_diff", "estimator": "ig",
                "seed": seed, "hashes": {"dictionaries": dict.fromkeys(names, "x")}}  # fmt: skip
    run = Run.create(folder, settings)
    ids = [f"prompt-{k}" for k in range(prompts)]
    halves = [Half.DISCOVERY if k % 2 else Half.EVALUATION for k in range(prompts)]
    role = np.array(["subject"] * 3 + ["rest"] * (tokens - 4) + ["end"])
    rows = [{"id": each, "clean": f"some words of {each}", "corrupt": f"other words of {each}", "answer": " yes",
             "wrong_answer": " no", "group": f"question {k % 5}"} for k, each in enumerate(ids)]  # fmt: skip
    run.write_text("prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    every = np.repeat(np.arange(prompts), tokens)
    at = np.tile(np.arange(tokens), prompts)
    texts = [f" word{k % 97}" for k in range(prompts * tokens)]
    run.write_shard(
        "tokens", "0",
        pl.DataFrame({"prompt": [ids[k] for k in every], "position": at, "role": role[at], "token": at, "text": texts}),
    )  # fmt: skip
    nodes, sums = [], []
    for site in names:
        latent = rng.integers(0, 4096, size=(prompts * tokens, ON))
        latent[:, :KNOWN] = np.arange(KNOWN)
        value = rng.standard_t(3, size=latent.shape) / 20
        on = np.repeat(np.arange(prompts * tokens), ON)
        table = pl.DataFrame(
            {"prompt": [ids[k] for k in every[on]], "site": site, "position": at[on], "latent": latent.ravel(),
             "role": role[at[on]], "token": at[on], "clean": np.abs(value.ravel()) * 50, "baseline": 0.0,
             "atp": value.ravel(), "ig": value.ravel()}
        ).unique(["prompt", "position", "latent"], keep="first", maintain_order=True)  # fmt: skip
        errors = table.unique(["prompt", "position"], keep="first", maintain_order=True).with_columns(
            latent=pl.lit(None, dtype=pl.Int64), clean=float("nan"), baseline=float("nan")
        )
        nodes.append(pl.concat([table, errors]))
        total = nodes[-1].group_by("prompt", maintain_order=True).agg(pl.col("ig").sum())
        sums.append(total.select("prompt", half=pl.Series(halves, dtype=pl.String), site=pl.lit(site), clean="ig",
                                 baseline=pl.lit(0.0), atp="ig", ig="ig"))  # fmt: skip
    table = pl.concat(nodes)
    run.write_shard("nodes", "0", table)
    run.write_shard("prompts", "0", pl.concat(sums))
    sample = table.sample(400, seed=0).select(
        "prompt", "site", "position", "latent", "role", "atp", "ig", exact_effect="ig"
    )
    run.write_shard("calibration", "0", sample)
    run.write_shard("edge_calibration", "0", sample.select(target="site", weight="ig", exact_effect="ig"))
    run.write_shard("edges", "0", _edges(ids, names, tokens, rng))
    run.write_shard("meta", "0", _parts(table.filter(pl.col("site") == names[0]).drop_nulls("latent"), rng))
    _set_graph(run, names)
    agreed = {"pearson": 1.0, "spearman": 1.0, "sign": 1.0, "n": 400}
    run.record(
        trust={"conservation_gap": dict.fromkeys(names, 0.0), "error_share": dict.fromkeys(names, 0.03),
               "estimator_vs_exact": {"ig": agreed, "atp": agreed}, "edges_vs_exact": agreed, "warnings": []},
        flags={"meta": "meta", "site": names[0], "settings": {}, "meta_split_max_relative_error": 0.0},
    )  # fmt: skip
    return run


def _edges(ids: list[str], names: list[str], tokens: int, rng: np.random.Generator) -> pl.DataFrame:
    """In-edges of the set's latents at the last token from the site below, and of the behaviour from the last."""
    parts = []
    for k, name in enumerate([*names[1:], "target"]):
        n = INTO * (KNOWN if name != "target" else 3)
        target = [name if name == "target" else f"{name}/{tokens - 1}/{j % KNOWN}" for j in range(n)]
        for prompt in ids:
            latents, positions = rng.integers(0, ON, n), rng.integers(0, tokens, n)
            source = [f"{names[k]}/{p}/{i}" for p, i in zip(positions, latents, strict=True)]
            parts.append(
                pl.DataFrame(
                    {"prompt": prompt, "source": source, "target": target, "weight": rng.normal(size=n),
                     "contribution": rng.normal(size=n)}
                )
            )  # fmt: skip
    return pl.concat(parts).unique(["prompt", "source", "target"], keep="first", maintain_order=True)


def _parts(table: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """Four meta-latents of each latent, bias and residual, in random shares."""
    shares = rng.dirichlet(np.ones(6), size=len(table)) * table["ig"].to_numpy()[:, None]
    metas = np.column_stack(
        [(table["latent"].to_numpy()[:, None] * 7 + np.arange(4)) % 512, *np.full((2, len(table)), -1)]
    )
    metas[:, 5] = -2
    each = pl.DataFrame(
        {"row": np.repeat(np.arange(len(table)), 6), "meta": metas.ravel(), "attribution": shares.ravel()}
    )
    keys = table.select("prompt", "position", "latent").with_row_index("row").cast({"row": pl.Int64})
    return each.join(keys, on="row", maintain_order="left").select(
        "prompt", "position", "latent", "meta", "attribution"
    )


def _set_graph(run: Run, names: list[str]) -> None:
    """Nodes by role, and edges from each site to the next and to the behaviour, as means over the prompts."""
    everyone = len(run.read("prompts")["prompt"].unique())
    known = pl.col("latent").is_null() | (pl.col("latent") < KNOWN)
    means = run.read("nodes").filter(known).group_by("site", "role", "latent", maintain_order=True).agg(
        attribution=pl.col("ig").sum() / everyone
    )  # fmt: skip
    kind = pl.when(pl.col("latent").is_null()).then(pl.lit("error")).otherwise(pl.lit("latent"))
    last = pl.when(pl.col("latent").is_null()).then(pl.lit("error")).otherwise(pl.col("latent").cast(pl.String))
    nodes = means.select(
        pl.concat_str(["site", "role", last], separator="/").alias("id"), kind.alias("kind"), "site", "latent",
        "attribution",
        position="role", low=pl.col("attribution") - 0.1, high=pl.col("attribution") + 0.1,
        label=pl.concat_str([pl.lit("concept "), last]),
    )  # fmt: skip
    by_site = {name: nodes.filter(pl.col("site") == name)["id"].to_list() for name in names}
    links = [
        (source, target, 0.5 + (i * j % 7) / 7, (i * j % 11 - 5) / 9)
        for below, above in zip(names, [*names[1:], None], strict=True)
        for i, source in enumerate(by_site[below])
        for j, target in enumerate(["target"] if above is None else by_site[above])
        if not target.endswith("error")
    ]
    schema = {"source": pl.String, "target": pl.String, "weight": pl.Float64, "contribution": pl.Float64}
    edges = pl.DataFrame(links, schema=schema, orient="row")
    meta = {"behaviour": "logit_diff", "total_effect": 1.0, "prompts": everyone, "held_out_prompts": everyone // 2,
            "positions": list(ROLES)}  # fmt: skip
    run.write_text("graph.json", AttributionGraph.from_tables(nodes, edges, meta=meta).to_json())
