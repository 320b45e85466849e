"""Edges of an attribution graph three ways, side by side in one run, on the same nodes, with equal results.

    python benchmarks/edges.py > edges.json
    python benchmarks/edges.py --model smollm2 --saes PACK/saes --prompts prompts.jsonl --threads 2 > edges.json

1. `ours`: circuits.edges, different prompts and targets packed into one backward pass.
2. `one_backward_per_target`: the algorithm of sparse feature circuits (Marks et al. 2024).
3. `one_prompt_repeated`: the algorithm of circuit-tracer (Ameisen et al. 2025): a prompt is run in B equal copies,
   one target's gradient is injected into each, and one backward pass goes through the whole model.

Both baselines are written out plainly below. They are given what is ours to give: the sites cut from one another,
frozen parameters, only active decoder rows, and per target one pass for all upstream sites together. A method's time
has its forward passes in it. Every method's edges are compared with ours before a time is printed. The share of peak
is the floor of operations in circuits.edges over the time, beside a matrix product of this machine in this run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mediation
from circuits.edges import REST, Edges, Sources, Targets, edges
from mediation.commands import Source, load_dictionaries
from mediation.nodes import site_states
from mediation.prompts import Baseline, Batch, PromptSet, batches, collate, tokenize
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel

ORGANISM = Path(mediation.__file__).parent / "organisms" / "default"
RESIDUAL = (Stream.RESID_PRE, Stream.RESID_POST)


@dataclass
class Task:
    """A batch with its sources, in execution order, and the targets of each place."""

    batch: Batch
    sources: list[Sources]
    targets: list[Targets]


def make_task(model: SubjectModel, batch: Batch, dictionaries: list, per_site: int, baseline: Baseline) -> Task:
    """Of every site and prompt, `per_site` of its nodes as targets, evenly spread."""
    states = site_states(model, batch, dictionaries, baseline)
    sources = [Sources.embeddings(model, batch, baseline)] + [Sources.of(state) for state in states]
    targets = []
    for state in states:
        chosen = []
        for row in range(len(batch)):
            mine = (state.row == row).nonzero()[:, 0]
            chosen.append(mine[torch.linspace(0, len(mine) - 1, min(per_site, len(mine))).long()])
        targets.append(Targets.latents(state, torch.zeros_like(state.x), torch.cat(chosen)))
    return Task(batch, sources, targets)


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
    run = model.forward(batch.clean[:, :length], batch.mask[:, :length], cut=sites, grad=True, logits=False)
    return [run.sites[each.place] for each in task.targets], [run.leaves[site] for site in sites]  # type: ignore[index]


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


def one_prompt_repeated(model: SubjectModel, tasks: list[Task], copies: int) -> list[Found]:
    every = []
    for task in tasks:
        found: Found = {}
        for row in range(len(task.batch)):
            wanted = [
                (place, k)
                for place, targets in enumerate(task.targets)
                for k in (targets.row == row).nonzero()[:, 0].tolist()
            ]
            values, leaves = cut_forward(model, task, torch.full((copies,), row))
            for start in range(0, len(wanted), copies):
                part = wanted[start : start + copies]
                seeds = [torch.zeros_like(value) for value in values]
                for copy, (place, k) in enumerate(part):
                    targets = task.targets[place]
                    seeds[place][copy, targets.position[k]] = targets.vector[k]
                pulled = torch.autograd.grad(values, leaves, seeds, retain_graph=True, allow_unused=True)
                last = torch.stack([task.targets[place].position[k] for place, k in part])
                for index, each in enumerate(pulled):
                    if each is None:
                        continue
                    weights = contract(task.sources[index], row, each[: len(part)], last)
                    for target, weight in zip(part, weights, strict=True):
                        found.setdefault(target, {})[index] = weight
        every.append(found)
    return every


def ours(model: SubjectModel, tasks: list[Task], chunk: int) -> list[Edges]:
    return [edges(model, task.batch, task.sources, task.targets, chunk=chunk) for task in tasks]


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
        for row in range(len(task.batch)):
            tokens = int(task.batch.mask[row].sum())
            nodes = sum(int((task.sources[i].row == row).sum() + task.sources[i].free[row].sum()) for i in reach)
            n = int((targets.row == row).sum())
            total += n * (2 * weights * tokens + 2 * nodes * model.d_model)
    return total


def crossed(model: SubjectModel, cut: list[Site], start: Site, end: Site) -> Iterator[int]:
    """Sizes of the modules that paths from `start` to `end` run through: those whose output is not itself cut."""
    for layer in range(model.n_layers):
        for stream in (Stream.ATTN_OUT, Stream.MLP_OUT):
            site = Site(layer, stream)
            if start.depth < site.depth <= end.depth and (site == end or site not in cut):
                path = model._paths[site]
                yield sum(each.numel() for each in model.module.get_submodule(path).parameters())


def peak(seconds: float = 1.0) -> float:
    """Operations per second of a large fp32 matrix product here and now."""
    a = torch.randn(1024, 1024)
    best, end = 0.0, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        a @ a
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return result, best


def compare(model: SubjectModel, tasks: list[Task], chunk: int, repeats: int) -> dict[str, Any]:
    """Times of the three methods on the same targets; raises AssertionError where their edges differ."""
    reference, seconds = timed(lambda: ours(model, tasks, chunk), repeats)
    operations = sum(floor(model, task) for task in tasks)
    result: dict[str, Any] = {
        "prompts": sum(len(task.batch) for task in tasks),
        "tokens": sum(int(task.batch.mask.sum()) for task in tasks),
        "targets": sum(len(each) for task in tasks for each in task.targets),
        "edges": sum(len(each.weight) for each in reference),
        "floor_gflop": operations / 1e9,
        "ours": {
            "seconds": seconds,
            "gflops": operations / seconds / 1e9,
            "share_of_peak": operations / seconds / peak(),
        },
    }
    for method in (one_backward_per_target, one_prompt_repeated):
        found, taken = timed(lambda method=method: method(model, tasks, chunk), repeats)
        gap = max(same(*each) for each in zip(tasks, reference, found, strict=True))
        assert gap < 1e-4, f"{method.__name__} differs from ours by {gap:.1e} of the largest edge"
        result[method.__name__] = {"seconds": taken, "times_ours": taken / seconds, "largest_difference": gap}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ORGANISM / "model"), help="folder, or smollm2")
    parser.add_argument("--saes", nargs="+", default=[str(ORGANISM / "saes")])
    parser.add_argument("--prompts", default=str(ORGANISM / "prompts.jsonl"))
    parser.add_argument("--baseline", type=Baseline, default=Baseline.CORRUPT, choices=list(Baseline))
    parser.add_argument("--number", type=int, default=16, help="prompts in the set")
    parser.add_argument("--per-site", type=int, default=16, help="targets of each prompt and site")
    parser.add_argument("--chunk", type=int, default=16, help="copies in a pass, of all methods")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)

    source = Source(chosen.model, tuple(chosen.saes), chosen.prompts, "cpu")
    model = SubjectModel.load(chosen.model, device="cpu")
    dictionaries = load_dictionaries(source, "cpu")
    prompts = PromptSet.from_jsonl(chosen.prompts)[: chosen.number]
    examples = tokenize(prompts, model, baseline=chosen.baseline)

    def task(batch: Batch) -> Task:
        return make_task(model, batch, dictionaries, chosen.per_site, chosen.baseline)

    result = {
        "model": model.name,
        "sites": [each.site.name for each in dictionaries],
        "settings": {
            **vars(chosen),
            "model": model.name,
            "saes": len(dictionaries),
            "prompts": Path(chosen.prompts).name,
        },
        "one_prompt": compare(model, [task(collate([max(examples, key=len)]))], chosen.chunk, chosen.repeats),
        "set": compare(model, [task(each) for each in batches(examples, chosen.chunk)], chosen.chunk, chosen.repeats),
    }
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
