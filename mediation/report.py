"""What the commands show people in the terminal: tables on standard output, progress on standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from circuits.contrast import ALPHA, Contrast
from circuits.evidence import Description, LatentEvidence, MetaEvidence, Passage
from circuits.export import path_tree, tier_text
from circuits.graph import AttributionGraph, node_label
from circuits.supernodes import Supernode
from mediation.contexts import AFTER, BEFORE
from mediation.dictionaries import Dictionary
from mediation.prompts import PromptSet
from mediation.subject import SubjectModel

console = Console(width=None if sys.stdout.isatty() else 120)
progress_console = Console(stderr=True)
SHOWN = 12  # rows of a table that people read; everything is in the run folder
BARS = "▁▂▃▄▅▆▇█"
BENCH_SHOWN = ("factored", "batchtopk", "SAELens", "ICA", "own-row pursuit", "null")  # of the methods in bench meta


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in columns:
        numeric = name.startswith("#")
        table.add_column(name.removeprefix("#"), justify="right" if numeric else "left", no_wrap=numeric)
    return table


@contextmanager
def bar(title: str, quiet: bool) -> Iterator[Any]:
    """A progress bar on standard error; yields tick(done, of)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console, disable=quiet, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


@contextmanager
def stages(title: str, quiet: bool) -> Iterator[Any]:
    """A progress bar of named stages; yields show(stage, done, of)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console, disable=quiet, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda stage, done, of: bar.update(task, description=stage, completed=done, total=of)


def opening(model: SubjectModel, dictionaries: Sequence[Dictionary], prompts: PromptSet, cost: str) -> None:
    """What is about to run, and what it will cost."""
    sites = ", ".join(f"{d.site.name} ({d.d_sae} latents)" for d in dictionaries)
    console.print(
        f"[bold]{escape(model.name)}[/bold] ({model.architecture}, {model.n_layers} layers, width {model.d_model}); "
        f"dictionaries: {escape(sites)}; {len(prompts)} prompts; {cost}."
    )


def proving(chosen_on: int, measured_on: int, cost: str) -> None:
    """What is about to be proven, and what it will cost."""
    console.print(f"Circuits chosen on {chosen_on} prompts, measured on {measured_on} others; {cost}.")


def trace(result: dict[str, Any], model: SubjectModel) -> None:
    """Total effect, trust figures, top latents."""
    effect = result["total_effect"]
    console.print(
        f"\n[bold]Total effect on the prompt set[/bold]: {effect['mean']:+.2f} "
        f"[{effect['low']:+.2f}, {effect['high']:+.2f}] nats over {effect['prompts']} prompts "
        f"(behaviour {effect['clean']:+.2f} on clean prompts, {effect['baseline']:+.2f} at the baseline)."
    )
    _trust(result)
    _latents(result, model)


def _trust(result: dict[str, Any]) -> None:
    table = _table(
        "What these numbers can bear", "site", "#variance", "#L0", "#CE", "#gap", "#on errors",
        caption="variance explained, active latents per token and cross-entropy recovered by the dictionary on these "
        "prompts; gap: what conservation misses; on errors: share of attribution on error nodes",
    )  # fmt: skip
    fidelity = dict(zip(result["conservation_gap"], result["fidelity"].values(), strict=True))
    for site, gap in result["conservation_gap"].items():
        one = fidelity[site]
        table.add_row(
            _short(site), _number(one["variance_explained"]), _number(one["l0"], 1),
            _number(one["cross_entropy_recovered"]), f"{gap:.1%}", f"{result['error_share'][site]:.0%}",
        )  # fmt: skip
    console.print(table)
    calibration(result, result["warnings"])


def calibration(figures: dict[str, Any], warnings: Sequence[str]) -> None:
    """Estimates beside exact patching, what the graph can have missed, and what a reader must be warned of."""
    compared = [(name, "nodes", each) for name, each in figures["estimator_vs_exact"].items()]
    for name, kind, each in [*compared, ("edges", "edges", figures["edges_vs_exact"])]:
        console.print(
            f"{name} against exact patching of {each['n']} sampled {kind}: Pearson {_number(each['pearson'])}, "
            f"Spearman {_number(each['spearman'])}, same sign {_number(each['sign'])}."
        )
    missed = figures["important_missed"]
    if missed["at_most"] is None:
        console.print("What the graph misses is unknown: none of its nodes was patched exactly on held-out prompts.")
    else:
        console.print(
            f"{missed['missed']} of {missed['left_out']} sampled nodes outside the graph have at least the median "
            f"effect of those in it ({missed['median']:.2g}): it misses at most {missed['at_most']:.0%} of such nodes "
            "(95 % bound, held-out prompts)."
        )
    for warning in warnings:
        console.print(f"[yellow]Warning[/yellow]: {escape(warning)}", soft_wrap=True)


def _latents(result: dict[str, Any], model: SubjectModel) -> None:
    measured = {(row["site"], row["latent"]): row for row in result["effects"]}
    table = _table(
        "Top latents", "site", "role", "latent", "#attribution, 95 %", "#TIE", "#NIE", "#recurs",
        caption="label: or the token it fires hardest on; attribution: mean over all prompts, nats, those that chose "
        "these latents among them; TIE, NIE: measured, at all positions; recurs: tier, and share of held-out prompts "
        "whose own graph keeps it",
    )  # fmt: skip
    table.add_column("label", max_width=40, min_width=12)
    for row in result["top_latents"][:SHOWN]:
        one = measured.get((row["site"], row["latent"]), {})
        token = model.tokenizer.decode([row["token"]]) if model.tokenizer is not None else str(row["token"])
        error = row["latent"] is None
        interval = rf"\[{row['low']:+.2f}, {row['high']:+.2f}]"
        table.add_row(
            _short(row["site"]), escape(row["role"]), "error" if error else str(row["latent"]),
            f"{row['attribution']:+.2f} {interval}",
            _number(None if error else one.get("tie")), _number(None if error else one.get("nie")),
            tier_text(row) or "-",
            "" if error else escape(row["label"] or f"on '{token.strip()}'"),
        )  # fmt: skip
    console.print(table)


def _short(site: str) -> str:
    """ "1.resid_pre" of "blocks.1.hook_resid_pre"."""
    return site.removeprefix("blocks.").replace("hook_", "")


def paths(graph: AttributionGraph, n: int) -> None:
    """The strongest paths as a tree."""
    console.print("\n[bold]Strongest paths[/bold], from the behaviour back to the tokens")
    console.print(path_tree(graph, n))


def latent(found: LatentEvidence) -> None:
    """Everything known of a latent: what it stands for, where it acts, what feeds it, what it is made of."""
    console.print(
        f"[bold]Latent {found.latent}[/bold] of {escape(found.site)}: [bold]{escape(found.called)}[/bold]"
        f"{_score(found.described)}; on in {found.on_in} of {found.prompts} prompts."
    )
    _description(found.described)
    _passages("Strongest in the run's prompts (activation)", found.passages)
    table = _table(
        "Attribution", "role", f"#{found.estimator}, mean", "#held out, 95 %", "#kept in", "tier",
        caption="mean over all prompts; held out: over those that did not choose the graph's nodes; kept in: share of "
        "these whose own graph keeps it",
    )  # fmt: skip
    for row in found.roles.iter_rows(named=True):
        interval = "" if row["low"] is None else rf" \[{row['low']:+.2f}, {row['high']:+.2f}]"
        table.add_row(
            escape(row["role"]), f"{row['attribution']:+.3f}", f"{row['held_out']:+.3f}{interval}",
            "-" if row["frequency"] is None else f"{row['frequency']:.0%}", row["tier"] or "-",
        )  # fmt: skip
    console.print(table)
    table = _table("By prompt", "prompt", "half", "role", "#activation", "#baseline", "#attribution", "#exact")
    for row in found.by_prompt.head(SHOWN).iter_rows(named=True):
        table.add_row(
            escape(row["prompt"]), row["half"] or "-", escape(row["role"]), _number(row["clean"]),
            _number(row["baseline"]), f"{row['attribution']:+.3f}",
            "-" if row["exact"] is None else f"{row['exact']:+.3f}",
        )  # fmt: skip
    console.print(table)
    if found.effects is not None:
        shown = ", ".join(f"{key.upper()} {value:+.2f}" for key, value in found.effects.items())
        console.print(f"Measured at all its positions, mean over the prompts: {shown}.")
    if len(found.inputs) or len(found.outputs):
        console.print(link_tree(found, SHOWN))
    if found.parts is not None:
        _parts(found.parts)
    _notes(found.notes)


def link_tree(found: LatentEvidence, n: int) -> Tree:
    """A latent with the n strongest edges into it and out of it, by contribution."""
    root = Tree(Text(f"latent {found.latent}", style="bold"))
    for title, links in (("fed by", found.inputs), ("feeds", found.outputs)):
        if links.is_empty():
            continue
        more = f", {n} of {len(links)}" if len(links) > n else ""
        branch = root.add(Text(f"{title} (contribution to the behaviour{more})"))
        for row in links.head(n).iter_rows(named=True):
            line = Text(f"{row['contribution']:+.3f} ", style="green" if row["contribution"] >= 0 else "red")
            line.append(row["label"], style="bold")
            line.append(f"  {_short(row['node'])}, at {row['role']}", style="dim")
            branch.add(line)
    return root


def meta_latent(found: MetaEvidence) -> None:
    """Everything known of a meta-latent: what its members share, where it acts and through what, its tests."""
    console.print(
        f"[bold]Meta-latent {found.meta}[/bold] at {escape(found.site)}: [bold]{escape(found.called)}[/bold]"
        f"{_score(found.described)}; attribution {found.attribution:+.3f}, mean over the prompts."
    )
    _description(found.described)
    if found.described.shared:
        console.print("Words that its members share: " + escape(", ".join(found.described.shared)))
    _passages("Where it acts in the run's prompts (attribution)", found.passages)
    table = _table("Through which latents", "#latent", "label", "#attribution, mean")
    for row in found.through.head(SHOWN).iter_rows(named=True):
        table.add_row(str(row["latent"]), escape(row["label"] or "-"), f"{row['attribution']:+.3f}")
    console.print(table)
    if len(found.carriers):
        table = _table("Carriers: latents that are the fact, or the nearest", "#latent", "label", "#cosine", "carrier",
                       "#on in prompts")  # fmt: skip
        for row in found.carriers.head(SHOWN).iter_rows(named=True):
            table.add_row(str(row["latent"]), escape(row["label"] or "-"), _number(row["cosine"]),
                          "yes" if row["carrier"] else "no", str(row["on_in"]))  # fmt: skip
        console.print(table)
    if len(found.tests):
        table = _table("Tests", "prompt", "in", "#removal", "#controls", "#of", "#hidden", "swap", "#p", "#q", "flag",
                       caption="controls: mean size of what the matched controls move; of: total effect")  # fmt: skip
        for row in found.tests.head(SHOWN).iter_rows(named=True):
            table.add_row(
                escape(row["prompt"]), escape(row["group"]), f"{row['removal']:+.2f}",
                f"{sum(row['controls']) / len(row['controls']):.2f}", f"{row['total_effect']:+.2f}",
                f"{row['hidden_share']:.0%}", "follows" if row["swap_follows"] else "stays", probability(row["p"]),
                probability(row["q"]), "hidden" if row["flagged"] else "-",
            )  # fmt: skip
        console.print(table)
    _notes(found.notes)


def _score(described: Description) -> str:
    if described.label is None:
        return ""
    scored = "not scored" if described.score is None else f"score {described.score:.2f}"
    return f" ({scored}, from {escape(described.source or 'enrichment')})"


def _description(described: Description) -> None:
    """What the dictionary's folder says: density, histogram, logit lens, contexts."""
    if described.density is not None:
        console.print(f"On at {described.density:.3%} of the text's tokens. {_histogram(described.histogram)}".rstrip())
    for word, tokens in (("promotes", described.logits_up), ("suppresses", described.logits_down)):
        if tokens:
            console.print(f"Logit lens: {word} {escape(' '.join(_visible(each).strip() or '␣' for each in tokens))}")
    _passages("Strongest contexts (activation)", described.contexts)


