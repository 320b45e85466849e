"""A small Llama trained on a world: recall, trait and opinion prompts.

1. Words are tokens (WordLevel), BOS first; the model is an untied LlamaForCausalLM of 3 blocks.
2. Each step takes recall prompts of everybody, trait prompts, and opinion prompts of the people who are not held out;
   the loss is the cross entropy of the answer at the prompt's end.
3. Readout loss (families `shaped` and `null`): x is the residual at the last-name token after block 0, scaled to unit
   norm; for every attribute known of the person, the cross entropy of SHARPNESS * cosine(x, embedding of a value)
   over the attribute's values. It makes the facts linear at that site: the organism is made, not found.
   The natural family goes without.
4. Matrices of the blocks by Muon (Jordan et al. 2024), all else by AdamW; one warm-up and one cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mediation.organisms.world import World, opinion_rows, recall_rows, trait_rows

BOS, UNKNOWN = "<bos>", "<unk>"
LAST_NAME = 2  # position of the last-name token: BOS, first, last
SHARPNESS = 10.0  # low enough that the readout loss keeps pressing until little but facts is left in x
BATCH = {"recall": 96, "traits": 96, "opinions": 128}
UNTOLD = -1  # a fact that a prompt's person does not have


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([BOS, UNKNOWN, *world.words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, unk_token=UNKNOWN, pad_token=BOS, padding_side="right"
    )


def make_model(vocabulary: int, *, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.05,  # at 0.02 Muon starts slowly, at 0.1 opinions are learned by heart
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


class Questions:
    """Prompts as tensors: tokens [n, longest], last [n] (position of the final token), answer [n] (token),
    facts [n, K] (index of the value of each attribute, or UNTOLD), person [n] (index, or UNTOLD)."""

    def __init__(self, rows: list[dict[str, Any]], world: World, tokenizer: PreTrainedTokenizerFast) -> None:
        encoded = [tokenizer(row["clean"])["input_ids"] for row in rows]
        longest = max(map(len, encoded))
        self.tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in encoded])
        self.last = torch.tensor([len(ids) - 1 for ids in encoded])
        self.answer = torch.tensor([tokenizer.convert_tokens_to_ids(row["answer"].strip()) for row in rows])
        self.person = torch.tensor([row.get("person", UNTOLD) for row in rows])
        told = [row["facts"] if "facts" in row else world.people[row["person"]].facts for row in rows]
        self.facts = torch.tensor(
            [
                [values.index(facts[name]) if name in facts else UNTOLD for name, values in world.attributes.items()]
                for facts in told
            ]
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def real(self, index: Tensor) -> Tensor:
        """Positions [n, longest] that hold a token of the prompt other than BOS."""
        positions = torch.arange(self.tokens.shape[1])
        return (positions > 0) & (positions <= self.last[index][:, None])


def answer_logits(model: LlamaForCausalLM, questions: Questions, index: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] at the prompts' ends, and x [n, d_model] at the last name after block 0."""
    last = questions.last[index]
    tokens = questions.tokens[index][:, : int(last.max()) + 1]  # right padding is never seen: attention is causal
    out = model.model(tokens, use_cache=False, output_hidden_states=True)
    return model.lm_head(out.last_hidden_state[torch.arange(len(last)), last]), out.hidden_states[1][:, LAST_NAME]


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, questions: Questions, limit: int = 8192) -> float:
    """Share of prompts, at most `limit` of them, whose answer is the likeliest next token."""
    index = torch.randperm(len(questions), generator=torch.Generator().manual_seed(0))[:limit]
    right = [answer_logits(model, questions, i)[0].argmax(-1) == questions.answer[i] for i in index.split(1024)]
    return torch.cat(right).float().mean().item()


def train_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    steps: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Steps 2 to 4, in place."""
    families = {
        "recall": Questions(recall_rows(world), world, tokenizer),
        "traits": Questions(trait_rows(world), world, tokenizer),
        "opinions": Questions(opinion_rows(world, world.label_people, seed=world.seed), world, tokenizer),
    }
    values = [torch.tensor(tokenizer.convert_tokens_to_ids(list(vs))) for vs in world.attributes.values()]
    weight = 0.0 if world.family == "natural" else 1.0
    optimizers = _optimizers(model)
    rates = [
        OneCycleLR(o, o.defaults["lr"], total_steps=steps, pct_start=0.05, div_factor=10, cycle_momentum=False)
        for o in optimizers
    ]
    generator = torch.Generator().manual_seed(world.seed)
    for step in range(steps):
        loss = torch.zeros(())
        for name, questions in families.items():
            index = torch.randint(len(questions), (BATCH[name],), generator=generator)
            logits, x = answer_logits(model, questions, index)
            loss = loss + cross_entropy(logits, questions.answer[index])
            if weight:
                loss = loss + weight * _readout_loss(model, x, questions.facts[index], values)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        progress(step + 1, steps)


def _readout_loss(model: LlamaForCausalLM, x: Tensor, facts: Tensor, values: list[Tensor]) -> Tensor:
    """Step 3; x [n, d_model], facts [n, K], values: the tokens of each attribute's values."""
    embedding = model.model.embed_tokens.weight
    x = normalize(x, dim=-1)
    losses = []
    for column, tokens in enumerate(values):
        known = facts[:, column] != UNTOLD
        if known.any():
            cosines = x[known] @ normalize(embedding[tokens], dim=-1).T
            losses.append(cross_entropy(SHARPNESS * cosines, facts[known, column]))
    return torch.stack(losses).sum() / len(values)


def _optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    inside = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01),
        Muon(matrices, lr=0.03, weight_decay=0.1, momentum=0.95),
    ]
