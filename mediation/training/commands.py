"""The bodies of `mediation train`: open what was asked for, train it, measure it on held-out text, show it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mediation import report
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.loading import resolve
from mediation.quality import held_out_figures
from mediation.sites import Site
from mediation.subject import SubjectModel
from mediation.training.activations import collect_activations, token_windows
from mediation.training.meta import train_meta
from mediation.training.several import Plan, refuse, train_saes
from mediation.training.text import dataset_documents, documents_of, held_out, kept

HELD_OUT_TOKENS = 20_000  # at most; figures are measured on them


@dataclass(frozen=True)
class Corpus:
    """What to train on, as the user named it."""

    files: tuple[Path, ...]
    dataset: str | None
    tokens: int
    context: int
    seed: int

    def __post_init__(self) -> None:
        if bool(self.files) == bool(self.dataset):
            raise MediationError("Name either --text files or a --dataset to train on.")

    def documents(self) -> Iterable[str]:
        if self.dataset:
            return dataset_documents(self.dataset, seed=self.seed)
        return documents_of(self.files, self.seed)

    def windows(self, model: SubjectModel) -> tuple[Tensor, Tensor]:
        """To train on and held out, [n, context] each."""
        train = token_windows(kept(self.documents()), model, self.context, self.tokens)
        try:
            unseen = token_windows(held_out(self.documents()), model, self.context, HELD_OUT_TOKENS)
        except MediationError:  # a text so short that nothing is held out
            unseen = train[:0]
        return train, unseen


def saes_command(
    name: str,
    sites: Sequence[str],
    corpus: Corpus,
    out: Path,
    chosen: dict[str, Any],
    device: str | None,
    allow_download: bool,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """`mediation train saes`."""
    started = time.perf_counter()
    _fits(name, allow_download)
    dtype = torch.bfloat16
    model = SubjectModel.load(name, dtype=dtype, device=device, allow_download=allow_download)
    places = tuple(dict.fromkeys(model.site(site) for site in sites))
    plan = Plan.of(places, corpus.tokens, normalize=True, bf16=True, **chosen)
    train, unseen = corpus.windows(model)
    refuse(model, train, plan, out)
    if not quiet:
        needed = plan.memory(model.d_model, dtype.itemsize) / 2**30
        disk, minutes = plan.disk(model.d_model) / 2**30, _seconds(model, train, plan) / 60
        report.console.print(
            f"[bold]{escape(model.name)}[/bold]: SAEs at {len(places)} site(s), {plan.sae.d_sae} latents, on "
            f"{plan.tokens:,} tokens; about {needed:.1f} GiB of memory beside the model, {disk:.1f} GiB of disk, "
            f"{minutes:.0f} minutes."
        )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} tokens"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=report.progress_console, disable=quiet, transient=True) as bar:
        task = bar.add_task("SAEs", total=plan.tokens, figures="")

        def show(done: int, of: int, figures: dict[str, float]) -> None:
            bar.update(task, completed=done)
            if figures:
                shown = (
                    f"loss {figures['loss']:.3g}, variance explained {figures['variance_explained']:.3f}, "
                    f"L0 {figures['l0']:.0f}, dead {figures['dead']:.1%}"
                )
                bar.update(task, figures=shown)

        folders = train_saes(model, train, plan, out, show)
    quality = _quality(model, unseen, plan, folders) if len(unseen) else {}
    result: dict[str, Any] = {"saes": [str(folder) for folder in folders], "held_out": quality}
    result["seconds"] = time.perf_counter() - started
    if not quiet:
        report.trained(result)
    return result


def train_meta_command(folders: list[Path], out: Path, chosen: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """`mediation train meta`: decoder rows into a meta-dictionary; see mediation.training.meta."""
    with report.stages("rows", quiet) as show:
        announce = (lambda text: None) if quiet else report.progress_console.print
        result = train_meta(folders, out, **chosen, progress=show, announce=announce)
    if not quiet:
        report.trained_meta(result)
    return result


def _fits(name: str, allow_download: bool) -> None:
    """A model too large for memory is refused before its weights are read."""
    needed = sum(file.stat().st_size for file in resolve(name, None, allow_download).weights)
    free = psutil.virtual_memory().available
    if needed > free:
        raise MediationError(
            f"The weights of {name} take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; use a "
            "smaller model or a larger machine."
        )


def _seconds(model: SubjectModel, tokens: Tensor, plan: Plan) -> float:
    """From one batch through the model, and arithmetic for the SAEs' one dense product at the same speed."""
    few = tokens[:16].long().to(model.device)
    model.forward(few[:1], read=plan.sites, logits=False)
    start = time.perf_counter()
    model.forward(few, read=plan.sites, logits=False)
    model_seconds = (time.perf_counter() - start) / few.numel() * plan.tokens
    blocks = sum(p.numel() for p in model.module.parameters()) - model.vocab_size * model.d_model
    depth = (max(site.layer for site in plan.sites) + 1) / model.n_layers
    sae = len(plan.sites) * 4 * model.d_model * plan.sae.d_sae  # the rest of a step costs about as much again
    return model_seconds * (1 + sae / (2 * blocks * depth))


def _quality(model: SubjectModel, unseen: Tensor, plan: Plan, folders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Variance explained, L0 and dead share on held-out text, by site."""
    held = collect_activations(model, unseen.tolist(), plan.sites, n_tokens=unseen[:, 1:].numel())
    return {
        site.name: held_out_figures(Dictionary.load(folder), held.x[site]) for site, folder in _pairs(plan, folders)
    }


def _pairs(plan: Plan, folders: Sequence[Path]) -> Iterable[tuple[Site, Path]]:
    return zip(plan.sites, folders, strict=True)
