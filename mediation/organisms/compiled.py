"""Compiles a circuit into a model, so that its true nodes and edges are known: what no training can promise.

1. The residual stream of a small Llama has one axis per part: a constant so large that every norm divides by nearly the
   same number; features, one a position, whose tokens are on or off; the moved features; and gates.
2. Attention is uniform (queries and keys are zero). Block 0 moves each feature it is to move to the end of the prompt;
   the other blocks' attention writes nothing.
3. Every block's MLP holds gates, each of two inputs among the moved features and the gates of earlier blocks: *sum*, a
   weighted sum; *and*, max(a + b - 1, 0); *or*, min(a + b, 1), whose gradient vanishes where both inputs are on.
   Its neurons have ReLU for activation and the constant for the other branch.
4. Two tokens' logits read some gates of the last block, with both signs. The rest of the circuit is a decoy: features
   that are moved and read by nothing that reaches a logit, and are twice as large; gates that nobody reads.
5. Dictionaries at the embeddings, at block 0's attention output and at every MLP output have one latent per axis.
6. Truth: nodes with a way to a logit, and the edges between them, by the weights alone.
Everything follows from the seed.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mediation.errors import MediationError

GATES = ("sum", "and", "or")
TARGET, END = "target", "end"
FEATURES, USED, LAYERS, PER_LAYER, READ = 10, 6, 3, 6, 3
CONSTANT = 1000.0  # on the first axis, at every token: what norms divide by, but for 1e-5 of it
ON = (0.75, 0.25)  # chance of a feature to be on in the clean prompt and in the corrupt one
DECOY = 2.0  # size of features that are not used
BOS, YES, NO, LAST = "<bos>", "yes", "no", "so"
EMBEDDING, MOVED = "blocks.0.hook_resid_pre", "blocks.0.hook_attn_out"

Wire = tuple[str, str]  # ids of a source and a target, as in circuits.graph


@dataclass(frozen=True)
class Truth:
    """Ids `{site}/{role}/{latent}` of the true nodes, and the true edges between them and to `target`."""

    nodes: frozenset[str]
    edges: frozenset[Wire]


@dataclass(frozen=True)
class _Gate:
    kind: str
    inputs: tuple[str, str]
    weights: tuple[float, float]

    def value(self, a: float, b: float) -> float:
        if self.kind == "sum":
            return self.weights[0] * a + self.weights[1] * b
        return max(a + b - 1.0, 0.0) if self.kind == "and" else min(a + b, 1.0)


def compile_circuit(seed: int, folder: str | Path, kinds: tuple[str, ...] = GATES, *, prompts: int = 128) -> Truth:
    """Make a model, its dictionaries (saes/) and prompts.jsonl in `folder`, and say what the circuit is.

    `kinds` of gates to draw from. MediationError for a kind that does not exist.
    """
    if not kinds or set(kinds) - set(GATES):
        raise MediationError(f"There are no gates {', '.join(kinds) or 'named'}; choose among {', '.join(GATES)}.")
    rng, folder = random.Random(f"circuit {seed}"), Path(folder)
    gates, outputs = _draw(rng, kinds)
    axes = _axes(gates)
    _model(gates, outputs, axes).save_pretrained(folder / "model")
    _tokenizer().save_pretrained(folder / "model")
    for site, latents in _sites(gates).items():
        _dictionary(site, [axes[each] for each in latents], len(axes) + 1).save_model(folder / "saes" / site)
    rows = _prompts(rng, gates, outputs, prompts)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return _truth(gates, outputs)


def _draw(rng: random.Random, kinds: tuple[str, ...]) -> tuple[list[dict[str, _Gate]], dict[str, float]]:
    """Gates of each layer by id, and the weights with which the logits read some of the last."""
    moved = [f"{MOVED}/{END}/{k}" for k in range(FEATURES)]
    useful, idle = moved[:USED], moved[USED:]
    layers: list[dict[str, _Gate]] = []
    for layer in range(LAYERS):
        found = {}
        # a layer reads mostly the one before; the last gate of each reads what is not used, and nobody reads it
        pool = useful if layer == 0 else [*list(layers[-1])[:-1], *rng.sample(useful, 1)]
        for index in range(PER_LAYER):
            chosen = rng.sample(idle if index == PER_LAYER - 1 else pool, 2)
            weights = (rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.8))
            gate = _Gate(rng.choice(kinds), (chosen[0], chosen[1]), weights)
            found[f"blocks.{layer}.hook_mlp_out/{END}/{index}"] = gate
        layers.append(found)
    while True:
        read = rng.sample(list(layers[-1])[:-1], READ)
        outputs = {name: rng.choice((-1, 1)) * rng.uniform(1.0, 2.0) for name in read}
        if abs(_whole(layers, outputs)) > 0.5:  # else prompts hardly differ
            return layers, outputs


def _whole(gates: list[dict[str, _Gate]], outputs: dict[str, float]) -> float:
    """What all features together do to the difference of the two logits."""
    return _output(gates, outputs, [True] * FEATURES) - _output(gates, outputs, [False] * FEATURES)


def _axes(gates: list[dict[str, _Gate]]) -> dict[str, int]:
    """The residual axis of every part; 0 is the constant's."""
    names = [f"{EMBEDDING}/f{k}/{k}" for k in range(FEATURES)] + [f"{MOVED}/{END}/{k}" for k in range(FEATURES)]
    names += [name for layer in gates for name in layer]
    return {name: number for number, name in enumerate(names, 1)}


