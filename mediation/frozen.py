"""A model made linear around one forward pass: the model in which direct effects add up exactly.

What a transformer multiplies together depends on its input twice. One factor of every such product is held
at its value in the recorded pass, so that the model's output, unchanged in that pass, becomes an affine
function of its input:

1. Attention: queries and keys are held, so the pattern (masks, soft-capping, windows and all) is constant
   and the output is linear in the values.
2. LayerNorm and RMSNorm: the divisor is held; centring, gain and bias stay.
3. Gated MLP, act(gate) * up: act(gate) is held, and the output is linear in up.
4. Plain MLP: the factor act(z) / z is held, so that no constant comes from the activation.

What is left that is not linear is a soft-cap on the logits (Gemma 2). `record` holds the factors of the pass
it runs; `replay` uses those of the last recorded one, on the same tokens and other values.
Sources: frozen patterns and divisors, Elhage et al. 2021 and Ameisen et al. 2025; the held factor of the
activation is the identity rule of layer-wise relevance propagation (RelP, arXiv 2508.21258), the held gate
one choice where that paper halves the product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mediation.loading import ARCHITECTURES
from mediation.subject import SubjectModel, own_forward, with_forward

SMALLEST = 1e-12  # below this |z| the factor act(z) / z is taken as 0: all families' act(0) is 0


class Semantics(StrEnum):
    """Which Jacobian an edge uses."""

    GRADIENT = "gradient"
    """The model as it is. First order: right for small changes, and where the model is not curved. The default."""
    LINEAR = "linear"
    """Attention patterns, norms' divisors and MLP factors held: edges add up exactly; what moves those is not seen.
    Only a log-probability's normaliser, and the soft-cap of Gemma 2's logits, stay curved."""


class Frozen:
    """The factors held of one forward pass of a model."""

    def __init__(self, model: SubjectModel) -> None:
        names = ARCHITECTURES[model.architecture]
        self._config = model.module.config.get_text_config()
        self._norms = [part for part in model.module.modules() if is_norm(part)]
        blocks = model.module.get_submodule(names.blocks)
        self._activations = [block.get_submodule(names.activation) for block in blocks]
        self._gated = names.gated
        self._held: dict[nn.Module, tuple[Tensor, ...]] = {}

    @contextmanager
    def record(self) -> Iterator[None]:
        """Forward passes in this block have the model's own values and the linear model's gradients."""
        self._held = {}
        with self._patched(self._record):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Forward passes in this block, on the tokens of the recorded one, are the linear model's."""
        with self._patched(self._recall):
            yield

    def _record(self, module: nn.Module, *factors: Tensor) -> tuple[Tensor, ...]:
        self._held[module] = tuple(factor.detach() for factor in factors)
        return self._held[module]

    def _recall(self, module: nn.Module, *factors: Tensor) -> tuple[Tensor, ...]:
        return self._held[module]

    @contextmanager
    def _patched(self, hold: Callable[..., tuple[Tensor, ...]]) -> Iterator[None]:
        """`hold(module, *factors)` says which factors a module multiplies with."""
        activation = _gate if self._gated else _secant
        kinds = {self._config._attn_implementation, "eager"}  # a forward pass inside may take the plain one
        with ExitStack() as undo:
            for norm in self._norms:
                rule = _layer_norm if isinstance(norm, nn.LayerNorm) else _rms_norm
                undo.enter_context(with_forward(norm, partial(rule, norm, own_forward(norm), hold)))
            for part in self._activations:
                undo.enter_context(with_forward(part, partial(activation, part, own_forward(part), hold)))
            for kind in kinds:
                own = ALL_ATTENTION_FUNCTIONS.get(kind)
                ALL_ATTENTION_FUNCTIONS[kind] = partial(_attention, own, hold)
                undo.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, kind)
            yield


def is_norm(module: nn.Module) -> bool:
    """Whether a module is one of the norms that `Frozen` knows."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _layer_norm(norm: Any, own: Any, hold: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    (scale,) = hold(norm, torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps))
    y = centred * scale
    if norm.weight is not None:
        y = y * norm.weight
    return y if norm.bias is None else y + norm.bias


def _rms_norm(norm: Any, own: Any, hold: Any, x: Tensor) -> Tensor:
    # Families differ in what they multiply with (w or 1 + w): the norm's own value on ones tells.
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    gain = own(torch.ones_like(x[..., :1, :])) * (1 + eps) ** 0.5
    (scale,) = hold(norm, torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype))
    return x * scale * gain


def _gate(part: nn.Module, own: Any, hold: Any, z: Tensor) -> Tensor:
    (value,) = hold(part, own(z))
    return value


def _secant(part: nn.Module, own: Any, hold: Any, z: Tensor) -> Tensor:
    (factor,) = hold(part, torch.where(z.abs() > SMALLEST, own(z) / z, 0.0))
    return z * factor


def _attention(own: Any, hold: Any, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    if own is None:  # the eager kind, which each family's file has its own of
        own = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return own(module, *hold(module, query, key), *args, **kwargs)
