"""Absorption beyond spelling: is a concept's own latent silent where the concept is present and used?

1. Words of several concepts, one token each, in the same contexts (`mediation.absorbed.concepts`); x is the residual at
   the word. Members are split in two halves, and each half is judged by what was found on the other half in other
   contexts: neither a word nor a context is shared.
2. Probe of a concept: logistic regression (balanced classes, C = .1) on standardised x, members against all other
   words. *Present* at a word: the probe is positive there.
3. Own latents of a concept: `mediation.absorption.main_latents`, from the same words as the probe. *Silent*: all off.
   Where no latent speaks for a concept (no positive weight) there is none to be silent: counted apart.
4. *Used*, which no dictionary enters: the word's x is moved along the difference of means (members less others) until
   the probe reads what it reads on average for others. The behaviour is the logit of the concept's answer less the mean
   logit of the other concepts' answers; it must be positive to begin with. Used: it falls to half or less. How often
   `CONTROLS` moves of the same length, along differences of two other words, do the same is reported beside it.
5. Figures, over members: share of words present at which own latents are silent; the same among those where the concept
   is used; the share with v2 full absorption, where one other latent carries at least .4 of the probe's projection; and
   v2's fraction (`mediation.absorbed.letters`). Beside them the own latents' F1 on the held-out words: a dictionary
   without a latent for the concept at all shows as silent too.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mediation.absorbed.concepts import Family
from mediation.absorbed.contexts import InContext, single_tokens
from mediation.absorbed.letters import SILENT, absorbed_full
from mediation.absorbed.scores import share
from mediation.absorption import absorption_fractions, main_latents
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.quality import held_out_figures
from mediation.sites import Site
from mediation.subject import SubjectModel

FOLDS, CONTROLS, STRENGTH = 2, 2, 0.1
HALF, READABLE = 0.5, 0.6
LEAST_MEMBERS = 8
NO_CONCEPT = -1


@dataclass
class Words:
    """A family's words [n] with their concept (number or NO_CONCEPT) and half; x [contexts, n, d] by site."""

    family: Family
    words: list[str]
    concept: Tensor
    half: Tensor
    discovery: dict[Site, Tensor]
    evaluation: dict[Site, Tensor]
    contexts: list[InContext]  # those of evaluation
    answers: Tensor  # token of every concept's answer


@dataclass
class Case:
    """One concept judged on one half: rows of `Words` per role, the probe, and per judged word and context what holds.

    probe [d], unit; members [k] rows; present, right, used and the share of control moves that do the same
    [contexts, k].
    """

    concept: int
    half: int
    probe: Tensor
    bias: float
    members: Tensor
    present: Tensor
    right: Tensor
    used: Tensor
    control: Tensor


def read_words(model: SubjectModel, family: Family, sites: Sequence[Site], seed: int = 0) -> Words:
    """Step 1."""
    rng = random.Random(seed)
    known = single_tokens(model, [word for each in family.concepts for word in each.members] + list(family.others))
    rows: list[tuple[str, int, int]] = []
    kept = tuple(each for each in family.concepts if sum(word in known for word in each.members) >= LEAST_MEMBERS)
    if len(kept) < min(2, len(family.concepts)):
        raise MediationError(
            f"{model.name} writes fewer than {LEAST_MEMBERS} words as one token of all but {len(kept)} concepts of "
            f"'{family.name}'; measure another model."
        )
    family = replace(family, concepts=kept)
    groups = [(number, each.members) for number, each in enumerate(kept)] + [(NO_CONCEPT, family.others)]
    for number, members in groups:
        mine = [word for word in dict.fromkeys(members) if word in known]
        rng.shuffle(mine)
        rows += [(word, number, place % FOLDS) for place, word in enumerate(mine)]
    ids = torch.tensor([known[word] for word, _, _ in rows])
    sides = [[InContext(model, each, ids) for each in side] for side in (family.discovery, family.evaluation)]
    read = [[context.x(sites) for context in side] for side in sides]
    discovery, evaluation = ({site: torch.stack([x[site].cpu() for x in side]) for site in sites} for side in read)
    answers = [model.tokenizer(each.answer, add_special_tokens=False)["input_ids"][0] for each in kept]
    return Words(
        family,
        [word for word, _, _ in rows],
        torch.tensor([number for _, number, _ in rows]),
        torch.tensor([half for _, _, half in rows]),
        discovery,
        evaluation,
        sides[1],
        torch.tensor(answers),
    )


