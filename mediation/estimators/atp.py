"""Attribution patching (Nanda 2023; Syed et al. 2023), at the level of latents.

Algorithm
1. One forward of the bare model on the clean prompts and one backward of the behaviour give g at
   every site. The dictionary stands beside the model, not in it: the error term is kept.
2. A_i = (f_i - f'_i) (g . w_i), gathered over active latents; A_eps = (eps - eps') . g.
"""

from __future__ import annotations

from collections.abc import Sequence

from mediation.estimators.common import EstimatorSettings, NodeScores, behaviour_gradient, contract
from mediation.nodes import SiteState
from mediation.prompts import Batch
from mediation.subject import SubjectModel


def atp(
    model: SubjectModel, batch: Batch, states: Sequence[SiteState], settings: EstimatorSettings
) -> list[NodeScores]:
    """First-order attribution of every node of every state; all sites share one backward pass."""
    sites = [state.dictionary.site for state in states]
    _, gradients = behaviour_gradient(model, batch, sites)
    return [contract(state, gradient) for state, gradient in zip(states, gradients, strict=True)]
