"""First letters: both published definitions of absorption, and the label-free flag judged by them.

1. Words of one token stand after ten lines "word has the first letter: X" and before " has the first letter:". Words
   of the lines, training words and test words are disjoint, and so are the lines of training and test contexts. x is
   the residual at the word, the behaviour m = logit of the right letter - mean logit of the 25 others.
2. Probe: logistic regression for all letters on x of training words. A letter is valid when its F1 on test words is at
   least .6; a site with fewer than 20 valid letters gets no figure. Main latents of a letter: see
   `mediation.absorption.main_latents`, from training words.
3. For test words whose letter the probe gets right, with a_i the latents, w_i their rows, p the letter's unit probe:
   *v1* (Chanin et al. 2024): all main latents are off, and of all latents' attributions A_i = a_i (g . w_i), g the mean
   of m's gradient at x, 5/6 x, ..., 1/6 x, the largest is positive, exceeds the second by 1 logit, and its latent has
   w_i . p >= .025. (Off main latents leave the sparse probe of the original with its negative intercept, so its second
   condition, a negative score, holds as well.)
   *v2 full* (Karvonen et al. 2025): all main latents are off, and the latent with the largest a_i (w_i . p) has
   w_i . p >= .025 and carries at least .4 of x . p. *v2 fraction*: `mediation.absorption.absorption_fractions`.
4. The flag knows no probe. Decoder rows w_i = b + sum_j z_ij u_j + r_i come from a meta-dictionary. On training words a
   meta-latent is named after a letter by enrichment (`mediation.labels.enrichment`) of sum_i a_i z_ij. On a test word,
   with M the meta-latents named after its letter, E = sum over latents i and j in M of a_i z_ij (g . u_j), shared out
   among carriers of M and others. Hidden share = |E others| / (|E others| + |E carriers|). Flagged: hidden share >= .5,
   no carrier on, E others > 0 and |E| >= 5 % of sum_i |A_i|. Carriers of u_j, three rules, none of them fitted: w_i .
   u_j is at least .7 (the default of `mediation flag`), or .5, or .7 of the largest w_i . u_j in the dictionary
   (*nearest*).
5. Judged on the words of step 3, absorbed or not by each definition: area under the ROC curve of the hidden share (0
   where E others <= 0 or no meta-latent bears the letter's name), precision and recall of the flag. Beside it: the
   same with a meta-dictionary trained on rows turned at random, and with the probes themselves as directions, which no
   label-free method has.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from mediation.absorbed.contexts import Context, InContext, single_tokens
from mediation.absorbed.scores import auc, precision_recall, share
from mediation.absorption import VALID_F1, VALID_LETTERS, absorption_fractions, main_latents
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.labels import enrichment
from mediation.metalatents import Decomposition
from mediation.sites import Site
from mediation.subject import SubjectModel

EXAMPLES, CONTEXTS = 10, 8  # lines before a word, and how many such texts for training words and for test words
LEAST_WORDS, TEST_SHARE = 10, 0.3
SILENT = 1e-8
STEPS, GAP, V1_COSINE = 6, 1.0, 0.025
V2_COSINE, V2_SHARE = 0.025, 0.4
NEAREST = 0.7  # of the largest cosine
HIDDEN, IMPORTANT = 0.5, 0.05
CARRY_PAIRS = 64
RULES = ("cosine .7", "cosine .5", "nearest")


@dataclass
class Spelled:
    """Words of one side of the split: letters [n] as numbers, x [n, d] by site, and whether the model spells them
    right.

    contexts: each with the rows of the words in it.
    """

    words: list[str]
    letters: Tensor
    contexts: list[tuple[InContext, Tensor]]
    x: dict[Site, Tensor]
    right: Tensor

    def path_gradients(self, site: Site, rows: Tensor, tokens: Tensor) -> Tensor:
        """g of step 3 for `rows` [k]: [k, d]; tokens [26]: of the letters."""
        weights = one_hot(self.letters, 26).float() * (26 / 25) - 1 / 25
        found = torch.zeros(len(self.words), self.x[site].shape[1])
        for context, mine in self.contexts:
            here = torch.isin(mine, rows).nonzero()[:, 0]
            if len(here):
                words = mine[here]
                for step in range(STEPS):
                    x = (1 - step / STEPS) * self.x[site][words]
                    found[words] += context.gradient(site, here, x, weights[words], tokens) / STEPS
        return found[rows]


@dataclass
class Spelling:
    """Both sides, and the letters' tokens [26]."""

    train: Spelled
    test: Spelled
    tokens: Tensor


