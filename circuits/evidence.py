"""What a run, and the folders of its dictionaries, hold of one latent or of one meta-latent.

Algorithm of `latent_evidence`
1. By role: the mean attribution over all prompts, the mean over the held-out ones and its bootstrap interval
   (circuits.consensus); how often prompts' graphs keep it, and its tier, where it is in the set's graph.
2. By prompt: attribution, and activation on both sides, as the run stored them; nodes that were patched exactly.
3. Links: mean direct effects over all prompts, by role. In-edges were computed for the latents of the set's graph;
   any other latent is known as a source only.
4. Parts, conserved: of its decoder row w = b + sum_j z_j u_j + r, with the share (w . part) / |w|^2, so that shares
   sum to 1; and, where `mediation flag` split the run with the same meta-dictionary, of its attribution.
5. The dictionary's folder: label, contexts, density, histogram, logit lens, as `mediation label` left them.

Algorithm of `meta_evidence`
1. Attribution of the meta-latent in every prompt, summed over latents; at which tokens, and through which latents.
2. Carriers: latents with the run's carrier cosine or more to it, and in how many prompts they were on. What the run
   tested: removal, its controls, swap, p and q of each test.
3. The meta-dictionary's folder: label, members, contexts, logit lens.

Nothing is computed by a model: what a run or a folder lacks is said in `notes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from circuits.consensus import doubt, node_values
from circuits.graph import AttributionGraph, node_label
from circuits.prompt_graph import ENDS, with_roles
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.labels import load_labels, read_labels
from mediation.metalatents import MetaDictionary
from mediation.prompts import Half
from mediation.quality import meta_beside
from mediation.runs import Run
from mediation.sites import Site
from mediation.trace import prompt_ids

SHOWN = 5  # prompts given with their tokens
LISTED = 5  # names offered to someone who asks for what is not there
BIAS, RESIDUAL = -1, -2  # in place of a meta-latent in the run's split (mediation.metasplit)
PARTS = {BIAS: "bias", RESIDUAL: "residual"}


@dataclass(frozen=True)
class Passage:
    """Tokens, a value on each (activation or attribution), and where among them the peak is; of a prompt, its id."""

    tokens: list[str]
    values: list[float]
    position: int
    prompt: str | None = None

    @property
    def peak(self) -> str:
        """The token at the peak."""
        return self.tokens[self.position].strip()


@dataclass(frozen=True)
class Description:
    """What the folder of a dictionary or meta-dictionary says of one index; empty where it says nothing.

    score: area under the ROC curve of the label as a prediction. density: share of tokens it is on at.
    histogram: dicts of `from` and `count`. members: dicts of `latent`, `code` and `label`, of a meta-latent.
    """

    label: str | None = None
    score: float | None = None
    source: str | None = None
    density: float | None = None
    histogram: list[dict[str, Any]] = field(default_factory=list)
    contexts: list[Passage] = field(default_factory=list)
    logits_up: list[str] = field(default_factory=list)
    logits_down: list[str] = field(default_factory=list)
    members: list[dict[str, Any]] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path | None, index: int) -> Description:
        """Row `index` of the folder's labels."""
        table = None if folder is None else read_labels(folder)
        rows = [] if table is None else table.filter(pl.col("index") == index).to_dicts()
        if not rows:
            return cls()
        known = {name.name: rows[0][name.name] for name in fields(cls) if rows[0].get(name.name) is not None}
        known["contexts"] = [Passage(**each) for each in known.get("contexts", ())]
        return cls(**known)