def _histogram(bins: Sequence[dict[str, Any]]) -> str:
    """Counts by activation, one bar a half octave."""
    if not bins:
        return ""
    most = max(each["count"] for each in bins)
    bars = "".join(BARS[round((len(BARS) - 1) * each["count"] / most)] for each in bins)
    return f"Activations from {bins[0]['from']:.2g} to {bins[-1]['from']:.2g}: {bars}"


def _passages(title: str, passages: Sequence[Passage]) -> None:
    """Passages around their peak, which stands in brackets, its value before them."""
    if not passages:
        return
    console.print(f"\n[bold]{title}[/bold]")
    for each in passages:
        gap = "" if any(token[:1].isspace() for token in each.tokens[1:]) else " "  # words as tokens have no spaces
        at, shown = each.position, [_visible(token) for token in each.tokens]
        first, end = max(0, at - BEFORE), at + AFTER + 1
        space = " " if shown[at][:1].isspace() else ""
        line = Text(f"{each.values[at]:+8.3g}  ", style="cyan")
        line.append("…" if first else "").append(gap.join([*shown[first:at], space]))
        line.append(f"[{shown[at].strip()}]", style="bold reverse")
        line.append(gap.join(["", *shown[at + 1 : end]])).append("…" if end < len(shown) else "")
        line.append("" if each.prompt is None else f"  {each.prompt}", style="dim")
        console.print(line)


