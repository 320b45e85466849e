"""Feature absorption on first letters: does a latent for a letter fall silent where another latent carries its part?

SAEBench's absorption fraction (Karvonen et al. 2025), which extends Chanin et al. 2024 ("A is for Absorption"):
1. Words that are one token stand in lines "{word} has the first letter: X", after ten such lines. x and the latents
   are taken at the word. Training and test words (four to one) never share a prompt.
2. A linear probe for all letters on x. A letter is valid when the probe's F1 on test words is at least .6; with fewer
   than 20 valid letters the model cannot spell well enough, and no figure is given.
3. A letter's main latents: of the largest positive weights of an L1 probe on the latents, the best k. k grows while a
   probe on k + 1 latents has an F1 more than .03 above that on k.
4. For each test word whose letter the probe gets right, with p the letter's unit probe direction, P = x . p, M the main
   latents' a_i (w_i . p) and T the sum of the three largest positive ones of other latents with w_i . p >= .1:
   nothing is absorbed when M >= P or T < .4 P; all is when M <= 0; else t / (t + M) with t = min(T, P - M).
5. The figure is the mean over words, then over valid letters.

An undertrained or random dictionary has no main latents worth the name and looks free of absorption: read the figure
with variance explained.
"""

from __future__ import annotations

import json
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import MaxAbsScaler, StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.subject import SubjectModel

EXAMPLES = 10  # lines before the first word that is looked at
WORDS_IN_PROMPT = 20
WORDS_PER_LETTER = 150  # at most
LEAST_WORDS = 10  # of a letter, for it to be asked at all
TEST_SHARE = 0.2
VALID_F1, VALID_LETTERS = 0.6, 20
SPLIT_F1 = 0.03  # what one more main latent must add
MOST_MAIN = 10
ABSORBERS, ABSORBER_COSINE, ABSORBED_SHARE = 3, 0.1, 0.4


@dataclass
class Absorption:
    """fraction is None, and `reason` says why, where the model cannot spell.

    probe_f1: by letter; main: main latents by valid letter; words: word, letter, fraction of each test word judged.
    """

    fraction: float | None
    reason: str | None
    probe_f1: dict[str, float]
    main: dict[str, list[int]]
    words: pl.DataFrame


def absorption_fractions(latents: Tensor, x: Tensor, decoder: Tensor, probe: Tensor, main: Sequence[int]) -> Tensor:
    """Step 4 for words of one letter: [n] from latents [n, d_sae], x [n, d], unit decoder rows and a probe [d]."""
    direction = normalize(probe, dim=0)
    cosines = decoder @ direction
    projections = latents * cosines
    by_main = projections[:, list(main)].sum(1)
    others = cosines >= ABSORBER_COSINE
    others[list(main)] = False
    by_others = torch.where(others, projections, 0.0).relu().topk(min(ABSORBERS, len(others)), dim=1).values.sum(1)
    wanted = x @ direction
    taken = torch.minimum(by_others, wanted - by_main)
    fraction = torch.where(by_main <= 0, 1.0, taken / (taken + by_main))
    nothing = (wanted <= 0) | (by_main >= wanted) | (by_others < ABSORBED_SHARE * wanted)
    return torch.where(nothing, 0.0, fraction)


