"""Node attribution: parallel functions with one signature, one formula each.

Every estimator takes the model, a batch, the batch's site states and `EstimatorSettings`, and
returns one `NodeScores` per state. Positive = the node, at its clean value, pushes the behaviour up.

| function | A_i = (f_i - f'_i) x ... | cost |
|---|---|---|
| `atp` | gradient at the clean prompt | one forward and backward |
| `ig` | gradient averaged along the path from baseline to clean | `steps` of them per site |
| `exact` | m(clean) - m(do f_i = f'_i), measured | one forward per node |
"""

from collections.abc import Callable
from enum import StrEnum

from mediation.estimators.atp import atp
from mediation.estimators.common import EstimatorSettings, NodeScores
from mediation.estimators.exact import exact
from mediation.estimators.integrated_gradients import ig


class Estimator(StrEnum):
    """Which estimator ranks the nodes of a run."""

    ATP = "atp"  # attribution patching (Nanda 2023): first order at the clean prompt; cheapest
    IG = "ig"  # integrated gradients (Sundararajan et al. 2017) in activation space; conserves at a cut
    EXACT = "exact"  # activation patching of every node; the reference the others are judged by


ESTIMATORS: dict[Estimator, Callable[..., list[NodeScores]]] = {
    Estimator.ATP: atp,
    Estimator.IG: ig,
    Estimator.EXACT: exact,
}

__all__ = ["ESTIMATORS", "Estimator", "EstimatorSettings", "NodeScores", "atp", "exact", "ig"]
