"""circuit-tracer on the model and transcoders of benchmarks/transcoders.py, for a comparison on one machine.

In an environment of its own, since its requirements exclude ours:

    pip install circuit-tracer==0.5.0
    python benchmarks/circuit_tracer_baseline.py --tokens 64 > circuit-tracer.json

A random Llama of SmolLM2's size by TransformerLens, in fp32, 30 random transcoders of 6,144 latents with biases such
that `--on` of them are on at a position and layer, 512 feature nodes, batches of 64, three logits. Seconds are those of
`attribute`, the peak is the resident set's from then on; model and transcoders are in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import normalize, relu
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

LAYERS, WIDTH, WORDS, LATENTS = 30, 576, 49152, 6144


def config() -> HookedTransformerConfig:
    return HookedTransformerConfig(
        n_layers=LAYERS, d_model=WIDTH, n_ctx=256, d_head=64, n_heads=9, n_key_value_heads=3, d_mlp=1536, d_vocab=WORDS,
        act_fn="silu", gated_mlp=True, normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=64,
        final_rms=True, device="cpu", dtype=torch.float32, seed=0, init_mode="gpt2",
    )  # fmt: skip


def transcoders(tokens: torch.Tensor, on: int) -> TranscoderSet:
    """Random directions; the biases come from a run of a model with the same seed, which is then let go."""
    model = HookedTransformer(config())
    names = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(LAYERS)]
    _, read = model.run_with_cache(tokens, names_filter=names)
    found = {}
    for layer, name in enumerate(names):
        made = SingleLayerTranscoder(WIDTH, LATENTS, relu, layer, device=torch.device("cpu"), dtype=torch.float32)
        for weight in (made.W_enc, made.W_dec):
            normalize(weight.data.normal_(), dim=1, out=weight.data)
        made.b_enc.data.fill_(-(read[name][0] @ made.W_enc.T).quantile(1 - on / LATENTS, dim=1).mean())
        found[layer] = made
    return TranscoderSet(found, "ln2.hook_normalized", "hook_mlp_out")


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=512)
    parser.add_argument("--on", type=int, default=31)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    tokens = torch.randint(3, WORDS, (chosen.tokens,))
    made = transcoders(tokens[None], chosen.on)
    model = TransformerLensReplacementModel.from_config(config(), made)
    # Words are numbers; the first token is the special one that `attribute` leaves out.
    words = Tokenizer(WordLevel({str(index): index for index in range(WORDS)}, unk_token="0"))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=str(int(tokens[0])))
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    graph = attribute(
        tokens, model, attribution_targets=torch.tensor([10, 11, 12]), batch_size=chosen.batch,
        max_feature_nodes=chosen.nodes,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    result = {
        "settings": vars(chosen),
        "active_latents": len(graph.active_features),
        "seconds": seconds,
        "peak_mb": peak_mb(),
    }
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
