"""`mediation bench absorption`: four measurements of absorption on a real model, at the site of every dictionary.

letters: both published definitions on first letters, and the label-free flag against them (needs spelling/ in the
data); concepts: own latents silent while a concept is used, by site, and by width and sparsity with dictionaries
trained here from one set of activations (needs text); wordings: what carries a latent that another wording silences;
anomalies: latents that look unrelated to their task, and the parts they share with related ones (needs text).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mediation.absorbed.anomalies import ask_task, measure_anomalies
from mediation.absorbed.beyond import Case, Words, find_cases, measure_dictionary
from mediation.absorbed.beyond import read_words as read_family
from mediation.absorbed.concepts import FAMILIES
from mediation.absorbed.coordination import ask_wordings, measure_coordination
from mediation.absorbed.letters import measure_letters, spell
from mediation.absorbed.relatedness import find_text, relations
from mediation.absorbed.scores import plain
from mediation.absorption import read_words
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.metalatents import Decomposition, MetaDictionary, rotated
from mediation.quality import held_out_figures
from mediation.sites import Site
from mediation.subject import SubjectModel
from mediation.training.activations import collect_activations, shuffled_batches, windows
from mediation.training.saes import SAESettings, train_sae
from mediation.training.text import documents_of

PARTS = ("letters", "concepts", "wordings", "anomalies")
SPELLING = Path("spelling") / "smollm2_common_word_tokens.jsonl"
WINDOW, BATCH, META_BATCH = 128, 1024, 512


@dataclass(frozen=True)
class AbsorptionSettings:
    """Sizes: training and test words of a letter, words judged, families of concepts, wordings of a question; large
    latents of a task, tokens of text read for them; the grid of (width, k) trained at the middle site, its tokens and
    epochs; meta-dictionary of the rows in use: width, k, steps.
    """

    seed: int = 0
    parts: tuple[str, ...] = PARTS
    per_letter: int = 150
    judged: int = 400
    families: int = len(FAMILIES)
    wordings: int = 6
    large: int = 32
    text_tokens: int = 64_000
    grid: tuple[tuple[int, int], ...] = ((1024, 32), (2048, 32), (8192, 32), (2048, 16), (2048, 64))
    grid_tokens: int = 150_000
    grid_epochs: int = 3
    meta: tuple[int, int, int] = (1024, 4, 400)

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise MediationError(f"There is no part '{part}' of the benchmark; choose of {', '.join(PARTS)}.")


def quick_settings(seed: int, parts: tuple[str, ...]) -> AbsorptionSettings:
    """Sizes that show that all works, in under three minutes; their figures say little."""
    return AbsorptionSettings(
        seed, parts, per_letter=24, judged=24, families=1, wordings=2, large=4, text_tokens=4_000,
        grid=((512, 16), (512, 32)), grid_tokens=8_000, grid_epochs=1, meta=(128, 2, 50),
    )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What is measured, and with what; metas by the dictionary's name.

    data holds spelling/ (and pararel/, for more wordings); texts are read for the grid and the anomalies.
    """

    model: SubjectModel
    dictionaries: Sequence[Dictionary]
    metas: Mapping[str, MetaDictionary]
    data: Path | None
    texts: Sequence[Path]

    @property
    def sites(self) -> list[Site]:
        return [dictionary.site for dictionary in self.dictionaries]


Show = Callable[[str], None]