def absorbed_v1(latents: Tensor, attribution: Tensor, cosines: Tensor, main: Sequence[int]) -> Tensor:
    """Step 3, v1, for words of one letter: [n] from latents and attributions [n, d_sae], w_i . p [d_sae]."""
    largest = attribution.topk(2, dim=1)
    gap = largest.values[:, 0] - largest.values[:, 1]
    off = (latents[:, list(main)] < SILENT).all(1)
    return off & (largest.values[:, 0] > 0) & (gap >= GAP) & (cosines[largest.indices[:, 0]] >= V1_COSINE)


def absorbed_full(latents: Tensor, x: Tensor, decoder: Tensor, probe: Tensor, main: Sequence[int]) -> Tensor:
    """Step 3, v2 full, for words of one letter: [n] from latents [n, d_sae], x [n, d], unit rows and a probe [d]."""
    direction = normalize(probe, dim=0)
    cosines, wanted = decoder @ direction, x @ direction
    largest = (latents * cosines).max(1)
    off = (latents[:, list(main)] < SILENT).all(1)
    carries = (wanted > 0) & (largest.values >= V2_SHARE * wanted)
    return off & carries & (cosines[largest.indices] >= V2_COSINE)


@dataclass
class Pooled:
    """Step 4 for n words: effects of the named meta-latents through other latents and through carriers, [n] each, and
    whether a carrier is on."""

    hidden: Tensor
    carried: Tensor
    carrier_on: Tensor

    def share(self) -> Tensor:
        """Hidden share [n], 0 where the hidden effect is not positive."""
        whole = self.hidden.abs() + self.carried.abs()
        return torch.where(self.hidden > 0, self.hidden / whole.clamp_min(1e-12), 0.0)

    def flagged(self, attribution: Tensor) -> Tensor:
        """The flag [n]; attribution [n, d_sae]."""
        important = (self.hidden + self.carried).abs() >= IMPORTANT * attribution.abs().sum(1)
        return (self.share() >= HIDDEN) & ~self.carrier_on & important


def carriers(rows: Tensor, directions: Tensor) -> dict[str, Tensor]:
    """Which rows [k, d] carry some of the directions [m, d], [k] by rule of step 4."""
    cosines = rows @ directions.T
    if not len(directions):
        return dict.fromkeys(RULES, torch.zeros(len(rows), dtype=torch.bool))
    levels = torch.tensor(0.7), torch.tensor(0.5), NEAREST * cosines.max(0).values
    return {rule: (cosines >= level).any(1) for rule, level in zip(RULES, levels, strict=True)}


def pooled_effects(latents: Tensor, gradients: Tensor, codes: Tensor, directions: Tensor, carrier: Tensor) -> Pooled:
    """Step 4: latents [n, k], gradients [n, d], codes [k, m] and directions [m, d] of the m meta-latents, and which of
    the k latents carry them [k].
    """
    effects = latents * (gradients @ directions.T @ codes.T)
    carried = effects[:, carrier].sum(1)
    return Pooled(effects[:, ~carrier].sum(1), carried, (latents[:, carrier] > SILENT).any(1))