@dataclass(frozen=True)
class LatentEvidence:
    """Everything that is known of a latent.

    called: its label, else the token it is most on at. on_in: prompts (of `prompts`) on whose clean side it is on.
    roles: role, attribution, held_out, low, high, frequency, tier. by_prompt: prompt, role, clean, baseline,
    attribution, exact (null unless all its positions there were patched), half. passages: the prompts it is most on
    in. exact: prompt, role, position, exact_effect, ig, atp. effects: te, tie, nie, nde where measured. inputs,
    outputs: role, node, label, weight, contribution. parts: part, meta, code, share, attribution, or None where there
    is no meta-dictionary.
    """

    site: str
    latent: int
    called: str
    estimator: str
    prompts: int
    on_in: int
    described: Description
    roles: pl.DataFrame
    by_prompt: pl.DataFrame
    passages: list[Passage]
    exact: pl.DataFrame
    effects: dict[str, float] | None
    inputs: pl.DataFrame
    outputs: pl.DataFrame
    parts: pl.DataFrame | None
    notes: list[str]

    def __repr__(self) -> str:
        amounts = ", ".join(f"{value:+.2f} at {role}" for role, value in self.roles["role", "attribution"].iter_rows())
        return f"<latent {self.latent} of {self.site}, {self.called}: {amounts}; on in {self.on_in} of {self.prompts}>"

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold; tables as lists of rows."""
        return _plain(self)


@dataclass(frozen=True)
class MetaEvidence:
    """Everything that is known of a meta-latent.

    attribution: mean over the run's prompts. by_prompt: prompt, half, attribution. passages: the prompts it does most
    in, with its attribution at every token. through: latent, label, attribution (mean over prompts). carriers: latent,
    label, cosine, carrier, on_in (prompts); the nearest latents where none is a carrier. tests: the run's rows on it,
    with the controls of each removal.
    """

    meta: int
    site: str
    folder: str
    called: str
    described: Description
    attribution: float
    by_prompt: pl.DataFrame
    passages: list[Passage]
    through: pl.DataFrame
    carriers: pl.DataFrame
    tests: pl.DataFrame
    notes: list[str]

    def __repr__(self) -> str:
        return f"<meta-latent {self.meta} at {self.site}, {self.called}: {self.attribution:+.2f}>"

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold; tables as lists of rows."""
        return _plain(self)


def latent_evidence(
    run: Run, graph: AttributionGraph, site: str, latent: int, meta: str | Path | None = None
) -> LatentEvidence:
    """Steps 1 to 5. graph: the set's. meta: folder of a meta-dictionary; by default the one the run was split with, or
    one beside the dictionary.

    MediationError: the run has no such site, the latent is on in no prompt, or the meta-dictionary is not of this site.
    """
    site = run_site(run, site)
    mine = (pl.col("site") == site) & (pl.col("latent") == latent)
    nodes, estimator = run.read("nodes"), run.settings["estimator"]
    here = nodes.filter(mine)
    if here.is_empty():
        some = nodes.filter(pl.col("site") == site).drop_nulls("latent").group_by("latent").agg(pl.col(estimator).sum())
        known = some.sort(pl.col(estimator).abs(), descending=True)["latent"].head(LISTED).to_list()
        raise MediationError(
            f"Latent {latent} of {site} is on in no prompt of the run in {run.path}; strong ones are "
            f"{', '.join(map(str, known))}."
        )
    folder = dictionary_folder(run, site)
    described = Description.of(folder, latent)
    tokens = token_texts(run)
    passages = _passages(here, tokens, "clean")
    halves = run.read("prompts").select("prompt", "half").unique(maintain_order=True)
    inputs, outputs = _links(run, graph, site, latent, len(halves))
    effects = [each for each in run.info.get("effects", ()) if (each["site"], each["latent"]) == (site, latent)]
    keys = ("te", "tie", "nie", "nde")
    exact = run.read("calibration").filter(mine).sort("prompt", "position")
    exact = exact.select("prompt", "role", "position", "exact_effect", "ig", "atp")
    parts, notes = latent_parts(run, site, latent, folder=meta), []
    if not (described.contexts or described.logits_up):
        where = "the folder of its dictionary is not there" if folder is None else f"there are none in {folder}"
        notes.append(f"Contexts, density and logit lens are made by `mediation label`; {where}.")
    if inputs.is_empty():
        notes.append("In-edges are computed for the latents of the set's graph, and this is none of them.")
    if parts is None:
        notes.append("No meta-dictionary is known for this site: name one with --meta, or `mediation flag` the run.")
    elif parts["attribution"].null_count() == len(parts):
        notes.append("Its attribution was not split: `mediation flag` does that with a meta-dictionary of this site.")
    return LatentEvidence(
        site=site,
        latent=latent,
        called=described.label or (f"on '{passages[0].peak}'" if passages else "off in every clean prompt"),
        estimator=estimator,
        prompts=len(halves),
        on_in=here.filter(pl.col("clean") != 0)["prompt"].n_unique(),
        described=described,
        roles=_roles(run, graph, here, site, latent),
        by_prompt=_by_prompt(here, exact, estimator).join(halves, on="prompt", maintain_order="left"),
        passages=passages,
        exact=exact,
        effects={key: effects[0][key] for key in keys} if effects else None,
        inputs=inputs,
        outputs=outputs,
        parts=parts,
        notes=notes,
    )


