"""A graph of circuit-tracer's kind and size: nodes of one prompt of a model with a transcoder at every MLP.

    python benchmarks/transcoders.py > transcoders.json
    python benchmarks/transcoders.py --tokens 32 --nodes 512 --chunk 32

A random Llama of SmolLM2's size (30 layers, width 576, 9 and 3 heads), random transcoders of 6,144 latents, `--on` of
which are on at a position and layer, embeddings and errors as sources: 512 nodes are targets, evenly spread, and all
their edges are kept as finished rows on disk. The semantics are circuit-tracer's: attention patterns and divisors of
norms are held. circuit-tracer 0.5.0 on the same sizes, with batches of 64 on 2 CPU cores, took 22.0 s and 3.4 GB for 32
tokens and 46.7 s and 5.3 GB for 64.

Seconds and the peak of the resident set are those of everything after loading: encoding, edges, writing; the peak holds
model and transcoders too. With one thread the seconds are processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from sae_lens import Transcoder, TranscoderConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import LlamaConfig, LlamaForCausalLM

from circuits.edges import EdgeRows, Sources, Targets, edges
from mediation.dictionaries import Dictionary
from mediation.frozen import Semantics
from mediation.nodes import site_states
from mediation.products import use_fast_products
from mediation.prompts import Baseline, Example, collate
from mediation.runs import Run, peak_memory_mb
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel

LAYERS, WIDTH, WORDS, LATENTS = 30, 576, 49152, 6144


def random_model(folder: Path) -> SubjectModel:
    """SmolLM2's sizes, random weights."""
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return SubjectModel.load(folder, device="cpu")


def random_transcoder(layer: int, read: torch.Tensor, on: int) -> Dictionary:
    """Random directions, with biases such that `on` of its latents are on at a position of `read` [T, d]."""
    site, reads = Site(layer, Stream.MLP_OUT), Site(layer, Stream.MLP_IN)
    metadata = SAEMetadata(hook_name=reads.name, hook_name_out=site.name)
    sae = Transcoder(
        TranscoderConfig(d_in=WIDTH, d_out=WIDTH, d_sae=LATENTS, metadata=metadata, apply_b_dec_to_input=False)
    )
    for weight, dim in ((sae.W_enc, 0), (sae.W_dec, 1)):  # in place: what is freed between them would count as held
        torch.nn.functional.normalize(weight.data.normal_(), dim=dim, out=weight.data)
    sae.b_dec.data.zero_()
    sae.b_enc.data = -(read @ sae.W_enc).quantile(1 - on / LATENTS, dim=1).mean().expand(LATENTS).clone()
    return Dictionary(sae, name=f"transcoder-{layer}", site=site, content_hash="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=512)
    parser.add_argument("--on", type=int, default=31)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--semantics", type=Semantics, default=Semantics.LINEAR, choices=list(Semantics))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    use_fast_products()
    torch.manual_seed(0)
    clock = time.process_time if chosen.threads == 1 else time.perf_counter

    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "model")
        run = Run.create(Path(folder) / "run", vars(chosen))
        length = chosen.tokens
        tokens = torch.randint(3, WORDS, (length,)).tolist()
        targets = [(length - 1, 10, 1), (length - 1, 11, -1)]
        batch = collate([Example(0, tokens, None, targets, [""] * length)])
        sites = [Site(layer, Stream.MLP_IN) for layer in range(LAYERS)]
        values = model.forward(batch.clean, batch.mask, read=sites, logits=False).sites
        transcoders = [random_transcoder(site.layer, values[site][0], chosen.on) for site in sites]
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5")

        start = clock()
        states = site_states(model, batch, transcoders, Baseline.ZERO)
        sources = [Sources.embeddings(model, batch, Baseline.ZERO), *map(Sources.of, states)]
        active = [len(state.row) for state in states]
        first, wanted = 0, torch.linspace(0, sum(active) - 1, chosen.nodes).long()
        nodes = []
        for state, count in zip(states, active, strict=True):
            mine = wanted[(wanted >= first) & (wanted < first + count)] - first
            nodes.append(Targets.latents(state, torch.zeros_like(state.x), mine))
            first += count
        kept = 0

        def write(rows: EdgeRows) -> None:
            nonlocal kept
            kept += len(rows.weight)
            run.write_shard("edges", f"{kept:012d}", rows.frame())

        edges(model, batch, sources, nodes, semantics=chosen.semantics, chunk=chosen.chunk, sink=write)
        seconds = clock() - start
        result = {
            "settings": vars(chosen),
            "active_latents": sum(active),
            "edges": kept,
            "seconds": seconds,
            "nodes_per_second": chosen.nodes / seconds,
            "peak_mb": peak_memory_mb(),
        }
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
