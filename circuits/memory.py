"""What a trace and its graph will hold in memory and take in time, before they run; and the batch that fits.

Algorithm
1. Probe. One forward pass with gradients of two short sequences, and one of half their length. Every tensor that
   the graph saves for its backward is counted once, parameters left out: a quadratic in the length (attention
   matrices are the quadratic part, where the kernel keeps them) is what one sequence of any length holds. The
   probe's time is the time of a forward pass; the first prompt's latents say how many are on at a token.
2. Predict. Each phase's bytes are a sum over what it holds at its peak: node attribution a whole batch's graph, the
   sites' states, their latents and, a piece at a time, a dictionary's dense latents; exact patching the patched
   sequences of the sample, fidelity the logits at all positions; edges the graph of a job's prompts, the gradients of
   the targets (up to `chunk` sequences at once in either) and the gathered decoder rows. The peak is what the process
   holds already, what libraries add, and the largest phase.
3. Fit. The phase that is over the budget has its batch or its chunk halved, until all are under it. Neither changes
   a result (tests/circuits/test_memory.py), so only speed is traded.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

import psutil
import torch
from torch import Tensor

from circuits.build import KEEP, KEPT_PART
from circuits.edges import EMBEDDING_SITE, GATHERED, SEEDS
from mediation.behaviours import keep_positions
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.estimators import Estimator
from mediation.heads import Heads
from mediation.nodes import ENCODE_TOKENS, first_free, free_positions
from mediation.prompts import Baseline, Batch, Example, batches
from mediation.sites import RESIDUAL, Site
from mediation.subject import SubjectModel
from mediation.trace import Prepared, TraceSettings, role_of

SHARE = 0.8  # of the free memory that is used where no budget is given
PROBE = 64  # tokens of the probe's longer sequence
FLOAT = 4
LIBRARIES = 250 * 2**20  # what the libraries that write tables and graphs take once they are in use
EDGE = 200  # bytes of an edge in the tables of a batch
ON = 0.1  # of a role's positions, at how many a latent of the graph is on: .05 to .15 on SmolLM2
NODE = 300  # bytes of a latent node in states, scores and the tables of one site's shard
DENSE = 7  # copies of a piece's dense latents while it is encoded
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Cost:
    """What a run will take: `phases` are the bytes of each over what the process `held` before it."""

    seconds: float
    held: float
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes at the run's highest point."""
        return self.held + LIBRARIES + max(self.phases.values())

    def __str__(self) -> str:
        return f"about {self.seconds:.0f} s and {self.peak / 2**20:.0f} MB"


@dataclass(frozen=True)
class Probe:
    """Of one forward pass with gradients: bytes saved by one sequence of T tokens, `linear` T + `square` T^2; seconds
    of a forward pass for each token; latents on at a token, of each dictionary."""

    linear: float
    square: float
    seconds: float
    on: float

    def saved(self, length: int) -> float:
        """Bytes that one sequence's graph holds."""
        return self.linear * length + self.square * length**2


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 2GB, 800MB or 1.5GiB. Raises MediationError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if found is None or (unit := found[2].lower()) not in UNITS:
        raise MediationError(f"--memory is {text!r}; give a size such as 2GB or 800MB.")
    return int(float(found[1]) * UNITS[unit])