def meta_evidence(run: Run, meta: int) -> MetaEvidence:
    """Steps 1 to 3. MediationError: the run was not split over meta-latents, or this one has no part in it."""
    site, folder = split_of(run)
    split = run.read("meta").filter(pl.col("meta") >= 0)
    here = split.filter(pl.col("meta") == meta)
    if here.is_empty():
        best = split.group_by("meta").agg(pl.col("attribution").sum()).sort(pl.col("attribution").abs())
        known = ", ".join(map(str, best["meta"].tail(LISTED).reverse()))
        raise MediationError(f"Meta-latent {meta} is in no latent of the run in {run.path}; strong ones are {known}.")
    described, labels = Description.of(folder, meta), load_labels(dictionary_folder(run, site))
    halves = run.read("prompts").select("prompt", "half").unique(maintain_order=True)
    at_token = here.group_by("prompt", "position", maintain_order=True).agg(pl.col("attribution").sum())
    flags = run.read("flags").filter(pl.col("meta") == meta) if run.has("flags") else None
    named = [] if flags is None else flags["label"].unique().to_list()
    notes = []
    if not (described.contexts or described.logits_up):
        notes.append("Contexts, members and logit lens are made by `mediation label --meta`; this one has none.")
    tests = fact_rows(run).filter(pl.col("meta") == meta) if flags is not None else pl.DataFrame()
    if tests.is_empty():
        notes.append("Its removal was tested in no prompt: discovery prompts did not nominate its kind of fact.")
    return MetaEvidence(
        meta=meta,
        site=site,
        folder=str(folder),
        called=described.label or (named[0] if named else f"meta-latent {meta}"),
        described=described,
        attribution=float(here["attribution"].sum()) / len(halves),
        by_prompt=here.group_by("prompt", maintain_order=True)
        .agg(pl.col("attribution").sum())
        .join(halves, on="prompt")
        .select("prompt", "half", "attribution")
        .sort(pl.col("attribution").abs(), "prompt", descending=[True, False]),
        passages=_passages(at_token, token_texts(run), "attribution"),
        through=here.group_by("latent", maintain_order=True)
        .agg(pl.col("attribution").sum() / len(halves))
        .sort(pl.col("attribution").abs(), "latent", descending=[True, False])
        .select("latent", _labelled(labels), "attribution"),
        carriers=_carriers(run, site, meta, labels),
        tests=tests,
        notes=notes,
    )


def run_site(run: Run, name: str) -> str:
    """The run's site of that name: as the run has it, as tables print it ("1.resid_pre"), or by module path."""
    sites = run.read("prompts")["site"].unique(maintain_order=True).to_list()
    for site in sites:
        if name in (site, short_site(site)):
            return site
    try:
        wanted = Site.parse(name).canonical()
        return next(site for site in sites if Site.parse(site).canonical() == wanted)
    except (MediationError, StopIteration):
        raise MediationError(f"The run in {run.path} has no site '{name}'; its sites are {', '.join(sites)}.") from None


