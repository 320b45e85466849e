"""The command line: what each command takes. What it does is in mediation.commands, imported when needed.

Kept free of heavy imports, so that `mediation --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from mediation.errors import MediationError

app = typer.Typer(
    help="Find which facts a language model actually used.\n\n"
    "Start with [bold]mediation demo[/bold]: the whole path on an embedded model, no download.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(help="Score the method where the answer is known.", no_args_is_help=True)
app.add_typer(bench, name="bench")
train = typer.Typer(help="Train dictionaries and meta-dictionaries.", no_args_is_help=True)
app.add_typer(train, name="train")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Out = Annotated[Path | None, typer.Option(help="Run folder; the same settings resume the run there.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of samples, controls and splits.")]


@app.command(epilog="Example: mediation demo --json")
def demo(out: Out = None, as_json: Json = False) -> None:
    """Trace, inspect and flag on the embedded planted-fact model; about half a minute, nothing to download."""
    commands = _commands()

    _finish(commands.demo(out, quiet=as_json), as_json)


@app.command(epilog="Example: mediation trace prompts.jsonl --model smollm2 --saes packs/layer-15 --out runs/capitals")
def trace(
    prompts: Annotated[Path, typer.Argument(help="JSONL rows {clean, corrupt?, answer, wrong_answer, roles?}.")],
    model: Annotated[str, typer.Option(help="Hugging Face name, local folder, .gguf file, or smollm2.")],
    saes: Annotated[
        list[str], typer.Option(help="SAE folder, folder of them, RELEASE:SAE_ID, heads or neurons[:LAYERS]; repeat.")
    ],
    out: Out = None,
    baseline: Annotated[str, typer.Option(help="What a latent is set to: corrupt, zero or mean.")] = "corrupt",
    behaviour: Annotated[str, typer.Option(help="What is measured: logit_diff or logprob.")] = "logit_diff",
    estimator: Annotated[str, typer.Option(help="What ranks the nodes: atp, ig or exact.")] = "ig",
    semantics: Annotated[
        str, typer.Option(help="Edges: gradient (the model as it is) or linear (patterns and norms held: they add up).")
    ] = "gradient",
    steps: Annotated[int, typer.Option(help="Points of ig's path integral.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Prompts in a forward at most; fewer where memory asks it.")] = 16,
    memory: Annotated[
        str | None, typer.Option(help="Memory to stay in, such as 2GB; default: most of the free.")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="Nodes of each site patched exactly, to judge the estimators.")
    ] = 128,
    top: Annotated[int, typer.Option(help="Latents reported, and latents of each site in the graph.")] = 20,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")] = None,
    allow_download: Annotated[bool, typer.Option(help="Let names be fetched from the Hugging Face hub.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Which latents mediate a behaviour on a prompt set, by how much, how sure; and how they feed each other."""
    commands = _commands()

    source = commands.Source(model, tuple(saes), str(prompts), device, allow_download)
    chosen = {
        "baseline": baseline, "behaviour": behaviour, "estimator": estimator, "semantics": semantics, "steps": steps,
        "batch_size": batch_size, "sample": sample, "top": top, "seed": seed,
    }  # fmt: skip
    _finish(commands.trace_command(source, chosen, out, memory=memory, quiet=as_json), as_json)