def held(device: torch.device) -> int:
    """Bytes that this process holds now, on its accelerator or in main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def free(device: torch.device) -> int:
    """Bytes that nobody holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def probe(model: SubjectModel, dictionaries: Sequence[Dictionary], example: Example) -> Probe:
    """Step 1, on the first tokens of `example`."""
    first = min((dictionary.site for dictionary in dictionaries), key=lambda site: site.depth)
    length = max(2, min(PROBE, len(example)))
    tokens = torch.tensor([example.clean[:length]] * 2, device=model.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, -1] = False  # padding, as batches of prompts have
    saved = {}
    for part in (length, max(1, length // 2)):
        start = time.perf_counter()
        saved[part] = _saved(model, tokens[:, -part:], mask[:, -part:], first) / 2
        seconds = (time.perf_counter() - start) / (2 * part)
        if part == length:
            per_token = seconds
    half = max(1, length // 2)
    square = max(0.0, (saved[length] / length - saved[half] / half) / (length - half))
    linear = saved[length] / length - square * length
    reads = [dictionary.reads for dictionary in dictionaries]
    values = model.forward(tokens[:1], mask[:1], read=reads, logits=False).sites
    on = [int((each.encode(values[each.reads][0, 1:]) != 0).sum()) / (length - 1) for each in dictionaries]
    return Probe(linear, square, per_token, max(on))


def _saved(model: SubjectModel, tokens: Tensor, mask: Tensor, first: Site) -> float:
    """Bytes of what the graph from the site on keeps for its backward pass, logits and parameters left out."""
    kept: dict[int, int] = {}
    own = {each.untyped_storage().data_ptr() for each in model.module.parameters()}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    position = torch.zeros(1, dtype=torch.long, device=tokens.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run = model.forward(tokens, mask, read=[first], positions=position, grad=True)
    assert run.logits is not None
    return float(sum(kept.values()))


def predict(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prepared: Sequence[Batch],
    settings: TraceSettings,
    probed: Probe,
    before: int,
) -> Cost:
    """Step 2, for prompts batched as they are; `before` is what the process held before the run."""
    width, words = model.d_model, model.vocab_size
    sites, chunk = len(dictionaries), settings.chunk
    longest = max(batch.clean.shape[1] for batch in prepared)
    working = _working(model)
    states, attribution, patching, between, pulled = [], [], [], [], 0.0
    total = sum(len(batch) for batch in prepared)
    for batch in prepared:
        rows, length = batch.clean.shape
        value = FLOAT * rows * length * width  # one site's value
        on = probed.on * rows * length * (2 if settings.baseline is Baseline.CORRUPT else 1)
        logits = FLOAT * len(keep_positions(batch)) * words
        directions = sum(each.d_sae * each.d_model for each in dictionaries if isinstance(each, Heads))
        own = sites * (5 * value + 60 * on) + FLOAT * rows * length * directions
        dense = FLOAT * DENSE * min(ENCODE_TOKENS, rows * length) * max(each.d_sae for each in dictionaries)
        states.append(own + 2 * sites * value + dense)
        graph = rows * probed.saved(length) + rows * length * working
        attribution.append(own + max(graph + 3 * rows * logits + sites * value, NODE * on))
        patched = on
        if settings.estimator is not Estimator.EXACT:
            patched = ceil(settings.sample * max(1, sites / KEPT_PART) * rows / total)
        patched = min(chunk, max(1, int(patched)))
        patching.append(own + patched * (length * (working + (4 + sites) * FLOAT * width) + 2 * logits))
        share = _longest_stretch(model, dictionaries)
        job = min(rows, chunk)
        run = length - int(first_free(batch, free_positions(batch, settings.baseline)).min())
        targets = settings.top * _positions_on(batch)  # of a site, in a prompt; of like position, up to the top
        turns = max(1, min(chunk // job, settings.top, SEEDS // (run * width)))
        gradients = turns * job * run * (working + 2 * FLOAT * width * _most_in_reach(dictionaries))
        rest = max(job * share * probed.saved(run) + gradients, graph + 3 * rows * logits)
        tables = EDGE * KEEP * targets * sites * rows
        pulled += batch.clean.numel() * targets  # tokens that edges' backward passes go over
        between.append(own + (sites + 3) * value + max(rest + 2 * FLOAT * min(GATHERED, on * width), tables))
    first = len(prepared[0])
    fidelity = FLOAT * longest * (first + 2) * words + first * longest * working
    phases = {
        "nodes": max(attribution),
        "states": max(states),
        "exact patching": max(patching),
        "edges": max(between),
        "fidelity": fidelity,
    }
    tokens = sum(batch.clean.numel() for batch in prepared)
    passes = 5 + sites * (3 * settings.steps + 1) + 2 * settings.top + 3 * settings.steps
    sampled = 2 * sites * settings.sample * longest
    return Cost(probed.seconds * (tokens * passes + 2 * pulled + sampled), before, phases)


def _positions_on(batch: Batch) -> float:
    """At how many positions of a prompt a latent of the graph is on, as a guess: it is one node for all of a role's."""
    roles = (Counter(role_of(example, at) for at in range(len(example))) for example in batch.examples)
    return max(1.0, ON * max(max(each.values()) for each in roles))


def _working(model: SubjectModel) -> int:
    """Bytes of one token of what a layer computes with at a time."""
    config = model.module.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * model.d_model
    return FLOAT * (4 * inner + 4 * model.d_model)


def _longest_stretch(model: SubjectModel, dictionaries: Sequence[Dictionary]) -> float:
    """The longest run of layers between residual sites, as a share of those from the first site on."""
    walls = sorted({each.site.canonical().layer for each in dictionaries if each.site.stream in RESIDUAL})
    first = min(each.site.layer for each in dictionaries)
    walls = [EMBEDDING_SITE.layer, *walls, model.n_layers]
    longest = max(end - start for start, end in pairwise(walls))
    return longest / max(1, model.n_layers - first)


def _most_in_reach(dictionaries: Sequence[Dictionary]) -> int:
    """Sites whose gradients arrive together: those from one residual site to the next."""
    most = here = 1
    for each in sorted(dictionaries, key=lambda each: each.site.depth):
        here = 1 if each.site.stream in RESIDUAL else here + 1
        most = max(most, here)
    return most


def fit(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prepared: Prepared,
    settings: TraceSettings,
    memory: int | None,
) -> tuple[Prepared, TraceSettings, Cost]:
    """Step 3: prompts batched anew and the settings that fit `memory` bytes, by default a share of what is free.

    Raises MediationError where not even one prompt at a time fits.
    """
    examples = [example for batch in prepared.batches for example in batch.examples]
    longest = max(examples, key=len)
    probed = probe(model, dictionaries, longest)
    before = held(model.device)
    budget = memory if memory is not None else before + int(SHARE * free(model.device))
    while True:
        made = [batch.to(model.device) for batch in batches(examples, settings.batch_size)]
        cost = predict(model, dictionaries, made, settings, probed, before)
        over = [name for name, size in cost.phases.items() if before + LIBRARIES + size > budget]
        if not over:
            return replace(prepared, batches=made), settings, cost
        if settings.chunk > 1 and set(over) <= {"exact patching", "edges"}:
            settings = replace(settings, chunk=settings.chunk // 2)
        elif settings.batch_size > 1:
            settings = replace(settings, batch_size=min(settings.batch_size, len(examples)) // 2 or 1)
        elif settings.chunk > 1:
            settings = replace(settings, chunk=settings.chunk // 2)
        else:
            raise MediationError(
                f"The longest prompt has {len(longest)} tokens and needs {cost.peak / 1e9:.2f} GB alone, of which "
                f"{before / 1e9:.2f} GB are held already and {LIBRARIES / 1e9:.2f} GB are for libraries, but the "
                f"budget is {budget / 1e9:.2f} GB: give more with --memory, shorter prompts or fewer dictionaries."
            )
