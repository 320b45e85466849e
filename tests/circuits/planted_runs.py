"""Runs on disk with planted values, as a trace and `build_graph` write them, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from mediation.prompts import Half
from mediation.runs import Run

LOW, HIGH = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
NODES = {"a": (LOW, "subject", 1), "b": (LOW, "subject", 2), "c": (HIGH, "end", 3), "e": (HIGH, "end", None)}
LENGTH = 6
SETTINGS: dict[str, Any] = {
    "baseline": "corrupt", "behaviour": "logit_diff", "estimator": "ig", "semantics": "gradient",
}  # fmt: skip


def node_id(name: str, position: int | str | None = None) -> str:
    site, role, latent = NODES[name]
    place = role if position is None else position
    return f"{site}/{place}/{'error' if latent is None else latent}"


def position_of(prompt: str, name: str) -> int:
    """Where the role of a node stands: prompts differ in wording, so the subject moves."""
    return LENGTH - 1 if NODES[name][1] == "end" else 1 + sum(map(ord, prompt)) % 3


def planted_run(
    folder: Path,
    nodes: Mapping[str, Mapping[str, float]],
    edges: Mapping[str, Mapping[tuple[str, str], float]] | None = None,
    *,
    halves: Mapping[str, Half | None] | None = None,
    chosen: Sequence[str] = tuple(NODES),
    hashes: Mapping[str, str] | None = None,
    shards: int = 2,
    **settings: Any,
) -> Run:
    """A run of prompts `nodes[prompt][name]`, attributions, and `edges[prompt][(name, name or "target")]`.

    A latent's value is split over two positions where its role is "subject". By default the prompts whose ids end in
    an even digit are discovery prompts.
    """
    hashed = {"dictionaries": dict(hashes or {LOW: "low", HIGH: "high"})}
    run = Run.create(folder, SETTINGS | settings | {"hashes": hashed})
    prompts = list(nodes)
    halves = halves or {p: (Half.EVALUATION if int(p[-1]) % 2 else Half.DISCOVERY) for p in prompts}
    for shard in range(shards):
        mine = prompts[shard::shards]
        if not mine:
            continue
        rows = [
            (p, halves[p], site, sum(nodes[p].values()), 0.0, sum(nodes[p].values()))
            for p in mine
            for site in (LOW, HIGH)
        ]
        columns = {"prompt": pl.String, "half": pl.String, "site": pl.String}
        floats = dict.fromkeys(("clean", "baseline", "ig"), pl.Float64)
        run.write_shard("prompts", f"{shard}", pl.DataFrame(rows, schema=columns | floats, orient="row"))
        run.write_shard("nodes", f"{shard}", pl.concat([_nodes(p, nodes[p]) for p in mine]))
        run.write_shard("tokens", f"{shard}", pl.concat([_tokens(p) for p in mine]))
        run.write_shard("edges", f"{shard}", pl.concat([_edges(p, (edges or {}).get(p, {})) for p in mine]))
    run.write_table(
        "graph_nodes", graph_nodes(chosen).with_columns(role="position", name=pl.lit(None, dtype=pl.String))
    )
    return run


def graph_nodes(names: Sequence[str] = tuple(NODES)) -> pl.DataFrame:
    """The chosen nodes as `consensus_tables` takes them, all of attribution 1."""
    rows = [
        (node_id(name), "error" if latent is None else "latent", site, role, latent, 1.0, f"{name}!")
        for name, (site, role, latent) in NODES.items()
        if name in names
    ]
    schema = {
        "id": pl.String, "kind": pl.String, "site": pl.String, "position": pl.String, "latent": pl.Int64,
        "attribution": pl.Float64, "label": pl.String,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def _parts(prompt: str, name: str) -> list[tuple[int, float]]:
    """Positions of a node in a prompt, and their shares of its value."""
    at = position_of(prompt, name)
    return [(at, 1.0)] if NODES[name][1] == "end" else [(at, 0.75), (at + 1, 0.25)]


def _nodes(prompt: str, values: Mapping[str, float]) -> pl.DataFrame:
    rows = [
        (prompt, NODES[name][0], at, NODES[name][2], NODES[name][1], 7, 1.0, 0.0, share * value)
        for name, value in values.items()
        for at, share in _parts(prompt, name)
    ]
    schema = {
        "prompt": pl.String, "site": pl.String, "position": pl.Int64, "latent": pl.Int64, "role": pl.String,
        "token": pl.Int64, "clean": pl.Float64, "baseline": pl.Float64, "ig": pl.Float64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def _tokens(prompt: str) -> pl.DataFrame:
    subject = [at for at, _ in _parts(prompt, "a")]
    roles = ["end" if at == LENGTH - 1 else "subject" if at in subject else "rest" for at in range(LENGTH)]
    return pl.DataFrame(
        {"prompt": [prompt] * LENGTH, "position": list(range(LENGTH)), "role": roles, "token": [7] * LENGTH,
         "text": [f" t{k}" for k in range(LENGTH)]}
    )  # fmt: skip


def _edges(prompt: str, values: Mapping[tuple[str, str], float]) -> pl.DataFrame:
    rows = []
    for (source, target), value in values.items():
        ends = (
            [("target", 1.0)] if target == "target" else [(node_id(target, at), s) for at, s in _parts(prompt, target)]
        )
        named = NODES["a"][1] if source == "embed" else None
        for at, share in _parts(prompt, "a" if named else source):
            start = f"embed/{at}" if named else node_id(source, at)
            rows += [(prompt, start, end, 2 * value * share * part, value * share * part) for end, part in ends]
    schema = {"prompt": pl.String, "source": pl.String, "target": pl.String, "weight": pl.Float64}
    return pl.DataFrame(rows, schema=schema | {"contribution": pl.Float64}, orient="row")
