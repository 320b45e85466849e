"""Makes a model organism from a seed: world, model, two SAEs, a meta-SAE, labels, prompts and stage measurements.

1. World (`world`) and model (`language`). `shaped` and `null` organisms are *made*: they are trained with a readout
   loss at the last-name token after block 0, and all families with trait prompts. `organism.json` repeats this.
2. A dictionary after block 0 with one active latent per token (TopK, k = 1), whose rows begin at one activation per
   person and some of other tokens. With such a budget a person gets a latent of their own and the facts are absorbed
   into it: no latent for an attribute fires. A second dictionary after block 1, wider budget, gives graphs edges.
3. A meta-SAE on the rows of the latents that fire at names. Width and k follow from the world's size alone
   (WIDTH_PER_VALUE, SPARE_CODES), whoever is scored later. Labels come from the people who are not held out.
4. Every stage is measured on its own (`measure`), and everything is written in one rename at the end.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.labels import save_labels
from mediation.metalatents import MetaDictionary
from mediation.organisms import measure
from mediation.organisms.language import LAST_NAME, Questions, make_model, make_tokenizer, train_model
from mediation.organisms.score import label_parts
from mediation.organisms.world import World, make_world, opinion_rows, recall_rows
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel
from mediation.training.activations import shuffled_batches
from mediation.training.saes import SAESettings, train_sae

SITE, NEXT_SITE = Site(1, Stream.RESID_PRE), Site(2, Stream.RESID_PRE)
STEPS = 1700
OTHER_LATENTS = 0.25  # latents that begin at other tokens than last names, per person
WIDTH_PER_VALUE = 1.5  # meta-latents per attribute value: too few merge facts, surplus ones stay silent
SPARE_CODES = 1  # meta-latents per row beyond one per attribute, for what a name leaves in the row
PROMPTS_PER_CLAIM = 12  # of the shipped prompts
SAE_BATCH = 1024
SAE_STEPS = {SITE: 300, NEXT_SITE: 1200}  # the first begins close to its end
DISCLOSURE = {
    "shaped": "trained with a linear readout loss for every attribute after block 0, and with trait prompts",
    "null": "as shaped, but replies depend on the claim's words alone and on no attribute of the person",
    "natural": "no readout loss; trained with trait prompts",
}

Progress = Callable[[str, int, int], None]


def make_organism(
    seed: int,
    family: str,
    folder: str | Path,
    progress: Progress = lambda stage, done, of: None,
    *,
    n_people: int = 1024,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Make one in `folder`, which must be new or empty; returns what organism.json holds.

    family: shaped, natural or null. progress: called with (stage, done, of). Takes three and a half minutes on two
    idle cores. The same arguments give the same weights on the same machine.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MediationError(f"{folder} already holds something; choose a new folder.")
    started = time.perf_counter()
    world = make_world(seed, family, n_people=n_people, n_held_out=min(64, n_people // 8 * 2))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise MediationError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
    try:
        measured = _fill(partial, world, steps, progress)
        measured = {"seconds": round(time.perf_counter() - started, 1), **measured}
        (partial / "organism.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return measured


def _fill(folder: Path, world: World, steps: int, progress: Progress) -> dict[str, Any]:
    tokenizer = make_tokenizer(world)
    model = make_model(len(tokenizer), seed=world.seed)
    train_model(model, tokenizer, world, steps=steps, progress=lambda done, of: progress("model", done, of))
    model.eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    world.save(folder / "world.json")
    _write_prompts(folder / "prompts.jsonl", world)

    dictionary = _train_dictionaries(folder / "saes", model, tokenizer, world, progress)
    x = measure.name_activations(model, tokenizer, world)
    meta_folder = folder / "meta" / SITE.name
    progress("meta-SAE", 0, 1)
    at_names = (dictionary.encode(x) != 0).any(dim=0)
    n_values = sum(map(len, world.attributes.values()))
    meta = MetaDictionary.train(
        dictionary.decoder[at_names],
        width=round(WIDTH_PER_VALUE * n_values),
        k=len(world.attributes) + SPARE_CODES,
        seed=world.seed,
        base_hash=dictionary.content_hash,
    )
    meta.save(meta_folder)
    save_labels(meta_folder, label_parts(SubjectModel.load(folder / "model", device="cpu"), dictionary, meta, world))
    progress("measuring", 0, 1)
    return {
        "seed": world.seed,
        "family": world.family,
        "made": DISCLOSURE[world.family],
        "site": SITE.name,
        **measure.behaviour(model, tokenizer, world),
        **measure.decodability(x, world),
        **measure.interchange(model, tokenizer, world),
        **measure.person_latents(dictionary, x, world),
        **measure.meta_latents(meta, dictionary.decoder[at_names], x, world),
    }


def _write_prompts(path: Path, world: World) -> None:
    """Opinion prompts of held-out people, against held-out people: one claim for each attribute.

    Few claims, many prompts each: half of a claim's prompts nominate what the other half tests.
    """
    rng = random.Random(f"shipped {world.seed}")
    claims = {claim.attribute: claim.words for claim in reversed(world.claims)}
    rows = opinion_rows(world, world.held_out, seed=world.seed)
    chosen = []
    for words in claims.values():
        mine = [row for row in rows if row["group"] == words]
        chosen += rng.sample(mine, min(PROMPTS_PER_CLAIM, len(mine)))
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def _train_dictionaries(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, progress: Progress
) -> Dictionary:
    """Step 2; the dictionary of SITE is returned."""
    sites = (SITE, NEXT_SITE)
    values, at_name = _activations(model, tokenizer, world, sites)
    people = measure.name_activations(model, tokenizer, world)
    generator = torch.Generator().manual_seed(world.seed)

    others = values[SITE][~at_name]
    others = others[torch.randperm(len(others), generator=generator)]
    start = torch.cat([people, others[: round(OTHER_LATENTS * len(people))]])
    names = values[SITE][at_name]
    train_sae(
        # Two thirds last names: they carry the facts, and are one token in nine of the prompts.
        shuffled_batches(torch.cat([names.repeat(4, 1), others[: 2 * len(names)]]), SAE_BATCH, seed=world.seed),
        folder / SITE.name,
        SAESettings(len(start), k=1, steps=SAE_STEPS[SITE], architecture="topk", seed=world.seed),
        site=SITE,
        model_name="model",
        start=start,
        progress=lambda done, of: progress(f"SAE {SITE}", done, of),
    )
    train_sae(
        shuffled_batches(values[NEXT_SITE], SAE_BATCH, seed=world.seed),
        folder / NEXT_SITE.name,
        SAESettings(512, k=8, steps=SAE_STEPS[NEXT_SITE], architecture="topk", lr=3e-3, seed=world.seed),
        site=NEXT_SITE,
        model_name="model",
        progress=lambda done, of: progress(f"SAE {NEXT_SITE}", done, of),
    )
    return Dictionary.load(folder / SITE.name)


@torch.no_grad()
def _activations(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, sites: tuple[Site, ...]
) -> tuple[dict[Site, Tensor], Tensor]:
    """Values [n, d_model] at the sites on prompts of everybody, BOS left out, and which of them are last names."""
    rng = random.Random(f"activations {world.seed}")
    everybody = range(len(world.people))
    n = 3 * len(world.people)
    rows = rng.sample(recall_rows(world), n) + rng.sample(opinion_rows(world, everybody), n)
    questions = Questions(rows, world, tokenizer)
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
    at_name = []
    for index in torch.arange(len(questions)).split(1024):
        hidden = model.model(questions.tokens[index], use_cache=False, output_hidden_states=True).hidden_states
        real = questions.real(index)
        for site in sites:
            kept[site].append(hidden[site.layer][real])
        at_name.append((torch.arange(real.shape[1]) == LAST_NAME).expand_as(real)[real])
    return {site: torch.cat(parts) for site, parts in kept.items()}, torch.cat(at_name)
