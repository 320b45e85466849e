"""Attention heads as nodes, without a dictionary: with neurons the baseline any claim about a dictionary must survive.

What the heads of a block hand to its last projection, z, is one vector in as many segments as there are heads. A head
has no direction of its own that it writes along, as a latent has; it has the one in which it moved:

1. Of head h at one place, u = (z_h - z'_h) / |z_h - z'_h|, zero outside its segment: from baseline to clean.
2. Its values are u . z clean and u . z' at the baseline, so that the heads' f u sum to z - z' and leave no error.
3. As a target it is read along u too. An attribution is therefore that of the whole head, its edges in are of what it
   moved by, and everything that holds for latents holds for heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mediation.dictionaries import Dictionary, Split
from mediation.loading import ARCHITECTURES
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel


class Heads(Dictionary):
    """The attention heads of one block; `directions` says along what they are read and written."""

    def __init__(self, model: SubjectModel, layer: int) -> None:
        self.site = self.reads = Site(layer, Stream.ATTN_Z)
        block: Any = model.module.get_submodule(ARCHITECTURES[model.architecture].blocks)[layer]
        self.architecture, self.normalisation = "heads", "none"
        self.d_model, self.d_sae = model.width(self.site), model.module.config.get_text_config().num_attention_heads
        self.decoder = torch.zeros(self.d_sae, self.d_model, device=next(block.parameters()).device)
        self.b_dec = torch.zeros_like(self.decoder[0])
        self.name, self.content_hash = f"{self.site.name}.heads", ""
        self.folder, self.model_name = None, None

    def encode(self, x: Tensor) -> Tensor:
        """Length of what each head hands on, [..., heads] of z [..., heads * d_head]."""
        return x.to(self.decoder).unflatten(-1, (self.d_sae, -1)).norm(dim=-1)

    def split(self, x: Tensor, read: Tensor | None = None) -> Split:
        """All of z belongs to heads: constant and error are zero."""
        latents, nothing = self.explain(x)
        return Split(latents, nothing, nothing)

    def explain(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Latents as `encode` has them; the constant is zero."""
        return self.encode(read), torch.zeros_like(read.to(self.decoder))

    def directions(self, change: Tensor) -> Tensor:
        """u of every head where z changes by `change` [n, width]: [n * heads, width], rows in order."""
        parts = torch.nn.functional.normalize(change.to(self.decoder).unflatten(-1, (self.d_sae, -1)), dim=-1)
        spread = torch.eye(self.d_sae, device=parts.device)[None, :, :, None] * parts[:, None]
        return spread.flatten(0, 1).flatten(1)