def find_cases(words: Words, site: Site, seed: int = 0, progress: Callable[[], None] = lambda: None) -> list[Case]:
    """Steps 2 and 4 for every concept and half at a site."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for concept in range(len(words.family.concepts)):
        for half in range(FOLDS):
            progress()
            learn = words.half != half
            x, is_member = _discovery(words, site, learn, concept)
            scaler = StandardScaler().fit(x.numpy())
            fitted = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=300)
            fitted.fit(scaler.transform(x.numpy()), is_member.numpy())
            weights = torch.from_numpy(fitted.coef_[0] / scaler.scale_).float()
            offset = float(fitted.intercept_[0]) - float(weights @ torch.from_numpy(scaler.mean_).float())
            size = float(weights.norm())
            probe, bias = weights / size, offset / size
            members = ((words.concept == concept) & ~learn).nonzero()[:, 0]
            judged = words.evaluation[site][:, members]
            present = judged @ probe + bias > 0
            nothing = torch.zeros_like(present)
            case = Case(concept, half, probe, bias, members, present, nothing, nothing, torch.zeros(present.shape))
            if words.family.asks:
                means = x[is_member].mean(0), x[~is_member].mean(0)
                _intervene(words, site, case, means, x[~is_member], generator)
            cases.append(case)
    return cases


def moved(x: Tensor, probe: Tensor, along: Tensor, level: float) -> Tensor:
    """x [k, d] moved along `along` [d] until x . probe is `level`; where `along` is orthogonal to the probe, as it
    was."""
    slope = along @ probe
    if float(slope.abs()) < 1e-6 * float(along.norm()):
        return x
    return x - ((x @ probe - level) / slope)[:, None] * along


def _discovery(words: Words, site: Site, learn: Tensor, concept: int) -> tuple[Tensor, Tensor]:
    """x [contexts * n, d] of the words to learn from, and which are members."""
    x = words.discovery[site][:, learn]
    return x.flatten(0, 1), (words.concept[learn] == concept).repeat(len(x))


def _intervene(
    words: Words, site: Site, case: Case, means: tuple[Tensor, Tensor], others: Tensor, generator: torch.Generator
) -> None:
    """Step 4: fills in what is right and used."""
    right, used, control = [], [], []
    k = len(case.members)
    weights = torch.full((len(words.answers),), -1.0 / (len(words.answers) - 1))
    weights[case.concept] = 1.0
    for context, x_all in zip(words.contexts, words.evaluation[site], strict=True):
        x = x_all[case.members]
        new = moved(x, case.probe, means[0] - means[1], float(means[1] @ case.probe))
        length = (new - x).norm(dim=1, keepdim=True)
        changed = [x, new]
        for _ in range(CONTROLS):
            pair = others[torch.randint(len(others), (2, k), generator=generator)]
            direction = pair[0] - pair[1]
            # Two draws of one word give no direction; they stay as they are and count as no change.
            changed.append(x + length * direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-6))
        rows = case.members.repeat(len(changed))
        margins = (context.logits(site, rows, torch.cat(changed), words.answers).cpu() @ weights).view(-1, k)
        halved = (margins[1:] <= HALF * margins[0]) & (margins[0] > 0)
        right.append(margins[0] > 0)
        used.append(halved[0])
        control.append(halved[1:].float().mean(0))
    case.right, case.used, case.control = torch.stack(right), torch.stack(used), torch.stack(control)


@dataclass
class Judged:
    """Per judged word and context of one concept: what holds, as flat columns, and the member each belongs to."""

    concept: str
    member: list[str]
    present: np.ndarray
    right: np.ndarray
    used: np.ndarray
    control: np.ndarray
    silent: np.ndarray
    full: np.ndarray
    fraction: np.ndarray
    f1: float
    own: int


@torch.no_grad()
def judge(dictionary: Dictionary, words: Words, cases: Sequence[Case]) -> list[Judged]:
    """Steps 3 and 5 for one dictionary: what holds at every judged word, by concept and half."""
    site = dictionary.site
    everything = words.discovery[site].flatten(0, 1)
    latents = torch.cat([dictionary.encode(part) for part in everything.split(512)])
    latents = latents.view(len(words.discovery[site]), len(words.words), -1)
    judged_latents = torch.stack([dictionary.encode(each) for each in words.evaluation[site]])
    found = []
    for case in cases:
        learn = words.half != case.half
        seen = sparse.csr_matrix(latents[:, learn].flatten(0, 1).numpy())
        is_member = (words.concept[learn] == case.concept).repeat(len(latents)).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            own = main_latents(seen, is_member)
        f = judged_latents[:, case.members].flatten(0, 1)
        x = words.evaluation[site][:, case.members].flatten(0, 1)
        held = judged_latents[:, ~learn]
        on = (held[..., own] > SILENT).any(-1).flatten()
        truth = (words.concept[~learn] == case.concept).repeat(len(held))
        found.append(
            Judged(
                words.family.concepts[case.concept].name,
                [words.words[row] for row in case.members.tolist()] * len(held),
                case.present.flatten().numpy(),
                case.right.flatten().numpy(),
                case.used.flatten().numpy(),
                case.control.flatten().numpy(),
                (f[:, own] < SILENT).all(1).numpy(),
                absorbed_full(f, x, dictionary.decoder, case.probe, own).numpy(),
                absorption_fractions(f, x, dictionary.decoder, case.probe, own).numpy(),
                float(f1_score(truth.numpy(), on.numpy())),
                len(own),
            )
        )
    return found


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Step 5 over halves (and concepts, where several are given); own latents' figures where there are any."""
    own = np.concatenate([np.full(len(each.member), each.own > 0) for each in judged])
    member = np.concatenate([np.array([f"{each.concept}: {word}" for word in each.member]) for each in judged])
    present, right, used, control, silent, full, fraction = (
        np.concatenate([getattr(each, name) for each in judged])
        for name in ("present", "right", "used", "control", "silent", "full", "fraction")
    )
    with_own = present & own
    at = with_own & used
    found: dict[str, Any] = {
        "present": share(present, groups=member),
        "right": share(right & present, present, member),
        "used": share(used & present, right & present, member),
        "control": share(control * present, right & present, member),
        "without_own": sum(each.own == 0 for each in judged) / len(judged),
        "own_f1": float(np.mean([each.f1 for each in judged if each.own])) if own.any() else None,
        "own_latents": float(np.mean([each.own for each in judged])),
    }
    readable = (found["present"]["value"] or 0.0) >= READABLE
    counted, counted_used = with_own & readable, at & readable
    return found | {
        "silent": share(silent & counted, counted, member),
        "silent_while_used": share(silent & counted_used, counted_used, member),
        "absorbed_full": share(full & counted, counted, member),
        "absorbed_full_while_used": share(full & counted_used, counted_used, member),
        "absorbed_fraction": share(fraction * counted, counted, member),
    }


def measure_dictionary(dictionary: Dictionary, families: Sequence[tuple[Words, Sequence[Case]]]) -> dict[str, Any]:
    """Steps 3 and 5 for a dictionary: figures by family, over all its concepts and for each; fidelity on these
    words."""
    x = torch.cat([words.evaluation[dictionary.site].flatten(0, 1) for words, _ in families])
    result: dict[str, Any] = {
        "site": dictionary.site.name,
        "width": dictionary.d_sae,
        "on_these_words": held_out_figures(dictionary, x),
        "families": {},
    }
    for words, cases in families:
        judged = judge(dictionary, words, cases)
        concepts = list(dict.fromkeys(each.concept for each in judged))
        result["families"][words.family.name] = {
            "all": figures(judged),
            "concepts": {name: figures([each for each in judged if each.concept == name]) for name in concepts},
        }
    return result