def spell(
    model: SubjectModel,
    words: Sequence[tuple[str, str]],
    sites: Sequence[Site],
    *,
    per_letter: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> Spelling:
    """Step 1 for (word, letter) pairs, `per_letter` of a letter at most."""
    tokens = single_tokens(model, [f"{letter}" for letter in ascii_uppercase])
    if len(tokens) < 26:
        raise MediationError(f"{model.name} does not write every letter as one token; there is no spelling to measure.")
    one_token = single_tokens(model, [word for word, _ in words])
    rng = random.Random(seed)
    pool = [(word, letter) for word, letter in dict(words).items() if word in one_token and letter.upper() in tokens]
    rng.shuffle(pool)
    lines, pool = pool[: 2 * CONTEXTS * EXAMPLES], pool[2 * CONTEXTS * EXAMPLES :]
    by_letter = defaultdict(list)
    for word, letter in pool:
        by_letter[letter].append(word)
    if sum(len(mine) >= LEAST_WORDS for mine in by_letter.values()) < VALID_LETTERS:
        raise MediationError(
            f"The words give fewer than {VALID_LETTERS} letters with {LEAST_WORDS} one-token words; give more words."
        )
    train, test = [], []
    for letter, mine in sorted(by_letter.items()):
        if len(mine) >= LEAST_WORDS:
            kept = mine[:per_letter]
            cut = max(2, round(TEST_SHARE * len(kept)))
            test += [(word, letter) for word in kept[:cut]]
            train += [(word, letter) for word in kept[cut:]]
    letters = torch.tensor([tokens[letter] for letter in ascii_uppercase])
    sides = []
    for number, side in enumerate((train, test)):
        progress("training words" if number == 0 else "test words")
        rng.shuffle(side)
        before = lines[number * CONTEXTS * EXAMPLES :][: CONTEXTS * EXAMPLES]
        sides.append(_read(model, side, before, one_token, letters, sites, asked=number == 1))
    return Spelling(sides[0], sides[1], letters)


def _read(
    model: SubjectModel,
    side: list[tuple[str, str]],
    lines: list[tuple[str, str]],
    one_token: Mapping[str, int],
    letters: Tensor,
    sites: Sequence[Site],
    *,
    asked: bool,
) -> Spelled:
    ids = torch.tensor([one_token[word] for word, _ in side])
    numbers = torch.tensor([ord(letter) - ord("a") for _, letter in side])
    x = {site: torch.zeros(len(side), model.d_model) for site in sites}
    right = torch.zeros(len(side), dtype=torch.bool)
    contexts = []
    for number in range(CONTEXTS):
        mine = torch.arange(number, len(side), CONTEXTS)
        shown = lines[number * EXAMPLES :][:EXAMPLES]
        text = "".join(f" {word} has the first letter: {letter.upper()}\n" for word, letter in shown)
        context = InContext(model, Context(text, " has the first letter:"), ids[mine])
        for site, values in context.x(sites).items():
            x[site][mine] = values.cpu()
        if asked:
            right[mine] = context.asked()[:, letters].argmax(1).cpu() == numbers[mine]
        contexts.append((context, mine))
    return Spelled([word for word, _ in side], numbers, contexts, x, right)


def carried_at_word(spelling: Spelling, site: Site, seed: int = 0) -> dict[str, Any]:
    """Share of the effect of exchanging a word for one of another letter that x at the word carries; logit
    difference."""
    test, generator = spelling.test, torch.Generator().manual_seed(seed)
    moved, whole = [], []
    for context, mine in test.contexts:
        order = torch.randperm(len(mine), generator=generator)
        one, other = order[: len(order) // 2], order[len(order) // 2 :][: len(order) // 2]
        differ = test.letters[mine[one]] != test.letters[mine[other]]
        one, other = (side[differ][: CARRY_PAIRS // CONTEXTS] for side in (one, other))
        x = test.x[site][mine]
        logits = [
            context.logits(site, rows, values, spelling.tokens)
            for rows, values in ((one, x[one]), (one, x[other]), (other, x[other]))
        ]
        own, wrong = test.letters[mine[one]], test.letters[mine[other]]
        row = torch.arange(len(one))
        clean, patched, exchanged = (each[row, own] - each[row, wrong] for each in logits)
        moved += (clean - patched).tolist()
        whole += (clean - exchanged).tolist()
    return share(moved, whole) | {"n": len(whole)}


@torch.no_grad()
def measure_letters(
    dictionary: Dictionary,
    spelling: Spelling,
    metas: Callable[[Tensor], Mapping[str, Decomposition]],
    *,
    judged: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Steps 2 to 5 at one site; metas: from the decoder rows in use on training words, meta-dictionaries by name.

    judged: test words at most, drawn at random from those whose letter the probe gets right.
    """
    site, train, test = dictionary.site, spelling.train, spelling.test
    progress("probes")
    scaler = StandardScaler().fit(train.x[site].numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that has not converged has a lower F1, shown
        probe = LogisticRegression(max_iter=300).fit(scaler.transform(train.x[site].numpy()), train.letters.numpy())
    predicted = torch.from_numpy(probe.predict(scaler.transform(test.x[site].numpy())))
    letters = [int(letter) for letter in probe.classes_]
    f1 = f1_score(test.letters, predicted, labels=letters, average=None)
    valid = [letter for letter, value in zip(letters, f1, strict=True) if value >= VALID_F1]
    result: dict[str, Any] = {
        "site": site.name,
        "words": {"training": len(train.words), "test": len(test.words)},
        "spelt_right": share(test.right.float()),
        "carried_at_word": carried_at_word(spelling, site, seed),
        "probe_f1": float(np.mean(f1)),
        "valid_letters": len(valid),
    }
    if len(valid) < VALID_LETTERS:
        return result | {
            "reason": f"{len(valid)} letters can be read with an F1 of {VALID_F1}; {VALID_LETTERS} are needed"
        }

    progress("main latents")
    seen = sparse.csr_matrix(np.concatenate([dictionary.encode(part).numpy() for part in train.x[site].split(512)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        main = {letter: main_latents(seen, train.letters.numpy() == letter) for letter in valid}
    generator = torch.Generator().manual_seed(seed)
    rows = ((predicted == test.letters) & torch.isin(test.letters, torch.tensor(valid))).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)[:judged]].sort().values
    letter_of, x = test.letters[rows], test.x[site][rows]
    progress("gradients")
    with torch.enable_grad():
        gradients = test.path_gradients(site, rows, spelling.tokens)
    latents = dictionary.encode(x)
    attribution = latents * (gradients @ dictionary.decoder.T)
    directions = torch.zeros(26, x.shape[1])
    directions[letters] = normalize(torch.from_numpy(probe.coef_ / scaler.scale_).float(), dim=1)
    v1, full = (torch.zeros(len(rows), dtype=torch.bool) for _ in range(2))
    fraction = torch.zeros(len(rows))
    silent = torch.zeros(len(rows), dtype=torch.bool)
    for letter in valid:
        here = (letter_of == letter).nonzero()[:, 0]
        p, own = directions[letter], main[letter]
        silent[here] = (latents[here][:, own] < SILENT).all(1)
        v1[here] = absorbed_v1(latents[here], attribution[here], dictionary.decoder @ p, own)
        full[here] = absorbed_full(latents[here], x[here], dictionary.decoder, p, own)
        fraction[here] = absorption_fractions(latents[here], x[here], dictionary.decoder, p, own)
    truths = {"v1": v1, "v2 full": full, "v2 fraction over .5": fraction > 0.5}
    result |= {
        "judged": len(rows),
        "main_latents": float(np.mean([len(own) for own in main.values()])),
        "main_silent": share(silent.float()),
        "absorbed": {"v1": share(v1.float()), "v2 full": share(full.float()), "v2 fraction": share(fraction)},
        "examples": _examples(test, rows, latents, attribution, v1 | full),
    }

    used = torch.from_numpy(np.unique(seen.indices)).long()
    in_use = dictionary.decoder[used]
    amounts = torch.from_numpy(seen[:, used.numpy()].toarray()).float()
    here_on = latents[:, used]
    result |= {"rows_in_use": len(used), "flags": {}}
    progress("meta-dictionaries")
    with torch.enable_grad():
        made = metas(in_use)
    for name, meta in made.items():
        progress(f"flag: {name}")
        codes = meta.codes(in_use, used)
        table = enrichment(amounts @ codes, [{"letter": ascii_uppercase[k]} for k in train.letters.tolist()])
        named = {
            letter: table.filter(table["label"] == f"letter={ascii_uppercase[letter]}")["meta"].to_list()
            for letter in valid
        }
        parts = {letter: (codes[:, each], meta.directions[each]) for letter, each in named.items()}
        result["flags"][name] = {
            "rules": _judge(here_on, gradients, in_use, letter_of, parts, attribution, truths),
            "width": len(meta.directions),
            "variance_explained": meta.variance_explained(in_use),
            "named_letters": sum(bool(each) for each in named.values()),
        }
    supervised = {letter: (in_use @ directions[letter][:, None], directions[letter][None]) for letter in valid}
    rules = _judge(here_on, gradients, in_use, letter_of, supervised, attribution, truths)
    result["flags"]["probe directions"] = {"rules": rules}
    return result


Named = Mapping[int, tuple[Tensor, Tensor]]  # codes [k, m] and directions [m, d] of the m meta-latents of a letter


def _judge(
    latents: Tensor,
    gradients: Tensor,
    rows: Tensor,
    letters: Tensor,
    named: Named,
    attribution: Tensor,
    truths: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Step 5 for each rule: with how many letters have a carrier."""
    found = {}
    on = {letter: carriers(rows, directions) for letter, (_, directions) in named.items()}
    for rule in RULES:
        pooled = Pooled(
            torch.zeros(len(letters)), torch.zeros(len(letters)), torch.zeros(len(letters), dtype=torch.bool)
        )
        for letter, (codes, directions) in named.items():
            here = (letters == letter).nonzero()[:, 0]
            each = pooled_effects(latents[here], gradients[here], codes, directions, on[letter][rule])
            pooled.hidden[here], pooled.carried[here] = each.hidden, each.carried
            pooled.carrier_on[here] = each.carrier_on
        score, flags = pooled.share().numpy(), pooled.flagged(attribution).numpy()
        found[rule] = {
            "flagged": share(flags),
            "letters_with_carrier": sum(bool(each[rule].any()) for each in on.values()),
            "against": {
                name: {"auc": auc(score, truth.numpy()), **precision_recall(flags, truth.numpy())}
                for name, truth in truths.items()
            },
        }
    return found


def _examples(
    test: Spelled, rows: Tensor, latents: Tensor, attribution: Tensor, absorbed: Tensor
) -> list[dict[str, Any]]:
    """The absorbed words whose strongest latent has the largest attribution."""
    best = attribution.max(1)
    order = torch.where(absorbed, best.values, -torch.inf).argsort(descending=True)[: min(8, int(absorbed.sum()))]
    return [
        {
            "word": test.words[int(rows[k])],
            "latent": int(best.indices[k]),
            "activation": float(latents[k, best.indices[k]]),
            "attribution": float(best.values[k]),
        }
        for k in order.tolist()
    ]
