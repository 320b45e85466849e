"""SAEs at several sites, fed by one forward pass, in bounded memory, resumed after a kill.

1. Estimate memory and disk and refuse before anything starts when they do not suffice.
2. Take a chunk of activations at all sites (mediation.training.activations); shuffle it by (seed, chunk).
3. Step every site's SAE through the chunk. The next chunk replaces it: memory is one chunk, whatever the corpus.
4. At the end of a chunk, when the last time is a while ago, write a checkpoint in one rename: every SAE's weights,
   Adam's moments and counters, and how many sequences were used. A resumed run skips those sequences and goes on
   to the same weights as an unbroken one.
5. When the tokens are done, write a last checkpoint, save the SAEs that are not there yet, and drop the checkpoint: a
   kill between two SAEs loses nothing either.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from mediation.errors import MediationError
from mediation.sites import Site
from mediation.subject import SubjectModel
from mediation.training.activations import Activations, collect_activations
from mediation.training.saes import SAESettings, SAETraining

CHECKPOINT = ".training"
CHECKPOINT_SECONDS = 120.0
MOST_SINKS = 0.98  # a text this much shorter than the tokens wanted is begun again


@dataclass(frozen=True)
class Plan:
    """How much of what: `batch` and `chunk` in tokens; `sae.steps` follows from `tokens`."""

    sites: tuple[Site, ...]
    tokens: int
    sae: SAESettings
    batch: int = 4096
    chunk: int = 2**17

    def __post_init__(self) -> None:
        if self.chunk % self.batch or self.tokens % self.chunk:
            raise MediationError("Tokens must be whole chunks and chunks whole batches.")

    @classmethod
    def of(cls, sites: Sequence[Site], tokens: int, *, batch: int = 4096, chunk: int = 2**17, **sae: object) -> Plan:
        """Round to whole chunks of whole batches, at least one."""
        batch = min(batch, tokens)
        chunk = max(min(chunk, tokens) // batch, 1) * batch
        tokens = max(tokens // chunk, 1) * chunk
        return cls(tuple(sites), tokens, SAESettings(steps=tokens // batch, **sae), batch, chunk)  # type: ignore[arg-type]

    @property
    def chunks(self) -> int:
        return self.tokens // self.chunk

    def memory(self, d_model: int, activation_bytes: int) -> int:
        """Bytes beyond the model: a chunk, each SAE with gradients and moments, one step's products."""
        chunk = self.chunk * d_model * activation_bytes * len(self.sites)
        weights = 2 * d_model * self.sae.d_sae * 4
        return chunk + 4 * weights * len(self.sites) + 4 * self.batch * (d_model + 16 * self.sae.k)

    def disk(self, d_model: int) -> int:
        """Bytes of a checkpoint, its successor, and the SAEs."""
        return 7 * len(self.sites) * 2 * d_model * self.sae.d_sae * 4


Progress = Callable[[int, int, dict[str, float]], None]


def train_saes(
    model: SubjectModel,
    sequences: Tensor,
    plan: Plan,
    folder: Path,
    progress: Progress = lambda done, of, figures: None,
) -> list[Path]:
    """Train one SAE a site on `sequences` [n, length], token ids; returns the folders SAELens opens.

    sequences: the same when a run is resumed; when attention sinks make them fall short they are begun again.
    progress(done, of, figures): in tokens, after every step; figures are those of `SAETraining.figures` at the
    last step of each site in a chunk, else empty.

    Raises:
        MediationError: too little memory, disk or text; a checkpoint of other settings; SAEs already there.
    """
    refuse(model, sequences, plan, folder)
    description = {"model": model.content_hash, **_plain(plan)}
    state, trainings = _resume(folder / CHECKPOINT, description, plan, model)
    endless = _Endless(sequences, state["sequences"])
    written = time.monotonic()
    for number in range(state["chunks"], plan.chunks):
        chunk = collect_activations(model, endless, plan.sites, n_tokens=plan.chunk)
        if not trainings:
            device = str(model.device)
            trainings = {site: SAETraining(plan.sae, chunk.x[site][: plan.batch], device=device) for site in plan.sites}
        _train_on(chunk, number, plan, trainings, progress)
        if time.monotonic() - written > CHECKPOINT_SECONDS or number + 1 == plan.chunks:
            _write(folder / CHECKPOINT, description, endless.used, number + 1, trainings)
            written = time.monotonic()
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for site in plan.sites:
            if not (folder / site.name).exists():
                trainings[site].save(folder / site.name, site, model.name)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    return [folder / site.name for site in plan.sites]