def _visible(token: str) -> str:
    """A token on one line, control characters by their codes."""
    shown = token.replace("\n", "↵").replace("\t", "⇥")
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in shown)


def _parts(parts: pl.DataFrame) -> None:
    """A latent's parts; the weak ones as one line, so that the columns add up."""
    metas, rest = parts.drop_nulls("meta"), parts.filter(pl.col("meta").is_null())
    table = _table(
        "What it is made of", "part", "#meta-latent", "#code", "#share of the row", "#attribution, ig",
        caption="shares sum to 1, attributions to the latent's own: nothing is left out",
    )  # fmt: skip
    rows = metas.head(SHOWN).to_dicts()
    if len(metas) > SHOWN:
        sums = metas[SHOWN:].select(_total("share"), _total("attribution")).row(0, named=True)
        rows.append({"part": f"{len(metas) - SHOWN} other meta-latents", "meta": None, "code": None, **sums})
    whole = parts.select(_total("share"), _total("attribution")).row(0, named=True)
    for row in [*rows, *rest.to_dicts(), {"part": "sum", "meta": None, "code": None, **whole}]:
        table.add_row(
            escape(row["part"]), "" if row["meta"] is None else str(row["meta"]), _number(row["code"], 3),
            _number(row["share"], 3), "-" if row["attribution"] is None else f"{row['attribution']:+.3f}",
            style="bold" if row["part"] == "sum" else None,
        )  # fmt: skip
    console.print(table)