def read_words(path: str | Path) -> list[tuple[str, str]]:
    """(word, first letter) from JSON Lines with `word` and perhaps `first`, or from plain text, a word a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise MediationError(f"Cannot read the words in {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise MediationError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not (line := line.strip()):
            continue
        try:
            row = json.loads(line) if line.startswith("{") else {"word": line}
            word = str(row["word"]).strip()
            letter = str(row.get("first", word[:1])).lower()
        except (json.JSONDecodeError, KeyError) as error:
            raise MediationError(f'Line {number} of {path} is neither a word nor {{"word": ...}}; mend it.') from error
        if letter.isalpha() and letter.isascii() and len(letter) == 1:
            found.append((word, letter))
    return found


@torch.no_grad()
def measure_absorption(
    model: SubjectModel,
    dictionary: Dictionary,
    words: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Absorption:
    """Steps 1 to 5 for (word, letter) pairs; words that are not one token of the model are left out."""
    train, test = _split(_single_tokens(model, words), seed)
    letters = sorted({letter for _, _, letter in train})
    if len(letters) < VALID_LETTERS:
        reason = f"the words give {len(letters)} letters with {LEAST_WORDS} one-token words; {VALID_LETTERS} are needed"
        return Absorption(None, reason, {}, {}, pl.DataFrame())
    of = len(train) + len(test)
    seen = _at_words(model, dictionary, train, lambda done: progress(done, of))
    held = _at_words(model, dictionary, test, lambda done: progress(len(train) + done, of))
    answers = np.array([letter for _, _, letter in test])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that has not converged has a lower F1, shown
        scaler = StandardScaler().fit(seen.x)
        asked = [letter for _, _, letter in train]
        probe = LogisticRegression(max_iter=300).fit(scaler.transform(seen.x), asked)
        predicted = probe.predict(scaler.transform(held.x))
        f1 = dict(zip(letters, f1_score(answers, predicted, labels=letters, average=None).tolist(), strict=True))
        valid = [letter for letter in letters if f1[letter] >= VALID_F1]
        if len(valid) < VALID_LETTERS:
            reason = (
                f"the model cannot spell well enough: {len(valid)} first letters can be read at the site with an F1 of "
                f"{VALID_F1}, and {VALID_LETTERS} are needed"
            )
            return Absorption(None, reason, f1, {}, pl.DataFrame())
        main = {letter: main_latents(seen.latents, np.array(asked) == letter) for letter in valid}

    tables = []
    for letter in valid:
        direction = probe.coef_[list(probe.classes_).index(letter)] / scaler.scale_
        at = np.flatnonzero((answers == letter) & (predicted == letter))
        fractions = absorption_fractions(
            torch.from_numpy(held.latents[at].toarray()), torch.from_numpy(held.x[at]), dictionary.decoder.cpu(),
            torch.from_numpy(direction).float(), main[letter],
        )  # fmt: skip
        names = [test[i][0] for i in at]
        tables.append(pl.DataFrame({"word": names, "letter": letter, "fraction": fractions.double().tolist()}))
    table = pl.concat(tables)
    figure = table.group_by("letter", maintain_order=True).agg(pl.col("fraction").mean())["fraction"].mean()
    return Absorption(float(figure), None, f1, main, table)  # type: ignore[arg-type]


def main_latents(latents: sparse.csr_matrix, is_letter: np.ndarray) -> list[int]:
    """Step 3: the latents that stand for one letter, from activations [n, d_sae] and whether a word has it [n]."""
    scaled = MaxAbsScaler().fit_transform(latents)
    chosen = LogisticRegression(l1_ratio=1, solver="liblinear", class_weight="balanced", random_state=0)
    weights = chosen.fit(scaled, is_letter).coef_[0]
    ranked = [int(i) for i in np.argsort(-weights)[:MOST_MAIN] if weights[i] > 0]
    best, kept = 0.0, 1
    for k in range(1, len(ranked) + 1):
        columns = scaled[:, ranked[:k]]
        refit = LogisticRegression(max_iter=500, class_weight="balanced").fit(columns, is_letter)
        f1 = f1_score(is_letter, refit.predict(columns))
        if k > 1 and f1 <= best + SPLIT_F1:
            break
        best, kept = f1, k
    return ranked[:kept]


@dataclass
class _AtWords:
    """x [n, d] and latents [n, d_sae], sparse, at words."""

    x: np.ndarray
    latents: sparse.csr_matrix


Row = tuple[str, int, str]  # word, its token id, its first letter


def _single_tokens(model: SubjectModel, words: Sequence[tuple[str, str]]) -> list[Row]:
    unknown = model.tokenizer.unk_token_id
    found = []
    for word, letter in dict(words).items():
        ids = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != unknown:
            found.append((word, ids[0], letter))
    return found


def _split(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Training and test words, every letter in both."""
    rng = random.Random(seed)
    letters = defaultdict(list)
    for row in rows:
        letters[row[2]].append(row)
    train, test = [], []
    for _, mine in sorted(letters.items()):
        if len(mine) >= LEAST_WORDS:
            chosen = rng.sample(mine, min(len(mine), WORDS_PER_LETTER))
            cut = round(TEST_SHARE * len(chosen))
            test += chosen[:cut]
            train += chosen[cut:]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _at_words(
    model: SubjectModel, dictionary: Dictionary, rows: list[Row], progress: Callable[[int], None]
) -> _AtWords:
    x, latents, done = [], [], 0
    for tokens, places in _prompts(model, rows):
        values = model.forward(torch.tensor([tokens], device=model.device), read=[dictionary.reads], logits=False)
        here = values.sites[dictionary.reads][0, places]
        x.append(here.cpu().numpy())
        latents.append(sparse.csr_matrix(dictionary.encode(here.to(dictionary.decoder)).cpu().numpy()))
        progress(done := done + len(places))
    return _AtWords(np.concatenate(x), sparse.vstack(latents, format="csr"))


def _prompts(model: SubjectModel, rows: list[Row]) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each prompt, and the positions of the words it was made for, in the order of `rows`."""
    ends = {
        letter: model.tokenizer(f" has the first letter: {letter.upper()}\n", add_special_tokens=False)["input_ids"]
        for letter in {row[2] for row in rows}
    }
    start = [model.bos_id] if model.prepend_bos and model.bos_id is not None else []
    for first in range(0, len(rows), WORDS_IN_PROMPT):
        asked = rows[first : first + WORDS_IN_PROMPT]
        before = [rows[(first - k) % len(rows)] for k in range(EXAMPLES, 0, -1)]
        tokens, places = list(start), []
        for _, token, letter in before + asked:
            places.append(len(tokens))
            tokens += [token, *ends[letter]]
        yield tokens, places[EXAMPLES:]
