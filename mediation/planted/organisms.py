"""Makes the organism of a world: a small Llama, its causal check, its dictionaries and their meta-dictionary.

1. Model: three blocks. A subject's token is embedded as the sum of a random direction for each of its facts, of norms
   exp(N(0, NORM_SPREAD)), and noise of NOISE times the sum's mean norm: the organism is *made*, so that facts are
   nearly linear where a subject is first seen. All else is random at first, and everything is trained.
   `names` has nothing made: embeddings are random, and facts are of pairs of tokens. There a token attends to itself
   and the one before it only (sliding window), and the model has two blocks: what the claim's token learns of the first
   name it learns from the last name's, after block 0 has joined the two. Without a window the claim's token reads
   both names itself and keeps replies of its own by heart.
2. Training: replies to claims about the subjects trained on, and recall ("Person12 has city" -> city3) of everybody,
   so that all facts are known and of use. In `names` claims are of everybody: nothing about a pair can be inferred, and
   a model of this size did not learn to put facts that it had only recalled to use in claims. Cross entropy at the
   end; blocks by Muon (Jordan et al. 2024), all else by AdamW, embeddings slowly; the rate falls linearly.
3. Causal check, on held-out subjects: a base and its variant differ in one attribute. Where that turns the right reply,
   the model's must turn (`follows`); where the claim's rule does not name the attribute, it must not (`moves`).
   Passed: FOLLOWS and MOVES, and CARRIED in `names`: the share of the total effect that the residual carries at the
   last name, between block 0 and 1. There also reported: how well facts are read off linearly, from the embeddings of
   both names and from that residual. For a twin, how often replies are right where both rules agree, and where they do
   not.
4. Dictionaries, at the embeddings: later sites will not do, for block 0 takes facts from the subject's token to the
   claim's and makes a reply of them there. `narrow`: TopK, one latent a token, rows begin at the mean activation of a
   subject's token: facts are absorbed into the subject's latent. `wide` (family overt): TopK with a latent for each
   fact, begun at the mean activation of those who have it and trained, as many on a token as there are attributes:
   each fact has a carrier that fires.
5. Meta-dictionary: factored (mediation.factored), on META_ROWS of the narrow dictionary's rows that fire at subjects;
   in `names` on all that fire at subjects trained on, and where it finds no fact, a sparse meta-SAE of 1.5 meta-latents
   for each value, one more a row than there are attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import RidgeClassifier
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.factored import train_factored
from mediation.metalatents import MetaDictionary
from mediation.planted.worlds import Claim, Subject, World
from mediation.sites import Site, Stream
from mediation.training.activations import shuffled_batches
from mediation.training.saes import SAESettings, train_sae

SITES = {"names": Site(1, Stream.RESID_PRE)}  # of a world's dictionaries; elsewhere the embeddings
EMBEDDINGS = Site(0, Stream.RESID_PRE)
WIDTH, NEURONS, BLOCKS, HEADS = 96, 192, 3, 4
NOISE, NORM_SPREAD = 0.2, 0.3
REPLIES, RECALLS = 128, 32  # prompts of a step
RIDGE = 1.0  # penalty of a readout
WINDOW, PAIRS = 2, 192  # in `names`: tokens that a token attends to, itself one of them; recalls of a step
FOLLOWS, MOVES, CARRIED = 0.95, 0.05, 0.9  # what the causal check asks for
SAE_STEPS, SAE_BATCH, SPARSE_STEPS = 100, 512, 1000
META_ROWS = 320  # more make it slower in proportion
BOS, UNKNOWN = "<bos>", "<unk>"

Progress = Callable[[int, int], None]


@dataclass
class Trained:
    """A model and its tokenizer."""

    model: LlamaForCausalLM | MistralForCausalLM
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
        kind: Any = MistralForCausalLM if world.name == "names" else LlamaForCausalLM
        return cls(kind.from_pretrained(folder).eval(), make_tokenizer(world))


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
    made = Trained((_joining_model if world.name == "names" else _model)(world, tokenizer), tokenizer)
    asked = [(subject, claim) for subject in world.asked_in_training for claim in world.claims]
    tokens = made.ids([world.text(*each) for each in asked])
    yes, no = (tokenizer.get_vocab()[word] for word in ("yes", "no"))
    answers = torch.tensor([yes if claim.reply(world.of(subject)) else no for subject, claim in asked])
    recalled = [(holder, name, value) for holder, facts in world.facts.items() for name, value in facts.items()]
    recalls = made.ids([world.recall(holder, name) for holder, name, _ in recalled])
    values = torch.tensor(tokenizer.convert_tokens_to_ids([value for *_, value in recalled]))

    optimizers = _optimizers(made.model)
    full = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(world.seed)
    steps, n_recalls = world.size.steps, PAIRS if world.name == "names" else RECALLS
    for step in range(steps):
        scale = min((step + 1) / 20, 1 - step / steps)
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, lr in zip(groups, full, strict=True):
            group["lr"] = lr * scale
        index = torch.randint(len(tokens), (REPLIES,), generator=generator)
        other = torch.randint(len(recalls), (n_recalls,), generator=generator)
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


def site_of(world: World) -> Site:
    """Where the world's dictionaries read."""
    return SITES.get(world.name, EMBEDDINGS)