def short_site(site: str) -> str:
    """ "1.resid_pre" of "blocks.1.hook_resid_pre", as tables print it."""
    return site.removeprefix("blocks.").replace("hook_", "")


def dictionary_folder(run: Run, site: str) -> Path | None:
    """Where the dictionary of a site is kept; None for heads and neurons, which have none, or where it is not there."""
    known = (run.info.get("dictionaries") or {}).get(site) or {}
    folder = Path(known["folder"]) if known.get("folder") else None
    return folder if folder is not None and folder.is_dir() else None


def token_texts(run: Run) -> pl.DataFrame:
    """prompt, position, text of every token; of a prompt of two sequences, the first one's."""
    tokens = run.read("tokens").unique(["prompt", "position"], keep="first", maintain_order=True)
    return tokens.select("prompt", "position", "text").sort("prompt", "position")


def split_of(run: Run) -> tuple[str, Path]:
    """The site whose latents the run split, and the folder of the meta-dictionary."""
    flags = run.info.get("flags") or {}
    if not run.has("meta") or "site" not in flags:
        raise MediationError(
            f"The run in {run.path} was not split over meta-latents; run `mediation flag` on it with --meta FOLDER."
        )
    return flags["site"], Path(flags["meta"])


def fact_rows(run: Run) -> pl.DataFrame:
    """Every fact that was tested on a prompt, smallest q first: the rows of `flags`, with the list `controls`.

    removal: what the behaviour loses without the fact's part; controls: how far each control moves it, without its
    sign; swap: what it loses when the counterpart's fact stands in.
    """
    rows, keys = run.read("flags").drop_nulls("removal"), ["prompt", "meta"]
    rows = rows.join(run.read("controls"), on=keys, how="left", maintain_order="left")
    return rows.sort("q", -pl.col("removal").abs(), maintain_order=True)


def latent_parts(
    run: Run, site: str, latent: int, *, prompt: str | None = None, folder: str | Path | None = None
) -> pl.DataFrame | None:
    """Step 4: part, meta (null: bias, residual), code, share, attribution; None where no meta-dictionary is known.

    Attributions are `ig`'s, means over the run's prompts or of one `prompt`, and null where the run was not split with
    this meta-dictionary; codes and shares are null where the dictionary's folder is not there.
    """
    own, named = dictionary_folder(run, site), folder
    flags = (run.info.get("flags") or {}) if run.has("meta") else {}
    split = Path(flags["meta"]) if flags.get("site") == site else None
    dictionary = Dictionary.load(own) if own is not None and (own / "cfg.json").is_file() else None
    if folder is None:
        folder = split or (None if dictionary is None else meta_beside(dictionary))
    if folder is None:
        return None
    attributions = None
    if split is not None and split.resolve() == Path(folder).resolve():
        attributions = _split_sums(run, latent, prompt)
    weights = _row_parts(run, site, dictionary, latent, Path(folder)) if dictionary is not None else None
    if weights is None and attributions is None:
        if named is None:
            return None
        raise MediationError(f"The rows of {site} cannot be taken apart: the folder of its dictionary is not there.")
    keys = {"meta": pl.Int64, "code": pl.Float64, "share": pl.Float64}
    table = pl.DataFrame(schema=keys) if weights is None else weights
    sums = pl.DataFrame(schema={"meta": pl.Int64, "attribution": pl.Float64}) if attributions is None else attributions
    table = table.join(sums, on="meta", how="full", coalesce=True, maintain_order="left_right")
    if attributions is not None:  # a part along which the behaviour does not change has no row in the split
        table = table.with_columns(pl.col("attribution").fill_null(0.0))
    names = load_labels(folder)
    called = [PARTS.get(meta) or names.get(meta, f"meta-latent {meta}") for meta in table["meta"]]
    table = table.with_columns(
        part=pl.Series(called, dtype=pl.String), meta=pl.when(pl.col("meta") >= 0).then("meta")
    )  # fmt: skip
    size = pl.coalesce(pl.col("attribution").abs(), pl.col("share").abs())
    return table.select("part", "meta", "code", "share", "attribution").sort(
        pl.col("meta").is_null(), size, descending=[False, True], maintain_order=True
    )


