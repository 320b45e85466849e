"""What the page shows, as one JSON value: the tables of a run, cut to what a reader can reach and a browser can hold.

Algorithm
1. The set's graph, with the influence of every node and edge (circuits.pruning). Above NODES or EDGES those of least
   influence are left out, and the counts say so; the slider in the page cuts further.
2. Of each of the first PROMPTS prompts, its own graph: the LATENTS latents and as many error nodes and embeddings of
   the largest influence, and the LINKS strongest edges between them. One prompt may be asked for whole.
3. For every latent of the set's graph a dossier: its label and evidence where the dictionary's folder has them, the
   prompts it is most on in, its attribution on every prompt, what was patched exactly.
4. Where facts were split: the parts of every node, of every prompt, and of every meta-latent, each with what it leaves
   out as one more part, so that parts always sum to the whole; the tests with their controls.

Tables are stored by column. Floats keep DIGITS significant digits; what is absent is null. Prompts, sites and latents
are numbers that index the payload's own lists. Nothing here is markup: circuits.viewer.page escapes the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from circuits.contrast import Contrast
from circuits.graph import TARGET, AttributionGraph, NodeKind
from circuits.prompt_graph import node_ids, prompt_flows
from circuits.pruning import Keep, influence
from circuits.supernodes import Supernode
from mediation.labels import read_labels
from mediation.prompts import PromptSet
from mediation.runs import Run
from mediation.sites import Site
from mediation.statistics import bootstrap_interval
from mediation.trace import prompt_table, set_effect

DIGITS = 5  # significant
NODES, EDGES = 2_000, 20_000  # of the set's graph
PROMPTS, LATENTS, LINKS = 300, 60, 400  # prompts with a graph of their own, and what of it
DOSSIERS = 600  # latents with evidence, strongest first
WHERE = 6  # prompts shown as a latent's or a meta-latent's contexts
PARTS = 8  # meta-latents shown of a split; the others are one part
METAS = 400  # meta-latents described
SAMPLE = 2_000  # points of a scatter
BIAS, RESIDUAL, OTHERS, SUMMED = -1, -2, -3, -4  # in place of a meta-latent, or of a latent: all others
EVIDENCE = ("label", "score", "source", "density", "histogram", "contexts", "logits_up", "logits_down")
Json = dict[str, Any]


def payload(
    run: Run,
    graph: AttributionGraph,
    *,
    prompts_file: str,
    keep: Keep | None = None,
    supernodes: Sequence[Supernode] = (),
    against: tuple[str, Contrast] | None = None,
    prompt: str | None = None,
    most: int | None = PROMPTS,
) -> Json:
    """Steps 1 to 4 for a run and its set's `graph`.

    prompts_file: the run's JSONL of prompts. keep: what the page shows at first. supernodes: groups of the set's
    latents. against: another run's name and what differs from it. prompt: id of the prompt whose graph is given whole,
    and shown first. most: prompts with a graph of their own; None: all.
    """
    keep = keep or Keep()
    found = _Builder(run, graph, prompts_file).build(supernodes, against, prompt, most)
    return found | {"keep": {"nodes": keep.nodes, "edges": keep.edges}}


class _Builder:
    """The tables of one run, read once, and the numbers that stand for prompts, sites and meta-latents."""

    def __init__(self, run: Run, graph: AttributionGraph, prompts_file: str) -> None:
        self.run, self.graph, self.info = run, graph, run.info
        self.settings = self.info["settings"]
        self.estimator: str = self.settings["estimator"]
        table = prompt_table(run)
        asked = PromptSet.from_jsonl(run.path / prompts_file) if (run.path / prompts_file).exists() else ()
        known = {each.id: each for each in asked}
        ids = table["prompt"].unique(maintain_order=True).to_list()
        order = {each.id: place for place, each in enumerate(asked)}
        self.prompts = sorted(ids, key=lambda each: (order.get(each, len(order)), each))
        self.asked = [known.get(each) for each in self.prompts]
        self.sites = sorted(table["site"].unique().to_list(), key=lambda name: (Site.parse(name).depth, name))
        self.effects = table
        self.number = pl.DataFrame({"prompt": self.prompts}).with_row_index("at")
        self.nodes = self._numbered(run.read("nodes")).with_columns(id=node_ids("role"))
        self.tokens = self._numbered(run.read("tokens")).unique(["at", "position"], keep="first").sort("at", "position")
        self.flags: Json = self.info.get("flags") or {}
        self.meta_site: str | None = self.flags.get("site") if run.has("meta") else None
        self.shown: dict[str, list[int]] = {}

    def build(
        self,
        groups: Sequence[Supernode],
        against: tuple[str, Contrast] | None,
        prompt: str | None,
        most: int | None,
    ) -> Json:
        """The payload but for how much of it is shown at first."""
        chosen = self._set_graph(groups)
        latents = self._latents(chosen)
        facts, metas = self._facts(), self._metas()
        return {
            "title": self.run.path.resolve().name,
            "run": self._made(),
            "sites": [{"name": site, "title": _site_title(site)} for site in self.sites],
            "prompts": self._prompts(),
            "first": None if prompt is None else self.prompts.index(prompt),
            "graph": chosen,
            "own": self._own_graphs(prompt, most),
            "latents": latents,
            "metas": metas,
            "facts": facts,
            "contrast": None if against is None else self._contrast(*against),
        }

    def _numbered(self, table: pl.DataFrame) -> pl.DataFrame:
        """With the prompt's number, `at`, for its id."""
        return table.join(self.number, on="prompt", how="inner", maintain_order="left")

    # -- the run ---------------------------------------------------------------------------------------------------

    def _made(self) -> Json:
        """Where the numbers come from and what they can bear."""
        named = ("model", "saes", "behaviour", "baseline", "estimator", "steps", "seed")
        measured = self.run.read("calibration")
        picked = measured.sample(min(SAMPLE, len(measured)), seed=0)
        nodes = picked.select("site", "latent", "role", "ig", "atp", exact="exact_effect")
        edges = self.run.read("edge_calibration") if self.run.has("edge_calibration") else None
        trust, effect = self.info["trust"], set_effect(self.run)
        return {
            **{name: self.settings.get(name) for name in named},
            "model": Path(self.settings["model"]).name,
            "path": str(self.run.path),
            "created": self.info["created"],
            "versions": self.info["versions"],
            "hashes": self.settings["hashes"],
            "seconds": round(sum(self.info["timings"].values()), 1),
            "effect": effect,
            "held_out": self.graph.meta.get("held_out_prompts") or 0,
            "trust": trust,
            "fidelity": self._fidelity(),
            "groups": self._groups(),
            "calibration": {
                "nodes": _columns(nodes),
                "edges": None
                if edges is None
                else _columns(edges.sample(min(SAMPLE, len(edges)), seed=0).select("weight", exact="exact_effect")),
            },
            "proof": self._proof(),
        }

    def _fidelity(self) -> list[Json]:
        """One row a site: its dictionary, how well it fits, and whether it has labels."""
        known = self.info.get("dictionaries") or {}
        by_name = self.info.get("fidelity") or {}
        rows = []
        for site in self.sites:
            each = known.get(site) or {}
            rows.append({"site": site, **each, **(by_name.get(each.get("name", site)) or by_name.get(site) or {})})
            rows[-1]["labels"] = self._evidence(site) is not None
        return rows

    def _groups(self) -> list[Json]:
        """Mean total effect of each group of prompts, with its interval."""
        first = self.effects.filter(pl.col("site") == self.effects["site"][0])
        value = dict(zip(first["prompt"], (first["clean"] - first["baseline"]).to_list(), strict=True))
        groups: dict[str, list[float]] = {}
        for name, asked in zip(self.prompts, self.asked, strict=True):
            groups.setdefault("all" if asked is None else asked.group, []).append(value[name])
        rows = []
        for group, values in groups.items():
            low, high = bootstrap_interval(np.array(values)) if len(values) > 1 else (None, None)
            ends = {"low": None if low is None else float(low), "high": None if high is None else float(high)}
            rows.append({"group": group, "prompts": len(values), "mean": float(np.mean(values)), **ends})
        return rows

    def _proof(self) -> Json | None:
        """Faithfulness by size, where `mediation prove` measured it."""
        if not self.run.has("proof"):
            return None
        return _columns(self.run.read("proof").select("kind", "ranking", "size", "of", "faithfulness", "completeness"))

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _prompts(self) -> Json:
        """One row a prompt: what it says, its behaviour, and who carries its total effect at every site (`ig`)."""
        tokens = self.tokens.group_by("at", maintain_order=True).agg("text", "role").sort("at")
        effects = self._numbered(self.effects)
        totals = effects.select("at", "site", total=pl.col("clean") - pl.col("baseline"))
        shown = pl.col("id").is_in(list(self.graph.digraph))
        error, value = pl.col("latent").is_null(), pl.col("ig")
        sums = self.nodes.group_by("at", "site").agg(
            shown=value.filter(shown & ~error).sum(), errors=value.filter(error).sum(), all=value.sum()
        )
        sums = totals.join(sums, on=["at", "site"], how="left").fill_null(0.0)
        sums = sums.with_columns(
            others=pl.col("all") - pl.col("shown") - pl.col("errors"), gap=pl.col("total") - pl.col("all")
        )
        by_site = {}
        for site in self.sites:
            here = sums.filter(pl.col("site") == site).sort("at")
            by_site[site] = _columns(here.select("shown", "errors", "others", "gap"))
        one = effects.unique("at", keep="first").sort("at")
        roles = self.tokens["role"].unique(maintain_order=True).to_list()
        asked = [(None, None, "all", None) if a is None else (a.answer, a.wrong_answer, a.group, a.fact)
                 for a in self.asked]  # fmt: skip
        answer, wrong, group, fact = (list(each) for each in zip(*asked, strict=True))
        return {
            "id": self.prompts,
            "text": [a.clean if a is not None and isinstance(a.clean, str) else None for a in self.asked],
            "half": one["half"].to_list(),
            "group": group,
            "answer": answer,
            "wrong": wrong,
            "fact": fact,
            "tokens": tokens["text"].to_list(),
            "roles": roles,
            "role": [[roles.index(each) for each in row] for row in tokens["role"].to_list()],
            **_columns(one.select("clean", "baseline")),
            "sites": by_site,
            "heat": self._heat(),
        }

    def _heat(self) -> list[list[list[float]]]:
        """Of every prompt and site, the attribution of each position, latents and error together."""
        sums = self.nodes.group_by("at", "site", "position").agg(pl.col(self.estimator).sum().round_sig_figs(3))
        lengths = self.tokens.group_by("at").len().sort("at")["len"].to_list()
        heat = [[[0.0] * length for _ in self.sites] for length in lengths]
        place = {site: k for k, site in enumerate(self.sites)}
        for at, site, position, value in sums.iter_rows():
            if position < lengths[at]:
                heat[at][place[site]][position] = value
        return heat

    # -- graphs ----------------------------------------------------------------------------------------------------

    def _set_graph(self, groups: Sequence[Supernode]) -> Json:
        """Step 1."""
        digraph, found = self.graph.digraph, influence(self.graph)
        ranked = sorted((name for name in digraph if name != TARGET), key=lambda name: (-found.nodes[name], name))
        kept = [TARGET, *ranked[: NODES - 1]]
        number = {name: place for place, name in enumerate(kept)}
        names = ("kind", "site", "position", "latent", "label", "attribution", "low", "high", "held_out", "frequency",
                 "tier")  # fmt: skip
        rows = [{"id": name, **{key: digraph.nodes[name][key] for key in names}} for name in kept]
        nodes = pl.DataFrame(rows, infer_schema_length=None).with_columns(
            influence=pl.Series([found.nodes[name] for name in kept])
        )
        links = [
            (number[s], number[t], data["weight"], data["contribution"], found.edges[s, t], data.get("tier"))
            for s, t, data in digraph.edges(data=True)
            if s in number and t in number
        ]
        schema = {"source": pl.Int64, "target": pl.Int64, "weight": pl.Float64, "contribution": pl.Float64,
                  "influence": pl.Float64, "tier": pl.String}  # fmt: skip
        edges = pl.DataFrame(links, schema=schema, orient="row").sort("influence", descending=True, maintain_order=True)
        return {
            "nodes": _columns(self._with_sites(nodes)),
            "edges": _columns(edges.head(EDGES)),
            "of": {"nodes": len(digraph), "edges": digraph.number_of_edges()},
            "positions": [str(each) for each in self.graph.positions()],
            "groups": [
                {"label": each.label, "members": [number[m] for m in each.members if m in number]} for each in groups
            ],
        }

    def _with_sites(self, nodes: pl.DataFrame) -> pl.DataFrame:
        """Site names as numbers; embeddings and the behaviour have none."""
        order = {site: k for k, site in enumerate(self.sites)}
        here = pl.col("kind").is_in([NodeKind.LATENT.value, NodeKind.ERROR.value, NodeKind.SUPERNODE.value])
        site = pl.when(here).then(pl.col("site").cast(pl.String).replace_strict(order, default=None))
        return nodes.with_columns(site=site.cast(pl.Int64))

    def _own_graphs(self, prompt: str | None, most: int | None) -> dict[str, Json]:
        """Step 2, by the prompt's number."""
        wanted = {*self.prompts[:most], *([] if prompt is None else [prompt])}
        chosen = pl.col("prompt").is_in(list(wanted))
        nodes, edges = (each.filter(chosen) for each in prompt_flows(self.run))
        parts = pl.col("id").str.split("/").list
        nodes = nodes.with_columns(
            site=parts.get(0), position=parts.get(1, null_on_oob=True).cast(pl.Int64, strict=False),
            latent=parts.get(2, null_on_oob=True).cast(pl.Int64, strict=False),
        ).with_columns(
            kind=pl.when(pl.col("id") == TARGET).then(pl.lit(NodeKind.TARGET.value))
            .when(pl.col("site") == "embed").then(pl.lit(NodeKind.EMBEDDING.value))
            .when(pl.col("latent").is_null()).then(pl.lit(NodeKind.ERROR.value))
            .otherwise(pl.lit(NodeKind.LATENT.value))
        )  # fmt: skip
        keys = ["prompt", "site", "position", "latent"]
        own = self.nodes.select(*keys, activation=pl.col("clean").fill_nan(None), attribution=self.estimator)
        nodes = nodes.join(own, on=keys, how="left", nulls_equal=True, maintain_order="left")
        latent, target = pl.col("kind") == NodeKind.LATENT, pl.col("kind") == NodeKind.TARGET
        totals = nodes.group_by("prompt").agg(held=pl.col("influence").filter(latent).sum(), nodes=pl.len())
        place = pl.col("influence").rank("ordinal", descending=True).over("prompt", latent)
        nodes = nodes.filter((place <= LATENTS) | target | (pl.col("prompt") == (prompt or "")))
        nodes = nodes.sort("influence", descending=True, maintain_order=True)
        nodes = nodes.with_columns(number=pl.int_range(pl.len()).over("prompt"))
        called = nodes.select("prompt", "id", "number")
        counts = edges.group_by("prompt").agg(edges=pl.len())
        for end in ("source", "target"):
            names = called.rename({"id": end, "number": f"{end}_number"})
            edges = edges.join(names, on=["prompt", end], how="inner", maintain_order="left")
        strong = pl.col("influence").rank("ordinal", descending=True)
        keep = (strong.over("prompt") <= LINKS) | (strong.over("prompt", "source") == 1)
        edges = edges.filter(keep | (pl.col("prompt") == (prompt or "")))
        edges = edges.select(
            "prompt", "weight", "contribution", "influence", source="source_number", target="target_number"
        ).sort("influence", descending=True, maintain_order=True)
        counts = totals.join(counts, on="prompt", how="left")
        of = {name: (held, n, m) for name, held, n, m in counts.select("prompt", "held", "nodes", "edges").iter_rows()}
        nodes = self._with_sites(nodes.drop("number"))
        split_nodes, split_edges = (each.partition_by("prompt", as_dict=True) for each in (nodes, edges))
        found = {}
        for at, name in enumerate(self.prompts):
            if (name,) in split_nodes and (name,) in split_edges:
                held, n, m = of[name]
                found[str(at)] = {
                    "nodes": _columns(split_nodes[name,].drop("prompt", "id")),
                    "edges": _columns(split_edges[name,].drop("prompt")),
                    "of": {"nodes": n, "edges": m, "influence": round(held, 6)},
                }
        return found

    # -- latents ---------------------------------------------------------------------------------------------------

    def _evidence(self, site: str) -> pl.DataFrame | None:
        folder = ((self.info.get("dictionaries") or {}).get(site) or {}).get("folder")
        return None if folder is None else read_labels(folder)

    def _latents(self, chosen: Json) -> list[Json]:
        """Step 3: dossiers of the set's latents, by site and number, strongest first."""
        nodes = chosen["nodes"]
        wanted: dict[tuple[int, int], list[int]] = {}
        for k, kind in enumerate(nodes["kind"]):
            if kind == NodeKind.LATENT:
                wanted.setdefault((nodes["site"][k], nodes["latent"][k]), []).append(k)
        wanted = dict(list(wanted.items())[:DOSSIERS])
        keys = pl.DataFrame(
            [(self.sites[site], latent) for site, latent in wanted],
            schema={"site": pl.String, "latent": pl.Int64}, orient="row",
        )  # fmt: skip
        mine = self.nodes.join(keys, on=["site", "latent"], how="semi", maintain_order="left")
        by_prompt = mine.group_by("site", "latent", "role", "at").agg(pl.col(self.estimator).sum()).sort("at")
        by_prompt = by_prompt.with_columns(pl.col(self.estimator).round_sig_figs(DIGITS))
        attributions = {
            (site, latent, role): {"at": at, "value": value}
            for site, latent, role, at, value in by_prompt.group_by("site", "latent", "role").agg(
                "at", self.estimator).iter_rows()
        }  # fmt: skip
        where = self._where(mine.filter(pl.col("clean") != 0), ["site", "latent"], "clean")
        exact = self._exact(keys)
        effects = {(each["site"], each["latent"]): each for each in self.info.get("effects") or ()}
        evidence = {site: self._described(site, [b for a, b in wanted if self.sites[a] == site]) for site in self.sites}
        splits = self._node_splits()
        found = []
        for (site, latent), places in wanted.items():
            name = self.sites[site]
            measured = effects.get((name, latent))
            roles = [nodes["position"][k] for k in places]
            found.append({
                "site": site,
                "latent": latent,
                "nodes": places,
                **(evidence[name].get(latent) or {}),
                "by_prompt": {role: attributions.get((name, latent, role)) for role in roles},
                "where": where.get((name, latent), []),
                "exact": exact.get((name, latent), []),
                "effects": None if measured is None else {k: _short(measured[k]) for k in ("te", "tie", "nie", "nde")},
                "split": {role: splits.get((latent, role)) for role in roles} if name == self.meta_site else None,
            })  # fmt: skip
        return found

    def _described(self, site: str, latents: Sequence[int]) -> dict[int, Json]:
        """What the dictionary's folder says of these latents."""
        table = self._evidence(site)
        if table is None:
            return {}
        return _evidence_rows(table.filter(pl.col("index").is_in(list(latents))))

    def _where(self, rows: pl.DataFrame, keys: list[str], value: str) -> dict[tuple[Any, ...], list[Json]]:
        """The prompts on which `value` is largest, by key: at (prompt), position and value of every token."""
        peaks = rows.group_by(*keys, "at").agg(peak=pl.col(value).abs().max())
        place = pl.col("peak").rank("ordinal", descending=True).over(keys)
        peaks = peaks.sort("at").filter(place <= WHERE)
        both = rows.join(peaks, on=[*keys, "at"]).group_by(*keys, "at", "peak").agg(
            pl.col("position").sort_by("position"), pl.col(value).sort_by("position").round_sig_figs(4)
        ).sort("peak", "at", descending=[True, False])  # fmt: skip
        found: dict[tuple[Any, ...], list[Json]] = {}
        for row in both.iter_rows(named=True):
            each = {"at": row["at"], "position": row["position"], "value": row[value]}
            found.setdefault(tuple(row[key] for key in keys), []).append(each)
        return found

    def _exact(self, keys: pl.DataFrame) -> dict[tuple[str, int], list[Json]]:
        """What was patched exactly of these latents: prompt, position, exact effect and estimates."""
        rows = self._numbered(self.run.read("calibration")).join(keys, on=["site", "latent"], how="semi")
        found: dict[tuple[str, int], list[Json]] = {}
        for row in rows.sort("at", "position").iter_rows(named=True):
            each = {key: row[key] for key in ("at", "position")}
            each |= {"exact": _short(row["exact_effect"]), "ig": _short(row["ig"]), "atp": _short(row["atp"])}
            found.setdefault((row["site"], row["latent"]), []).append(each)
        return found

    # -- facts -----------------------------------------------------------------------------------------------------

    def _split_table(self) -> pl.DataFrame | None:
        """The linear split: at, position, latent, meta, attribution and the position's role."""
        if self.meta_site is None:
            return None
        split = self._numbered(self.run.read("meta"))
        return split.join(self.tokens.select("at", "position", "role"), on=["at", "position"], how="left")

    def _node_splits(self) -> dict[tuple[int, str], Json]:
        """By latent and role, the mean over prompts of its parts."""
        split = self._split_table()
        if split is None:
            return {}
        known = pl.DataFrame(
            [(data["latent"], str(data["position"])) for _, data in self.graph.digraph.nodes(data=True)
             if data["kind"] == NodeKind.LATENT and data["site"] == self.meta_site],
            schema={"latent": pl.Int64, "role": pl.String}, orient="row",
        )  # fmt: skip
        mine = split.join(known, on=["latent", "role"], how="semi")
        means = mine.group_by("latent", "role", "meta").agg(value=pl.col("attribution").sum() / len(self.prompts))
        return {key: parts for key, parts in _top_parts(means, ["latent", "role"]).items()}

    def _metas(self) -> Json | None:
        """Step 4: the meta-latents that carry most or were tested, and the parts of every prompt."""
        split = self._split_table()
        if split is None:
            return None
        real = split.filter(pl.col("meta") >= 0)
        flags = self.run.read("flags") if self.run.has("flags") else None
        sizes = real.group_by("meta").agg(size=pl.col("attribution").abs().sum()).sort("size", "meta", descending=True)
        tested = [] if flags is None else flags["meta"].unique().sort().to_list()
        metas = list(dict.fromkeys([*tested, *sizes["meta"].head(METAS).to_list()]))
        folder = Path(self.flags["meta"])
        labels = read_labels(folder) if folder.is_dir() else None
        described = {} if labels is None else _evidence_rows(labels.filter(pl.col("index").is_in(metas)))
        names = {} if labels is None else dict(labels.drop_nulls("label").select("index", "label").iter_rows())
        if labels is None and flags is not None:
            names = dict(flags.select("meta", "label").unique().iter_rows())
        at_token = real.group_by("meta", "at", "position").agg(pl.col("attribution").sum())
        where = self._where(at_token.filter(pl.col("meta").is_in(metas)), ["meta"], "attribution")
        through = _largest(
            real.group_by("meta", "latent").agg(value=pl.col("attribution").sum() / len(self.prompts)), "meta", "latent"
        )
        means = dict(real.group_by("meta").agg(pl.col("attribution").sum() / len(self.prompts)).iter_rows())
        return {
            "folder": str(folder),
            "site": self.sites.index(self.meta_site),
            "width": None if labels is None else len(labels),
            "contexts": labels is not None and "contexts" in labels.columns,
            "list": [
                {
                    "meta": meta,
                    "label": names.get(meta),
                    **(described.get(meta) or {}),
                    "mean": _short(means.get(meta, 0.0)),
                    "through": through.get(meta, []),
                    "where": where.get((meta,), []),
                }
                for meta in metas
            ],
            "prompts": self._prompt_splits(split),
            "names": {str(meta): name for meta, name in names.items() if meta not in set(metas)},
        }

    def _prompt_splits(self, split: pl.DataFrame) -> list[list[Json]]:
        """Of every prompt its strongest latents, at their tokens, with their parts, and all others as one."""
        nodes = split.group_by("at", "position", "latent").agg(net=pl.col("attribution").sum())
        place = pl.col("net").abs().rank("ordinal", descending=True).over("at")
        nodes = nodes.sort("at", "position", "latent").with_columns(first=place <= PARTS)
        rows = split.join(nodes, on=["at", "position", "latent"])
        other = pl.lit(SUMMED, dtype=pl.Int64)
        rows = rows.with_columns(
            pl.when("first").then("position").otherwise(other).alias("position"),
            pl.when("first").then("latent").otherwise(other).alias("latent"),
        )
        means = rows.group_by("at", "position", "latent", "meta").agg(value=pl.col("attribution").sum())
        on = self.nodes.filter((pl.col("site") == self.meta_site) & (pl.col("clean") != 0))
        active = set(on.select("at", "position", "latent").iter_rows())
        found: list[list[Json]] = [[] for _ in self.prompts]
        for (at, position, latent), parts in _top_parts(means, ["at", "position", "latent"]).items():
            found[at].append({"position": position, "latent": latent, "on": (at, position, latent) in active, **parts})
        for each in found:
            each.sort(key=lambda row: (row["latent"] == SUMMED, -abs(sum(row["value"]))))
        return found

    def _facts(self) -> Json | None:
        """The rows of the flags, with the controls of each test, and which carriers there are and where they are on."""
        if not self.run.has("flags"):
            return None
        flags = self.run.read("flags").with_row_index("row")
        rows = self._numbered(flags).sort("row").drop("row", "prompt")
        controls: dict[tuple[int, int], list[float]] = {}
        if self.run.has("controls"):
            table = self._numbered(self.run.read("controls"))
            table = table.with_columns(pl.col("controls").list.eval(pl.element().round_sig_figs(3)))
            controls = {(at, meta): each for at, meta, each in table.select("at", "meta", "controls").iter_rows()}
        measured = [controls.get(each) for each in rows.select("at", "meta").iter_rows()]
        return {
            "settings": self.flags.get("settings"),
            "split_error": self.flags.get("meta_split_max_relative_error"),
            "rows": _columns(rows) | {"controls": measured},
            "carriers": self._carriers(),
        }

    def _carriers(self) -> list[Json] | None:
        if not self.run.has("carriers") or self.meta_site is None:
            return None
        table = self.run.read("carriers")
        here = (pl.col("site") == self.meta_site) & pl.col("latent").is_in(table["latent"].unique().to_list())
        on = self.nodes.filter(here & (pl.col("clean") != 0)).group_by("latent").agg(pl.col("at").unique().sort())
        active = dict(on.iter_rows())
        return [
            {"meta": meta, "latent": latent, "cosine": _short(cosine), "carrier": carrier,
             "on": active.get(latent, [])}
            for meta, latent, cosine, carrier in table.select("meta", "latent", "cosine", "carrier").iter_rows()
        ]  # fmt: skip

    def _contrast(self, other: str, found: Contrast) -> Json:
        """The two tables of a contrast, edges by the numbers of their nodes."""
        ids = [*found.nodes["id"], *found.edges["source"].sort(), TARGET]  # the other sources are embeddings
        number = {name: k for k, name in enumerate(dict.fromkeys(ids))}
        edges = found.edges.drop_nulls("p").sort(pl.col("difference").abs(), descending=True, maintain_order=True)
        edges = edges.head(EDGES).with_columns(pl.col("source", "target").replace_strict(number, return_dtype=pl.Int64))
        return {
            "other": other,
            "nodes": _columns(self._with_sites(found.nodes)),
            "rest": [name for name in number if name not in set(found.nodes["id"])],
            "edges": _columns(edges),
            "prompts": list(found.prompts),
            "paired": found.paired,
            "smallest_p": found.smallest_p,
            "notes": list(found.notes),
        }


