"""Writes docs/speed.md from docs/evidence/speed.json, which holds what the programs in benchmarks/ printed.

    python docs/make_speed.py

Keys of the JSON: edges, nodes, edges_organism (benchmarks/edges.py); transcoders, a list of pairs of
benchmarks/transcoders.py and benchmarks/circuit_tracer_baseline.py; long, from `mediation trace` of one prompt of 2,048
tokens; machine, in words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
METHODS = {
    "sparse_feature_circuits": "sparse feature circuits: one backward a latent and site, batches of two prompts",
    "one_prompt_repeated": "one prompt repeated, gradients injected, through the whole model",
    "one_prompt_repeated_in_order": "the same with its targets sorted by site",
    "one_backward_per_target": "one backward a target, with our cuts and active rows",
}
TEXT = """# What a graph costs

{machine}. Ratios are measured side by
side in one run, on the same nodes, after the edges have been compared with
ours (largest difference under 1e-4 of the largest edge).

## Edges

SmolLM2-135M-Instruct with the six dictionaries of the pack, 16 latents of every site and prompt as targets, zero
baseline; prompts are beginnings of encyclopaedia paragraphs. fp32, one thread, processor time, one run, other programs
beside it. Made by `python benchmarks/edges.py --model smollm2 --saes examples/packs/smollm2 --text FILE`, which
describes each method.

{edges}

The floor of operations (`circuits/edges.py`: backward products of the weights between two sites, attention,
contraction with active rows) is {one_floor:.0f} and {set_floor:.0f} GFLOP; ours runs at {one_share:.0%} and
{set_share:.0%} of what a 1024 x 1024 product reaches in the same run ({one_peak:.0f} and {set_peak:.0f} GFLOP/s).

**Missed**: 20 times sparse feature circuits holds for the set and not for one prompt, where their batch is one; 40 % of
the peak is not reached. Where one prompt's time goes (profile on an idle core): 45 % backward products, at 86 % of the
peak, a third of them on positions after a target's own; 17 % forward products; the rest softmax, norms, gates and the
contraction. Tried:

| idea | what it gave |
|---|---|
| latents laid out by how many are on at a position, not all padded to the most | contraction from 12 to 6 % of the \
time; kept |
| bf16 factors in all products | {bf16_one:.2f} of the time on one prompt (.70 when nothing ran beside it), \
{bf16_set:.2f} on the set; edges drift by {drift_one:.1e} and {drift_set:.1e} (norm): over 1e-3, not offered |
| fp32 as three bf16 products | 195 GFLOP/s against 180 at best: PyTorch has no bf16 product with an fp32 result on \
CPUs, so factors are rounded anew each time; not built |
| finer or coarser jobs (4 to 64 positions a start) | within 8 % |
| gradients in one pass (chunk 8 to 128) | within 10 % |
| attention in plain products or fused | within 8 % |

On the embedded organism (`python benchmarks/edges.py`: two sites, prompts of 11 tokens, corrupt baseline, median of 3)
the arithmetic is a tenth of a millisecond to five milliseconds, and starting operations is what costs. No target is met
there:

{organism}

![Cost against targets, tokens, prompts and layers](edges-scaling.svg)

Random Llama of width 256 with TopK dictionaries (`benchmarks/scaling.py`).

## Node attribution

All nodes of the 16 prompts, beside a bare forward and backward pass of the model with frozen parameters and
last-position logits: {nodes:.2f} times (aim: 1.2); {nodes_before:.2f} before products were taken at the nodes alone
(`torch.sparse.sampled_addmm`) in place of two gathered rows for each. On the organism, a matter of 20 ms,
{organism_nodes:.2f} times, of which the corrupt prompts' forward pass is a quarter.

## A transcoder at every MLP

The kind of graph circuit-tracer makes: a random Llama of SmolLM2's size, 30 transcoders of 6,144 latents, 31 on at a
position, 512 nodes with all their edges; two threads, one after the other, nothing beside them. Attention patterns and
divisors of norms are held in both. Peaks hold model, transcoders and libraries.

{transcoders}

**Missed**: a third of the memory. Libraries, model and transcoders alone take 1.9 GB, a third of theirs is 1.8. Tried:
weights made in place (2.36 to 2.28 GB), returning freed memory to the system before the run (60 MB), smaller chunks
(8 in place of 32: 2.24 GB).

