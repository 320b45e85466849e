"""The bodies of the commands: open what was asked for, run it, show it. The one place that joins
`mediation` with `circuits`."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import torch

from circuits.ablation import Errors
from circuits.build import build_graph
from circuits.consensus import Tier
from circuits.contrast import contrast
from circuits.export import Format, write_exports
from circuits.graph import AttributionGraph
from circuits.memory import fit, parse_bytes
from circuits.neuronpedia import Origin, probability
from circuits.opened import open_run
from circuits.prompt_graph import node_ids, prompt_graph
from circuits.proof import Kind, ProofSettings, proof_seconds, prove
from circuits.pruning import Keep, prune
from circuits.supernodes import Grouping, Supernode, by_edges, by_meta
from circuits.viewer.page import HOSTS, render, server
from circuits.viewer.payload import PROMPTS, payload
from mediation import report
from mediation.absorption import measure_absorption, read_words
from mediation.behaviours import Behaviour
from mediation.contexts import Reader
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.estimators import Estimator
from mediation.explanations import import_explanations
from mediation.facts import FactSettings, find_hidden_facts, nearest_latents
from mediation.frozen import Semantics
from mediation.heads import Heads
from mediation.labelling import label_readers, label_seconds
from mediation.labels import load_labels, update_labels
from mediation.metalatents import MetaDictionary
from mediation.metasplit import meta_split
from mediation.neurons import Neurons
from mediation.nodes import mean_state
from mediation.prompts import Baseline, PromptSet, tokenize
from mediation.quality import geometry, meta_against_null, meta_beside, meta_made_from, text_quality, with_published
from mediation.runs import PROMPTS_FILE, Run, peak_memory_mb, write_frame
from mediation.subject import SubjectModel
from mediation.trace import (
    Prepared,
    TraceSettings,
    error_warnings,
    prepare,
    prompt_table,
    seconds_per_token,
    set_effect,
    top_latents,
    trace,
)

Choice = TypeVar("Choice", bound=StrEnum)
UNITS: dict[str, type[Heads] | type[Neurons]] = {"heads": Heads, "neurons": Neurons}  # nodes without a dictionary


@dataclass(frozen=True)
class Source:
    """What a run is made from, as the user named it."""

    model: str
    saes: tuple[str, ...]
    prompts: str
    device: str | None = None
    allow_download: bool = False


def load_dictionaries(source: Source, device: str, model: SubjectModel | None = None) -> list[Dictionary]:
    """Every dictionary that `--saes` names, in the order of their sites; heads and neurons need their model."""
    found: list[Dictionary] = []
    for spec in source.saes:
        folder = Path(spec)
        release, _, sae_id = spec.partition(":")
        if model is not None and release in UNITS and not folder.exists():
            found.extend(UNITS[release](model, layer) for layer in _layers(sae_id, model))
            continue
        if not folder.exists() and sae_id:
            found.append(Dictionary.load(release, sae_id, device=device, allow_download=source.allow_download))
            continue
        folders = sorted(cfg.parent for cfg in folder.glob("*/cfg.json")) or [folder]
        found.extend(Dictionary.load(each, device=device) for each in folders)
    return sorted(found, key=lambda dictionary: dictionary.site.depth)


def _layers(given: str, model: SubjectModel) -> list[int]:
    """The layers in "3,5", all of them in ""."""
    layers = given.split(",") if given else [str(layer) for layer in range(model.n_layers)]
    for layer in layers:
        if not layer.isdecimal() or int(layer) >= model.n_layers:
            raise MediationError(f"{model.name} has no layer '{layer}': its layers are 0 to {model.n_layers - 1}.")
    return [int(layer) for layer in layers]


def demo(out: Path | None, *, quiet: bool) -> dict[str, Any]:
    """`mediation demo`: trace, graph and flags on the shipped organism."""
    torch.set_num_threads(1)  # a model of half a million parameters runs slower on several
    started = time.perf_counter()
    organism = Path(__file__).parent / "organisms" / "default"
    source = Source(str(organism / "model"), (str(organism / "saes"),), str(organism / PROMPTS_FILE), "cpu")
    out = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    traced = trace_command(source, {}, out, quiet=quiet)
    (meta,) = (organism / "meta").iterdir()
    flags = flag_command(out, meta, {}, quiet=quiet)
    inspected = inspect_command(out, 6, quiet=quiet)
    result = {
        "total_effect": traced["total_effect"]["mean"],
        "total_effect_interval": [traced["total_effect"]["low"], traced["total_effect"]["high"]],
        "prompts": traced["total_effect"]["prompts"],
        "estimator_vs_exact": traced["estimator_vs_exact"]["ig"] | traced["estimator_vs_exact"],
        "conservation_gap": max(traced["conservation_gap"].values()),
        "meta_split_max_relative_error": flags["meta_split_max_relative_error"],
        "hidden_facts": flags["hidden_facts"],
        "named_right": flags["named_right"],
        "paths": inspected["paths"],
        "run": str(out),
        "seconds": time.perf_counter() - started,
        "peak_memory_mb": peak_memory_mb(),
    }
    if not quiet:
        report.closing(out, result["seconds"], result["peak_memory_mb"])
    return result


def trace_command(
    source: Source, chosen: dict[str, Any], out: Path | None, *, memory: str | None = None, quiet: bool
) -> dict[str, Any]:
    """`mediation trace`: nodes, trust figures, top latents and the graph, into a run folder.

    Batch and chunk are made smaller until the run fits `memory` (such as "2GB"; by default a share of what is free).
    """
    budget = None if memory is None else parse_bytes(memory)
    settings = _trace_settings(chosen)
    prompts = PromptSet.from_jsonl(source.prompts)
    out = out or Path("runs") / f"{Path(source.prompts).stem}-{prompts.content_hash[:8]}"
    if (out / "run.json").is_file():  # its shards are those of its batches, which the memory of that time has set
        earlier = Run.open(out).settings
        settings = replace(settings, **{name: earlier[name] for name in ("batch_size", "chunk") if name in earlier})
        budget = sys.maxsize if budget is None else budget  # what was begun goes on, however little is free by now
    model, dictionaries, prepared = _open(source, prompts, settings)
    prepared, settings, cost = fit(model, dictionaries, prepared, settings, budget)
    run = Run.create(
        out,
        {
            **asdict(source),
            **asdict(settings),
            "hashes": {
                "model": model.content_hash,
                "prompts": prompts.content_hash,
                "dictionaries": {d.site.name: d.content_hash for d in dictionaries},
            },
        },
    )
    run.write_text(PROMPTS_FILE, Path(source.prompts).read_text(encoding="utf-8-sig"))
    run.record(dictionaries={d.site.name: {"name": d.name, "folder": d.folder} for d in dictionaries})
    run.record(memory={"budget": memory, "predicted_mb": cost.peak / 2**20, "predicted_seconds": cost.seconds})
    if not quiet:
        report.opening(model, dictionaries, prompts, str(cost))
    with report.bar("attribution", quiet) as tick:
        trace(model, dictionaries, prepared, run, settings, progress=tick)
    with report.bar("edges", quiet) as tick:
        graph = build_graph(model, dictionaries, prepared, run, settings, progress=tick)
    result = _trace_result(run, graph, settings, {d.site.name: load_labels(d.folder) for d in dictionaries})
    if not quiet:
        report.trace(result, model)
    return result


def _trace_result(
    run: Run, graph: AttributionGraph, settings: TraceSettings, labels: dict[str, dict[int, str]]
) -> dict[str, Any]:
    info = run.info
    table = top_latents(run, settings.top, estimator=settings.estimator, seed=settings.seed)
    nodes = table.select(node_ids("role").alias("id"))["id"]
    rows = table.drop("rank").to_dicts()
    for row, name in zip(rows, nodes, strict=True):
        row["label"] = labels[row["site"]].get(row["latent"])
        row |= {key: graph.digraph.nodes.get(name, {}).get(key) for key in ("held_out", "frequency", "tier")}
    return {
        "run": str(run.path),
        "total_effect": set_effect(run, seed=settings.seed),
        **info["trust"],
        "fidelity": info["fidelity"],
        "top_latents": rows,
        "effects": info["effects"],
        "seconds": sum(info["timings"].values()),
        "peak_memory_mb": info["peak_memory_mb"],
    }


@dataclass(frozen=True)
class View:
    """What `inspect` shows and writes of a run's graph.

    meta: for grouping by meta-latents; against: a run to compare with.
    """

    keep: Keep = field(default_factory=Keep)
    group: Grouping | None = None
    meta: Path | None = None
    exports: tuple[Format, ...] = (Format.GRAPHML,)
    against: Path | None = None

    @classmethod
    def of(
        cls, keep: Keep, group: str | None, meta: Path | None, exports: list[str], against: Path | None = None
    ) -> View:
        """The view that the command line's words ask for."""
        grouping = None if group is None else _choice(Grouping, group, "group")
        chosen = tuple(_choice(Format, each, "export") for each in exports) or cls.exports
        return cls(keep, grouping, meta, chosen, against)


