"""Factories of tiny random Hugging Face models with a word-level tokenizer: what tests load, not downloads.

    folder = save_tiny("gemma2", tmp_path / "gemma2")
    model = SubjectModel.load(folder, device="cpu")

Every family keeps its quirks (post-norms, soft-capping, grouped-query attention, parallel residual), has
weights large enough for attention and MLPs to matter, and nothing random in its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

BOS, PAD = "<s>", "<pad>"
WORDS = [PAD, BOS, "</s>", *(f"w{i}" for i in range(61))]
VOCAB = len(WORDS)
D_MODEL, LAYERS, HEADS = 16, 3, 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": D_MODEL // HEADS}
_VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_NO_DROPOUT: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=4),
    "smollm3": lambda: SmolLM3Config(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_COMMON, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**_GROUPED),
    "gemma": lambda: GemmaConfig(**_GROUPED),
    "gemma2": lambda: Gemma2Config(**_GROUPED, query_pre_attn_scalar=4, sliding_window=4),
    "gemma3_text": lambda: Gemma3TextConfig(**_GROUPED, query_pre_attn_scalar=4, sliding_window=4),
    "gemma3": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**_GROUPED, query_pre_attn_scalar=4, sliding_window=4),
        vision_config=_VISION,
        mm_tokens_per_image=4, image_token_index=3, boi_token_index=3, eoi_token_index=3,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_positions=64, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, **_NO_DROPOUT, use_parallel_residual=True),
    "gpt_neox_sequential": lambda: GPTNeoXConfig(**_COMMON, **_NO_DROPOUT, use_parallel_residual=False),
}  # fmt: skip

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }} {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} w0{% endif %}"
)


def tiny_tokenizer(*, add_bos: bool = False, words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """One token per word, split at white space; unknown words become ``w0``.

    Args:
        add_bos: Whether the tokenizer itself puts BOS in front, as Llama's does and GPT-2's does not.
        words: The vocabulary, in order of id, starting with PAD and BOS; default `WORDS`.
    """
    words = words or WORDS
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[3]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if add_bos:
        tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=words[2],
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_module(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of one of the `CONFIGS`, fp32, eval mode; ``changes`` are set on its config."""
    config = CONFIGS[kind]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_tiny(
    kind: str, folder: Path, *, add_bos: bool = False, tokenizer: bool = True, seed: int = 0, **changes: Any
) -> Path:
    """Save `tiny_module` and `tiny_tokenizer` the way ``save_pretrained`` does; returns ``folder``."""
    tiny_module(kind, seed=seed, **changes).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer(add_bos=add_bos).save_pretrained(folder)
    return folder