def _total(name: str) -> pl.Expr:
    """The sum of a column, null where it holds nothing."""
    return pl.when(pl.col(name).count() > 0).then(pl.col(name).sum()).alias(name)


def _notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.print(note, style="dim", soft_wrap=True, markup=False)


def proof(table: pl.DataFrame, summary: dict[str, Any]) -> None:
    """Faithfulness and completeness at every size, areas, and where a baseline is better."""
    for kind, figures in summary.items():
        names = list(figures["scores"])
        rows = table.filter(pl.col("kind") == kind)
        shown = _table(
            f"Circuits of {kind}: faithfulness / completeness on {figures['prompts']} prompts", "#kept",
            *(f"#{name}" for name in names),
            caption="faithfulness: what the circuit does of what the model does (1: all of it); completeness: what is "
            f"left without it (0: nothing); of {figures['of']} {kind}; behaviour {figures['clean']:+.2f} clean, "
            f"{figures['empty']:+.2f} with nothing kept",
        )  # fmt: skip
        for (size,), at in rows.group_by("size", maintain_order=True):
            cells = dict(zip(at["ranking"], zip(at["faithfulness"], at["completeness"], strict=True), strict=True))
            shown.add_row(str(size), *(" / ".join(_number(each) for each in cells[name]) for name in names))
        for area, label in (("cpr_log", "CPR, log k"), ("cmd_log", "CMD, log k"), ("cpr", "CPR"), ("cmd", "CMD")):
            values = [figures["scores"][name][area]["value"] for name in names]
            shown.add_row(label, *map(_number, values), style="bold")
        console.print(shown)
        for name, each in figures["against"].items():
            if each["baseline_closer_at"]:
                where = f"{', '.join(map(str, each['baseline_closer_at']))} {kind}"
                console.print(f"{escape(name)} is closer to the model than the circuit at {where}.", style="yellow")


