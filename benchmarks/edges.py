"""Edges of an attribution graph by several algorithms, side by side in one run, on the same nodes, with equal results.

    python benchmarks/edges.py > edges.json
    python benchmarks/edges.py --model smollm2 --saes examples/packs/smollm2 --text FILE > edges.json

With a text, the prompts are beginnings of its paragraphs, of 16 to 64 tokens in even steps, under the zero baseline.

1. `ours`: circuits.edges.
2. `sparse_feature_circuits`: the loop of Marks et al. 2024 as `attribution.jvp` of their repository has it. For each
   pair of neighbouring sites a forward pass of the whole model with both dictionaries in the graph (the site goes on as
   reconstruction plus error, the error's gradient set to zero), then for each downstream latent one `backward`, which
   runs from there to the embeddings, over the whole batch of prompts and into the parameters, none of which are frozen;
   the gradient of the upstream latents is dense, [B, T, d_sae], and so is its product with their change. Prompts are
   batched as theirs are, at their smallest default of two (`get_circuit_cluster`; their scripts use 6 to 20).
3. `one_backward_per_target`: the same idea, given what is ours to give: one forward with sites cut from one another,
   parameters frozen, only active decoder rows, and for each target one pass for all upstream sites together.
4. `one_prompt_repeated`: the loop of circuit-tracer (Ameisen et al. 2025), `AttributionContext.compute_batch`. A prompt
   is run in B equal copies; targets of any layers, in order of influence (here shuffled), are injected one into each
   copy; one backward pass runs from the deepest layer through the whole model to the embeddings, contracting at every
   site. They attach transcoders to a model with frozen MLPs; here it is given sites cut from one another, frozen
   parameters and, as theirs has, only active decoder rows.
5. `one_prompt_repeated_in_order`: the same with targets in order of their places, so that a pass runs only through the
   stretches of its own targets.

6. `ours_in_bf16`: ours with products whose factors are rounded to bf16, which is not on offer: see its `drift`, the
   norm of the change over that of the edges.

All methods' fp32 products run as `mediation` runs them (mediation.products), or, with `--plain-products`, as PyTorch
does by itself. A method's time has its forward passes in it. Every method's edges are compared with ours before a time
is printed. Repeats alternate between the methods and their median counts; with one thread it is processor time, so
that other programs on the machine do not count. `sparse_feature_circuits` runs once, over the set in batches of two
prompts, neighbours in length, or of `--batch`. `share_of_peak` is the floor of operations in
circuits.edges over the time, beside a matrix product of this machine in this run. `nodes` compares node attribution of
the set with a bare forward and backward pass of the model, parameters frozen and last-position logits only.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mediation
from circuits.edges import REST, Edges, Sources, Targets, edges, first_sources
from mediation.commands import Source, load_dictionaries
from mediation.dictionaries import Dictionary
from mediation.estimators.common import contract as contract_nodes
from mediation.estimators.common import states_and_gradients
from mediation.loading import ARCHITECTURES
from mediation.nodes import site_states
from mediation.products import use_fast_products
from mediation.prompts import Baseline, Batch, PromptSet, batches, collate, tokenize
from mediation.sites import RESIDUAL, Site, Stream
from mediation.subject import SubjectModel

PARTS = ("one_prompt", "set", "nodes")
ORGANISM = Path(mediation.__file__).parent / "organisms" / "default"


@dataclass
class Task:
    """A batch with its sources, in execution order, and the targets of each place."""

    batch: Batch
    dictionaries: list[Dictionary]
    sources: list[Sources]
    targets: list[Targets]


def make_task(model: SubjectModel, batch: Batch, dictionaries: list, per_site: int, baseline: Baseline) -> Task:
    """Of every site and prompt, `per_site` of the latents that are on as targets, evenly spread."""
    states = site_states(model, batch, dictionaries, baseline)
    sources = [Sources.embeddings(model, batch, baseline)] + [Sources.of(state) for state in states]
    targets = []
    for state in states:
        chosen = []
        for row in range(len(batch)):
            mine = ((state.row == row) & (state.clean != 0)).nonzero()[:, 0]
            chosen.append(mine[torch.linspace(0, len(mine) - 1, min(per_site, len(mine))).long()])
        targets.append(Targets.latents(state, torch.zeros_like(state.x), torch.cat(chosen)))
    return Task(batch, dictionaries, sources, targets)


# Every method yields, for a target of a place, its edges from all sources: {(place, target): {source: weights}}, the
# weights [n] over the row's latents at that source, in the source's order, then its free positions.
Found = dict[tuple[int, int], dict[int, Tensor]]


def contract(sources: Sources, row: int, pulled: Tensor, last: Tensor) -> Tensor:
    """Edges [c, n] of c targets of one row at positions `last` [c] from gradients `pulled` [c, T, d] at a site."""
    mine = sources.row == row
    position, latent, delta = sources.position[mine], sources.latent[mine], sources.delta[mine]
    free = sources.free[row].nonzero()[:, 0]
    active = sources.decoder[latent] * delta[:, None]
    weights = torch.cat(
        [
            torch.einsum("cnd,nd->cn", pulled[:, position], active),
            torch.einsum("cnd,nd->cn", pulled[:, free], sources.rest[row, free]),
        ],
        dim=1,
    )
    return torch.where(torch.cat([position, free]) <= last[:, None], weights, 0.0)


def cut_forward(model: SubjectModel, task: Task, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Values of the targets' places and leaves of the sources on copies of prompts, every site cut."""
    batch = task.batch.rows(rows)
    length = int(batch.mask.sum(1).max())
    sites = [each.site for each in task.sources]
    places = [each.place for each in task.targets if isinstance(each.place, Site)]
    run = model.forward(
        batch.clean[:, :length], batch.mask[:, :length], read=places, cut=sites, grad=True, logits=False
    )
    return [run.sites[each.place] for each in task.targets], [run.leaves[site] for site in sites]  # type: ignore[index]