def run_absorption(
    inputs: Inputs,
    settings: AbsorptionSettings,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> dict[str, Any]:
    """The parts asked for, at every dictionary's site."""
    started = time.perf_counter()
    if "letters" in settings.parts and (inputs.data is None or not (inputs.data / SPELLING).exists()):
        raise MediationError(f"First letters need {SPELLING} in the folder of --data; give it, or other parts.")
    if {"concepts", "anomalies"} & {*settings.parts} and not inputs.texts:
        raise MediationError("The grid of dictionaries and the anomalies need --text; give a file, or other parts.")
    measures = {"letters": _letters, "concepts": _concepts, "wordings": _wordings, "anomalies": _anomalies}
    result: dict[str, Any] = {}
    for number, part in enumerate(settings.parts):

        def show(stage: str, part: str = part, number: int = number) -> None:
            progress(f"{part}: {stage}", number, len(settings.parts))

        before = time.perf_counter()
        found = measures[part](inputs, settings, show)
        result[part] = found | {"seconds": time.perf_counter() - before, "settings": asdict(settings)}
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return plain({"model": inputs.model.name, **result, "machine": machine, "seconds": time.perf_counter() - started})


def _letters(inputs: Inputs, settings: AbsorptionSettings, show: Show) -> dict[str, Any]:
    assert inputs.data is not None
    words = read_words(inputs.data / SPELLING)
    spelling = spell(
        inputs.model, words, inputs.sites, per_letter=settings.per_letter, seed=settings.seed, progress=show
    )
    width, k, steps = settings.meta
    found = []
    for dictionary in inputs.dictionaries:

        def decompositions(rows: Tensor, name: str = dictionary.name) -> dict[str, Decomposition]:
            given = {"given meta-dictionary": inputs.metas[name]} if name in inputs.metas else {}
            alike: dict[str, Any] = {
                "width": width,
                "k": k,
                "steps": steps,
                "restarts": 1,
                "batch": META_BATCH,
                "seed": settings.seed,
            }
            own = MetaDictionary.train(rows, **alike)
            null = MetaDictionary.train(rotated(rows, settings.seed), **alike)
            return {**given, "meta-dictionary of rows in use": own, "the same of rotated rows (null)": null}

        def at(stage: str, name: str = dictionary.site.name) -> None:
            show(f"{name}, {stage}")

        measured = measure_letters(
            dictionary, spelling, decompositions, judged=settings.judged, seed=settings.seed, progress=at
        )
        found.append(measured)
    return {"sites": found}


def _concepts(inputs: Inputs, settings: AbsorptionSettings, show: Show) -> dict[str, Any]:
    families: list[Words] = []
    for family in FAMILIES[: settings.families]:
        show(family.name)
        families.append(read_family(inputs.model, family, inputs.sites, settings.seed))
    middle = inputs.dictionaries[len(inputs.dictionaries) // 2]
    by_site, grid = [], []
    for dictionary in inputs.dictionaries:
        show(dictionary.site.name)
        cases: list[tuple[Words, Sequence[Case]]] = [
            (words, find_cases(words, dictionary.site, settings.seed)) for words in families
        ]
        by_site.append(measure_dictionary(dictionary, cases))
        if dictionary is middle:
            grid = _grid(inputs, dictionary, cases, settings, show)
    members = {
        words.family.name: {
            each.name: int((words.concept == number).sum()) for number, each in enumerate(words.family.concepts)
        }
        for words in families
    }
    return {"members": members, "sites": by_site, "grid": grid}


def _grid(
    inputs: Inputs,
    beside: Dictionary,
    cases: Sequence[tuple[Words, Sequence[Case]]],
    settings: AbsorptionSettings,
    show: Show,
) -> list[dict[str, Any]]:
    """Dictionaries of other widths and sparsities, trained from the same activations in the same order."""
    show("activations for the grid")
    site = beside.site
    source = windows(documents_of(inputs.texts, settings.seed), inputs.model, WINDOW)
    held = settings.grid_tokens // 20
    x = collect_activations(inputs.model, source, [site], n_tokens=settings.grid_tokens + held).x[site].float()
    unseen, x = x[:held], x[held:]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for width, k in settings.grid:
            show(f"grid, {width} latents, k {k}")
            steps = settings.grid_epochs * len(x) // BATCH
            chosen = SAESettings(d_sae=width, k=k, steps=max(steps, 1), normalize=True, seed=settings.seed)
            batches = shuffled_batches(x, BATCH, seed=settings.seed)
            path = train_sae(batches, Path(folder) / f"{width}-{k}", chosen, site=site, model_name=inputs.model.name)
            dictionary = Dictionary.load(path)
            measured = measure_dictionary(dictionary, cases)
            found.append({"k": k, "on_text": held_out_figures(dictionary, unseen), **measured})
    return found


def _wordings(inputs: Inputs, settings: AbsorptionSettings, show: Show) -> dict[str, Any]:
    show("reading")
    data = inputs.data if inputs.data is not None and (inputs.data / "pararel").is_dir() else None
    _, worded = ask_wordings(inputs.model, inputs.sites, data, settings.wordings)
    found = []
    for dictionary in inputs.dictionaries:
        show(dictionary.site.name)
        found.append(measure_coordination(dictionary, worded, settings.seed))
    asked = [{"question": each.question, "wording": each.wording, "right": int(each.right.sum())} for each in worded]
    return {"wordings": asked, "sites": found}


def _anomalies(inputs: Inputs, settings: AbsorptionSettings, show: Show) -> dict[str, Any]:
    measured = [each for each in inputs.dictionaries if each.name in inputs.metas]
    if not measured:
        raise MediationError("Anomalies are explained by parts; give --meta, or other parts of the benchmark.")
    show("the task")
    task = ask_task(inputs.model, [each.site for each in measured], settings.seed)
    show("text")
    text = find_text(inputs.model, inputs.texts, task.words, settings.text_tokens)
    related = relations(inputs.model, measured, text, settings.seed)
    found = []
    for dictionary in measured:

        def at(stage: str, name: str = dictionary.site.name) -> None:
            show(f"{name}, {stage}")

        meta, relation = inputs.metas[dictionary.name], related[dictionary.site]
        found.append(
            measure_anomalies(
                inputs.model, dictionary, meta, task, relation, large=settings.large, seed=settings.seed, progress=at
            )
        )
    pairs = {"discovery": len(task.discovery.clean), "evaluation": len(task.evaluation.clean)}
    read = {"tokens": text.windows.numel(), "near": float(text.near.float().mean()), "task_words": len(task.words)}
    return {"pairs": pairs, "text": read, "sites": found}
