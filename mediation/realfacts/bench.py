"""Which part of an entity's latents answers which question? SmolLM2 on facts of countries, cities and laureates.

The questions about a pair of entities are asked with the entity first, so that the same latents, with the same
values, mediate every answer: no latent-level graph can say which fact was used, and only parts can.

1. Entities are split in halves. On development entities, in the development wordings: gradients of the log-probability
   of likely answers (SAMPLED of the LIKELY most probable tokens, flattened by a temperature of 2) at the entity's
   token; no right answer enters. Ways to take rows apart (`ways`) are learned there, and names of parts (`naming`).
2. On pairs of held-out entities, in the held-out wording, at each site, by intervention at the entity's last token:
   a. carry: effect of the whole difference over the total effect; of latents and error over that; of a way's parts, its
      MEASURED strongest parts together, and bias with residual, over the latents';
   b. part effects: correlation over the measured parts between two questions about the same pair; share of pairs with
      the same top part for both;
   c. naming: is the top part named by the question? Top 1, top 5, mean reciprocal rank; by each kind of name. Switch:
      both questions about a pair named right, by different parts, while the top latent is the same for both;
   d. shares: all parts shared out among the questions as their use is. Whose share has the largest effect?
   e. swap: x less one question's pool of the pair's difference (the parts in whose use the question has more than
      `parts.CLEAR` times its fair share), which puts the other entity's in its place. Does this answer follow, do the
      other answers stay?
   f. removal: x less one question's pool of the difference from the average development entity. Is this answer lost,
      are the others kept?
3. Swap and removal of subspaces instead of pools (`subspaces`): contrasts of gradients, random ones of as many
   dimensions, and subspaces trained on the answers of development entities.
4. The same parts under other wordings: fact first, and ParaRel's.
Intervals: bootstrap over entities; a pair counts as often as both of its entities are drawn (Owen 2007). The readings
are compared with every other way in the same resamples: intervals of differences are paired.
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

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.metalatents import Decomposition, MetaDictionary
from mediation.realfacts.asking import Asked, Asking, ask, reask
from mediation.realfacts.naming import by_enrichment, by_lens, by_share, effect_use, use
from mediation.realfacts.parts import CLEAR, PairParts, average_parts, latent_parts, meta_parts
from mediation.realfacts.questions import (
    PARAREL_RELATIONS,
    DevelopmentEntities,
    Entities,
    HeldOutEntities,
    Topic,
    paraphrases,
    topics,
)
from mediation.realfacts.scores import (
    MEASURED,
    Figure,
    Measured,
    Scorer,
    carries,
    compared,
    effects_by_question,
    largest,
    less,
    margins,
    masked,
    measure,
    pool_patches,
    removal,
    score,
    swap,
)
from mediation.realfacts.subspaces import contrasts, patches, trained
from mediation.realfacts.ways import Development, ways
from mediation.sites import Site
from mediation.subject import SubjectModel

SAMPLED, LIKELY, TEMPERATURE = 8, 64, 2.0
MOST = 128  # entities of each half
READ = 64  # development entities whose gradients are taken
READINGS = "readings"  # the way that all others are compared with, pair by pair
REWORDED = ("latents", "readings")  # ways that are measured under other wordings too
REWORDED_PAIRS = 24
PARAPHRASES = 2  # of ParaRel, for each question
BOUNDS = (1.0, 1.6, 2.0)  # other bounds than CLEAR on a pool's parts, for these ways
BOUNDED = ("latents", "meta-SAE", "readings", "rotated readings")


@dataclass(frozen=True)
class FactsSettings:
    """pairs: held-out pairs, and as many of development; width: meta-latents of the readings; space, rank, steps:
    dimensions of the reading space of subspaces, and of each trained subspace, and steps of training (0: none);
    only: these ways.
    """

    pairs: int = 48
    width: int = 100
    space: int = 150
    rank: int = 64
    steps: int = 60
    seed: int = 0
    only: tuple[str, ...] | None = None


QUICK = FactsSettings(pairs=12, width=24, space=40, rank=8, steps=6, only=("meta-SAE", "readings", "rotated readings"))


def run_facts(
    model: SubjectModel,
    sites: Sequence[tuple[Dictionary, MetaDictionary | None]],
    *,
    topic: Topic | None = None,
    data: Path | None = None,
    settings: FactsSettings | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> dict[str, Any]:
    """The whole benchmark at every site; `topic`: countries, if none is given; `data` holds ravel/ and pararel/ (None:
    none of ParaRel's wordings).
    """
    settings, topic = settings or FactsSettings(), topic or topics()["countries"]
    started = time.perf_counter()
    development, held_out = of_length(topic, topic.load(data), model).split(settings.seed)
    development, held_out = development.some(MOST, settings.seed), held_out.some(MOST, settings.seed)
    found = []
    for number, (dictionary, meta) in enumerate(sites):

        def show(stage: str, number: int = number, name: str = dictionary.site.name) -> None:
            progress(f"{name}: {stage}", number, len(sites))

        found.append(run_site(model, dictionary, meta, topic, development, held_out, data, settings, show))
    return _plain(
        {
            "model": model.name,
            "topic": topic.name,
            "entities": {"development": len(development), "held_out": len(held_out)},
            "questions": list(topic.attributes),
            "sites": found,
            "settings": vars(settings),
            "measured": MEASURED,
            "clear": CLEAR,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - started,
        }
    )


def of_length(topic: Topic, entities: Entities, model: SubjectModel) -> Entities:
    """Those whose name has the topic's number of tokens where it is asked about; at least ten, or MediationError."""
    before = len(model.encode(topic.before))
    length = [len(model.encode(f"{topic.before} {name}")) - before for name in entities.names]
    rows = [row for row, tokens in enumerate(length) if tokens == topic.tokens]
    if len(rows) < 10:
        raise MediationError(
            f"{model.name} writes {len(rows)} of the {topic.name} with {topic.tokens} token(s); ten are needed."
        )
    return entities.only(rows)


def run_site(
    model: SubjectModel,
    dictionary: Dictionary,
    meta: MetaDictionary | None,
    topic: Topic,
    development: DevelopmentEntities,
    held_out: HeldOutEntities,
    data: Path | None,
    settings: FactsSettings,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """All figures of one site."""
    site, seed, questions = dictionary.site, settings.seed, topic.attributes
    show("development entities")
    wordings = {question.attribute: question.other_wordings for question in topic.questions}
    gradients = reading_gradients(model, site, wordings, development.some(READ, seed), seed)
    practice = ask(model, site, {q: w[0] for q, w in wordings.items()}, development, n_pairs=settings.pairs, seed=seed)
    show("held-out entities")
    entity_first = {question.attribute: question.asked for question in topic.questions}
    trial = ask(model, site, entity_first, held_out, n_pairs=settings.pairs, seed=seed)
    learn = Development(dictionary, development, practice.x, gradients)
    taken = ways(learn, meta, settings.width, seed, settings.only, lambda name: show(f"learning {name}"))

    scorer = Scorer(trial, seed)
    figures: dict[str, Any] = {}
    carry: dict[str, Any] = {}
    top_latent: dict[str, Tensor] = {}
    average = average_parts(dictionary, trial.x, learn.x)
    latents = _split(dictionary, trial, None)
    for name, decomposition in taken.items():
        show(f"measuring {name}")
        split = _split(dictionary, trial, decomposition)
        shares = use(gradients, split.directions)
        measured = measure(trial, split, shares)
        if decomposition is None:
            carry = carries(scorer, measured)
            top_latent = {q: measured.top(q) for q in questions}
        names = {
            "use": by_share(shares),
            "effect": by_share(effect_use(practice, _split(dictionary, practice, decomposition))),
            "enrichment": by_enrichment(_amounts(dictionary, learn.x, decomposition), development, questions),
            "lens": by_lens(model, split.directions, practice, seed),
        }
        figures[name] = score(scorer, measured, names, top_latent)
        away = average if decomposition is None else meta_parts(average, decomposition)
        figures[name]["removal"] = removal(trial, pool_patches(away, shares), seed)
        if name in BOUNDED:
            figures[name]["swap_by_bound"] = {
                str(bound): swap(
                    scorer, effects_by_question(trial, pool_patches(split, shares, bound)), measured.margin
                )
                for bound in BOUNDS
            }
        if name in REWORDED:
            figures[name]["other_words"] = [
                _in_other_words(dictionary, decomposition, trial, held_out, question, wording, measured, shares, seed)
                for question, wording in other_wordings(topic, data)
            ]

    subspaces: dict[str, Any] = {}
    margin = margins(trial)
    for name, operators in _operators(practice, gradients, settings, show).items():
        show(f"measuring {name}")
        subspaces[name] = {
            "swap": swap(scorer, effects_by_question(trial, patches(operators, latents.latents, questions)), margin),
            "swap_of_whole": swap(
                scorer, effects_by_question(trial, patches(operators, latents.whole, questions)), margin
            ),
            "removal": removal(trial, patches(operators, average.latents, questions), seed),
        }
    every = {**figures, **{f"subspaces: {name}": each for name, each in subspaces.items()}}
    return {
        "site": site.name,
        "known": {q: int(trial.knows[q].sum()) for q in questions},
        "known_two": int((torch.stack(list(trial.knows.values())).sum(0) >= 2).sum()),
        "pairs": {q: int(trial.pairs.asked[q].sum()) for q in questions},
        "carry": carry,
        "gradient_cosine": gradient_cosines(trial),
        "ways": figures,
        "subspaces": subspaces,
        "readings_less": _paired(every, READINGS),
    }


def _paired(every: Mapping[str, Any], name: str) -> dict[str, dict[str, Figure]]:
    """Every figure of way `name` less that of each other one, in the same resamples; nothing where it is not there."""
    if name not in every:
        return {}
    own = compared(every[name])
    others = {other: compared(figures) for other, figures in every.items() if other != name}
    return {other: {key: less(own[key], figure) for key, figure in found.items()} for other, found in others.items()}


def _operators(
    practice: Asking, gradients: Mapping[str, Tensor], settings: FactsSettings, show: Callable[[str], None]
) -> dict[str, dict[str, Tensor]]:
    """Step 3, by name."""
    found = {
        "everything": {q: torch.eye(each.shape[1]) for q, each in gradients.items()},
        "contrasts": contrasts(gradients, width=settings.space),
        "random": contrasts(gradients, width=settings.space, turned=settings.seed),
    }
    if settings.steps:
        found["trained"] = trained(
            practice,
            gradients,
            width=settings.space,
            rank=settings.rank,
            steps=settings.steps,
            seed=settings.seed,
            progress=lambda question: show(f"training a subspace, {question}"),
        )
    return found


def _plain(value: Any) -> Any:
    """The same with None for what is no number, as JSON wants it, and without the resamples of figures."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if not isinstance(each, np.ndarray)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def other_wordings(topic: Topic, data: Path | None) -> list[tuple[str, str]]:
    """Step 4: (question, wording); the fact first, and ParaRel's where there is a folder with them."""
    found = {(question.attribute, question.fact_first): None for question in topic.questions}
    if data is not None:
        for q in topic.attributes:
            if q in PARAREL_RELATIONS:
                found |= {(q, wording): None for wording in paraphrases(data, q)[:PARAPHRASES]}
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
            sampled = torch.multinomial(p.cpu(), min(SAMPLED, p.shape[1]), generator=generator).to(p.device)
            weights = one_hot(sampled, p.shape[1]) - p[:, None]
            parts.append(asked.gradients(every, asked.x, weights, top.indices).flatten(0, 1))
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
    """The pairs' differences taken apart."""
    latents = latent_parts(dictionary, asking.x[asking.pairs.clean], asking.x[asking.pairs.other])
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
    """Step 4 for one wording: the figures of the same pairs."""
    asking = reask(trial, question, wording, held_out, REWORDED_PAIRS)
    asked = asking.pairs.asked[question]
    figures: dict[str, Any] = {"question": question, "wording": wording, "pairs": int(asked.sum())}
    if not asked.any():
        return figures
    again = measure(asking, _split(dictionary, asking, decomposition), shares)
    scorer = Scorer(asking, seed)
    number = list(trial.by_question).index(question)
    top = again.top(question)
    return figures | {
        "same_part": scorer.mean({question: masked(top == measured.top(question), asked)}),
        "named": scorer.mean({question: masked(by_share(shares)[top] == number, asked)}),
        "pool": scorer.mean({question: masked(largest(again.shared[question]) == number, asked)}),
        "follows": scorer.mean({question: masked(again.margin[question] < again.pools[question][:, number], asked)}),
    }