def _columns(table: pl.DataFrame) -> dict[str, list[Any]]:
    """A table by column, as JSON has it."""
    floats = pl.selectors.float()
    return table.with_columns(floats.fill_nan(None).round_sig_figs(DIGITS)).to_dict(as_series=False)


def _short(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.{DIGITS}g}")


def _evidence_rows(table: pl.DataFrame) -> dict[int, Json]:
    """Rows of a table of labels by index; columns that it lacks are absent."""
    names = [name for name in (*EVIDENCE, "members", "shared", "p") if name in table.columns]
    return {row["index"]: {name: row[name] for name in names} for row in table.iter_rows(named=True)}


def _top_parts(table: pl.DataFrame, keys: list[str]) -> dict[Any, Json]:
    """Parts (meta, value) of what `keys` name, largest first: PARTS meta-latents, all others as one, bias, residual."""
    real = pl.col("meta") >= 0
    place = pl.col("value").abs().rank("ordinal", descending=True).over([*keys, real])
    few = table.sort(*keys, "meta").with_columns(
        meta=pl.when(real & (place > PARTS)).then(pl.lit(OTHERS, dtype=pl.Int64)).otherwise("meta")
    )
    sums = few.group_by(*keys, "meta", maintain_order=True).agg(pl.col("value").sum())
    sums = sums.sort([pl.col("meta") < 0, pl.col("value").abs()], descending=[False, True], maintain_order=True)
    sums = sums.with_columns(pl.col("value").round_sig_figs(DIGITS))
    found = sums.group_by(*keys, maintain_order=True).agg("meta", "value")
    return {tuple(row[: len(keys)]): {"meta": row[-2], "value": row[-1]} for row in found.iter_rows()}


def _largest(table: pl.DataFrame, key: str, item: str) -> dict[int, Json]:
    """By key, the PARTS items of the largest |value|, and how many others there are with what sum."""
    table = table.sort(pl.col("value").abs(), item, descending=[True, False])
    grouped = table.group_by(key, maintain_order=True).agg(
        pl.col(item).head(PARTS), pl.col("value").head(PARTS).round_sig_figs(DIGITS).alias("values"),
        others=pl.col("value").slice(PARTS).sum(), more=pl.max_horizontal(pl.len() - PARTS, 0),
    )  # fmt: skip
    return {
        row[key]: {item: row[item], "value": row["values"], "others": _short(row["others"]), "more": row["more"]}
        for row in grouped.iter_rows(named=True)
    }


def _site_title(site: str) -> str:
    """A site as a reader says it: "layer 8 resid_pre"."""
    parsed = Site.parse(site)
    return f"layer {parsed.layer} {parsed.stream}"