def _sites(gates: list[dict[str, _Gate]]) -> dict[str, list[str]]:
    """The parts at each site, in the order of their latents."""
    sites = {EMBEDDING: [f"{EMBEDDING}/f{k}/{k}" for k in range(FEATURES)]}
    sites[MOVED] = [f"{MOVED}/{END}/{k}" for k in range(FEATURES)]
    return sites | {f"blocks.{number}.hook_mlp_out": list(layer) for number, layer in enumerate(gates)}


def _model(gates: list[dict[str, _Gate]], outputs: dict[str, float], axes: dict[str, int]) -> LlamaForCausalLM:
    words = _words()
    width = len(axes) + 1
    width += width % 2  # rotary embeddings want an even number
    neurons = 2 * PER_LAYER  # an `or` takes two
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=neurons, num_hidden_layers=LAYERS,
        num_attention_heads=1, hidden_act="relu", max_position_embeddings=32, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    module: Any = LlamaForCausalLM(config)
    unit = CONSTANT / width**0.5  # what a norm divides by: x / unit is what MLP, attention and logits are given
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embedding = module.get_input_embeddings().weight
        embedding[:, 0] = CONSTANT
        for k in range(FEATURES):
            embedding[words[f"on{k}"], axes[f"{EMBEDDING}/f{k}/{k}"]] = 1.0 if k < USED else DECOY
        attention = module.model.layers[0].self_attn
        for k in range(FEATURES):
            read, write = axes[f"{EMBEDDING}/f{k}/{k}"], axes[f"{MOVED}/{END}/{k}"]
            attention.v_proj.weight[write, read] = unit
            attention.o_proj.weight[write, write] = FEATURES + 2  # tokens of a prompt, over which it is a mean
        for layer, of_layer in zip(module.model.layers, gates, strict=True):
            mlp = layer.mlp
            mlp.up_proj.weight[:, 0] = unit / CONSTANT
            for index, (name, gate) in enumerate(of_layer.items()):
                weights = gate.weights if gate.kind == "sum" else (1.0, 1.0)
                for neuron, bias, sign in _neurons(gate.kind):
                    row = 2 * index + neuron
                    mlp.gate_proj.weight[row, 0] = bias * unit / CONSTANT
                    for source, weight in zip(gate.inputs, weights, strict=True):
                        mlp.gate_proj.weight[row, axes[source]] += weight * unit
                    mlp.down_proj.weight[axes[name], row] = sign
        for name, weight in outputs.items():
            for word, side in ((YES, 0.5), (NO, -0.5)):
                module.lm_head.weight[words[word], axes[name]] = side * weight * unit
    return module.eval()


