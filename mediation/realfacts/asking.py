"""A question asked of many entities, with the entity's token open to surgery.

1. Run the wording for every entity; they must be of one token length. The entity's position is the last token at
   which the prompts differ: the last of its name. Keep the whole residual at the site, with x at that position.
2. To measure a change of x, the model goes on from the site (the blocks before it are passed over) with the changed
   vector at the entity's position and all else as it was. Behaviour: logit of the right answer's first token less that
   of the other entity's.
3. Pairs: two entities; a question is asked of a pair when the model knows both answers (the right one has the largest
   logit among all answers to the question) and their first tokens differ.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mediation.errors import MediationError
from mediation.realfacts.questions import Entities
from mediation.sites import Site
from mediation.subject import SubjectModel

CHUNK = 64  # sequences in a forward
STEPS = 4  # of path gradients


class Asked:
    """One wording, asked of `names`. tokens [n, T]; x [n, d], the residual at the site and the entity's position."""

    def __init__(self, model: SubjectModel, site: Site, wording: str, names: Sequence[str]) -> None:
        tokens = [model.encode(wording.format(name)) for name in names]
        if len({len(row) for row in tokens}) != 1:
            raise MediationError(f"The entities asked {wording!r} have names of unequal token length; ask by length.")
        self.model, self.site, self.wording = model, site, wording
        self.tokens = torch.tensor(tokens, device=model.device)
        differs = (self.tokens != self.tokens[0]).any(0).nonzero()[:, 0]
        if len(differs) == 0:
            raise MediationError(f"{wording!r} is the same prompt for all entities; put {{}} where the entity stands.")
        self.position, self.last = int(differs[-1]), self.tokens.shape[1] - 1
        with torch.no_grad():
            parts = [model.forward(part, read=[site], logits=False).sites[site] for part in self.tokens.split(CHUNK)]
        self.residual = torch.cat(parts)

    @property
    def x(self) -> Tensor:
        """The residual at the entity's position, [n, d]."""
        return self.residual[:, self.position]

    def logits(self, rows: Tensor, x: Tensor) -> Tensor:
        """Logits [k, vocab] of the answer for prompts `rows` [k] with `x` [k, d] at the entity's position."""
        with torch.no_grad():
            return torch.cat([self._run(r, v)[0] for r, v in _chunks(rows, x)])

    def answer(self, rows: Tensor, x: Tensor) -> Tensor:
        """The same logits in one forward, with the graph that leads back to `x`."""
        return self._run(rows, x, graph=True)[0]

    def margin(self, rows: Tensor, x: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
        """logit[right] - logit[wrong], [k]; right and wrong are tokens [k], the rest as in `logits`."""
        with torch.no_grad():
            found = [_difference(self._run(r, v)[0], a, b) for r, v, a, b in _chunks(rows, x, right, wrong)]
            return torch.cat([x.new_zeros(0), *found])

    def gradients(self, rows: Tensor, x: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        """Gradients [k, s, d], with respect to `x`, of sums of logits of `tokens` [k, m] times `weights` [k, s, m]."""
        found = [x.new_zeros(0, weights.shape[1], x.shape[1])]
        for r, v, w, t in _chunks(rows, x, weights, tokens):
            logits, residual = self._run(r, v, grad=True)
            sums = (logits.gather(1, t)[:, None] * w).sum((0, 2))
            each = [torch.autograd.grad(one, [residual], retain_graph=True)[0][:, self.position] for one in sums]
            found.append(torch.stack(each, dim=1))
        return torch.cat(found)

    def path_gradient(self, rows: Tensor, start: Tensor, end: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
        """Mean gradient [k, d] of the margin on the straight path between two vectors [k, d]; midpoints of STEPS."""
        weights = torch.tensor([1.0, -1.0], device=start.device).expand(len(rows), 1, 2)
        tokens = torch.stack([right, wrong], dim=1)
        total = torch.zeros_like(start)
        for step in range(STEPS):
            x = start + (step + 0.5) / STEPS * (end - start)
            total += self.gradients(rows, x, weights, tokens)[:, 0] / STEPS
        return total

    def _run(self, rows: Tensor, x: Tensor, *, grad: bool = False, graph: bool = False) -> tuple[Tensor, Tensor]:
        residual = self.residual[rows].clone()
        residual[:, self.position] = x
        forward = self.model.forward(
            self.tokens[rows],
            edit={self.site: lambda _: residual},
            start=self.site,
            read=[self.site] if grad else [],
            positions=torch.tensor([self.last]),
            grad=grad or graph,
        )
        assert forward.logits is not None
        return forward.logits[:, 0], forward.sites[self.site] if grad else residual


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors CHUNK rows at a time; nothing of tensors without rows."""
    if len(tensors[0]):
        yield from zip(*(each.split(CHUNK) for each in tensors), strict=True)


def _difference(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    row = torch.arange(len(logits), device=logits.device)
    return logits[row, right] - logits[row, wrong]


def answer_tokens(model: SubjectModel, wording: str, entities: Entities, attribute: str) -> list[int]:
    """First token of every entity's answer to the wording; -1 where the answer is not known."""
    tokens = []
    for name, value in zip(entities.names, entities.values[attribute], strict=True):
        prompt = wording.format(name)
        prefix = model.encode(prompt)
        whole = model.encode(f"{prompt} {value}")
        tokens.append(-1 if value is None or whole[: len(prefix)] != prefix else whole[len(prefix)])
    return tokens


def known(asked: Asked, answers: Tensor) -> Tensor:
    """Whether each entity's answer (tokens [n], -1 for none) has the largest logit among all answers, [n]."""
    logits = asked.logits(torch.arange(len(answers), device=answers.device), asked.x)
    candidates = answers[answers >= 0].unique()
    best = candidates[logits[:, candidates].argmax(dim=1)]
    return (best == answers) & (answers >= 0)


@dataclass
class Pairs:
    """Pairs of entities: `clean` and `other` [n] index them; for each question `right` and `wrong` first tokens [n]
    and whether the question is asked of the pair, `asked` [n].
    """

    clean: Tensor
    other: Tensor
    right: Mapping[str, Tensor]
    wrong: Mapping[str, Tensor]
    asked: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.clean)

    def only(self, rows: Tensor) -> Pairs:
        """These pairs; `rows` are indices or a mask."""
        right, wrong, asked = (
            {q: each[rows] for q, each in group.items()} for group in (self.right, self.wrong, self.asked)
        )
        return Pairs(self.clean[rows], self.other[rows], right, wrong, asked)


def draw_pairs(answers: Mapping[str, Tensor], knows: Mapping[str, Tensor], n: int, seed: int) -> Pairs:
    """At most `n` ordered pairs, each with two questions to ask at least, up to half of them with three.

    answers: by question, first tokens [entities]; knows: by question, [entities].
    """
    (size,) = {len(each) for each in answers.values()}
    rng = random.Random(seed)
    chosen: dict[tuple[int, int], None] = {}
    for least, wanted in ((3, n // 2), (2, n)):
        for _ in range(4 * n):  # rounds through all entities in random order
            order = list(range(size))
            rng.shuffle(order)
            for pair in pairwise(order):
                if len(chosen) < wanted and sum(_askable(pair, answers[q], knows[q]) for q in answers) >= least:
                    chosen[pair] = None
    if not chosen:
        raise MediationError("No two entities have two questions that the model answers right for both.")
    clean, other = torch.tensor(list(chosen)).T
    return Pairs(
        clean,
        other,
        {q: tokens[clean] for q, tokens in answers.items()},
        {q: tokens[other] for q, tokens in answers.items()},
        {q: knows[q][clean] & knows[q][other] & (answers[q][clean] != answers[q][other]) for q in answers},
    )


@dataclass
class Asking:
    """One wording of every question, asked of the same entities at one site; pairs of them, and the pairs' gradients.

    answers and knows by question: first tokens [entities] and whether the model knows them; gradients and totals by
    question: path gradients [n, d] and total effects [n] of the pairs, NaN where the question is not asked.
    """

    by_question: dict[str, Asked]
    answers: dict[str, Tensor]
    knows: dict[str, Tensor]
    pairs: Pairs
    gradients: dict[str, Tensor]
    totals: dict[str, Tensor]

    @property
    def x(self) -> Tensor:
        """Residuals of all entities at their last token, [entities, d]: as the first question finds them, and with the
        entity first so do all.
        """
        return next(iter(self.by_question.values())).x


def ask(
    model: SubjectModel, site: Site, wordings: Mapping[str, str], entities: Entities, *, n_pairs: int, seed: int
) -> Asking:
    """Ask every question in one wording; `n_pairs` at most are drawn among what the model knows."""
    by_question = {q: Asked(model, site, wording, entities.names) for q, wording in wordings.items()}
    answers = {q: torch.tensor(answer_tokens(model, wordings[q], entities, q)) for q in wordings}
    knows = {q: known(by_question[q], answers[q]) for q in wordings}
    return _asking(by_question, answers, knows, draw_pairs(answers, knows, n_pairs, seed))


def reask(asking: Asking, question: str, wording: str, entities: Entities, most: int) -> Asking:
    """One question about the same pairs in other words: those whose answers the model knows then, `most` of them."""
    before = asking.by_question[question]
    asked = Asked(before.model, before.site, wording, entities.names)
    answers = torch.tensor(answer_tokens(before.model, wording, entities, question))
    knows = known(asked, answers)
    clean, other = asking.pairs.clean, asking.pairs.other
    right, wrong = answers[clean], answers[other]
    where = asking.pairs.asked[question] & knows[clean] & knows[other] & (right != wrong)
    where &= where.cumsum(0) <= most
    pairs = Pairs(clean, other, {question: right}, {question: wrong}, {question: where})
    return _asking({question: asked}, {question: answers}, {question: knows}, pairs)


def _asking(
    by_question: dict[str, Asked], answers: dict[str, Tensor], knows: dict[str, Tensor], pairs: Pairs
) -> Asking:
    gradients, totals = {}, {}
    for q, asked in by_question.items():
        here = pairs.only(pairs.asked[q])
        own, other = asked.x[here.clean], asked.x[here.other]
        right, wrong = here.right[q], here.wrong[q]
        found = asked.path_gradient(here.clean, other, own, right, wrong)
        total = asked.margin(here.clean, own, right, wrong) - asked.margin(here.other, other, right, wrong)
        gradients[q] = spread(found, pairs.asked[q])
        totals[q] = spread(total, pairs.asked[q])
    return Asking(by_question, answers, knows, pairs, gradients, totals)


def spread(values: Tensor, where: Tensor) -> Tensor:
    """`values` [k, ...] at the k places that `where` [n] marks, NaN elsewhere: [n, ...]."""
    found = values.new_full((len(where), *values.shape[1:]), torch.nan)
    found[where] = values
    return found


def _askable(pair: tuple[int, int], answers: Tensor, knows: Tensor) -> bool:
    a, b = pair
    return bool(knows[a] and knows[b] and answers[a] != answers[b])