def _row_parts(run: Run, site: str, dictionary: Dictionary, latent: int, folder: Path) -> pl.DataFrame:
    """Codes and shares of one decoder row, the bias and the residual among the parts."""
    made = (run.settings.get("hashes") or {}).get("dictionaries", {}).get(site)
    if made is not None and made != dictionary.content_hash:
        raise MediationError(
            f"The dictionary in {dictionary.folder} is not the one that the run in {run.path} was made with; "
            "put that one back, or trace again."
        )
    meta = MetaDictionary.load(folder)
    meta.check(dictionary)
    if not 0 <= latent < dictionary.d_sae:
        raise MediationError(f"{site} has the latents 0 to {dictionary.d_sae - 1}, and no {latent}.")
    row = dictionary.decoder[latent].double()
    (codes,) = meta.codes(dictionary.decoder[[latent]], torch.tensor([latent])).double()
    used = codes.nonzero().squeeze(1)
    pieces = codes[used, None] * meta.directions[used].double()
    bias = meta.bias.double()
    pieces = torch.cat([pieces, bias[None], (row - pieces.sum(0) - bias)[None]])
    shares = pieces @ row / row.square().sum()
    return pl.DataFrame(
        {"meta": [*used.tolist(), BIAS, RESIDUAL], "code": [*codes[used].tolist(), None, None],
         "share": shares.tolist()}
    )  # fmt: skip


def _split_sums(run: Run, latent: int, prompt: str | None) -> pl.DataFrame:
    """The run's split of one latent: meta, attribution."""
    rows = run.read("meta").filter(pl.col("latent") == latent)
    if prompt is not None:
        rows = rows.filter(pl.col("prompt") == prompt)
    n = run.read("prompts")["prompt"].n_unique() if prompt is None else 1
    return rows.group_by("meta", maintain_order=True).agg(pl.col("attribution").sum() / n)


def _roles(run: Run, graph: AttributionGraph, here: pl.DataFrame, site: str, latent: int) -> pl.DataFrame:
    """Step 1."""
    roles = here["role"].unique(maintain_order=True).to_list()
    ids = [f"{site}/{role}/{latent}" for role in roles]
    everyone, held_out = run.read("prompts")["prompt"].unique().sort().to_list(), prompt_ids(run, Half.EVALUATION)
    estimator, seed = run.settings["estimator"], run.settings["seed"]
    values = node_values(run, ids, held_out, estimator)
    found = doubt(values, np.zeros(values.shape, dtype=bool), judged=len(held_out) < len(everyone), seed=seed)
    known = [graph.digraph.nodes.get(name, {}) for name in ids]
    return (
        pl.DataFrame(
            {
                "role": roles,
                "attribution": node_values(run, ids, everyone, estimator).mean(axis=0),
                "held_out": found.held_out,
                "low": found.low,
                "high": found.high,
                "frequency": pl.Series([each.get("frequency") for each in known], dtype=pl.Float64),
                "tier": pl.Series([each.get("tier") for each in known], dtype=pl.String),
            }
        )
        .fill_nan(None)
        .sort(pl.col("attribution").abs(), descending=True, maintain_order=True)
    )


def _by_prompt(here: pl.DataFrame, exact: pl.DataFrame, estimator: str) -> pl.DataFrame:
    """Step 2: one row for each prompt and role, strongest first; values are the largest over the role's positions."""
    keys = ["prompt", "role"]
    patched = exact.group_by(keys).agg(pl.col("exact_effect").sum(), patched=pl.len())
    rows = here.group_by(keys, maintain_order=True).agg(
        pl.col("clean", "baseline").max(), attribution=pl.col(estimator).sum(), nodes=pl.len()
    )
    rows = rows.join(patched, on=keys, how="left", maintain_order="left")
    whole = pl.when(pl.col("patched") == pl.col("nodes")).then("exact_effect").alias("exact")
    rows = rows.select(*keys, "clean", "baseline", "attribution", whole)
    return rows.sort(pl.col("attribution").abs(), *keys, descending=[True, False, False])