@app.command(
    epilog="Examples: mediation inspect runs/capitals; mediation inspect runs/capitals --prompt france; "
    "mediation inspect runs/capitals --latent 15.resid_pre/273; mediation inspect --dictionary packs/layer-15"
)
def inspect(
    run: Annotated[Path | None, typer.Argument(help="Folder that a trace or demo wrote.")] = None,
    paths: Annotated[int, typer.Option(help="Strongest paths shown.")] = 8,
    prompt: Annotated[str | None, typer.Option(help="Id of one prompt of the run, for its own graph.")] = None,
    latent: Annotated[str | None, typer.Option(help="SITE/ID of one latent, for everything known of it.")] = None,
    meta_latent: Annotated[
        int | None, typer.Option(min=0, help="ID of one meta-latent, for everything known of it; run must be flagged.")
    ] = None,
    nodes: Annotated[float, typer.Option(help="Share of the latents' influence that page and exports keep.")] = 0.8,
    edges: Annotated[float, typer.Option(help="Share of the edges' influence that page and exports keep.")] = 0.98,
    top: Annotated[int | None, typer.Option(help="At most so many latents in page and exports.")] = None,
    group: Annotated[
        str | None, typer.Option(help="Draw alike latents as one: meta (same strongest meta-latent) or edges.")
    ] = None,
    export: Annotated[
        list[str] | None, typer.Option(help="graphml, dot, parquet, csv or neuronpedia; repeat. Default: graphml.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Another run, for what this one does differently.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page on this machine, all prompts in it.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for --serve; 0 takes a free one.")] = 0,
    dictionary: Annotated[str | None, typer.Option(help="Instead of a run: SAE folder, or RELEASE:SAE_ID.")] = None,
    model: Annotated[str | None, typer.Option(help="Model the SAE was trained on, for what needs text.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text to measure on; repeat.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of it on which dead and dense are counted.")] = 100_000,
    spelling: Annotated[Path | None, typer.Option(help="Words, one a line or JSONL {word}, for absorption.")] = None,
    meta: Annotated[Path | None, typer.Option(help="Meta-SAE folder; default: one beside the SAE.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")] = None,
    allow_download: Annotated[bool, typer.Option(help="Let names be fetched from the Hugging Face hub.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Which latents feed which, from a run: paths, a page (index.html), exports. Or a dictionary's quality."""
    commands = _commands()

    if (run is None) == (dictionary is None):
        raise MediationError("There is one thing to inspect at a time; give a run's folder or --dictionary.")
    views = {"--prompt": prompt, "--latent": latent, "--meta-latent": meta_latent}
    asked = [name for name, value in views.items() if value is not None]
    if len(asked) > 1:
        raise MediationError(f"{asked[0]} and {asked[1]} are two views of a run; give one at a time.")
    if run is not None and meta is not None and group != "meta" and latent is None:
        raise MediationError("A meta-SAE takes a run's latents apart; give --latent or --group meta with --meta.")
    if run is not None and (latent is not None or meta_latent is not None):
        if top is not None or group or export or against or serve:
            raise MediationError(f"Pruning, groups, exports and pages are of a graph; give them without {asked[0]}.")
        if latent is not None:
            _finish(commands.latent_command(run, latent, meta, quiet=as_json), as_json)
        elif meta_latent is not None:
            _finish(commands.meta_latent_command(run, meta_latent, quiet=as_json), as_json)
        return
    if run is not None:
        view = commands.View.of(commands.Keep(nodes, edges, top), group, meta, export or [], against)
        _finish(commands.inspect_command(run, paths, prompt, view, quiet=as_json), as_json)
        if serve:
            commands.serve_command(run, view, port)
        return
    if asked:
        raise MediationError(f"Prompts and latents are those of a run; give the run's folder with {asked[0]}.")
    if top is not None or group or export or against or serve:
        raise MediationError("Pruning, groups and exports are of a run's graph; give a run's folder for them.")
    if model is None and (text or spelling):
        raise MediationError("Text and words are measured with a model; give --model.")
    source = commands.Source(model or "", (dictionary or "",), "", device, allow_download)
    _finish(commands.quality_command(source, text or [], tokens, spelling, meta, seed, quiet=as_json), as_json)


@app.command(epilog="Example: mediation contrast runs/sycophantic runs/honest")
def contrast(
    first: Annotated[Path, typer.Argument(help="Run folder.")],
    second: Annotated[Path, typer.Argument(help="Run folder whose means are taken away, of the same dictionaries.")],
    out: Annotated[Path | None, typer.Option(help="Folder for nodes.parquet and edges.parquet.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What two prompt sets, or two models, use differently: nodes and edges of one run minus those of another."""
    commands = _commands()

    _finish(commands.contrast_command(first, second, out, seed, quiet=as_json), as_json)


@app.command(epilog="Example: mediation flag runs/capitals --meta packs/layer-15-meta")
def flag(
    run: Annotated[Path, typer.Argument(help="Folder that a trace wrote.")],
    meta: Annotated[Path, typer.Option(help="Meta-SAE folder, trained on the rows of one of the run's SAEs.")],
    controls: Annotated[int, typer.Option(help="Matched controls of each removal test, 20 or more.")] = 999,
    parts: Annotated[int, typer.Option(min=1, help="Meta-latents in each prompt's Shapley split.")] = 8,
    alpha: Annotated[float, typer.Option(help="False discovery rate of the flags.")] = 0.05,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Which facts were used though no latent for them fired, with causal proof."""
    commands = _commands()

    chosen = {"controls": controls, "parts": parts, "alpha": alpha, "seed": seed}
    _finish(commands.flag_command(run, meta, chosen, quiet=as_json), as_json)


@app.command(epilog="Example: mediation prove runs/capitals --errors removed")
def prove(
    run: Annotated[Path, typer.Argument(help="Folder that a trace or demo wrote.")],
    errors: Annotated[str, typer.Option(help="Error nodes of circuits: kept, removed or with_latents.")] = "kept",
    top: Annotated[int, typer.Option(min=1, help="Latents of each site between which edges are cut.")] = 20,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each half, at most: to choose on, to test on.")] = 32,
    edges: Annotated[bool, typer.Option(help="Edges too, which take many times the runs of nodes.")] = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Does the model do it with the circuit alone? Nodes and edges kept and cut, on prompts they were not chosen on."""
    commands = _commands()

    chosen = {"errors": errors, "top": top, "prompts": prompts, "edges": edges, "seed": seed}
    _finish(commands.prove_command(run, chosen, quiet=as_json), as_json)


@app.command(
    epilog="Example: mediation label packs/layer-15 --model smollm2 --text books.txt --meta packs/layer-15-meta"
)
def label(
    dictionaries: Annotated[list[str], typer.Argument(help="SAE folder, folder of SAE folders, or RELEASE:SAE_ID.")],
    model: Annotated[str | None, typer.Option(help="Model the SAEs were trained on; as for trace.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text to label from; repeat.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens read: half to label from, half to score on.")] = 200_000,
    meta: Annotated[Path | None, typer.Option(help="Meta-SAE of one of the SAEs, to be labelled too.")] = None,
    explanations: Annotated[
        Path | None, typer.Option("--import", help="Neuronpedia's explanations or delphi's results instead.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")] = None,
    allow_download: Annotated[bool, typer.Option(help="Let names be fetched from the Hugging Face hub.")] = False,
    as_json: Json = False,
) -> None:
    """What latents mean: contexts and names scored on held-out text, or imported explanations; kept with the SAE."""
    commands = _commands()

    if (explanations is None) == (model is None or not text):
        raise MediationError("Labels come from --model and --text together, or from --import; give one of the two.")
    source = commands.Source(model or "", tuple(dictionaries), "", device, allow_download)
    if explanations is not None:
        _finish(commands.import_command(source, explanations, quiet=as_json), as_json)
    else:
        _finish(commands.label_command(source, text or [], tokens, meta, quiet=as_json), as_json)


@app.command(epilog="Example: mediation organism --seed 7 --out organisms/7 --family shaped")
def organism(
    out: Annotated[Path, typer.Option(help="Folder to make; must not hold anything yet.")],
    seed: Annotated[int, typer.Option(min=0, help="Everything about the organism follows from it.")] = 0,
    family: Annotated[str, typer.Option(help="shaped, natural or null.")] = "shaped",
    as_json: Json = False,
) -> None:
    """Make a model organism: a small model with planted facts, its SAEs and its meta-SAE."""
    commands = _commands()

    _finish(commands.organism_command(seed, out, family, quiet=as_json), as_json)


@train.command(
    epilog="Example: mediation train saes --model smollm2 --sites blocks.9.hook_resid_pre "
    "--sites blocks.15.hook_resid_pre --text corpus.txt --tokens 2000000 --out packs/mine"
)
def saes(
    model: Annotated[str, typer.Option(help="Hugging Face name, local folder, .gguf file, or smollm2.")],
    sites: Annotated[list[str], typer.Option(help="SAELens hook name or module path; repeat.")],
    out: Annotated[Path, typer.Option(help="Folder for one SAE a site; a killed training goes on from there.")],
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text files; repeat.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hugging Face dataset or folder, column `text`.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on.")] = 10_000_000,
    d_sae: Annotated[int, typer.Option(min=1, help="Latents of each dictionary.")] = 8192,
    k: Annotated[int, typer.Option(min=1, help="Active latents a token, on average.")] = 64,
    architecture: Annotated[str, typer.Option(help="batchtopk, matryoshka or topk.")] = "batchtopk",
    lr: Annotated[float, typer.Option(help="Learning rate, on activations scaled to norm sqrt(d_model).")] = 1e-3,
    batch: Annotated[int, typer.Option(min=1, help="Tokens of a training step.")] = 4096,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 128,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")] = None,
    allow_download: Annotated[bool, typer.Option(help="Let the model be fetched from the Hugging Face hub.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """SAEs at several sites from one pass over a text, in bounded memory; resumes after a kill."""
    training = _commands("mediation.training.commands")

    corpus = training.Corpus(tuple(text or ()), dataset, tokens, context, seed)
    chosen = {"d_sae": d_sae, "k": k, "architecture": architecture, "lr": lr, "batch": batch, "seed": seed}
    _finish(training.saes_command(model, sites, corpus, out, chosen, device, allow_download, quiet=as_json), as_json)


@bench.command(epilog="Example: mediation bench planted --seeds 100-102 --work runs/planted --json")
def planted(
    families: Annotated[str, typer.Option(help="Families of organisms, by commas; or all.")] = "all",
    seeds: Annotated[str, typer.Option(help="Seeds of the organisms, FIRST-LAST.")] = "0-2",
    work: Annotated[
        Path | None, typer.Option(help="Folder that keeps each organism's scores; the same command goes on there.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest worlds.")] = False,
    organism: Annotated[
        Path | None, typer.Option(help="Score this folder, which `mediation organism` made, and nothing else.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="With --organism: opinion prompts that are scored.")] = 300,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Is the fact behind a reply named right, flagged and proven? On organisms made here, against baselines."""
    commands = _commands()

    if organism is not None:
        _finish(commands.planted_command(organism, prompts, seed, quiet=as_json), as_json)
    else:
        _finish(commands.bench_planted_command(families, seeds, work, quick=quick, quiet=as_json), as_json)


@bench.command(name="meta", epilog="Example: mediation bench meta --quick --json")
def bench_meta(
    quick: Annotated[bool, typer.Option("--quick", help="A few settings and seeds, under a minute.")] = False,
    as_json: Json = False,
) -> None:
    """Are the facts planted in decoder rows named right? Ways to decompose rows, over kinds of rows."""
    commands = _commands()

    _finish(commands.bench_meta_command(quick=quick, quiet=as_json), as_json)


@bench.command(name="facts", epilog="Example: mediation bench facts --model smollm2 --saes packs/smollm2 --json")
def bench_facts(
    model: Annotated[str, typer.Option(help="Hugging Face name, local folder, .gguf file, or smollm2.")],
    saes: Annotated[list[str], typer.Option(help="SAE folder, folder of them, or RELEASE:SAE_ID; repeat.")],
    meta: Annotated[
        list[Path] | None, typer.Option(help="Meta-SAE folder, or folder of them; without one it is trained.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="MEDIATION_DATA", help="Folder with ravel/ (cities, laureates), pararel/ (wordings)."),
    ] = None,
    entities: Annotated[
        str, typer.Option(help="countries, cities (either also: ... of two tokens), or laureates.")
    ] = "countries",
    quick: Annotated[bool, typer.Option("--quick", help="Few pairs and ways, under 3 minutes.")] = False,
    pairs: Annotated[int | None, typer.Option(min=4, help="Pairs of held-out entities; default: 48.")] = None,
    width: Annotated[int | None, typer.Option(min=2, help="Meta-latents of the readings; default: 100.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Only these ways to take latents apart; repeat.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Which part of an entity's latents answers which question about it? On held-out entities, by intervention."""
    commands = _commands()

    source = commands.Source(model, tuple(saes), entities)
    chosen = {"pairs": pairs, "width": width, "only": tuple(way) if way else None, "seed": seed}
    _finish(commands.bench_facts_command(source, meta or [], data, chosen, quick=quick, quiet=as_json), as_json)


@bench.command(
    name="absorption",
    epilog="Example: mediation bench absorption --model smollm2 --saes packs/smollm2 --meta packs/smollm2/meta "
    "--data DATA --text books.txt --json",
)
def bench_absorption(
    model: Annotated[str, typer.Option(help="Hugging Face name, local folder, .gguf file, or smollm2.")],
    saes: Annotated[list[str], typer.Option(help="SAE folder, folder of them, or RELEASE:SAE_ID; repeat.")],
    meta: Annotated[list[Path] | None, typer.Option(help="Meta-SAE folder, or folder of them; repeat.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="MEDIATION_DATA", help="Folder with spelling/, and pararel/ for more wordings."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text, for small dictionaries and contexts; repeat.")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help="letters, concepts, wordings or anomalies; repeat.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, under three minutes.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Are latents silent where they ought to fire? First letters, other concepts, other wordings, anomalies."""
    commands = _commands()

    source = commands.Source(model, tuple(saes), "words")
    inputs = {"metas": meta or [], "data": data, "texts": text or [], "parts": tuple(part or ())}
    _finish(commands.bench_absorption_command(source, inputs, seed, quick=quick, quiet=as_json), as_json)


@train.command(name="meta", epilog="Example: mediation train meta packs/layer-15 --out packs/layer-15-meta")
def train_meta(
    dictionaries: Annotated[list[Path], typer.Argument(help="SAE folders, or a folder of them; several are pooled.")],
    out: Annotated[Path, typer.Option(help="Folder to make; must not hold anything yet.")],
    width: Annotated[int | None, typer.Option(min=2, help="Meta-latents; default: found from the rows.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Meta-latents per row; default: found from the rows.")] = None,
    weights: Annotated[
        str, typer.Option(help="Rows count alike (uniform), or as often as they fire (use).")
    ] = "uniform",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """A meta-dictionary of decoder rows: the facts they share, against a null of rows that share nothing."""
    training = _commands("mediation.training.commands")

    chosen = {"width": width, "k": k, "weights": weights, "seed": seed}
    _finish(training.train_meta_command(dictionaries, out, chosen, quiet=as_json), as_json)


def _commands(module: str = "mediation.commands") -> Any:
    """The code behind the commands. Imported when one runs, so that help is quick."""
    import_module("mediation.products").use_fast_products()
    return import_module(module)


def _finish(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, allow_nan=False))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a MediationError becomes one sentence and exit code 2."""
    run: Callable[..., Any] = app
    try:
        run(arguments)
    except MediationError as error:
        print(f"mediation: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as stop:  # click ends a good command this way too, which a caller in Python does not expect
        if stop.code:
            raise


if __name__ == "__main__":
    main()