def inspect_command(
    path: Path, paths: int, prompt: str | None = None, view: View | None = None, *, quiet: bool
) -> dict[str, Any]:
    """`mediation inspect`: the graph of the set, or of one prompt: strongest paths, a page, exports."""
    run, view = Run.open(path), view or View()
    whole = AttributionGraph.load(run.path / "graph.json")
    graph = whole if prompt is None else prompt_graph(run, prompt)
    kept = prune(graph, view.keep)
    groups = _supernodes(run, kept, view)
    name = "graph" if prompt is None else f"prompt-{_file_stem(prompt)}"
    page = run.write_text(
        "index.html" if prompt is None else f"{name}.html", _page(run, whole, kept, groups, view, prompt)
    )
    origin = _origin(run, prompt)
    written = write_exports(run, kept, view.exports, origin=origin, supernodes=groups, name=name)
    tiers = tier_counts(graph) if prompt is None else {}
    warnings = error_warnings(graph.error_share())
    if not quiet:
        report.paths(graph, paths)
        report.kept(kept, groups)
        if prompt is None:
            report.recurrence(graph, tiers)
        report.calibration(whole.meta["calibration"], warnings)
        report.files(page, *written.values())
    return {
        "run": str(path),
        "prompt": prompt,
        "paths": [{"nodes": list(each.nodes), "carried": each.carried} for each in graph.strongest_paths(paths)],
        "kept": kept.meta["pruned"],
        "groups": [asdict(group) for group in groups],
        "tiers": tiers,
        **whole.meta["calibration"],
        "warnings": warnings,
        "page": str(page),
        "files": {name: str(file) for name, file in written.items()},
    }