def kept(graph: AttributionGraph, groups: Sequence[Supernode]) -> None:
    """What pruning left in the page and the exports, and the largest groups."""
    pruned = graph.meta["pruned"]
    share = pruned["influence"] / pruned["of_influence"] if pruned["of_influence"] else 1.0
    console.print(
        f"\nKept in page and exports, by influence: {pruned['kept']} of {pruned['of']} nodes with {share:.0%} of the "
        f"latents' influence, {pruned['edges']} of {pruned['of_edges']} edges; the run holds all. Paths from error "
        f"nodes carry {pruned['from_errors']:.0%}."
    )
    for group in groups[:SHOWN]:
        console.print(f"{len(group.members)} alike: [bold]{escape(group.label)}[/bold]  {escape(group.id)}")


def recurrence(graph: AttributionGraph, tiers: dict[str, dict[str, int]]) -> None:
    """How far the nodes of a set's graph go beyond the prompts they were chosen on."""
    held_out = graph.meta["held_out_prompts"]
    if not held_out:
        console.print("One prompt, or one text, cannot be split: nothing says what of this graph recurs elsewhere.")
        return
    table = _table(
        f"What recurs on {held_out} held-out prompts", "site", "role", "node", "#attribution", "#held out, 95 %",
        "#kept in", "tier",
        caption="attribution: mean over all prompts; held out: mean over those that did not choose the nodes; "
        "kept in: share of these whose own graph keeps the node",
    )  # fmt: skip
    for name in graph.ranked()[:SHOWN]:
        node = graph.digraph.nodes[name]
        interval = "" if node["low"] is None else rf" \[{node['low']:+.2f}, {node['high']:+.2f}]"
        table.add_row(
            _short(node["site"]), escape(str(node["position"])), escape(node_label(node, name)),
            f"{node['attribution']:+.2f}", f"{node['held_out']:+.2f}{interval}", f"{node['frequency']:.0%}",
            node["tier"] or "-",
        )  # fmt: skip
    console.print(table)
    for kind, counts in tiers.items():
        said = ", ".join(f"{count} {tier}" for tier, count in counts.items()) or "too few held-out prompts for tiers"
        console.print(f"{kind}: {said}.")


def contrast(found: Contrast, first: str, second: str) -> None:
    """What differs between two runs: the nodes and edges with the smallest p."""
    a, b = found.prompts
    how = f"{a} pairs of held-out prompts" if found.paired else f"{a} and {b} held-out prompts, not paired"
    tried = "all rearrangements" if found.exact else "random rearrangements"
    console.print(
        f"[bold]{escape(first)}[/bold] minus [bold]{escape(second)}[/bold]: {how}; {tried}, smallest p possible "
        f"{found.smallest_p:.2g}.",
        soft_wrap=True,
    )
    table = _table("Nodes that differ", "site", "role", "node", "#first", "#second", "#difference", "#p", "#q")
    for row in found.nodes.head(SHOWN).iter_rows(named=True):
        table.add_row(
            _short(row["site"]), escape(row["role"]), escape(row["label"]), *_differences(row),
        )  # fmt: skip
    console.print(table)
    edges = found.edges.drop_nulls("p").head(SHOWN)
    if len(edges):
        table = _table("Edges that differ", "from", "to", "#first", "#second", "#difference", "#p", "#q")
        for row in edges.iter_rows(named=True):
            table.add_row(escape(_short(row["source"])), escape(_short(row["target"])), *_differences(row))
        console.print(table)
    counts = found.summary()["significant"]
    console.print(
        f"At a false discovery rate of {ALPHA:.0%}: {counts['nodes']} of {len(found.nodes)} nodes and "
        f"{counts['edges']} of {len(found.edges.drop_nulls('p'))} tested edges differ."
    )
    for note in found.notes:
        console.print(note)


def _differences(row: dict[str, Any]) -> list[str]:
    return [f"{row[name]:+.2f}" for name in ("first", "second", "difference")] + [
        probability(row[k]) for k in ("p", "q")
    ]


def flagging(prompts: int, seconds: float) -> None:
    """Before flags: how long they take."""
    console.print(f"Splitting and testing the facts of {prompts} prompts: at most about {max(seconds, 1):.0f} s.")


