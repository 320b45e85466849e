"""Which part of an entity's latents answers which question? SmolLM2 on facts of countries.

The questions about a pair of countries are asked with the country first, so that the same latents, with the same
values, mediate every answer: no latent-level graph can say which fact was used, and only parts can.

1. Entities are split in halves. On development entities, in the development wordings: gradients of the log-probability
   of likely answers (SAMPLED of the LIKELY most probable tokens, flattened by a temperature of 2) at the entity's
   token; no right answer enters. Ways to take rows apart (`ways`) are learned there, and names of parts (`naming`).
2. On pairs of held-out entities, in the held-out wording, at each site, by intervention at the entity's token:
   a. carry: effect of the whole difference over the total effect; of latents and error over that; of a way's parts, its
      MEASURED strongest parts together, and bias with residual, over the latents';
   b. part effects: correlation over the measured parts between two questions about the same pair; share of pairs with
      the same top part for both;
   c. naming: is the top part named by the question? Top 1, top 5, mean reciprocal rank; by each kind of name. Switch:
      both questions about a pair named right, by different parts, while the top latent is the same for both;
   d. pools: all parts shared out among the questions as their use is. Which question's pool has the largest effect?
   e. swap: x less one question's pool of the pair's difference, which puts the other country's in its place. Does this
      answer follow, and do the other answers stay?
3. The same parts under other wordings: fact first, and ParaRel's.
Intervals: bootstrap over entities; a pair counts as often as both of its entities are drawn (Owen 2007).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.metalatents import Decomposition, MetaDictionary
from mediation.realfacts.asking import Asked, Asking, ask, reask
from mediation.realfacts.naming import by_enrichment, by_lens, by_share, effect_use, use
from mediation.realfacts.parts import PairParts, latent_parts, meta_parts
from mediation.realfacts.questions import (
    COUNTRY_QUESTIONS,
    PARAREL_RELATIONS,
    DevelopmentEntities,
    Entities,
    HeldOutEntities,
    countries,
    paraphrases,
)
from mediation.realfacts.scores import MEASURED, Measured, Scorer, carries, largest, masked, measure, score
from mediation.realfacts.ways import Development, ways
from mediation.sites import Site
from mediation.subject import SubjectModel

SAMPLED, LIKELY, TEMPERATURE = 12, 64, 2.0
REWORDED = ("latents", "meta-SAE", "readings")  # ways that are measured under other wordings too
QUESTIONS = tuple(question.attribute for question in COUNTRY_QUESTIONS)


@dataclass(frozen=True)
class FactsSettings:
    """pairs: held-out pairs, and as many of development; width: meta-latents of the readings; only: these ways."""

    pairs: int = 48
    width: int = 150
    seed: int = 0
    only: tuple[str, ...] | None = None


def run_facts(
    model: SubjectModel,
    sites: Sequence[tuple[Dictionary, MetaDictionary | None]],
    *,
    data: Path | None = None,
    settings: FactsSettings | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> dict[str, Any]:
    """The whole benchmark at every site; `data` holds pararel/ (None: none of its wordings)."""
    settings = settings or FactsSettings()
    started = time.perf_counter()
    development, held_out = one_token(countries(), model).split(settings.seed)
    found = []
    for number, (dictionary, meta) in enumerate(sites):

        def show(stage: str, number: int = number, name: str = dictionary.site.name) -> None:
            progress(f"{name}: {stage}", number, len(sites))

        found.append(run_site(model, dictionary, meta, development, held_out, data, settings, show))
    return _plain(
        {
            "model": model.name,
            "entities": {"development": len(development), "held_out": len(held_out)},
            "questions": list(QUESTIONS),
            "sites": found,
            "settings": vars(settings),
            "measured": MEASURED,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - started,
        }
    )


def one_token(entities: Entities, model: SubjectModel) -> Entities:
    """Those whose name is one token in the middle of a sentence; MediationError when they are fewer than ten."""
    before = len(model.encode("In"))
    rows = [row for row, name in enumerate(entities.names) if len(model.encode(f"In {name}")) == before + 1]
    if len(rows) < 10:
        raise MediationError(f"{model.name} writes {len(rows)} of the countries as one token; ten are needed.")
    return entities.only(rows)


def run_site(
    model: SubjectModel,
    dictionary: Dictionary,
    meta: MetaDictionary | None,
    development: DevelopmentEntities,
    held_out: HeldOutEntities,
    data: Path | None,
    settings: FactsSettings,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """All figures of one site."""
    site, seed = dictionary.site, settings.seed
    show("development entities")
    wordings = {question.attribute: question.other_wordings for question in COUNTRY_QUESTIONS}
    gradients = reading_gradients(model, site, wordings, development, seed)
    practice = ask(model, site, {q: w[0] for q, w in wordings.items()}, development, n_pairs=settings.pairs, seed=seed)
    show("held-out entities")
    entity_first = {question.attribute: question.asked for question in COUNTRY_QUESTIONS}
    trial = ask(model, site, entity_first, held_out, n_pairs=settings.pairs, seed=seed)
    learn = Development(dictionary, development, practice.x(QUESTIONS[0]), gradients)
    taken = ways(learn, meta, settings.width, seed, settings.only, lambda name: show(f"learning {name}"))

    scorer = Scorer(trial, seed)
    figures: dict[str, Any] = {}
    carry: dict[str, Any] = {}
    top_latent: dict[str, Tensor] = {}
    for name, decomposition in taken.items():
        show(f"measuring {name}")
        split = _split(dictionary, trial, decomposition)
        shares = use(gradients, split.directions)
        measured = measure(trial, split, shares)
        if decomposition is None:
            carry = carries(scorer, measured)
            top_latent = {q: measured.top(q) for q in QUESTIONS}
        names = {
            "use": by_share(shares),
            "effect": by_share(effect_use(practice, _split(dictionary, practice, decomposition))),
            "enrichment": by_enrichment(_amounts(dictionary, learn.x, decomposition), development, QUESTIONS),
            "lens": by_lens(model, split.directions, practice, seed),
        }
        figures[name] = score(scorer, measured, names, top_latent)
        if name in REWORDED:
            figures[name]["other_words"] = [
                _in_other_words(dictionary, decomposition, trial, held_out, question, wording, measured, shares, seed)
                for question, wording in other_wordings(data)
            ]
    return {
        "site": site.name,
        "known": {q: int(trial.knows[q].sum()) for q in QUESTIONS},
        "pairs": {q: int(trial.pairs.asked[q].sum()) for q in QUESTIONS},
        "carry": carry,
        "gradient_cosine": gradient_cosines(trial),
        "ways": figures,
    }


def _plain(value: Any) -> Any:
    """The same with None for what is no number, as JSON wants it."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def other_wordings(data: Path | None) -> list[tuple[str, str]]:
    """Step 3: (question, wording); the fact first, and ParaRel's where there is a folder with them."""
    found = {(question.attribute, question.fact_first): None for question in COUNTRY_QUESTIONS}
    if data is not None:
        found |= {(q, wording): None for q in PARAREL_RELATIONS for wording in paraphrases(data, q)}
    return list(found)


