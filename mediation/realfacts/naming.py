"""What a part is for: names by question, made on development entities.

1. *use*: the share of a question in the power of gradients along the part's direction, E[(g.u)^2], every question's
   gradients scaled to the same power: who reads it.
2. *effect*: the share of a question in the part's effects on development pairs. A part's effect on a pair counts as a
   share of all parts' effects there, so that no question has more to give than another.
3. *enrichment* (mediation.labels): the attribute of the fact whose entities have most of the part.
4. *logit lens*: the attribute whose values' first tokens the part's direction moves most, up or down, against other
   tokens: area under the ROC curve, LENS_SCORE at least.
A name is the number of a question, -1 for none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mediation.labels import enrichment, final_norm_scale
from mediation.realfacts.asking import Asking
from mediation.realfacts.parts import PairParts, screen
from mediation.realfacts.questions import DevelopmentEntities
from mediation.subject import SubjectModel

LENS_SCORE = 0.75
LENS_TOKENS = 4000  # of the vocabulary, that values are compared with


def use(gradients: Mapping[str, Tensor], directions: Tensor) -> Tensor:
    """Name 1 before it is one: every question's share in directions [m, d], [m, n_questions]; gradients [n, d]."""
    power = [(each @ directions.T).square().sum(0) / each.square().sum() for each in gradients.values()]
    return _shares(torch.stack(power, dim=1))


def effect_use(practice: Asking, split: PairParts) -> Tensor:
    """The same for name 2; zeros for parts never met."""
    found = []
    for q in practice.by_question:
        size = screen(split, practice.gradients[q])[practice.pairs.asked[q]].abs()
        found.append((size / size.sum(1, keepdim=True).clamp_min(1e-12)).sum(0) / max(1, len(size)))
    return _shares(torch.stack(found, dim=1))


def by_share(shares: Tensor) -> Tensor:
    """The question with the largest share [m, n_questions] of each part, [m]."""
    return torch.where(shares.sum(1) > 0, shares.argmax(1), -1)


def _shares(power: Tensor) -> Tensor:
    return power / power.sum(1, keepdim=True).clamp_min(1e-12)


def by_enrichment(scores: Tensor, entities: DevelopmentEntities, questions: Sequence[str]) -> Tensor:
    """Name 3 from how much of each part every entity has, scores [entities, m]."""
    table = enrichment(scores, entities.tags())
    names = torch.full((scores.shape[1],), -1)
    for meta, label in zip(table["meta"].to_list(), table["label"].to_list(), strict=True):
        names[meta] = list(questions).index(label.partition("=")[0])
    return names


def by_lens(model: SubjectModel, directions: Tensor, practice: Asking, seed: int) -> Tensor:
    """Name 4 of directions [m, d]."""
    unembedding = model.module.get_output_embeddings().weight.detach().float() * final_norm_scale(model)
    drawn = torch.randperm(len(unembedding), generator=torch.Generator().manual_seed(seed))[:LENS_TOKENS]
    others = (directions @ unembedding[drawn].T).sort(dim=1).values
    scores = []
    for answers in practice.answers.values():
        tokens = answers[answers >= 0].unique()
        own = directions @ unembedding[tokens].T
        auc = torch.searchsorted(others, own.contiguous()).float().mean(1) / len(drawn)
        scores.append((auc - 0.5).abs() + 0.5)
    best = torch.stack(scores, dim=1).max(1)
    return torch.where(best.values >= LENS_SCORE, best.indices, -1)