def flags(result: dict[str, Any]) -> None:
    """Hidden facts with their proof."""
    found = result["hidden_facts"]
    table = _table(
        "Hidden facts: used, though no latent for them fired", "fact", "expected", "in", "#removal", "#of", "#hidden",
        "swap", "#p", "#q",
        caption="removal: what the behaviour loses without the fact's part, of the total effect; swap: the "
        "counterpart's fact instead, does the answer follow?",
    )  # fmt: skip
    for row in found[:SHOWN]:
        table.add_row(
            escape(row["fact"]), escape(row["expected_fact"] or "-"), escape(row["group"]), f"{row['effect']:+.1f}",
            f"{row['total_effect']:+.1f}", f"{row['hidden_share']:.0%}", "follows" if row["swap_follows"] else "stays",
            f"{row['p']:.3f}", f"{row['q']:.3f}",
        )  # fmt: skip
    console.print(table)
    more = f"; the {len(found) - SHOWN} others are in flags.parquet" if len(found) > SHOWN else ""
    console.print(
        f"{result['flagged_prompts']} of {result['evaluation_prompts']} evaluation prompts flagged, "
        f"{result['tests']} tests{more}."
    )
    named = result["named_right"]
    if named["of"]:
        console.print(
            "The part that drives the answer most is of the expected kind in "
            f"{named['right']} of {named['of']} prompts."
        )


def quality(result: dict[str, Any]) -> None:
    """A dictionary's figures beside published ones."""
    table = _table("Quality", "figure", "#here", "published", "source")
    for name, row in result["figures"].items():
        shown = _number(row["value"], 3)
        table.add_row(name.replace("_", " "), shown, row["published"] or "-", row["source"] or "-")
    console.print(
        f"[bold]{escape(result['dictionary'])}[/bold] at {result['site']}: {result['latents']} latents, "
        f"{result['architecture']}."
    )
    console.print(table)
    for note in result["notes"]:
        console.print(escape(note))


def meta_made(made: dict[str, Any]) -> str:
    """What a meta-dictionary was made from, in a sentence."""
    return (
        f"Meta-SAE: {made['method']}, {made['width']} meta-latents from {made['rows']} rows of "
        f"{', '.join(made['dictionaries'].values())} ({made['dead_dropped']} dead dropped, weights {made['weights']}, "
        f"seed {made['seed']}); variance explained {_number(made['variance_explained'], 3)}, of rotated "
        f"rows {_number(made['null_variance_explained'], 3)}."
    )


def label_opening(dictionaries: Sequence[Dictionary], n_tokens: int, seconds: float) -> None:
    """What is about to be labelled, and how long it will take."""
    sites = ", ".join(f"{d.site.name} ({d.d_sae} latents)" for d in dictionaries)
    console.print(f"Labelling {escape(sites)} from {n_tokens} tokens; about {seconds:.0f} s.")


def labels(found: Sequence[dict[str, Any]]) -> None:
    """What was labelled, and the labels that predict best."""
    for each in found:
        table = _table(
            "Labels", "#latent", "label", "#score",
            caption="the best of them; score: area under the ROC curve of the label's words as a prediction of where "
            "the latent is on, in text the label was not made from; .5 is chance",
        )  # fmt: skip
        for row in each["best"]:
            table.add_row(str(row["index"]), escape(row["label"]), _number(row["score"]))
        if each["best"]:
            console.print(table)
        console.print(
            f"{escape(each['folder'])}: {each['labelled']} labels for {each['latents']} latents, {each['scored']} of "
            f"them scored, median {_number(each['median_score'])}.",
            soft_wrap=True,
        )


def trained(result: dict[str, Any]) -> None:
    """New dictionaries, and how they do on text they were not trained on."""
    table = _table("Held-out text", "site", "#variance explained", "#L0", "#silent latents")
    for site, row in result["held_out"].items():
        table.add_row(site, f"{row['variance_explained']:.3f}", f"{row['l0']:.1f}", f"{row['silent']:.1%}")
    if table.row_count:
        console.print(table)
    files(*map(Path, result["saes"]))


def files(*paths_written: Path) -> None:
    for path in paths_written:
        console.print(f"wrote {path}", soft_wrap=True)


def serving(address: str) -> None:
    """Where the page is, while it is served."""
    console.print(f"The page is at {address} until you press Ctrl-C.", soft_wrap=True)


def closing(run: Path, seconds: float, megabytes: float) -> None:
    console.print(
        f"\nDone in {seconds:.0f} s, {megabytes:.0f} MB at most. Run folder: [bold]{run}[/bold]",
        soft_wrap=True,
    )


