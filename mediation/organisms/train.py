from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mediation.organisms.world import NO, YES, World, opinion_rows, recall_rows

Progress = Callable[[str, int, int], None]
BOS, UNKNOWN = "<bos>", "<unk>"
LAST_NAME = 2  # position of the last-name token: BOS, first, last


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


def make_model(vocabulary: int, *, d_model: int = 96, d_ff: int = 384, n_layers: int = 3) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


class Questions:
    """Prompts as tensors: tokens [n, longest], the position of the last token, the answer's token, the person."""

    def __init__(self, rows, tokenizer):
        encoded = [tokenizer(row["clean"])["input_ids"] for row in rows]
        longest = max(map(len, encoded))
        self.tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in encoded])
        self.last = torch.tensor([len(ids) - 1 for ids in encoded])
        self.answer = torch.tensor([tokenizer.convert_tokens_to_ids(row["answer"].strip()) for row in rows])
        self.person = torch.tensor([row["person"] for row in rows])
        self.rows = rows

    def __len__(self):
        return len(self.rows)


def answer_logits(model, questions, index):
    """Logits [n, vocabulary] at the end of the prompts, and x [n, d_model] at the last name after block 0."""
    tokens, last = questions.tokens[index], questions.last[index]
    out = model.model(tokens[:, : int(last.max()) + 1], use_cache=False, output_hidden_states=True)
    hidden = out.last_hidden_state[torch.arange(len(last)), last]
    return model.lm_head(hidden), out.hidden_states[1][:, LAST_NAME]


def facts_table(world):
    return torch.tensor([[vs.index(p.facts[a]) for a, vs in world.attributes.items()] for p in world.people])


class Readout(nn.Module):
    def __init__(self, world, d_model):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(d_model, len(v)) for v in world.attributes.values())

    def forward(self, x, facts):
        return sum(
            nn.functional.cross_entropy(h(x), facts[:, i]) for i, h in enumerate(self.heads)
        ) / len(self.heads)


def train_model(world, model, tokenizer, *, steps=2000, batch=256, lr=2e-3, weight=0.5, wd=0.01, progress=None):
    recall = Questions(recall_rows(world), tokenizer)
    opinions = Questions(opinion_rows(world, world.label_people), tokenizer)
    held = Questions(opinion_rows(world, world.held_out), tokenizer)
    facts = facts_table(world)
    readout = Readout(world, model.config.hidden_size)
    params = [*model.parameters(), *(readout.parameters() if weight else [])]
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=wd, fused=True)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.05, div_factor=10)
    g = torch.Generator().manual_seed(world.seed)
    for step in range(steps):
        loss = 0.0
        for q in (recall, opinions):
            index = torch.randint(len(q), (batch // 2,), generator=g)
            logits, x = answer_logits(model, q, index)
            loss = loss + nn.functional.cross_entropy(logits, q.answer[index])
            if weight:
                loss = loss + weight * readout(x, facts[q.person[index]])
        opt.zero_grad(); loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step(); sched.step()
        if progress and (step + 1) % 250 == 0:
            progress(step + 1, loss.item(), accuracy(model, recall), accuracy(model, opinions), accuracy(model, held))


@torch.no_grad()
def accuracy(model, q, n=4096):
    idx = torch.arange(len(q)) if len(q) <= n else torch.randperm(len(q), generator=torch.Generator().manual_seed(0))[:n]
    return sum((answer_logits(model, q, i)[0].argmax(-1) == q.answer[i]).sum().item() for i in idx.split(512)) / len(idx)