def _neurons(kind: str) -> list[tuple[int, float, float]]:
    """(neuron, bias, sign of what it writes) of a gate: `or` is relu(a + b) - relu(a + b - 1)."""
    return {"sum": [(0, 0.0, 1.0)], "and": [(0, -1.0, 1.0)], "or": [(0, 0.0, 1.0), (1, -1.0, -1.0)]}[kind]


def _dictionary(site: str, axes: list[int], width: int) -> StandardSAE:
    width += width % 2
    sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=len(axes), metadata=SAEMetadata(hook_name=site)))
    rows = torch.eye(width)[axes]
    sae.W_enc.data, sae.W_dec.data = rows.T.contiguous(), rows.contiguous()
    sae.b_enc.data, sae.b_dec.data = torch.zeros(len(axes)), torch.zeros(width)
    return sae


def _words() -> dict[str, int]:
    names = [f"{state}{k}" for k in range(FEATURES) for state in ("on", "off")]
    return {word: number for number, word in enumerate([BOS, YES, NO, LAST, *names])}


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(_words(), unk_token=LAST))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, pad_token=BOS, padding_side="right")


def _prompts(
    rng: random.Random, gates: list[dict[str, _Gate]], outputs: dict[str, float], n: int
) -> list[dict[str, Any]]:
    """Pairs of random features, all different: most on in the clean prompt, few in the corrupt one.

    Their outputs differ, always in the same direction, so that no part's effects cancel over the prompts.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    answers = (YES, NO) if _whole(gates, outputs) > 0 else (NO, YES)
    while len(rows) < n:
        sides = [[rng.random() < share for _ in range(FEATURES)] for share in ON]
        clean, corrupt = (" ".join([*(f"{'on' if on else 'off'}{k}" for k, on in enumerate(side)), LAST])
                          for side in sides)  # fmt: skip
        change = _output(gates, outputs, sides[0]) - _output(gates, outputs, sides[1])
        if (change if answers[0] == YES else -change) < 0.2 or (clean, corrupt) in rows:
            continue
        starts = [len(" ".join(clean.split()[:k])) + (k > 0) for k in range(FEATURES)]
        roles = {f"f{k}": [start, start + len(clean.split()[k])] for k, start in enumerate(starts)}
        rows[clean, corrupt] = {
            "id": f"{len(rows)}", "clean": clean, "corrupt": corrupt, "answer": f" {answers[0]}",
            "wrong_answer": f" {answers[1]}", "roles": roles,
        }  # fmt: skip
    return list(rows.values())


def _output(gates: list[dict[str, _Gate]], outputs: dict[str, float], on: list[bool]) -> float:
    """The difference of the two logits."""
    sizes = [1.0 if k < USED else DECOY for k in range(FEATURES)]
    values = {f"{MOVED}/{END}/{k}": sizes[k] * each for k, each in enumerate(on)}
    for layer in gates:
        for name, gate in layer.items():
            values[name] = gate.value(*(values[source] for source in gate.inputs))
    return sum(weight * values[name] for name, weight in outputs.items())


def _truth(gates: list[dict[str, _Gate]], outputs: dict[str, float]) -> Truth:
    graph = nx.DiGraph((name, TARGET) for name in outputs)
    graph.add_edges_from((f"{EMBEDDING}/f{k}/{k}", f"{MOVED}/{END}/{k}") for k in range(FEATURES))
    graph.add_edges_from((source, name) for layer in gates for name, gate in layer.items() for source in gate.inputs)
    true = nx.ancestors(graph, TARGET)
    return Truth(frozenset(true), frozenset(graph.subgraph(true | {TARGET}).edges))
