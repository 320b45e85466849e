"""MLP neurons as latents, without a dictionary: the baseline that any claim about a dictionary must survive.

A block's MLP writes sum_i h_i w_i + b, with h what its last projection is given and w_i that projection's columns. So
neurons are a transcoder that is exact: read where the MLP is given its input, written to its output, no error.

1. h is taken from the MLP itself, run on its input; latents are h_i |w_i|, as those of every dictionary. What runs is a
   copy with the same weights, so that neurons can be read while the model runs.
2. A neuron has no threshold: as a target it is read through its slope at the value read, d h_i / d x, in place of an
   encoder row. A gated neuron's slope goes through both branches.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.loading import ARCHITECTURES
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel


class Neurons(Dictionary):
    """The neurons of one block's MLP. Raises MediationError where a norm follows the MLP (Gemma 2 and 3)."""

    def __init__(self, model: SubjectModel, layer: int) -> None:
        names = ARCHITECTURES[model.architecture]
        if names.mlp_out != "mlp":
            raise MediationError(
                f"In {model.name} a norm stands after the MLP, so that its neurons write nothing by themselves: use "
                "Coordinates or dictionaries there."
            )
        self._mlp = _bare(model.module.get_submodule(names.blocks)[layer].mlp)
        self._last = self._mlp.get_submodule(names.projection.removeprefix("mlp."))
        weight = self._last.weight.float()
        columns = weight.T if isinstance(self._last, torch.nn.Linear) else weight  # GPT-2's Conv1D is transposed
        self._norms = columns.norm(dim=-1)
        self.decoder = columns / self._norms[:, None].clamp_min(torch.finfo(columns.dtype).tiny)
        bias = self._last.bias
        self.b_dec = torch.zeros_like(columns[0]) if bias is None else bias.float()
        self.architecture, self.normalisation = "neurons", "none"
        self.d_model, self.d_sae = model.d_model, len(columns)
        self.site, self.reads = Site(layer, Stream.MLP_OUT), Site(layer, Stream.MLP_IN)
        self.name, self.content_hash = f"{self.site.name}.neurons", ""
        self.folder, self.model_name = None, None

    def encode(self, x: Tensor) -> Tensor:
        """h |w| [..., d_mlp] of what the MLP is given, x [..., d_model]."""
        held: list[Tensor] = []
        handle = self._last.register_forward_pre_hook(lambda _, given: held.append(given[0]))
        try:
            self._mlp(x.to(self._last.weight))
        finally:
            handle.remove()
        return held[0].float() * self._norms

    def explain(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Of the MLP's output, from its input `read` [..., d_model]; the error is rounding."""
        return self.encode(read), self.b_dec.expand(*read.shape[:-1], -1)

    def rows(self, read: Tensor, latent: Tensor) -> Tensor:
        """Slopes [n, d_model] of n neurons, each at what the MLP is given at its place, `read` [n, d_model]."""
        with torch.enable_grad():
            given = read.detach().clone().requires_grad_()
            chosen = self.encode(given)[torch.arange(len(latent), device=latent.device), latent]
            (slopes,) = torch.autograd.grad(chosen.sum(), given)
        return slopes


def _bare(mlp: Any) -> Any:
    """A copy that shares the weights and that nnsight, which takes over every module's forward, knows nothing of."""
    memo: dict[int, Any] = {id(each): each for each in mlp.parameters()}
    taken = ("forward", "__nnsight__")
    memo |= {id(value): value for part in mlp.modules() for name, value in vars(part).items() if name in taken}
    bare = copy.deepcopy(mlp, memo)
    for part in bare.modules():
        for name in taken:
            vars(part).pop(name, None)
    return bare
