"""Small real set-ups shared by tests: a tiny saved model, random SAELens dictionaries, contrast pairs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from torch import nn

from mediation.dictionaries import Dictionary
from mediation.prompts import Batch, Example, collate
from mediation.subject import SubjectModel
from tests.tiny_models import D_MODEL, LAYERS, save_tiny

DOCS = Path(__file__).parents[1] / "docs"


def page_script(name: str) -> ModuleType:
    """docs/make_NAME.py, loaded anew, so that what a test sets in it is gone with the test."""
    spec = importlib.util.spec_from_file_location(f"make_{name}", DOCS / f"make_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def shared_data(*parts: str) -> Path:
    """A path in the public data beside the checkout (or in $MEDIATION_DATA); skips where it is absent."""
    root = os.environ.get("MEDIATION_DATA") or Path(__file__).parents[2] / "shared" / "data"
    path = Path(root).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs the public data at {'/'.join(parts)} (set MEDIATION_DATA)")
    return path


def random_dictionary(
    folder: Path,
    hook: str,
    *,
    architecture: str = "standard",
    d_in: int = D_MODEL,
    d_sae: int = 48,
    seed: int = 0,
    reads: str | None = None,
    reshape: str = "none",
) -> Dictionary:
    """A random dictionary saved by SAELens and loaded back; decoder rows of various norms, about half on.

    With `reads` it is a transcoder from there to `hook`.
    """
    generator = torch.Generator().manual_seed(seed)
    metadata = SAEMetadata(hook_name=reads, hook_name_out=hook) if reads else SAEMetadata(hook_name=hook)
    common: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "metadata": metadata, "reshape_activations": reshape}
    sae: Any
    if reads and architecture == "jumprelu":
        sae = JumpReLUTranscoder(JumpReLUTranscoderConfig(**common, d_out=d_in, apply_b_dec_to_input=False))
        sae.threshold.data.fill_(0.1)
    elif reads:
        sae = Transcoder(TranscoderConfig(**common, d_out=d_in, apply_b_dec_to_input=False))
    elif architecture == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
        sae.threshold.data.fill_(0.1)
    else:
        sae = StandardSAE(StandardSAEConfig(**common))
    for name, scale in (("W_enc", 0.5), ("W_dec", 0.5), ("b_enc", 0.1), ("b_dec", 0.1)):
        parameter = getattr(sae, name).data
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    sae.save_model(folder)
    return Dictionary.load(folder)


def alike(lengths: Sequence[int] = (14, 12, 16), first: Sequence[int] = (9, 8, 12)) -> Batch:
    """Contrast pairs whose eight first tokens are the same in all, and that differ from token `first` on."""
    generator = torch.Generator().manual_seed(5)
    start, examples = torch.randint(3, 60, (8,), generator=generator).tolist(), []
    for row, (length, at) in enumerate(zip(lengths, first, strict=True)):
        clean = start + torch.randint(3, 60, (length - 8,), generator=generator).tolist()
        corrupt = [*clean[:at], (clean[at] + 5) % 60 + 3, *clean[at + 1 :]]
        examples.append(Example(row, clean, corrupt, [(length - 1, 10, 1), (length - 1, 11, -1)], [""] * length))
    return collate(examples)


def pairs(n: int = 4, *, longest: int = 8, corrupt: bool = True, vocab: int = 60, seed: int = 0) -> list[Example]:
    """Contrast pairs of random tokens: different lengths, one token exchanged, a logit difference at the end."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(n):
        length = 4 + index % (longest - 3)
        clean = torch.randint(3, vocab, (length,), generator=generator).tolist()
        other = list(clean)
        other[1] = 3 + (clean[1] + 7) % (vocab - 3)
        targets = [(length - 1, 10, 1), (length - 1, 11, -1)]
        examples.append(Example(index, clean, other if corrupt else None, targets, [""] * length))
    return examples


def batch_of(n: int = 4, *, corrupt: bool = True) -> Batch:
    return collate(pairs(n, corrupt=corrupt))


def tiny(folder: Path, kind: str = "llama") -> SubjectModel:
    return SubjectModel.load(save_tiny(kind, folder), device="cpu")


def linear_model(folder: Path) -> SubjectModel:
    """A GPT-2 in which every site's influence on the logits is linear.

    Identity norms, identity activation, and zero queries and keys, which make attention a plain mean.
    """
    model = tiny(folder, "gpt2")
    transformer = model.module.transformer
    transformer.ln_f = nn.Identity()
    for block in transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        block.attn.c_attn.weight.data[:, : 2 * D_MODEL] = 0.0
        block.attn.c_attn.bias.data[: 2 * D_MODEL] = 0.0
    assert len(transformer.h) == LAYERS
    return model


def detector_model(folder: Path, detected: int = 6) -> SubjectModel:
    """A tiny Llama whose first words, w0 to w5, have the embeddings 6 e_k; no other word reaches along those axes."""
    model = tiny(folder)
    weight = model.module.get_input_embeddings().weight.data
    weight[:, :detected] = 0.0
    weight[3 : 3 + detected] = 0.0
    weight[3 : 3 + detected, :detected] = 6 * torch.eye(detected)
    return model


def detector_dictionary(folder: Path, detected: int = 6) -> Dictionary:
    """At the embeddings of `detector_model`: latent k is on, at 5, where the token is wk; a last latent never is."""
    sae = StandardSAE(
        StandardSAEConfig(d_in=D_MODEL, d_sae=detected + 1, metadata=SAEMetadata(hook_name="blocks.0.hook_resid_pre"))
    )
    axes = torch.eye(D_MODEL)[: detected + 1]
    sae.W_enc.data, sae.W_dec.data = axes.T.contiguous(), axes.contiguous()
    sae.b_enc.data = torch.full((detected + 1,), -1.0)
    sae.b_enc.data[-1] = -1e6
    sae.b_dec.data = torch.zeros(D_MODEL)
    sae.save_model(folder)
    return Dictionary.load(folder)