def organism(make: Callable[[Callable[[str, int, int], None]], dict[str, Any]], quiet: bool) -> dict[str, Any]:
    """Make an organism under a progress bar, then show how well each stage came out."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console, disable=quiet, transient=True) as bar:
        task = bar.add_task("organism", total=None)
        result = make(lambda stage, done, of: bar.update(task, description=stage, completed=done, total=of))
    if not quiet:
        table = _table("Organism", "measured", "#value")
        for name, value in result.items():
            table.add_row(name, _number(value) if isinstance(value, float) else str(value))
        console.print(table)
    return result


def planted(result: dict[str, Any]) -> None:
    """The score of an organism beside its baselines."""
    table = _table("Which fact was used, on held-out people", "parts ranked", "#attribute named right")
    table.add_row("meta-latents", _number(result["attribute_top1"]))
    for name, value in result["baselines"].items():
        table.add_row(name, _number(value))
    table.add_row("chance", _number(result["chance"]))
    console.print(table)
    console.print(
        f"value named right {_number(result['value_top1'])}; flagged {result['flag_rate']:.1%} of evaluation prompts; "
        f"held-out linear decodability {_number(result['decodability'])}."
    )


def trained_meta(result: dict[str, Any]) -> None:
    """A new meta-dictionary: what it was trained on, how well it fits, how far it is from the null."""
    table = _table("Meta-dictionary", "measured", "#value")
    dropped = f"{result['dead_dropped']} dead dropped" if result["density_known"] else "densities unknown, all kept"
    table.add_row(f"rows ({dropped})", str(result["rows"]))
    table.add_row("method", result["method"])
    table.add_row("meta-latents", str(result["width"]))
    table.add_row("codes per row", _number(result["codes_per_row"], 1))
    if result["attributes"]:
        table.add_row("attributes, by number of values", " ".join(map(str, result["attributes"])))
    table.add_row("variance explained", _number(result["variance_explained"], 3))
    for name, value in result["held_out"].items():
        table.add_row(f"variance explained of held-out rows, {name}", _number(value, 3))
    table.add_row("variance explained of rotated rows (null)", _number(result["null_variance_explained"], 3))
    table.add_row("gap to the null", _number(result["gap_to_null"], 3))
    console.print(table)
    files(Path(result["out"]))


def meta_bench(result: dict[str, Any]) -> None:
    """Right fact at top 1, one line a setting, one column a method."""
    table = _table(
        "Right fact first (value and attribute), mean over seeds", "rows", *(f"#{name}" for name in BENCH_SHOWN)
    )
    for row in result["settings"]:
        table.add_row(row["setting"], *(_number(row["value"].get(name)) for name in BENCH_SHOWN))
    console.print(table)
    console.print(f"{result['seconds']:.0f} s; seeds {result['seeds']}; the other methods are in --json.")


def probability(value: float | None) -> str:
    """A p- or q-value."""
    if value is None or math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def facts_bench(result: dict[str, Any]) -> None:
    """Real facts: a line for each way to take the latents apart, and for each kind of subspace."""
    for site in result["sites"]:
        columns = ("#carry", "#correlation", "#same top", "#top named", "#answer follows", "#others stay", "#both")
        table = _table(f"Which part answers which question? {result['topic']}, {site['site']}", "parts", *columns)
        for name, way in site["ways"].items():
            figures = (way["carry"]["strongest"], way["correlation"], way["same_top"], way["named"]["use"]["top_1"])
            exchanged = (way["swap"]["follows"], way["swap"]["others_stay"], way["swap"]["both"])
            table.add_row(name, *(_number(figure["value"]) for figure in (*figures, *exchanged)))
        for name, subspace in site["subspaces"].items():
            exchanged = (subspace["swap"]["follows"], subspace["swap"]["others_stay"], subspace["swap"]["both"])
            table.add_row(f"subspaces: {name}", "", "", "", "", *(_number(figure["value"]) for figure in exchanged))
        console.print(table)
    console.print(
        f"held-out pairs {result['sites'][0]['pairs']}; named by chance {1 / len(result['questions']):.2f}, both .50; "
        f"{result['seconds']:.0f} s. Intervals and the rest are in --json."
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
