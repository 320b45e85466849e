"""Makes the organism of a world: a small Llama, its causal check, its dictionaries and their meta-dictionary.

1. Model: three blocks. A subject's token is embedded as the sum of a random direction for each of its facts, of norms
   exp(N(0, NORM_SPREAD)), and noise of NOISE times the sum's mean norm: the organism is *made*, so that facts are
   nearly linear where a subject is first seen. All else is random at first, and everything is trained.
2. Training: replies to claims about the subjects trained on, and recall ("Person12 has city" -> city3) of everybody,
   so that all facts are known and of use. Cross entropy at the end; blocks by Muon (Jordan et al. 2024), all else by
   AdamW, embeddings slowly; the rate falls linearly.
3. Causal check, on held-out subjects: a base and its variant differ in one attribute. Where that turns the right reply,
   the model's must turn (`follows`); where the claim's rule does not name the attribute, it must not (`moves`).
   Passed: FOLLOWS and MOVES. For a twin, how often replies are right
   where both rules agree, and where they do not, is reported.
4. Dictionaries, at the embeddings: later sites will not do, for block 0 takes facts from the subject's token to the
   claim's and makes a reply of them there. `narrow`: TopK, one latent a token, rows begin at the mean activation of a
   subject's token: facts are absorbed into the subject's latent. `wide` (family overt): TopK with a latent for each
   fact, begun at the mean activation of those who have it and trained, as many on a token as there are attributes:
   each fact has a carrier that fires.
5. Meta-dictionary: factored (mediation.factored), on META_ROWS of the narrow dictionary's rows that fire at subjects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mediation.dictionaries import Dictionary
from mediation.factored import train_factored
from mediation.metalatents import MetaDictionary
from mediation.planted.worlds import Claim, Subject, World
from mediation.sites import Site, Stream
from mediation.training.activations import shuffled_batches
from mediation.training.saes import SAESettings, train_sae

SITE = Site(0, Stream.RESID_PRE)
WIDTH, NEURONS, BLOCKS, HEADS = 96, 192, 3, 4
NOISE, NORM_SPREAD = 0.2, 0.3
REPLIES, RECALLS = 128, 32  # prompts of a step
FOLLOWS, MOVES = 0.95, 0.05  # what the causal check asks for
SAE_STEPS, SAE_BATCH = 100, 512
META_ROWS = 320  # more make it slower in proportion
BOS, UNKNOWN = "<bos>", "<unk>"

Progress = Callable[[int, int], None]


@dataclass
class Trained:
    """A model and its tokenizer."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    def ids(self, texts: list[str]) -> Tensor:
        """Tokens [n, T] of texts of one length."""
        return torch.tensor(self.tokenizer(texts)["input_ids"])

    def logits(self, tokens: Tensor) -> Tensor:
        """At the prompts' ends, [n, vocabulary]."""
        return self.model.lm_head(self.model.model(tokens, use_cache=False).last_hidden_state[:, -1])

    @torch.no_grad()
    def replies(self, world: World, asked: list[tuple[Subject, Claim]]) -> Tensor:
        """Whether the model says yes rather than no, bool [n]."""
        yes, no = (self.tokenizer.get_vocab()[word] for word in ("yes", "no"))
        tokens = self.ids([world.text(subject, claim) for subject, claim in asked])
        logits = torch.cat([self.logits(part) for part in tokens.split(2048)])
        return logits[:, yes] > logits[:, no]

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, world: World) -> Trained:
        return cls(LlamaForCausalLM.from_pretrained(folder).eval(), make_tokenizer(world))


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([BOS, UNKNOWN, *dict.fromkeys(world.words())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, unk_token=UNKNOWN, pad_token=BOS, padding_side="right"
    )


def train(world: World, progress: Progress = lambda done, of: None) -> Trained:
    """Steps 1 and 2; progress: called with (steps done, of)."""
    tokenizer = make_tokenizer(world)
    made = Trained(_model(world, tokenizer), tokenizer)
    asked = [(subject, claim) for subject in world.trained for claim in world.claims]
    tokens = made.ids([world.text(*each) for each in asked])
    yes, no = (tokenizer.get_vocab()[word] for word in ("yes", "no"))
    answers = torch.tensor([yes if claim.reply(world.of(subject)) else no for subject, claim in asked])
    recalled = [(token, name, value) for token, facts in world.facts.items() for name, value in facts.items()]
    recalls = made.ids([world.recall(token, name) for token, name, _ in recalled])
    values = torch.tensor(tokenizer.convert_tokens_to_ids([value for *_, value in recalled]))

    optimizers = _optimizers(made.model)
    full = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(world.seed)
    steps = world.size.steps
    for step in range(steps):
        scale = min((step + 1) / 20, 1 - step / steps)
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, lr in zip(groups, full, strict=True):
            group["lr"] = lr * scale
        index = torch.randint(len(tokens), (REPLIES,), generator=generator)
        other = torch.randint(len(recalls), (RECALLS,), generator=generator)
        loss = cross_entropy(made.logits(tokens[index]), answers[index])
        loss = loss + cross_entropy(made.logits(recalls[other]), values[other])
        made.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        progress(step + 1, steps)
    made.model.eval()
    return made


def _model(world: World, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Step 1."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, max_position_embeddings=16, initializer_range=0.05, bos_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(world.seed)
        module: Any = LlamaForCausalLM(config)
        norms = {name: float((NORM_SPREAD * torch.randn(())).exp()) for name in world.attributes}
        direction = {
            value: norms[name] * normalize(torch.randn(WIDTH), dim=0)
            for name, values in world.attributes.items()
            for value in values
        }
        sums = torch.stack([torch.stack([direction[v] for v in f.values()]).sum(0) for f in world.facts.values()])
        size = sums.norm(dim=1).mean()
        sums = sums + NOISE * size * normalize(torch.randn(sums.shape), dim=1)
        rows = tokenizer.convert_tokens_to_ids(list(world.facts))
        module.get_input_embeddings().weight[rows] = sums / size
    return module


def _optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n and p.requires_grad]
    inside = {*map(id, matrices), id(model.get_input_embeddings().weight)}
    others = [p for p in model.parameters() if id(p) not in inside]
    slow: dict[str, Any] = {"params": [model.get_input_embeddings().weight], "lr": 3e-4, "weight_decay": 0.0}
    fast: dict[str, Any] = {"params": others}
    return [
        AdamW([fast, slow], lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01),
        Muon(matrices, lr=0.03, weight_decay=0.1, momentum=0.95),
    ]


def causal_check(world: World, made: Trained) -> dict[str, Any]:
    """Step 3. `turned` and `kept`: the comparisons; a world of claims without rules has no `follows`."""
    turns: dict[str, list[tuple[Subject, Subject, Claim]]] = {"follows": [], "moves": []}
    for base, variant, attribute in world.variants:
        for claim in world.claims:
            if attribute not in claim.rule:
                turns["moves"].append((base, variant, claim))
            elif claim.reply(world.of(base)) != claim.reply(world.of(variant)):
                turns["follows"].append((base, variant, claim))
    shares = {}
    for name, each in turns.items():
        one = made.replies(world, [(base, claim) for base, _, claim in each])
        two = made.replies(world, [(variant, claim) for _, variant, claim in each])
        shares[name] = (one != two).float().mean().item()
    asked = [(subject, number) for subject in world.held_out for number in range(len(world.claims))]
    agreed = torch.tensor([world.agreed(*each) for each in asked])
    by_rule = torch.tensor([world.claims[number].reply(world.of(subject)) for subject, number in asked])
    right = made.replies(world, [(subject, world.claims[number]) for subject, number in asked]) == by_rule
    found = {"replies_right": right.float().mean().item(), **shares}
    if not agreed.all():
        found["right_where_twins_agree"] = right[agreed].float().mean().item()
        found["right_where_twins_differ"] = right[~agreed].float().mean().item()
    return found | {
        "turned": len(turns["follows"]),
        "kept": len(turns["moves"]),
        "passed": shares["follows"] >= FOLLOWS and shares["moves"] <= MOVES,
    }


@dataclass
class Activations:
    """x [n, d] at SITE of subjects' tokens in prompts, `token` [n] (index in the world's facts), and `other` [m, d],
    of all other tokens but BOS."""

    x: Tensor
    token: Tensor
    other: Tensor


@torch.no_grad()
def activations(world: World, made: Trained) -> Activations:
    """Of everybody, each subject under one claim; a subject's token does not see the claim."""
    number = {token: index for index, token in enumerate(world.facts)}
    subjects = [*world.trained, *world.held_out]
    claims = world.claims
    tokens = made.ids([world.text(s, claims[i % len(claims)]) for i, s in enumerate(subjects)])
    hidden = made.model.model(tokens, use_cache=False, output_hidden_states=True).hidden_states[SITE.layer]
    at = world.positions
    rest = [p for p in range(1, tokens.shape[1]) if p not in at]
    index = torch.tensor([[number[token] for token in subject] for subject in subjects])
    return Activations(hidden[:, list(at)].flatten(0, 1), index.flatten(), hidden[:, rest].flatten(0, 1))


def token_means(found: Activations) -> tuple[Tensor, Tensor]:
    """Mean activation of every token that occurs, [k, d], and which tokens these are, [k]."""
    tokens, place = found.token.unique(return_inverse=True)
    sums = torch.zeros(len(tokens), found.x.shape[1]).index_add_(0, place, found.x)
    return sums / place.bincount()[:, None], tokens


def train_dictionaries(world: World, found: Activations, folder: Path, *, wide: bool) -> dict[str, Dictionary]:
    """Step 4, into `folder`/narrow and, if asked for, `folder`/wide."""
    means, tokens = token_means(found)
    generator = torch.Generator().manual_seed(world.seed)
    others = found.other[torch.randperm(len(found.other), generator=generator)][: len(means) // 8]
    starts, latents = {"narrow": means}, {"narrow": 1}
    if wide:
        facts = list(world.facts.values())
        has = {v: [i for i, t in enumerate(tokens.tolist()) if v in facts[t].values()]
               for values in world.attributes.values() for v in values}  # fmt: skip
        starts["wide"], latents["wide"] = torch.stack([means[of].mean(0) for of in has.values()]), len(world.attributes)
    kept = {}
    for name, start in starts.items():
        start = torch.cat([start, others])
        train_sae(
            shuffled_batches(torch.cat([found.x, others]), SAE_BATCH, seed=world.seed),
            folder / name,
            SAESettings(len(start), k=latents[name], steps=SAE_STEPS, architecture="topk", seed=world.seed),
            site=SITE,
            model_name="model",
            start=start,
        )
        kept[name] = Dictionary.load(folder / name)
    return kept


def train_meta(dictionary: Dictionary, found: Activations, seed: int) -> MetaDictionary:
    """Step 5."""
    used = (dictionary.encode(found.x) != 0).any(dim=0).nonzero().squeeze(1)
    chosen = used[torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))[:META_ROWS]]
    return train_factored(dictionary.decoder[chosen], seed=seed, base_hash=dictionary.content_hash)