def refuse(model: SubjectModel, sequences: Tensor, plan: Plan, folder: Path) -> None:
    """Step 1: MediationError when SAEs are already there, or text, memory or disk do not suffice."""
    there = [site.name for site in plan.sites if (folder / site.name).exists()]
    if there and not (folder / CHECKPOINT).exists():  # with one, they are this training's own
        raise MediationError(f"{folder} already holds an SAE for {there[0]}; choose another folder.")
    given = sequences[:, 1:].numel()
    if given < MOST_SINKS * plan.tokens:
        raise MediationError(
            f"The text has {given:,} tokens to train on and {plan.tokens:,} are wanted; give more text."
        )
    needed = plan.memory(model.d_model, next(model.module.parameters()).element_size())
    free = psutil.virtual_memory().available
    if needed > free:
        raise MediationError(
            f"This training needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free; "
            "train fewer sites at a time, or fewer latents."
        )
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    on_disk, room = plan.disk(model.d_model), shutil.disk_usage(existing).free
    if on_disk > room:
        raise MediationError(
            f"This training needs {on_disk / 2**30:.1f} GiB on disk and {room / 2**30:.1f} are free at {existing}."
        )


def _train_on(
    chunk: Activations, number: int, plan: Plan, trainings: dict[Site, SAETraining], progress: Progress
) -> None:
    """Steps 2 and 3 for one chunk."""
    generator = torch.Generator().manual_seed(plan.sae.seed * 1_000_003 + number)
    order = torch.randperm(plan.chunk, generator=generator)
    device = next(iter(trainings.values())).sae.device
    steps = plan.chunk // plan.batch * len(plan.sites)
    for done, (site, rows) in enumerate(((s, r) for s in plan.sites for r in order.split(plan.batch)), start=1):
        trainings[site].step(chunk.x[site][rows].to(device))
        tokens = number * plan.chunk + plan.chunk * done // steps
        progress(tokens, plan.tokens, trainings[site].figures() if done * len(plan.sites) % steps == 0 else {})


class _Endless(Iterator[list[int]]):
    """The sequences, over and over; `used` counts those given and those skipped."""

    def __init__(self, sequences: Tensor, skip: int) -> None:
        self.used = skip
        self._sequences = sequences

    def __next__(self) -> list[int]:
        self.used += 1
        return self._sequences[(self.used - 1) % len(self._sequences)].tolist()


def _plain(plan: Plan) -> dict:
    return asdict(plan) | {"sites": [site.name for site in plan.sites]}


def _resume(
    checkpoint: Path, description: dict, plan: Plan, model: SubjectModel
) -> tuple[dict[str, int], dict[Site, SAETraining]]:
    file = checkpoint / "state.json"
    if not file.exists():
        return {"sequences": 0, "chunks": 0}, {}
    state = json.loads(file.read_text(encoding="utf-8"))
    if state["description"] != json.loads(json.dumps(description)):
        raise MediationError(
            f"{checkpoint.parent} holds an unfinished training with other settings; choose another folder, or delete "
            f"{checkpoint} to begin anew."
        )
    trainings = {}
    for site in plan.sites:
        blank = torch.zeros(plan.batch, model.d_model) + 1.0  # of no effect: everything it sets is restored
        trainings[site] = SAETraining(plan.sae, blank, device=str(model.device))
        trainings[site].restore(checkpoint / f"{site.name}.safetensors")
    return state, trainings


def _write(
    checkpoint: Path, description: dict, sequences: int, chunks: int, trainings: dict[Site, SAETraining]
) -> None:
    """Step 4. The old checkpoint goes only when the new one is whole."""
    partial = checkpoint.with_name(f"{checkpoint.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _disk(checkpoint.parent):
        partial.mkdir(parents=True)
        for site, training in trainings.items():
            training.checkpoint(partial / f"{site.name}.safetensors")
        state = {"description": description, "sequences": sequences, "chunks": chunks}
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        shutil.rmtree(checkpoint, ignore_errors=True)
        partial.rename(checkpoint)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A full disk or a folder without permission, in one sentence."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise MediationError(f"{folder} cannot be written: {reason}; the last checkpoint there is kept.") from error
