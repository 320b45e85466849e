"""How the cost of edges grows with nodes, tokens, prompts and layers, of ours and of one prompt repeated.

    python benchmarks/scaling.py --plot docs/edges-scaling.svg > scaling.json

A random Llama of width 256 with TopK dictionaries of 2,048 latents, 16 on, at every fourth layer's input; from one
prompt of 32 tokens, 16 layers and 32 targets a site, one of the four is varied at a time. `one_prompt_repeated` is
the algorithm of circuit-tracer as benchmarks/edges.py has it. One thread, processor time, median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import matplotlib
import torch
from edges import Task, alternating, make_task, one_prompt_repeated, ours
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import LlamaConfig, LlamaForCausalLM

from mediation.dictionaries import Dictionary
from mediation.products import use_fast_products
from mediation.prompts import Baseline, Example, collate
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel

matplotlib.use("svg")
from matplotlib import pyplot as plt

WIDTH, WORDS, LATENTS = 256, 1000, 2048
USUAL = {"nodes": 32, "tokens": 32, "prompts": 1, "layers": 16}
VARIED = {"nodes": (8, 32, 128), "tokens": (16, 32, 64, 128), "prompts": (1, 4, 16), "layers": (8, 16, 32)}
METHODS = {"ours": "this package", "repeated": "one prompt repeated"}


def make_model(folder: Path, layers: int) -> tuple[SubjectModel, list[Dictionary]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    dictionaries = []
    for layer in range(4, layers, 4):
        site = Site(layer, Stream.RESID_PRE)
        sae = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=16, metadata=SAEMetadata(hook_name=site.name)))
        sae.W_dec.data = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH), dim=1)
        sae.W_enc.data = sae.W_dec.data.T.contiguous()
        dictionaries.append(Dictionary(sae, name=site.name, site=site, content_hash=""))
    return SubjectModel.load(folder, device="cpu"), dictionaries


def task(model: SubjectModel, dictionaries: list[Dictionary], nodes: int, tokens: int, prompts: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for row in range(prompts):
        ids = torch.randint(3, WORDS, (tokens - row % 4,), generator=generator).tolist()
        examples.append(Example(row, ids, None, [(len(ids) - 1, 10, 1), (len(ids) - 1, 11, -1)], [""] * len(ids)))
    return make_task(model, collate(examples), dictionaries, nodes, Baseline.ZERO)


def measure(repeats: int) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {layers: make_model(Path(folder) / str(layers), layers) for layers in VARIED["layers"]}
        for name, values in VARIED.items():
            found[name] = []
            for value in values:
                size = USUAL | {name: value}
                model, dictionaries = models[size["layers"]]
                made = task(model, dictionaries, size["nodes"], size["tokens"], size["prompts"])
                calls = {
                    "ours": partial(ours, model, [made], 32),
                    "repeated": partial(one_prompt_repeated, model, [made], 32),
                }
                _, seconds = alternating(calls, repeats)
                found[name].append({name: value, **seconds})
    return found


def plot(found: dict[str, list[dict[str, float]]], file: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "edges"  # the same file for the same figures
    figure, axes = plt.subplots(1, len(found), figsize=(12, 3), layout="constrained")
    for axis, (name, rows) in zip(axes, found.items(), strict=True):
        for method, label in METHODS.items():
            axis.loglog([row[name] for row in rows], [row[method] for row in rows], marker="o", label=label)
        axis.set_xlabel({"nodes": "targets at each site"}.get(name, name))
        axis.set_xticks([row[name] for row in rows], [str(row[name]) for row in rows], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("seconds, one thread")
    axes[0].legend()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="picture to write (SVG)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    use_fast_products()
    found = measure(chosen.repeats)
    if chosen.plot is not None:
        plot(found, chosen.plot)
    json.dump(found, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