def _joining_model(world: World, tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """Step 1 in `names`: all is random at first."""
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=16, sliding_window=WINDOW,
        initializer_range=0.05, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        return MistralForCausalLM(config)


def _model(world: World, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Step 1 elsewhere."""
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


def _optimizers(model: LlamaForCausalLM | MistralForCausalLM) -> list[Optimizer]:
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
    passed = shares["follows"] >= FOLLOWS and shares["moves"] <= MOVES
    if site_of(world).layer > 0:
        found["carried"] = carried(world, made)
        found["decoded_from_embeddings"], found["decoded"] = decoded(world, made)
        passed = passed and found["carried"] >= CARRIED
    if not agreed.all():
        found["right_where_twins_agree"] = right[agreed].float().mean().item()
        found["right_where_twins_differ"] = right[~agreed].float().mean().item()
    return found | {
        "turned": len(turns["follows"]),
        "kept": len(turns["moves"]),
        "passed": passed,
    }


@torch.no_grad()
def carried(world: World, made: Trained) -> float:
    """Share of the total effect that the residual at the world's site and positions carries.

    Total effect: of exchanging a held-out subject for one of the opposite reply, on the logit difference of the
    replies, in the direction of the right one; over one such pair a subject and claim.
    """
    asked = [
        (subject, next(other for other in world.held_out if claim.reply(world.of(other)) != reply), claim, reply)
        for subject in world.held_out
        for claim in world.claims
        if claim.rule
        for reply in [claim.reply(world.of(subject))]
    ]
    clean = made.ids([world.text(subject, claim) for subject, _, claim, _ in asked])
    corrupt = made.ids([world.text(other, claim) for _, other, claim, _ in asked])
    yes, no = (made.tokenizer.get_vocab()[word] for word in ("yes", "no"))
    layer, at = site_of(world).layer, list(world.positions)

    def right(tokens: Tensor) -> Tensor:
        logits = made.logits(tokens)
        return (logits[:, yes] - logits[:, no]) * torch.tensor([1.0 if reply else -1.0 for *_, reply in asked])

    there = made.model.model(corrupt, use_cache=False, output_hidden_states=True).hidden_states[layer]

    def exchange(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[:, at] = there[:, at]
        return (x, *args[1:])

    before, after = right(clean), right(corrupt)
    hook = made.model.model.layers[layer].register_forward_pre_hook(exchange)
    try:
        exchanged = right(clean)
    finally:
        hook.remove()
    return float((before - exchanged).sum() / (before - after).sum())


@torch.no_grad()
def decoded(world: World, made: Trained) -> tuple[float, float]:
    """Share of held-out subjects' values that ridge regression reads off, fitted on subjects trained on: off the
    embeddings of their tokens side by side, and off the residual at the world's site and positions."""
    subjects = [*world.trained, *world.held_out]
    tokens = made.ids([world.text(subject, world.claims[0]) for subject in subjects])
    hidden = made.model.model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    places = [hidden[0][:, 1 : 1 + len(subjects[0])], hidden[site_of(world).layer][:, list(world.positions)]]
    shares: list[list[float]] = [[], []]
    n = len(world.trained)
    for attribute in world.attributes:
        values = [world.of(subject)[attribute] for subject in subjects]
        for share, x in zip(shares, places, strict=True):
            flat = x.flatten(1).numpy()
            share.append(float(RidgeClassifier(RIDGE).fit(flat[:n], values[:n]).score(flat[n:], values[n:])))
    return sum(shares[0]) / len(shares[0]), sum(shares[1]) / len(shares[1])


@dataclass
class Activations:
    """x [n, d] at the site and the world's positions in prompts, `token` [n] (index in the world's facts), and `other`
    [m, d], of all other tokens but BOS."""

    x: Tensor
    token: Tensor
    other: Tensor


@torch.no_grad()
def activations(world: World, made: Trained) -> Activations:
    """Of everybody, each subject under one claim; a subject's token does not see the claim."""
    number = {holder: index for index, holder in enumerate(world.facts)}
    subjects = [*world.trained, *world.held_out]
    claims = world.claims
    tokens = made.ids([world.text(s, claims[i % len(claims)]) for i, s in enumerate(subjects)])
    hidden = made.model.model(tokens, use_cache=False, output_hidden_states=True).hidden_states[site_of(world).layer]
    at = world.positions
    rest = [p for p in range(1, tokens.shape[1]) if p not in at]
    index = torch.tensor([[number[holder] for holder in world.holders(subject)] for subject in subjects])
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
            site=site_of(world),
            model_name="model",
            start=start,
        )
        kept[name] = Dictionary.load(folder / name)
    return kept


def train_meta(world: World, dictionary: Dictionary, found: Activations) -> MetaDictionary:
    """Step 5."""
    x, n_rows, seed = found.x, META_ROWS, world.seed
    if world.name == "names":
        trained = {holder for subject in world.trained for holder in world.holders(subject)}
        known = torch.tensor([holder in trained for holder in world.facts])
        x, n_rows = x[known[found.token]], len(trained)
    used = (dictionary.encode(x) != 0).any(dim=0).nonzero().squeeze(1)
    chosen = used[torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))[:n_rows]]
    rows, base = dictionary.decoder[chosen], dictionary.content_hash
    try:
        return train_factored(rows, seed=seed, base_hash=base)
    except MediationError:  # rows that share no fact
        if world.name != "names":
            raise
    width, k = round(1.5 * sum(map(len, world.attributes.values()))), len(world.attributes) + 1
    return MetaDictionary.train(rows, width=width, k=k, steps=SPARSE_STEPS, seed=seed, center=True, base_hash=base)
