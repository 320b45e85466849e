"""Does removing a kind of fact move the behaviour more than removing anything else as large would?

The hypothesis: the model does not tell the kind's directions u_v (one for each value v) from any other directions. The
test is a randomisation test over directions.

1. Statistic: the mean, over the prompts of a question, of |m(x) - m(x - c u_v)|, with c the coefficient of the prompt's
   own value v. Its size alone counts: a direction taken from the total effect would be that of the removed part itself,
   which is in the total effect (judged by that sign, .11 to .15 of null tests had p <= .05).
2. A control turns the whole kind: every u_v is replaced by u'_v with the same inner products among the values, and one
   control is one set u' for all prompts, with the same coefficients at the same positions. So two prompts that share a
   value share a direction in the control too, and under the hypothesis the statistic is one draw among its controls.
   Directions drawn anew for each prompt would average out, and the kind's own would look large beside them.
3. Controls lie in the span of the facts of other kinds in the same latents: random mixtures of them, made orthonormal,
   and the kind's own geometry upon them. Where other facts span too little for that, the dictionary's rows do.
4. p = (1 + #{controls >= statistic}) / (1 + n) (Phipson and Smyth 2010).
5. q-values by Benjamini and Hochberg (1995) over everything that *could* have been tested. Discovery and evaluation
   prompts share the model, so a kind that stands out by chance on the ones does so on the others: the best of K kinds
   is no single draw. Whatever was not nominated enters with p = 1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mediation.statistics import Floats, benjamini_hochberg, permutation_p


def turned(own: Tensor, others: Tensor, rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Steps 2 and 3: n controls [n, m, d] of a kind's directions `own` [m, d], m > 0.

    others [k, d]: directions of other kinds; rows [l, d]: of the dictionary.
    """
    u, s, _ = torch.linalg.svd(own.double(), full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    wide = len(others) >= rank and int(torch.linalg.matrix_rank(others.double())) >= rank
    source = (others if wide else rows).double()
    mixed = torch.randn(n, rank, len(source), generator=generator, dtype=torch.float64).to(source.device)
    frames = torch.linalg.qr((mixed @ source).mT).Q.mT  # [n, rank, d]
    return (u[:, :rank] * s[:rank] @ frames).to(own)  # own = (u s) @ an orthonormal frame


def removal_p(effects: ArrayLike, controls: ArrayLike) -> float:
    """Steps 1 and 4: `effects` [prompts] of the removals, `controls` [prompts, n] of the same prompts."""
    size, null = (np.abs(np.asarray(each, dtype=np.float64)).mean(axis=0) for each in (effects, controls))
    return float(permutation_p(size, null))


def q_values(p: ArrayLike, candidates: int) -> Floats:
    """Step 5: of the tests made, [m], among `candidates` >= m that could have been."""
    tested = np.asarray(p, dtype=np.float64)
    return benjamini_hochberg(np.concatenate([tested, np.ones(candidates - len(tested))]))[: len(tested)]


def least_q(tests: int, candidates: int, controls: int) -> float:
    """The smallest q that `tests` of `candidates` can reach, when all of them have the smallest p."""
    return min(1.0, candidates / (max(tests, 1) * (controls + 1)))