def reading_gradients(
    model: SubjectModel,
    site: Site,
    wordings: Mapping[str, Sequence[str]],
    entities: DevelopmentEntities,
    seed: int,
) -> dict[str, Tensor]:
    """Step 1: gradients [wordings * entities * SAMPLED, d] by question.

    The log-probability of a token is taken among the LIKELY most probable, at TEMPERATURE.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for q, each in wordings.items():
        parts = []
        for wording in each:
            asked = Asked(model, site, wording, entities.names)
            every = torch.arange(len(entities))
            top = asked.logits(every, asked.x).topk(min(LIKELY, model.vocab_size), dim=1)
            p = (top.values / TEMPERATURE).softmax(1)
            count = min(SAMPLED, p.shape[1])
            sampled = torch.multinomial(p.cpu(), count, generator=generator).to(p.device)
            rows = every.repeat_interleave(count)
            weights = one_hot(sampled.flatten(), p.shape[1]) - p[rows]
            parts.append(asked.gradient(rows, asked.x[rows], weights, top.indices[rows]))
        found[q] = torch.cat(parts)
    return found


def gradient_cosines(asking: Asking) -> dict[str, float]:
    """Mean cosine of the path gradients of two questions about the same pair, which sets how far parts can differ."""
    found = {}
    for q, r in combinations(asking.by_question, 2):
        both = asking.pairs.asked[q] & asking.pairs.asked[r]
        if both.any():
            cosine = cosine_similarity(asking.gradients[q][both], asking.gradients[r][both], dim=1)
            found[f"{q}, {r}"] = float(cosine.mean())
    return found


def _split(dictionary: Dictionary, asking: Asking, decomposition: Decomposition | None) -> PairParts:
    """The pairs' differences, at the residual that the first question finds: entity first, so do all."""
    x = asking.x(next(iter(asking.by_question)))
    latents = latent_parts(dictionary, x[asking.pairs.clean], x[asking.pairs.other])
    return latents if decomposition is None else meta_parts(latents, decomposition)


def _amounts(dictionary: Dictionary, x: Tensor, decomposition: Decomposition | None) -> Tensor:
    """How much of every part each entity has, [entities, m], for residuals x [entities, d]."""
    f = dictionary.encode(x)
    if decomposition is None:
        return f
    used = f.any(0).nonzero()[:, 0]
    return f[:, used] @ decomposition.codes(dictionary.decoder[used], used)


def _in_other_words(
    dictionary: Dictionary,
    decomposition: Decomposition | None,
    trial: Asking,
    held_out: HeldOutEntities,
    question: str,
    wording: str,
    measured: Measured,
    shares: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Step 3 for one wording: the figures of the same pairs."""
    asking = reask(trial, question, wording, held_out)
    asked = asking.pairs.asked[question]
    figures: dict[str, Any] = {"question": question, "wording": wording, "pairs": int(asked.sum())}
    if not asked.any():
        return figures
    again = measure(asking, _split(dictionary, asking, decomposition), shares)
    scorer = Scorer(asking, seed)
    number = QUESTIONS.index(question)
    top = again.top(question)
    return figures | {
        "same_part": scorer.mean({question: masked(top == measured.top(question), asked)}),
        "named": scorer.mean({question: masked(by_share(shares)[top] == number, asked)}),
        "pool": scorer.mean({question: masked(largest(again.pools[question]) == number, asked)}),
        "follows": scorer.mean({question: masked(again.margin[question] < again.pools[question][:, number], asked)}),
    }
