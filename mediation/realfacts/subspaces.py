"""One subspace for each question: what is exchanged when one fact of an entity is exchanged for another's.

Parts are directions, and a question's pool is some of them. These are the same without parts: for question q a matrix
P_q [d, d], and the patch for a pair is P_q (x - x').

`contrasts`, from gradients alone, without the answers (the generalised eigenvectors of two covariances; Fukunaga and
Koontz 1970):
1. Moments M_q of what questions read, their sum M, and the whitened reading space W, as in mediation.readings.
2. The eigenvectors of W^T M_q W: axes on which q's share of all reading is the eigenvalue. Keep those of a share above
   `clear` times the fair one; P_q projects on them, in the metric of M. With `turned` as many random axes: the control.

`trained`, from the answers of development entities: the bound on what a subspace fitted to few entities can do
(distributed alignment search, Geiger et al. 2024, with the isolating loss of Huang et al. 2024):
3. P_q = R_q R_q^T with R_q orthonormal, started from the strongest axes of step 2.
4. For random pairs of development entities, P_q (x - x') is taken out of x. Loss: cross-entropy, among all answers, of
   the other entity's answer to q, and of the entity's own answer to another question. Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mediation.errors import MediationError
from mediation.readings import reading_space
from mediation.realfacts.asking import Asking
from mediation.realfacts.parts import CLEAR

BATCH = 12  # pairs for each of the two losses
RATE = 1e-2


def contrasts(
    gradients: Mapping[str, Tensor], *, width: int, clear: float = CLEAR, turned: int | None = None
) -> dict[str, Tensor]:
    """Steps 1 and 2 for gradients [n, d] by question; `turned`: the seed of as many random axes."""
    moments, whiten = reading_space(gradients, width)
    into = torch.linalg.pinv(whiten.double()).float()
    generator = torch.Generator().manual_seed(turned or 0)
    found = {}
    for q, moment in zip(gradients, moments, strict=True):
        shares, axes = torch.linalg.eigh(whiten.T @ moment @ whiten)
        kept = axes[:, shares > clear / len(gradients)]
        if turned is not None:
            kept = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:, : kept.shape[1]]
        found[q] = whiten @ (kept @ kept.T) @ into
    return found


def trained(
    asking: Asking,
    gradients: Mapping[str, Tensor],
    *,
    width: int,
    rank: int,
    steps: int,
    seed: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Tensor]:
    """Steps 3 and 4 on the entities of `asking`; MediationError where a question has fewer than two known answers."""
    moments, whiten = reading_space(gradients, width)
    known = {q: each.nonzero()[:, 0] for q, each in asking.knows.items()}
    found = {}
    for q, moment in zip(gradients, moments, strict=True):
        if len(asking.answers[q][known[q]].unique()) < 2:
            raise MediationError(f"The model knows too few answers to train a subspace for {q}.")
        progress(q)
        axes = torch.linalg.eigh(whiten.T @ moment @ whiten).eigenvectors
        found[q] = _train(asking, q, known, whiten @ axes[:, -rank:], steps, torch.Generator().manual_seed(seed))
    return found


def _train(
    asking: Asking, question: str, known: Mapping[str, Tensor], start: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    others = [q for q in asking.by_question if q != question and len(known[q])]
    weights = torch.linalg.qr(start).Q.clone().requires_grad_()
    adam = torch.optim.Adam([weights], lr=RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps)
    everyone = torch.arange(len(asking.answers[question]))

    def drawn(among: Tensor) -> Tensor:
        return among[torch.randint(len(among), (BATCH,), generator=generator)]

    for step in range(steps):
        basis = torch.linalg.qr(weights).Q
        clean, other = drawn(known[question]), drawn(known[question])
        loss = _loss(asking, question, clean, other, other, basis)
        if others:
            kept = others[step % len(others)]
            clean = drawn(known[kept])
            loss = loss + _loss(asking, kept, clean, drawn(everyone), clean, basis)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        rate.step()
    basis = torch.linalg.qr(weights).Q.detach()
    return basis @ basis.T


def _loss(asking: Asking, question: str, clean: Tensor, other: Tensor, whose: Tensor, basis: Tensor) -> Tensor:
    """Cross-entropy of the answer that the entities `whose` [n] have, after the subspace is exchanged."""
    asked, answers = asking.by_question[question], asking.answers[question]
    candidates = answers[answers >= 0].unique()
    x = asked.x
    exchanged = x[clean] - ((x[clean] - x[other]) @ basis) @ basis.T
    logits = asked.answer(clean, exchanged)[:, candidates]
    return cross_entropy(logits, torch.searchsorted(candidates, answers[whose]))


def patches(operators: Mapping[str, Tensor], difference: Tensor, questions: Sequence[str]) -> Tensor:
    """Patches [n, n_questions, d] for differences [n, d]."""
    return torch.stack([difference @ operators[q].T for q in questions], dim=1)
