"""A finished run in Python: its tables as polars frames, its graphs, and its page in a notebook.

    from circuits.opened import open_run

    run = open_run("runs/capitals")
    run.hidden_facts()

Everything is read from the run's folder when it is asked for, and from the folders of its dictionaries where those
are there; no model is loaded. A figure is the same as in the tables, the page and the exports.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from circuits.evidence import (
    LatentEvidence,
    MetaEvidence,
    fact_rows,
    latent_evidence,
    latent_parts,
    meta_evidence,
    run_site,
)
from circuits.export import to_tables
from circuits.graph import TARGET, AttributionGraph
from circuits.prompt_graph import prompt_graph
from circuits.pruning import Keep, influence, prune
from mediation.errors import MediationError
from mediation.prompts import PromptSet
from mediation.runs import PROMPTS_FILE, Run
from mediation.statistics import bootstrap_interval
from mediation.trace import prompt_table, set_effect

PAGE = "index.html"  # what `mediation inspect` writes
HEIGHT = 760  # of the page in a notebook, px


def open_run(path: str | Path) -> OpenedRun:
    """The run in a folder that `mediation trace` or `mediation demo` wrote. MediationError when there is none."""
    return OpenedRun(Run.open(path))


class OpenedRun:
    """What a finished run holds. `run` is the folder itself (mediation.runs.Run), `path` where it is.

    In a notebook it shows its page, once `mediation inspect` has written it.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.path

    def __repr__(self) -> str:
        effect = self.effect()
        facts = ""
        if self.run.has("flags"):
            flagged = self.run.read("flags").filter("flagged")["prompt"].n_unique()
            facts = f", hidden facts flagged in {flagged} prompts"
        return (
            f"<run {self.path}: {effect['prompts']} prompts, total effect {effect['mean']:+.2f} "
            f"[{effect['low']:+.2f}, {effect['high']:+.2f}], {len(self.sites)} sites{facts}>"
        )

    def _repr_html_(self) -> str:
        """The run's page in a frame of its own, which may run the page's script and reach nothing else."""
        page = self.path / PAGE
        if not page.is_file():
            return f"<p>{html.escape(repr(self))}<br>Its page is written by <code>mediation inspect</code>.</p>"
        return (
            f'<iframe srcdoc="{html.escape(page.read_text(encoding="utf-8"))}" sandbox="allow-scripts allow-downloads" '
            f'title="{html.escape(str(self.path))}" style="width: 100%; height: {HEIGHT}px; border: 1px solid #8884">'
            "</iframe>"
        )

    # -- the run ---------------------------------------------------------------------------------------------------

    @property
    def info(self) -> dict[str, Any]:
        """run.json: settings, versions, hashes, timings, trust figures."""
        return self.run.info

    @property
    def sites(self) -> list[str]:
        """Names of the run's sites, in the order of the model."""
        return self.run.read("prompts")["site"].unique(maintain_order=True).to_list()

    def site(self, name: str) -> str:
        """The run's site of that name: as in `sites`, as tables print it ("1.resid_pre"), or by module path."""
        return run_site(self.run, name)

    def read(self, kind: str) -> pl.DataFrame:
        """A table of the run as it is on disk: nodes, edges, tokens, calibration, edge_calibration, meta, flags, ..."""
        return self.run.read(kind)

    def effect(self) -> dict[str, float]:
        """Mean total effect over the prompts with its bootstrap interval: mean, low, high, clean, baseline, prompts."""
        return set_effect(self.run, seed=self.info["settings"]["seed"])

    def prompts(self) -> pl.DataFrame:
        """One row a prompt: prompt, half, group, text, answer, wrong_answer, fact, clean, baseline, total_effect, gap.

        gap: what conservation misses at the worst site, |attributions under `ig` - total effect|. text is null for
        prompts that are chat messages.
        """
        effect = pl.col("clean") - pl.col("baseline")
        table = prompt_table(self.run).group_by("prompt", "half", maintain_order=True).agg(
            pl.col("clean", "baseline").first(), total_effect=effect.first(), gap=(pl.col("ig") - effect).abs().max()
        )  # fmt: skip
        rows = [
            (each.id, each.group, each.clean if isinstance(each.clean, str) else None, each.answer,
             each.wrong_answer, each.fact)
            for each in PromptSet.from_jsonl(self.path / PROMPTS_FILE)
        ]  # fmt: skip
        names = ["prompt", "group", "text", "answer", "wrong_answer", "fact"]
        asked = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
        figures = ["clean", "baseline", "total_effect", "gap"]
        return asked.join(table, on="prompt", maintain_order="left").select("prompt", "half", *names[1:], *figures)

    # -- graphs ----------------------------------------------------------------------------------------------------

    def graph(self, prompt: str | None = None, keep: Keep | None = None) -> AttributionGraph:
        """The graph of the set, or of one prompt; `.digraph` is a networkx.DiGraph. With `keep`, pruned by influence.

        MediationError: the run has no such prompt, or no graph.
        """
        graph = AttributionGraph.load(self.path / "graph.json") if prompt is None else prompt_graph(self.run, prompt)
        return graph if keep is None else prune(graph, keep)

    def nodes(self, prompt: str | None = None) -> pl.DataFrame:
        """The nodes of that graph but the behaviour, strongest first.

        id, kind, site, position (of the set, a role), latent, label, attribution, influence (the part of the flow into
        the behaviour that passes through); of a prompt activation; of the set held_out, low, high (the held-out mean
        and its interval), frequency (share of held-out prompts whose own graph keeps it), tier.
        """
        graph = self.graph(prompt)
        nodes, _ = to_tables(graph)
        through = influence(graph).nodes
        names = ["id", "kind", "site", "position", "latent", "label", "attribution", "influence"]
        names += ["held_out", "low", "high", "frequency", "tier"] if prompt is None else ["activation"]
        nodes = nodes.filter(pl.col("id") != TARGET).with_columns(
            influence=pl.col("id").replace_strict(through, return_dtype=pl.Float64)
        )
        order = pl.col("attribution").abs()
        return nodes.select(names).sort(order, "id", descending=[True, False], nulls_last=True)

    def edges(self, prompt: str | None = None) -> pl.DataFrame:
        """The edges of that graph, strongest first: source, target, weight, contribution, and of the set held_out, low,
        high, frequency, tier."""
        _, edges = to_tables(self.graph(prompt))
        return edges.sort(pl.col("contribution").abs(), "source", "target", descending=[True, False, False])

    def by_role(self) -> pl.DataFrame:
        """Who carries the total effect: site, role, kind (latent or error), attribution, low, high.

        Attributions under `ig` are summed over all nodes of a site, role and kind, and averaged over the prompts, with
        the bootstrap interval of that mean. Of a residual site they sum to the mean total effect, but for the gap.
        """
        nodes = self.run.read("nodes")
        prompts = self.run.read("prompts")["prompt"].unique(maintain_order=True)
        kind = pl.when(pl.col("latent").is_null()).then(pl.lit("error")).otherwise(pl.lit("latent")).alias("kind")
        sums = nodes.group_by("site", "role", kind, "prompt", maintain_order=True).agg(
            pl.col("ig").sum(), pl.col("position").mean()
        )
        place = pl.col("position").mean().over("role")
        keys = ["site", "role", "kind"]
        cells = sums.with_columns(place=place).select(*keys, "place").unique(keys, maintain_order=True)
        order = pl.DataFrame({"site": self.sites}).with_row_index("depth")
        cells = cells.join(order, on="site").sort("depth", "place", "role", "kind", descending=[False] * 3 + [True])
        values = np.zeros((len(prompts), len(cells)))
        at = sums.join(cells.with_row_index("column"), on=keys).join(
            pl.DataFrame({"prompt": prompts}).with_row_index("row"), on="prompt"
        )
        values[at["row"].to_numpy(), at["column"].to_numpy()] = at["ig"].to_numpy()
        low, high = bootstrap_interval(values, seed=self.info["settings"]["seed"])
        return cells.select(*keys, attribution=pl.Series(values.mean(axis=0)), low=pl.Series(low), high=pl.Series(high))

    # -- latents and facts -----------------------------------------------------------------------------------------

    def latent(self, site: str, latent: int, *, meta: str | Path | None = None) -> LatentEvidence:
        """Everything known of a latent: label, contexts, attribution by prompt, links, exact check, parts.

        site: a name of `sites`, or as the tables print it ("1.resid_pre"). meta: folder of a meta-dictionary for the
        parts; by default the one that the run was flagged with, or one beside the dictionary.
        """
        return latent_evidence(self.run, self.graph(), site, latent, meta)

    def parts(
        self, site: str, latent: int, *, prompt: str | None = None, meta: str | Path | None = None
    ) -> pl.DataFrame:
        """A latent split into its parts, conserved: part, meta (null for bias and residual), code, share, attribution.

        Shares of the decoder row sum to 1. Attributions, `ig`'s, sum to the latent's own: its mean over the prompts,
        or that of one prompt; null until `mediation flag` has split the run. `meta` as in `latent`.
        """
        site = self.site(site)
        if prompt is not None and prompt not in self.run.read("prompts")["prompt"]:
            raise MediationError(f"The run in {self.path} has no prompt '{prompt}'; see its prompts().")
        parts = latent_parts(self.run, site, latent, prompt=prompt, folder=meta)
        if parts is None:
            raise MediationError(
                f"No meta-dictionary is known for {site}; name its folder, or flag the run with `mediation flag`."
            )
        return parts

    def meta_latent(self, meta: int) -> MetaEvidence:
        """Everything known of a meta-latent: label, members, where and through which latents it acts, its tests.

        MediationError: the run was not flagged (`mediation flag`), or this one has no part in it.
        """
        return meta_evidence(self.run, meta)

    def hidden_facts(self) -> pl.DataFrame:
        """Every fact tested on a prompt, smallest q first, with its proof.

        prompt, group (the question), fact, kind, expected, meta, flagged, removal (what the behaviour loses without the
        fact's part through latents that are not for it), swap (what it loses with the counterpart's fact instead),
        swap_follows, hidden_share, carriers_silent, total_effect, behaviour, p, q, shapley, stderr. p and q are those
        of the test, which `tests` lists: one for each question and kind of fact.
        """
        names = ["prompt", "group", "fact", "kind", "expected", "meta", "flagged", "removal", "swap", "swap_follows",
                 "hidden_share", "carriers_silent", "total_effect", "behaviour", "p", "q", "shapley",
                 "stderr"]  # fmt: skip
        return fact_rows(self.run).rename({"label": "fact"}).select(names)

    def tests(self) -> pl.DataFrame:
        """Every test behind the flags, smallest q first: group, kind, prompts, removal, controls, swap_follows, p, q,
        flagged.

        removal: how far it moves the behaviour, without its sign, mean over the test's prompts. controls: the same of
        its matched controls; p is one more than how many of them reach the removal, over one more than their number.
        swap_follows, flagged: in how many of the prompts.
        """
        rows = []
        table = fact_rows(self.run).with_columns(pl.col("removal").abs())
        for (group, kind), here in table.group_by("group", "kind", maintain_order=True):
            rows.append(
                {
                    "group": group,
                    "kind": kind,
                    "prompts": len(here),
                    "removal": here["removal"].mean(),
                    "controls": np.array(here["controls"].to_list()).mean(axis=0).tolist(),
                    "swap_follows": here["swap_follows"].sum(),
                    "p": here["p"][0],
                    "q": here["q"][0],
                    "flagged": here["flagged"].sum(),
                }
            )
        schema: dict[str, type[pl.DataType] | pl.DataType] = {
            "group": pl.String, "kind": pl.String, "prompts": pl.Int64, "removal": pl.Float64,
            "controls": pl.List(pl.Float64), "swap_follows": pl.Int64, "p": pl.Float64, "q": pl.Float64,
            "flagged": pl.Int64,
        }  # fmt: skip
        return pl.DataFrame(rows, schema=schema, orient="row")