def latent_command(path: Path, named: str, meta: Path | None, *, quiet: bool) -> dict[str, Any]:
    """`mediation inspect --latent`: everything known of one latent, named SITE/ID."""
    site, _, latent = named.rpartition("/")
    if not site or not latent.isdecimal():
        raise MediationError(f"--latent is '{named}'; give SITE/ID, such as blocks.1.hook_resid_pre/17.")
    found = open_run(path).latent(site, int(latent), meta=meta)
    if not quiet:
        report.latent(found)
    return {"run": str(path), **found.to_dict()}


def meta_latent_command(path: Path, meta: int, *, quiet: bool) -> dict[str, Any]:
    """`mediation inspect --meta-latent`: everything known of one meta-latent of the run's split."""
    found = open_run(path).meta_latent(meta)
    if not quiet:
        report.meta_latent(found)
    return {"run": str(path), **found.to_dict()}


def _page(
    run: Run,
    graph: AttributionGraph,
    kept: AttributionGraph,
    groups: Sequence[Supernode],
    view: View,
    prompt: str | None = None,
    *,
    most: int | None = PROMPTS,
) -> str:
    """The page of a run whose set has this `graph`; `kept` is what is shown of it, or of one prompt's, at first."""
    pruned = kept.meta["pruned"]
    share = view.keep.nodes
    if view.keep.top is not None:
        share = min(share, pruned["influence"] / pruned["of_influence"] if pruned["of_influence"] else 1.0)
    shown = payload(
        run,
        graph,
        prompts_file=PROMPTS_FILE,
        keep=replace(view.keep, nodes=share),
        supernodes=groups if prompt is None else (),
        against=None if view.against is None else (view.against.name, contrast(run, Run.open(view.against))),
        prompt=prompt,
        most=most,
    )
    return render(shown)