## A prompt of 2,048 tokens

`mediation trace` with the six dictionaries of the pack, zero baseline, `--memory 8GB`, 2 steps, 2 exact patches a site,
20 nodes a site kept, one thread: {long_nodes:,} nodes attributed, {long_edges:,} edges, {long_cpu:.0f} minutes of
processor time ({long_minutes:.0f} beside four other programs; {long_predicted_minutes:.0f} predicted there).
Predicted peak {long_predicted:.2f} GB ({long_now:.2f} with what was added since for libraries), measured
{long_peak:.2f} GB. Before, a prompt's tokens without a role were one
role, whose 20 strongest latents of each site are on at 28,000 places of this prompt: hours of edges. One prompt alone
now keeps its positions.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def edges(found: dict[str, Any]) -> str:
    one, many = found["one_prompt"], found["set"]
    digits = 1 if one["ours"]["seconds"] > 1 else 3
    rows = [["ours", *(f"{part['ours']['seconds']:.{digits}f} s" for part in (one, many)), "", ""]]
    for name, words in METHODS.items():
        cells = [f"{part[name]['seconds']:.{digits}f} s" for part in (one, many)]
        ratios = [f"**{part[name]['times_ours']:.1f}**" for part in (one, many)]
        rows.append([words, *cells, *ratios])
    header = [
        "method",
        f"one prompt, {one['tokens']} tokens, {one['targets']} targets",
        f"{many['prompts']} prompts, {many['tokens']} tokens, {many['targets']} targets",
        "times ours, one prompt",
        "times ours, set",
    ]
    return table(header, rows)


def transcoders(pairs: list[dict[str, Any]]) -> str:
    rows = []
    for pair in pairs:
        ours, theirs = pair["ours"], pair["circuit_tracer"]
        rows.append(
            [
                str(ours["settings"]["tokens"]),
                f"{ours['active_latents']:,} and {theirs['active_latents']:,}",
                f"{ours['seconds']:.1f} s",
                f"{theirs['seconds']:.1f} s",
                f"**{ours['seconds'] / theirs['seconds']:.2f}**",
                f"{ours['peak_mb'] / 1000:.2f} GB",
                f"{theirs['peak_mb'] / 1000:.2f} GB",
                f"**{ours['peak_mb'] / theirs['peak_mb']:.2f}**",
            ]
        )
    header = ["tokens", "active latents", "ours", "circuit-tracer 0.5.0", "of its time"]
    header += ["ours, peak", "its peak", "of its memory"]
    return table(header, rows)


def main() -> None:
    found = json.loads((DOCS / "evidence" / "speed.json").read_text(encoding="utf-8"))
    one, many, long = found["edges"]["one_prompt"], found["edges"]["set"], found["long"]
    text = TEXT.format(
        machine=found["machine"],
        edges=edges(found["edges"]),
        organism=edges(found["edges_organism"]),
        organism_nodes=found["edges_organism"]["nodes"]["times_bare"],
        one_floor=one["floor_gflop"],
        set_floor=many["floor_gflop"],
        one_share=one["ours"]["share_of_peak"],
        set_share=many["ours"]["share_of_peak"],
        one_peak=one["peak_gflops"],
        set_peak=many["peak_gflops"],
        bf16_one=one["ours_in_bf16"]["times_ours"],
        bf16_set=many["ours_in_bf16"]["times_ours"],
        drift_one=one["ours_in_bf16"]["drift"],
        drift_set=many["ours_in_bf16"]["drift"],
        nodes=found["nodes"]["times_bare"],
        nodes_before=found["edges"]["nodes"]["times_bare"],
        transcoders=transcoders(found["transcoders"]),
        long_predicted=long["predicted_gb"],
        long_now=long["predicted_now_gb"],
        long_peak=long["peak_gb"],
        long_minutes=long["seconds"] / 60,
        long_predicted_minutes=long["predicted_seconds"] / 60,
        long_cpu=long["cpu_seconds"] / 60,
        long_nodes=long["nodes"],
        long_edges=long["edges"],
    )
    (DOCS / "speed.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