def _links(
    run: Run, graph: AttributionGraph, site: str, latent: int, prompts: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Step 3: in-edges and out-edges, strongest first."""

    def own(end: str) -> pl.Expr:
        return pl.col(end).str.starts_with(f"{site}/") & pl.col(end).str.ends_with(f"/{latent}")

    edges = with_roles(run.read("edges").filter(own("source") | own("target")), run.read("tokens"))
    mean = edges.group_by(ENDS, maintain_order=True).agg(pl.col("weight", "contribution").sum() / prompts)
    labels = {name: load_labels(dictionary_folder(run, name)) for name in run.read("prompts")["site"].unique()}

    def label(name: str) -> str:
        if name in graph.digraph:
            return node_label(graph.digraph.nodes[name], name)
        at, _, index = name.rpartition("/")
        known = labels.get(at.partition("/")[0], {}).get(int(index)) if index.isdecimal() else None
        return known or (f"latent {index}" if index.isdecimal() else index)

    found = []
    for end, other in (("target", "source"), ("source", "target")):
        links = mean.filter(own(end)).sort(pl.col("contribution").abs(), descending=True, maintain_order=True)
        names = pl.Series("label", [label(name) for name in links[other]], dtype=pl.String)
        role = pl.col(end).str.split("/").list.get(1).alias("role")
        found.append(links.select(role, pl.col(other).alias("node"), names, "weight", "contribution"))
    return found[0], found[1]


def _passages(rows: pl.DataFrame, tokens: pl.DataFrame, value: str) -> list[Passage]:
    """The prompts on which |value| is largest, every token with its value; rows: prompt, position, value."""
    peaks = rows.group_by("prompt").agg(peak=pl.col(value).abs().max()).filter(pl.col("peak") > 0)
    peaks = peaks.sort("peak", "prompt", descending=[True, False])
    found = []
    for prompt in peaks["prompt"].head(SHOWN):
        sums = rows.filter(pl.col("prompt") == prompt).group_by("position").agg(pl.col(value).max())
        line = tokens.filter(pl.col("prompt") == prompt).join(sums, on="position", how="left").sort("position")
        line = line.with_columns(pl.col(value).fill_null(0.0))
        values = line[value].to_list()
        at = max(range(len(values)), key=lambda k: abs(values[k]))
        found.append(Passage(line["text"].to_list(), values, at, prompt))
    return found


def _carriers(run: Run, site: str, meta: int, labels: dict[int, str]) -> pl.DataFrame:
    """Step 2 of `meta_evidence`; empty where the meta-latent was never tested."""
    schema = {"latent": pl.Int64, "label": pl.String, "cosine": pl.Float64, "carrier": pl.Boolean, "on_in": pl.Int64}
    if not run.has("carriers"):
        return pl.DataFrame(schema=schema)
    table = run.read("carriers").filter(pl.col("meta") == meta)
    here = (pl.col("site") == site) & (pl.col("clean") != 0)
    on = run.read("nodes").filter(here).group_by("latent").agg(on_in=pl.col("prompt").n_unique().cast(pl.Int64))
    table = table.join(on, on="latent", how="left", maintain_order="left").with_columns(pl.col("on_in").fill_null(0))
    return table.select("latent", _labelled(labels), "cosine", "carrier", "on_in")


def _labelled(labels: dict[int, str]) -> pl.Expr:
    return pl.col("latent").replace_strict(labels, default=None, return_dtype=pl.String).alias("label")


def _plain(value: Any) -> Any:
    if isinstance(value, pl.DataFrame):
        return value.fill_nan(None).to_dicts()
    if isinstance(value, LatentEvidence | MetaEvidence | Description | Passage):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