def serve_command(path: Path, view: View, port: int) -> None:
    """`mediation inspect --serve`: the page with the graphs of all prompts, on loopback until interrupted."""
    run = Run.open(path)
    graph = AttributionGraph.load(run.path / "graph.json")
    kept = prune(graph, view.keep)
    served = server(_page(run, graph, kept, _supernodes(run, kept, view), view, most=None), port)
    report.serving(f"http://{HOSTS[0]}:{served.server_port}/")
    with served, suppress(KeyboardInterrupt):
        served.serve_forever()


def prove_command(path: Path, chosen: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """`mediation prove`: circuits of the run's sites, chosen on one half of its prompts and measured on the other."""
    kinds = tuple(Kind) if chosen["edges"] else (Kind.NODES,)
    settings = ProofSettings(_choice(Errors, chosen["errors"], "errors"), chosen["seed"], kinds)
    run = Run.open(path)
    source, traced = _source_of(run)
    traced = replace(traced, top=chosen["top"], seed=chosen["seed"])
    discovery, evaluation = PromptSet.from_jsonl(run.path / PROMPTS_FILE).split(0.5, settings.seed)
    discovery, evaluation = discovery[: chosen["prompts"]], evaluation[: chosen["prompts"]]
    model = SubjectModel.load(source.model, device=source.device, allow_download=source.allow_download)
    dictionaries = load_dictionaries(source, str(model.device), model)
    prepared = prepare(discovery, model, dictionaries, traced)
    _, traced, cost = fit(model, dictionaries, prepared, traced, None)
    if not quiet:
        cost = replace(cost, seconds=proof_seconds(model, prepared, len(dictionaries), traced, settings))
        report.proving(len(discovery), len(evaluation), str(cost))
    with run.timed("proof"), report.bar("circuits", quiet) as tick:
        proof = prove(model, dictionaries, discovery, evaluation, traced, settings, progress=tick)
    table, summary = proof.table(seed=settings.seed), proof.summary(seed=settings.seed)
    run.write_table("proof", table)
    run.write_table("circuit", proof.members)
    run.record(proof={"settings": chosen, **summary})
    if not quiet:
        report.proof(table, summary)
    return {"run": str(path), **summary, "curves": table.fill_nan(None).to_dicts()}


def _origin(run: Run, prompt: str | None) -> Origin:
    """What the graph of the run, or of one of its prompts, is of."""
    source, settings = _source_of(run)
    model = Path(source.model).name
    if prompt is None:
        return Origin(model, probability(settings.behaviour, set_effect(run)["clean"]))
    value = prompt_table(run).filter(pl.col("prompt") == prompt)["clean"][0]
    (asked,) = (each for each in PromptSet.from_jsonl(run.path / PROMPTS_FILE) if each.id == prompt)
    text = asked.clean if isinstance(asked.clean, str) else None  # of messages, the tokens
    return Origin(model, probability(settings.behaviour, value), text, asked.answer)


def _supernodes(run: Run, graph: AttributionGraph, view: View) -> list[Supernode]:
    """Groups of the graph's latents as the view asks."""
    if view.group is not Grouping.META:
        return by_edges(graph) if view.group is Grouping.EDGES else []
    dictionaries = load_dictionaries(_source_of(run)[0], "cpu")
    if view.meta is not None:
        meta = MetaDictionary.load(view.meta)
        pairs = [(_base_dictionary(dictionaries, meta, view.meta), meta, view.meta)]
    else:
        beside = [(each, folder) for each in dictionaries if (folder := meta_beside(each)) is not None]
        pairs = [(each, MetaDictionary.load(folder), folder) for each, folder in beside]
    if not pairs:
        raise MediationError("There is no meta-SAE beside the run's dictionaries; name one with --meta.")
    return [group for each, meta, folder in pairs for group in by_meta(graph, each, meta, load_labels(folder))]


def tier_counts(graph: AttributionGraph) -> dict[str, dict[str, int]]:
    """How many nodes and edges of a set's graph are of each tier; empty where it has none."""
    nodes, edges = graph.digraph.nodes(data="tier"), graph.digraph.edges(data="tier")
    counted = {"nodes": Counter(tier for _, tier in nodes), "edges": Counter(tier for *_, tier in edges)}
    return {kind: {tier: counts[tier] for tier in Tier if counts[tier]} for kind, counts in counted.items()}


def _file_stem(prompt: str) -> str:
    """A prompt's id as part of a file's name; ids that had to be changed keep apart by their hash."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", prompt)[:80]
    return plain if plain == prompt else f"{plain}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def contrast_command(first: Path, second: Path, out: Path | None, seed: int, *, quiet: bool) -> dict[str, Any]:
    """`mediation contrast`: nodes and edges of one run minus those of another."""
    found = contrast(Run.open(first), Run.open(second), seed=seed)
    result = {"first": str(first), "second": str(second), **found.summary()}
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MediationError(f"Cannot write into {out} ({error.strerror}); choose another folder.") from error
        for name, table in (("nodes", found.nodes), ("edges", found.edges)):
            write_frame(out / f"{name}.parquet", table)
        result["out"] = str(out)
    if not quiet:
        report.contrast(found, str(first), str(second))
        report.files(*([] if out is None else [out / "nodes.parquet", out / "edges.parquet"]))
    return result


def flag_command(path: Path, meta: Path, chosen: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """`mediation flag`: decompose the run's latents and test which hidden facts were used."""
    settings = FactSettings(**chosen)
    run = Run.open(path)
    decomposition = MetaDictionary.load(meta)
    source, traced = _source_of(run)
    prompts = PromptSet.from_jsonl(run.path / PROMPTS_FILE)
    model, dictionaries, prepared = _open(source, prompts, traced)
    dictionary = _base_dictionary(dictionaries, decomposition, meta)
    discovery, evaluation = prompts.split(0.5, settings.seed)
    examples = partial(tokenize, model=model, baseline=traced.baseline, behaviour=traced.behaviour)
    mean = mean_state(model, prepared.batches, dictionary) if traced.baseline is Baseline.MEAN else None
    if not quiet:
        tokens = sum(batch.clean.numel() for batch in prepared.batches)
        report.flagging(len(prompts), seconds_per_token(model, prepared) * tokens * settings.passes)
    worst = meta_split(model, dictionary, decomposition, prepared, run, traced)
    with run.timed("facts"), report.bar("hidden facts", quiet) as tick:
        done = iter(range(1, len(prompts) + 1))
        table = find_hidden_facts(
            model,
            dictionary,
            decomposition,
            (discovery, examples(discovery)),
            (evaluation, examples(evaluation)),
            traced.baseline,
            settings,
            mean=mean,
            labels=load_labels(meta),
            progress=lambda _: tick(next(done), len(prompts)),
        )
    tested = table.drop_nulls("removal")
    metas = tested["meta"].unique().sort().to_list()
    run.write_table("flags", table.drop("controls"))
    run.write_table("controls", tested.select("prompt", "meta", "controls"))
    run.write_table("carriers", nearest_latents(dictionary, decomposition, metas, settings.carrier_cosine))
    figures = {"settings": asdict(settings), "meta_split_max_relative_error": worst}
    run.record(flags={"meta": str(meta), "site": dictionary.site.name, **figures})
    result = {"run": str(path), "meta_split_max_relative_error": worst, **flag_summary(table)}
    if not quiet:
        report.flags(result)
    return result


def flag_summary(table: pl.DataFrame) -> dict[str, Any]:
    """The flags of a run for people and scripts: one entry per flagged test, strongest first."""
    flagged = table.filter(pl.col("flagged")).sort(pl.col("removal").abs(), descending=True)
    evaluation = table.filter(pl.col("role") == "evaluation")
    known = table.filter(pl.col("expected").is_not_null() & (pl.col("rank") == 1))
    right = known.filter(pl.col("kind") == pl.col("expected").str.split("=").list.first())
    return {
        "hidden_facts": [
            {
                "fact": row["label"],
                "expected_fact": row["expected"],
                "effect": row["removal"],
                "hidden_share": row["hidden_share"],
                "p": row["p"],
                "q": row["q"],
                "swap_follows": row["swap_follows"],
                "total_effect": row["total_effect"],
                "group": row["group"],
                "prompt": row["prompt"],
            }
            for row in flagged.iter_rows(named=True)
        ],
        "tests": table.filter(pl.col("p").is_not_null()).select("group", "kind").n_unique(),
        "evaluation_prompts": evaluation["prompt"].n_unique(),
        "flagged_prompts": flagged["prompt"].n_unique(),
        "named_right": {"right": len(right), "of": known["prompt"].n_unique()},
    }


def quality_command(
    source: Source, texts: list[Path], n_tokens: int, words: Path | None, meta: Path | None, seed: int, *, quiet: bool
) -> dict[str, Any]:
    """`mediation inspect --dictionary`: what a dictionary is worth; without a model, what its weights say."""
    model = None
    if source.model:
        model = SubjectModel.load(source.model, device=source.device, allow_download=source.allow_download)
    dictionaries = load_dictionaries(source, source.device or "cpu" if model is None else str(model.device))
    if len(dictionaries) > 1:
        raise MediationError(f"{source.saes[0]} holds {len(dictionaries)} dictionaries; give one of its folders.")
    (dictionary,) = dictionaries
    if model is not None:
        dictionary.check(model)
    figures: dict[str, float | None] = {}
    notes: list[str] = []
    alive = dictionary.decoder.any(1)
    if model is not None and texts:
        with report.bar("tokens", quiet) as tick:
            found = text_quality(model, dictionary, texts, n_tokens, seed=seed, progress=tick)
        figures |= found.figures
        alive = alive & (found.density > 0).to(alive.device)
        notes.append(found.basis)
    else:
        notes.append("Fidelity, dead and dense latents need --model and --text.")
    figures |= asdict(geometry(dictionary))
    absorbed = None
    if model is not None and words is not None:
        with report.bar("words", quiet) as tick:
            absorbed = measure_absorption(model, dictionary, read_words(words), seed=seed, progress=tick)
        figures["absorption_fraction"] = absorbed.fraction
        notes += [f"No absorption figure: {absorbed.reason}."] if absorbed.reason else []
    else:
        notes.append("Absorption needs --model and --spelling.")
    made: dict[str, Any] = {}
    if (meta := meta or meta_beside(dictionary)) is not None:
        decomposition = MetaDictionary.load(meta, device=str(dictionary.decoder.device))
        decomposition.check(dictionary)
        with report.bar("null of the meta-SAE", quiet) as tick:
            figures |= meta_against_null(decomposition, dictionary.decoder[alive], seed=seed, progress=tick)
        made = meta_made_from(decomposition)
        notes += [report.meta_made(made)] if made else []
    else:
        notes.append("There is no meta-SAE beside the dictionary; name one with --meta.")
    result = {
        "dictionary": dictionary.name,
        "site": dictionary.site.name,
        "architecture": dictionary.architecture,
        "latents": dictionary.d_sae,
        "figures": with_published(figures),
        "probe_f1": absorbed.probe_f1 if absorbed else {},
        "meta": None if meta is None else str(meta),
        "meta_made_from": made,
        "notes": notes,
    }
    if not quiet:
        report.quality(result)
    return result


def label_command(
    source: Source, texts: list[Path], n_tokens: int, meta: Path | None, *, quiet: bool
) -> dict[str, Any]:
    """`mediation label`: label the latents of dictionaries, and of one meta-dictionary, from text."""
    model = SubjectModel.load(source.model, device=source.device, allow_download=source.allow_download)
    dictionaries = load_dictionaries(source, str(model.device))
    decomposition = None if meta is None else MetaDictionary.load(meta, device=str(model.device))
    base = None if decomposition is None or meta is None else _base_dictionary(dictionaries, decomposition, meta)
    readers = [Reader(each, decomposition if each is base else None) for each in dictionaries]
    seconds = label_seconds(model, readers, texts, n_tokens)
    if not quiet:
        report.label_opening(dictionaries, n_tokens, seconds)
    with report.bar("tokens", quiet) as tick:
        tables = label_readers(model, readers, texts, n_tokens=n_tokens, progress=tick)
    found = []
    for dictionary, (latents, metas) in zip(dictionaries, tables, strict=True):
        found.append(_saved_labels(dictionary.folder, latents))
        if metas is not None:
            found.append(_saved_labels(meta, metas))
    if not quiet:
        report.labels(found)
    return {"labels": found}


def import_command(source: Source, explanations: Path, *, quiet: bool) -> dict[str, Any]:
    """`mediation label --import`: take other people's explanations as labels."""
    dictionaries = load_dictionaries(source, "cpu")
    imported = [(each.folder, import_explanations(explanations, each)) for each in dictionaries]
    found = [_saved_labels(*each) for each in imported]
    if not quiet:
        report.labels(found)
    return {"labels": found}


def _saved_labels(folder: Path | None, new: pl.DataFrame) -> dict[str, Any]:
    """Save, and say what there is: counts, and the labels with the best scores."""
    assert folder is not None
    table = update_labels(folder, new)
    scored = table.drop_nulls("score").sort("score", descending=True, maintain_order=True)
    return {
        "folder": str(folder),
        "latents": len(table),
        "labelled": len(table.drop_nulls("label")),
        "scored": len(scored),
        "median_score": scored["score"].median(),
        "best": scored.head(report.SHOWN).select("index", "label", "score").to_dicts(),
    }


def organism_command(seed: int, out: Path, family: str, *, quiet: bool) -> dict[str, Any]:
    """`mediation organism`: make one; see mediation.organisms."""
    from mediation.organisms.train import make_organism

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MediationError(f"{out} already holds something; choose a new folder.")
    return report.organism(lambda show: make_organism(seed, family, out, show), quiet)


def planted_command(organism: Path, prompts: int, seed: int, *, quiet: bool) -> dict[str, Any]:
    """`mediation bench planted`: score an organism; see mediation.organisms.score."""
    from mediation.organisms.score import score_organism

    with report.bar("prompts", quiet) as tick:
        result = score_organism(organism, prompts=prompts, seed=seed, progress=tick)
    if not quiet:
        report.planted(result)
    return result


def bench_planted_command(families: str, seeds: str, work: Path | None, *, quick: bool, quiet: bool) -> dict[str, Any]:
    """`mediation bench planted`: organisms of many families; see mediation.planted.bench."""
    from mediation.planted import tables
    from mediation.planted.bench import bench, seed_range
    from mediation.planted.worlds import FAMILIES

    if work is None:
        raise MediationError("Give --work, a folder for the organisms' scores, or --organism, a folder made before.")
    names = list(FAMILIES) if families == "all" else [name.strip() for name in families.split(",")]
    with report.stages("organisms", quiet) as show:
        result = bench(names, seed_range(seeds), work, quick=quick, show=show)
    if not quiet:
        tables.show(result)
    return result


def bench_meta_command(*, quick: bool, quiet: bool) -> dict[str, Any]:
    """`mediation bench meta`: ways to decompose rows where the facts are planted; see mediation.metabench."""
    from mediation.metabench import run_bench

    with report.stages("settings", quiet) as show:
        result = run_bench(quick=quick, progress=show)
    if not quiet:
        report.meta_bench(result)
    return result


def bench_facts_command(
    source: Source, metas: list[Path], data: Path | None, chosen: dict[str, Any], *, quick: bool, quiet: bool
) -> dict[str, Any]:
    """`mediation bench facts`: real facts of `source.prompts`, at the site of every dictionary; see
    mediation.realfacts.bench. What is None in `chosen` is left at its default.
    """
    from mediation.realfacts.bench import QUICK, FactsSettings, run_facts
    from mediation.realfacts.questions import topics

    topic = topics().get(source.prompts)
    if topic is None:
        raise MediationError(f"--entities is {source.prompts!r}; give one of {', '.join(topics())}.")
    given = {name: value for name, value in chosen.items() if value is not None}
    model = SubjectModel.load(source.model, device=source.device)
    dictionaries, by_site = _with_metas(source, metas, model)
    with report.stages("real facts", quiet) as show:
        result = run_facts(
            model,
            [(dictionary, by_site.get(dictionary.name)) for dictionary in dictionaries],
            topic=topic,
            data=data,
            settings=replace(QUICK if quick else FactsSettings(), **given),
            progress=show,
        )
    if not quiet:
        report.facts_bench(result)
    return result


def bench_absorption_command(
    source: Source, inputs: dict[str, Any], seed: int, *, quick: bool, quiet: bool
) -> dict[str, Any]:
    """`mediation bench absorption`; inputs: metas, data, texts and parts. See mediation.absorbed.bench."""
    from mediation.absorbed import bench, tables

    parts = inputs["parts"] or bench.PARTS
    settings = bench.quick_settings(seed, parts) if quick else bench.AbsorptionSettings(seed, parts)
    model = SubjectModel.load(source.model, device=source.device)
    dictionaries, by_site = _with_metas(source, inputs["metas"], model)
    measured = bench.Inputs(model, dictionaries, by_site, inputs["data"], inputs["texts"])
    with report.stages("absorption", quiet) as show:
        result = bench.run_absorption(measured, settings, show)
    if not quiet:
        for table in tables.tables(result):
            report.console.print(table)
    return result


def _with_metas(
    source: Source, metas: list[Path], model: SubjectModel
) -> tuple[list[Dictionary], dict[str, MetaDictionary]]:
    """The dictionaries, checked, and of the meta-dictionaries in folders each one's own, by its name."""
    dictionaries = load_dictionaries(source, str(model.device), model)
    for dictionary in dictionaries:
        dictionary.check(model)
    folders = [each for given in metas for each in (sorted(c.parent for c in given.glob("*/cfg.json")) or [given])]
    by_site: dict[str, MetaDictionary] = {}
    for folder in folders:
        meta = MetaDictionary.load(folder, device=str(model.device))
        if not any(meta.base_hash == dictionary.content_hash for dictionary in dictionaries) and len(folders) > 1:
            continue  # a pack's folder of meta-SAEs may hold more sites than are measured
        by_site[_base_dictionary(dictionaries, meta, folder).name] = meta
    return dictionaries, by_site


def _trace_settings(chosen: dict[str, Any]) -> TraceSettings:
    enums: dict[str, type[StrEnum]] = {
        "baseline": Baseline, "behaviour": Behaviour, "estimator": Estimator, "semantics": Semantics,
    }  # fmt: skip
    settings: dict[str, Any] = {k: _choice(enums[k], v, k) if k in enums else v for k, v in chosen.items()}
    return TraceSettings(**settings)


def _choice(kind: type[Choice], value: str, name: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise MediationError(f"--{name} is {value!r}; give one of {', '.join(kind)}.") from None


def _open(
    source: Source, prompts: PromptSet, settings: TraceSettings
) -> tuple[SubjectModel, list[Dictionary], Prepared]:
    model = SubjectModel.load(source.model, device=source.device, allow_download=source.allow_download)
    dictionaries = load_dictionaries(source, str(model.device), model)
    return model, dictionaries, prepare(prompts, model, dictionaries, settings, alone=len(prompts) == 1)


def _source_of(run: Run) -> tuple[Source, TraceSettings]:
    """What a run was made from, out of its run.json."""
    stored = run.settings
    try:
        source = Source(
            **{name: stored[name] for name in Source.__dataclass_fields__} | {"saes": tuple(stored["saes"])}
        )
        return source, _trace_settings({name: stored[name] for name in TraceSettings.__dataclass_fields__})
    except (KeyError, TypeError) as error:
        raise MediationError(f"{run.path} is not the run of a trace (its settings lack {error}).") from error


def _base_dictionary(dictionaries: list[Dictionary], meta: MetaDictionary, path: Path) -> Dictionary:
    """The dictionary whose rows the meta-dictionary was trained on; one that does not say fits a lone dictionary."""
    if meta.base_hash is None and len(dictionaries) == 1:
        meta.check(dictionaries[0])
        return dictionaries[0]
    for dictionary in dictionaries:
        if meta.base_hash == dictionary.content_hash:
            return dictionary
    raise MediationError(f"{path} was not trained on any of the dictionaries; give the meta-SAE of one of them.")