def sparse_feature_circuits(model: SubjectModel, tasks: list[Task], _: int) -> list[Found]:
    """For residual dictionaries without run-time normalisation; the embeddings are a source without a dictionary."""
    for parameter in model.module.parameters():
        parameter.requires_grad_(True)
    every = []
    for task in tasks:
        found: Found = {}
        for place, targets in enumerate(task.targets):
            (own,) = (i for i, each in enumerate(task.sources) if i > 0 and each.site == targets.place)
            for k, weights in enumerate(one_pair(model, task, own - 1, targets)):
                found[place, k] = {own - 1: weights}
        every.append(found)
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return every


def one_pair(model: SubjectModel, task: Task, source: int, targets: Targets) -> list[Tensor]:
    """Their `jvp` from a source to the next site's targets, on a batch of prompts: weights [n] for each target."""
    sources = task.sources[source]
    blocks = model.module.get_submodule(ARCHITECTURES[model.architecture].blocks)
    up = task.dictionaries[source - 1] if source > 0 else None
    down = next(each for each in task.dictionaries if each.site == targets.place)
    kept: dict[str, Tensor] = {}

    def upstream(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if up is not None:
            kept["f"] = up.encode(x)
            kept["f"].retain_grad()
            x_hat = kept["f"] @ up.decoder + up.b_dec
            error = x - x_hat
            error.register_hook(torch.zeros_like)
            x = x_hat + error
        kept["x"] = x
        kept["x"].retain_grad()
        return (x, *args[1:])

    def downstream(_: Any, args: tuple[Any, ...]) -> None:
        kept["g"] = down.encode(args[0])

    hooks = [
        blocks[sources.site.layer].register_forward_pre_hook(upstream),
        blocks[down.site.layer].register_forward_pre_hook(downstream),
    ]
    model.module(input_ids=task.batch.clean, use_cache=False, logits_to_keep=1)  # padding is on the right, and causal
    for hook in hooks:
        hook.remove()
    change = torch.zeros(*task.batch.clean.shape, sources.decoder.shape[0])
    change[sources.row, sources.position, sources.latent] = sources.delta
    rows = []
    for k, (row, at) in enumerate(zip(targets.row.tolist(), targets.position.tolist(), strict=True)):
        kept["x"].grad = None
        if up is not None:
            kept["f"].grad = None
        kept["g"][row, at, int(targets.names[k].rsplit("/", 1)[1])].backward(retain_graph=True)
        mine, free = sources.row == row, sources.free[row].nonzero()[:, 0]
        position, latent = sources.position[mine], sources.latent[mine]
        of_latents = (kept["f"].grad * change)[row, position, latent] if up is not None else sources.delta[mine]
        of_rest = (kept["x"].grad * sources.rest).sum(-1)[row, free]
        rows.append(torch.where(torch.cat([position, free]) <= at, torch.cat([of_latents, of_rest]), 0.0))
    return rows


def one_backward_per_target(model: SubjectModel, tasks: list[Task], _: int) -> list[Found]:
    every = []
    for task in tasks:
        found: Found = {}
        for row in range(len(task.batch)):
            values, leaves = cut_forward(model, task, torch.tensor([row]))
            for place, targets in enumerate(task.targets):
                for k in (targets.row == row).nonzero()[:, 0].tolist():
                    read = values[place][0, targets.position[k]] @ targets.vector[k]
                    pulled = torch.autograd.grad(read, leaves, retain_graph=True, allow_unused=True)
                    last = targets.position[k : k + 1]
                    found[place, k] = {
                        index: contract(task.sources[index], row, each, last)[0]
                        for index, each in enumerate(pulled)
                        if each is not None
                    }
        every.append(found)
    return every


def one_prompt_repeated(model: SubjectModel, tasks: list[Task], copies: int, *, in_order: bool = False) -> list[Found]:
    every = []
    for task in tasks:
        found: Found = {}
        for row in range(len(task.batch)):
            wanted = [
                (place, k)
                for place, targets in enumerate(task.targets)
                for k in (targets.row == row).nonzero()[:, 0].tolist()
            ]
            if not in_order:
                random.Random(0).shuffle(wanted)
            most = min(copies, len(wanted))
            values, leaves = cut_forward(model, task, torch.full((most,), row))
            for start in range(0, len(wanted), most):
                part = wanted[start : start + most]
                here = sorted({place for place, _ in part}) if in_order else range(max(part)[0] + 1)
                seeds = {place: torch.zeros_like(values[place]) for place in here}
                for copy, (place, k) in enumerate(part):
                    targets = task.targets[place]
                    seeds[place][copy, targets.position[k]] = targets.vector[k]
                ends = [values[place] for place in here]
                pulled = torch.autograd.grad(ends, leaves, list(seeds.values()), retain_graph=True, allow_unused=True)
                last = torch.stack([task.targets[place].position[k] for place, k in part])
                for index, each in enumerate(pulled):
                    if each is None:
                        continue
                    weights = contract(task.sources[index], row, each[: len(part)], last)
                    for target, weight in zip(part, weights, strict=True):
                        found.setdefault(target, {})[index] = weight
        every.append(found)
    return every


def one_prompt_repeated_in_order(model: SubjectModel, tasks: list[Task], copies: int) -> list[Found]:
    return one_prompt_repeated(model, tasks, copies, in_order=True)


def ours(model: SubjectModel, tasks: list[Task], chunk: int) -> list[Edges]:
    return [edges(model, task.batch, task.sources, task.targets, chunk=chunk) for task in tasks]


def ours_in_bf16(model: SubjectModel, tasks: list[Task], chunk: int) -> list[Edges]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    found = ours(model, tasks, chunk)
    matmul.fp32_precision = before
    return found


def drift(reference: list[Edges], found: list[Edges]) -> float:
    exact, other = (torch.cat([each.weight for each in edges]) for edges in (reference, found))
    return float((other - exact).norm() / exact.norm())


def same(task: Task, reference: Edges, found: Found) -> float:
    """Largest difference of any edge, as a share of the largest edge; edges that one side lacks count as zero."""
    worst, largest, start = 0.0, float(reference.weight.abs().max()), 0
    for place, targets in enumerate(task.targets):
        for k in range(len(targets)):
            row, mine = int(targets.row[k]), reference.target == start + k
            for index, sources in enumerate(task.sources):
                at = (sources.row == row).nonzero()[:, 0]
                free = sources.free[row].nonzero()[:, 0]
                names = [*zip(sources.position[at].tolist(), sources.latent[at].tolist(), strict=True)]
                names += [(position, REST) for position in free.tolist()]
                where = mine & (reference.source == index)
                known = zip(reference.position[where].tolist(), reference.latent[where].tolist(), strict=True)
                weights = dict(zip(known, reference.weight[where].tolist(), strict=True))
                expected = torch.tensor([weights.get(name, 0.0) for name in names])
                measured = found[place, k].get(index, torch.zeros(len(names)))
                worst = max(worst, float((expected - measured).abs().max()) if names else 0.0)
        start += len(targets)
    return worst / largest


# Operations ----------------------------------------------------------------------------------------------------------


def floor(model: SubjectModel, task: Task) -> float:
    """Floating-point operations that the edges need at the least (see circuits.edges), forward passes left out."""
    names = [each.site for each in task.sources]
    total = 0.0
    for targets in task.targets:
        assert isinstance(targets.place, Site)
        reach = [i for i, site in enumerate(names) if site.depth < targets.place.depth]
        walls = [i for i in reach if names[i].stream in RESIDUAL]
        reach = [i for i in reach if not walls or i >= walls[-1]]
        weights = sum(crossed(model, names, names[reach[0]], targets.place)) if reach else 0
        layers = targets.place.layer - names[reach[0]].layer if reach else 0
        for row, begin in enumerate(first_sources(task.sources, task.batch).tolist()):
            for last in targets.position[targets.row == row].tolist():
                tokens, nodes = last + 1 - begin, 0
                for i in reach:
                    source = task.sources[i]
                    nodes += int(((source.row == row) & (source.position <= last)).sum())
                    nodes += int(source.free[row, : last + 1].sum())
                attention = 4 * layers * tokens * (last + 1) * model.d_model
                total += 2 * weights * tokens + 2 * nodes * model.d_model + attention
    return total


def crossed(model: SubjectModel, cut: list[Site], start: Site, end: Site) -> Iterator[int]:
    """Sizes of the modules that paths from `start` to `end` run through: those whose output is not itself cut."""
    for layer in range(model.n_layers):
        for stream in (Stream.ATTN_OUT, Stream.MLP_OUT):
            site = Site(layer, stream)
            if start.depth < site.depth <= end.depth and (site == end or site not in cut):
                path = model._paths[site]
                yield sum(each.numel() for each in model.module.get_submodule(path).parameters())


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak(repeats: int = 20) -> float:
    """Operations per second of a large fp32 matrix product here and now."""
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(repeats):
        start = clock()
        a @ a
        times.append(clock() - start)
    return 2 * 1024**3 / min(times)


def alternating(calls: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Last result and median seconds of each call, all of them in turn, `repeats` times."""
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            results[name] = call()
            seconds[name].append(clock() - start)
    return results, {name: statistics.median(each) for name, each in seconds.items()}


Method = Callable[[SubjectModel, list[Task], int], list[Found]]
METHODS: list[Method] = [one_backward_per_target, one_prompt_repeated, one_prompt_repeated_in_order]


def compare(model: SubjectModel, tasks: list[Task], pairs: list[Task], chunk: int, repeats: int) -> dict[str, Any]:
    """Times of all methods on the same targets; raises AssertionError where their edges differ.

    `pairs` are the same prompts in the batches that sparse feature circuits takes them in.
    """
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: ours(model, tasks, chunk)}
    calls |= {each.__name__: lambda each=each: each(model, tasks, chunk) for each in METHODS}
    calls["ours_in_bf16"] = lambda: ours_in_bf16(model, tasks, chunk)
    results, seconds = alternating(calls, repeats)
    literal = {"sparse_feature_circuits": lambda: sparse_feature_circuits(model, pairs, chunk)}
    for found, times in zip((results, seconds), alternating(literal, 1), strict=True):
        found.update(times)  # type: ignore[arg-type]
    rate, operations = peak(), sum(floor(model, task) for task in tasks)
    result: dict[str, Any] = {
        "prompts": sum(len(task.batch) for task in tasks),
        "tokens": sum(int(task.batch.mask.sum()) for task in tasks),
        "targets": targets_of(tasks),
        "edges": sum(len(each.weight) for each in results["ours"]),
        "floor_gflop": operations / 1e9,
        "peak_gflops": rate / 1e9,
        "ours": {"seconds": seconds["ours"], "share_of_peak": operations / seconds["ours"] / rate},
    }
    seconds_in_bf16 = seconds["ours_in_bf16"]
    result["ours_in_bf16"] = {
        "seconds": seconds_in_bf16,
        "times_ours": seconds_in_bf16 / seconds["ours"],
        "drift": drift(results["ours"], results["ours_in_bf16"]),
    }
    for name in [*(each.__name__ for each in METHODS), *literal]:
        made = pairs if name in literal else tasks
        reference = ours(model, pairs, chunk) if name in literal else results["ours"]
        gap = max(same(*each) for each in zip(made, reference, results[name], strict=True))
        assert gap < 1e-4, f"{name} differs from ours by {gap:.1e} of the largest edge"
        result[name] = {
            "seconds": seconds[name],
            "times_ours": seconds[name] / seconds["ours"],
            "largest_difference": gap,
        }
    return result


def targets_of(tasks: list[Task]) -> int:
    return sum(len(each) for task in tasks for each in task.targets)


def node_attribution(
    model: SubjectModel, prepared: list[Batch], dictionaries: list[Dictionary], baseline: Baseline, repeats: int
) -> dict[str, Any]:
    """Attribution of all nodes of the set beside a bare forward and backward pass, and the parts it is made of."""

    def attributed() -> None:
        for batch in prepared:
            states, gradients = states_and_gradients(model, batch, dictionaries, baseline)
            for state, gradient in zip(states, gradients, strict=True):
                contract_nodes(state, gradient)

    def bare() -> None:
        table = model.module.get_input_embeddings()
        for batch in prepared:
            embedded = table(batch.clean).requires_grad_()
            kept = batch.target_positions.unique()
            mask = batch.mask.long()
            out = model.module(inputs_embeds=embedded, attention_mask=mask, use_cache=False, logits_to_keep=kept)
            torch.autograd.grad(out.logits.sum(), embedded)

    def corrupt() -> None:
        for batch in prepared:
            if batch.corrupt is not None:
                with torch.no_grad():
                    model.module(batch.corrupt, attention_mask=batch.mask.long(), use_cache=False, logits_to_keep=1)

    _, seconds = alternating({"ours": attributed, "bare": bare, "corrupt_forward": corrupt}, repeats)
    return {
        **seconds,
        "times_bare": seconds["ours"] / seconds["bare"],
        "times_bare_with_corrupt": seconds["ours"] / (seconds["bare"] + seconds["corrupt_forward"]),
    }


def paragraphs(model: SubjectModel, file: Path, number: int) -> PromptSet:
    """Beginnings of paragraphs of a text, of 16 to 64 tokens in even steps."""
    found = [" ".join(each.split()) for each in file.read_text(encoding="utf-8").split("\n\n")]
    long = [each for each in found if len(model.encode(each)) >= 64][:number]
    rows = []
    for index, text in enumerate(long):
        words, most = text.split(" "), 16 + round(48 * index / max(1, number - 1))
        while len(model.encode(" ".join(words))) > most:
            words.pop()
        rows.append({"id": str(index), "clean": " ".join(words), "answer": " the", "wrong_answer": " a"})
    return PromptSet.from_rows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ORGANISM / "model"), help="folder, or smollm2")
    parser.add_argument("--saes", nargs="+", default=[str(ORGANISM / "saes")])
    parser.add_argument("--prompts", default=str(ORGANISM / "prompts.jsonl"))
    parser.add_argument("--text", type=Path, help="make the prompts from this text instead")
    parser.add_argument("--baseline", type=Baseline, default=Baseline.CORRUPT, choices=list(Baseline))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--number", type=int, default=16, help="prompts in the set")
    parser.add_argument("--per-site", type=int, default=16, help="targets of each prompt and site")
    parser.add_argument("--chunk", type=int, default=32, help="copies in a pass, of all methods")
    parser.add_argument("--batch", type=int, default=2, help="prompts in a batch of sparse feature circuits")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plain-products", action="store_true", help="leave fp32 products to PyTorch's choice")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    fast = not chosen.plain_products and use_fast_products()

    source = Source(chosen.model, tuple(chosen.saes), chosen.prompts, "cpu")
    model = SubjectModel.load(chosen.model, device="cpu")
    dictionaries = load_dictionaries(source, "cpu")
    if chosen.text is not None:
        prompts, chosen.baseline = paragraphs(model, chosen.text, chosen.number), Baseline.ZERO
    else:
        prompts = PromptSet.from_jsonl(chosen.prompts)[: chosen.number]
    examples = tokenize(prompts, model, baseline=chosen.baseline)

    def task(batch: Batch) -> Task:
        return make_task(model, batch, dictionaries, chosen.per_site, chosen.baseline)

    longest = collate([max(examples, key=len)])
    made, pairs = (list(batches(examples, size)) for size in (chosen.number, chosen.batch))
    result = {
        "model": model.name,
        "sites": [each.site.name for each in dictionaries],
        "settings": {
            **vars(chosen),
            "products_by_onednn": fast,
            "model": model.name,
            "saes": len(dictionaries),
            "prompts": Path(chosen.prompts).name,
            "text": chosen.text and chosen.text.name,
        },
    }
    if "one_prompt" in chosen.parts:
        result["one_prompt"] = compare(model, *[[task(longest)]] * 2, chosen.chunk, chosen.repeats)
    if "set" in chosen.parts:
        both = (list(map(task, each)) for each in (made, pairs))
        result["set"] = compare(model, *both, chosen.chunk, chosen.repeats)
    if "nodes" in chosen.parts:
        result["nodes"] = node_attribution(model, made, dictionaries, chosen.baseline, chosen.repeats)
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
