"""Where a dictionary reads: a layer and a stream, under any of the names the field gives it.

A site has three spellings, and `Site.parse` reads them all:

* SAELens / TransformerLens: ``blocks.8.hook_resid_pre``, ``blocks.8.hook_mlp_out``; ``blocks.8.mlp.hook_in``
  is what the MLP is given (in TransformerLens ``hook_mlp_in`` lies before the norm and ``ln2.hook_normalized``
  before its gain: other values, which are refused); ``blocks.8.attn.hook_z`` is what the heads hand on;
* Hugging Face module paths: ``model.layers.8`` (what the block returns, resid_post),
  ``model.layers.8.self_attn`` (attn_out), ``transformer.h.8.mlp`` (mlp_out);
* the same with nnsight's ``.input`` or ``.output``: ``model.layers.8.input`` is resid_pre, ``...mlp.input`` mlp_in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from mediation.errors import MediationError


class Stream(StrEnum):
    """The places in a block where the residual stream is read or added to."""

    RESID_PRE = "resid_pre"
    RESID_POST = "resid_post"
    ATTN_Z = "attn_z"
    ATTN_OUT = "attn_out"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"


RESIDUAL = (Stream.RESID_PRE, Stream.RESID_POST)
"""Streams that are the whole residual: nothing later depends on what came before but through them."""

_ORDER = (Stream.RESID_PRE, Stream.ATTN_Z, Stream.ATTN_OUT, Stream.MLP_IN, Stream.MLP_OUT, Stream.RESID_POST)
_STEP = {stream: step for step, stream in enumerate(_ORDER)}
_HOOKS = {stream: f"hook_{stream}" for stream in Stream}
_HOOKS |= {Stream.MLP_IN: "mlp.hook_in", Stream.ATTN_Z: "attn.hook_z"}
_STREAMS = {hook: stream for stream, hook in _HOOKS.items()}
_SAELENS = re.compile(rf"blocks\.(\d+)\.({'|'.join(map(re.escape, _STREAMS))})")
_BEFORE_MLP = re.compile(r"blocks\.\d+\.(?:hook_mlp_in|ln2\.hook_normalized)")
_MODULE = re.compile(r"(?:[a-z_]\w*\.)*(?:layers|h)\.(\d+)(?:\.(self_attn|attn|attention|mlp))?(?:\.(input|output))?")


@dataclass(frozen=True)
class Site:
    """One stream of one block, layers counted from 0.

    ``attn_out`` and ``mlp_out`` are what is *added* to the residual stream: after the post-norm where
    the architecture has one (Gemma 2 and 3). ``mlp_in`` is what the MLP is given: the residual stream after
    the norm before it, gain and all. ``attn_z`` is what the attention's heads hand to its last projection,
    side by side.
    """

    layer: int
    stream: Stream

    @property
    def name(self) -> str:
        """The SAELens name, for example ``blocks.8.hook_resid_pre``."""
        return f"blocks.{self.layer}.{_HOOKS[self.stream]}"

    @property
    def depth(self) -> int:
        """Topological order: the same for resid_post of a layer and resid_pre of the next, one vector."""
        return _STEP[Stream.RESID_POST] * self.layer + _STEP[self.stream]

    def canonical(self) -> Site:
        """Itself, but resid_post of layer l becomes resid_pre of layer l + 1, which holds the same vector."""
        if self.stream is Stream.RESID_POST:
            return Site(self.layer + 1, Stream.RESID_PRE)
        return self

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> Site:
        """Read a SAELens name or a Hugging Face module path.

        Raises:
            MediationError: The name is neither, or names a point that is not one of the streams.
        """
        if match := _SAELENS.fullmatch(name):
            return cls(int(match[1]), _STREAMS[match[2]])
        if _BEFORE_MLP.fullmatch(name):
            raise MediationError(
                f"{name!r} is a value before the norm or before its gain, not what the MLP is given: only "
                "blocks.N.mlp.hook_in is read there."
            )
        if match := _MODULE.fullmatch(name):
            layer, module, port = int(match[1]), match[2], match[3]
            if module is None:
                return cls(layer, Stream.RESID_PRE if port == "input" else Stream.RESID_POST)
            if module == "mlp" and port == "input":
                return cls(layer, Stream.MLP_IN)
            if port != "input":
                return cls(layer, Stream.MLP_OUT if module == "mlp" else Stream.ATTN_OUT)
        raise MediationError(
            f"{name!r} names no site that can be hooked: use blocks.N.hook_S with S one of "
            f"{', '.join(Stream)}, or a module path such as model.layers.N, model.layers.N.self_attn "
            "or model.layers.N.mlp."
        )
