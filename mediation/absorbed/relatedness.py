"""Is a latent about a task? By the contexts it fires in most strongly, as a reader of its label would say.

1. Task words: given names and words, in capitals as given. A token is *near* when it belongs to a task word or stands
   `NEAR` tokens or less from one.
2. Text: windows of which half hold a task word that has been met less than `ENOUGH` times so far, so that rare words
   come up as well as common ones, and half hold none.
3. A latent's contexts: its strongest token in each window, and of these the `CONTEXTS` strongest. Its *share* is how
   many of them are near. A latent with fewer than `LEAST` contexts is not judged.
4. p: as many windows at random, in each a random token: how often do at least as many fall near a task word? As in
   `mediation.statistics`, `DRAWS` draws.
5. *Related*: a share of at least `RELATED`, and p <= .05. *Unrelated*: p > .05, so that the share is what tokens at
   random have. Others are neither.

It is a share of the latent's contexts, not of the task's words: a latent for one country is as much about the task as
one for all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mediation.contexts import Reader, blocks, text_windows
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.sites import Site
from mediation.statistics import permutation_p
from mediation.subject import SubjectModel

NEAR, ENOUGH = 3, 8
CONTEXTS, LEAST = 20, 5
RELATED, ALPHA, DRAWS = 0.5, 0.05, 999
WORD = re.compile(r"\w+")


@dataclass
class Text:
    """Windows of token ids [w, T], and which of their tokens are near a task word [w, T]."""

    windows: Tensor
    near: Tensor


@dataclass
class Relation:
    """Step 4 for each latent: its number of contexts, the share of them near a task word (nan without any), p; and the
    tokens at which its contexts peak, strongest first, [CONTEXTS, d_sae] with -1 where there are fewer."""

    contexts: NDArray[np.int64]
    share: NDArray[np.float64]
    p: NDArray[np.float64]
    peaks: Tensor

    def of(self, latents: Tensor) -> Self:
        """That of some latents [k]."""
        rows = latents.numpy()
        return replace(
            self, contexts=self.contexts[rows], share=self.share[rows], p=self.p[rows], peaks=self.peaks[:, latents]
        )

    @property
    def judged(self) -> NDArray[np.bool_]:
        return self.contexts >= LEAST

    @property
    def related(self) -> NDArray[np.bool_]:
        return self.judged & (np.nan_to_num(self.share) >= RELATED) & (self.p <= ALPHA)

    @property
    def unrelated(self) -> NDArray[np.bool_]:
        return self.judged & (self.p > ALPHA)


def find_text(model: SubjectModel, paths: Sequence[Path], words: Collection[str], n_tokens: int) -> Text:
    """Steps 1 and 2: about `n_tokens` tokens of text files, fewer where they run out.

    Raises:
        MediationError: No window holds a task word, or none is without.
    """
    wanted, met = set(words), Counter[str]()
    pieces = _pieces(model)
    with_word: list[list[int]] = []
    without: list[list[int]] = []
    marks: list[Tensor] = []
    for window in text_windows(model, paths, 0):
        half = n_tokens // (2 * len(window))
        if len(with_word) >= half and len(without) >= half:
            break
        found = list(_words(window, pieces, wanted))
        if not found and len(without) < half:
            without.append(window)
        elif len(with_word) < half and any(met[word] < ENOUGH for word, _, _ in found):
            met.update(word for word, _, _ in found)
            with_word.append(window)
            mark = torch.zeros(len(window), dtype=torch.bool)
            for _, first, last in found:
                mark[max(0, first - NEAR) : last + NEAR + 1] = True
            marks.append(mark)
    if not with_word or not without:
        raise MediationError("The text needs windows with names of countries or capitals, and others; give more of it.")
    near = torch.cat([torch.stack(marks), torch.zeros(len(without), len(marks[0]), dtype=torch.bool)])
    return Text(torch.tensor(with_word + without), near)


def _pieces(model: SubjectModel) -> list[str]:
    """What each token adds to a text: some tokenizers drop the space before a word that is decoded alone."""
    (anchor,) = model.encode("a")[-1:]
    before = len(model.tokenizer.decode([anchor]))
    return [model.tokenizer.decode([anchor, token])[before:] for token in range(model.vocab_size)]


def _words(window: Sequence[int], pieces: Sequence[str], wanted: Collection[str]) -> Iterator[tuple[str, int, int]]:
    """Task words in a window, with the first and the last token of each."""
    starts = np.cumsum([0, *(len(pieces[token]) for token in window)])
    text = "".join(pieces[token] for token in window)
    for match in WORD.finditer(text):
        if match[0] in wanted:
            first, last = np.searchsorted(starts, [match.start(), match.end() - 1], side="right") - 1
            yield match[0], int(first), int(last)


def relations(
    model: SubjectModel, dictionaries: Sequence[Dictionary], text: Text, seed: int = 0
) -> dict[Site, Relation]:
    """Steps 3 and 4 for all latents of each dictionary, by its site."""
    peaks = [Peaks(dictionary.d_sae) for dictionary in dictionaries]
    readers = [Reader(dictionary) for dictionary in dictionaries]
    kept: list[list[Tensor]] = [[] for _ in dictionaries]
    for block in blocks(model, text.windows.tolist(), readers, n_tokens=text.windows.numel()):
        peaks[block.reader].add(block.values.cpu())
        kept[block.reader].append(block.kept.cpu())
    return {
        dictionary.site: relation(found, text, torch.cat(counted), seed)
        for dictionary, found, counted in zip(dictionaries, peaks, kept, strict=True)
    }


class Peaks:
    """Step 3: of every latent the windows in which it is strongest, at most one token each.

    value, window, position: [CONTEXTS, width]; value is 0 where there are fewer.
    """

    def __init__(self, width: int) -> None:
        self.value = torch.zeros(CONTEXTS, width)
        self.window, self.position = (torch.zeros(CONTEXTS, width, dtype=torch.long) for _ in range(2))
        self._seen = 0

    def add(self, values: Tensor) -> None:
        """The next windows' values [w, T, width]."""
        here = values.max(dim=1)
        window = torch.arange(self._seen, self._seen + len(values))[:, None].expand_as(here.indices)
        self._seen += len(values)
        self.value, order = torch.cat([self.value, here.values]).topk(CONTEXTS, dim=0)
        self.window = torch.cat([self.window, window]).gather(0, order)
        self.position = torch.cat([self.position, here.indices]).gather(0, order)


def relation(peaks: Peaks, text: Text, kept: Tensor, seed: int = 0) -> Relation:
    """Step 4; kept [w, T]: the tokens that count."""
    held = peaks.value > 0
    n = held.sum(0).numpy()
    hits = (text.near[peaks.window, peaks.position] & held).sum(0).numpy()
    generator = torch.Generator().manual_seed(seed)
    usable = kept.any(1).nonzero()[:, 0]
    tokens = torch.multinomial(kept[usable].float(), DRAWS, replacement=True, generator=generator)  # [w, DRAWS]
    drawn = text.near[usable].gather(1, tokens)
    order = torch.rand(drawn.shape, generator=generator).argsort(0)[:CONTEXTS]
    by_chance = drawn.gather(0, order).long().cumsum(0).numpy()  # [k, DRAWS]: hits of the first 1, 2, ... windows
    rows = np.clip(n, 1, len(by_chance)) - 1
    p = np.where(n > 0, permutation_p(hits, by_chance[rows].T), 1.0)
    share = np.divide(hits, n, out=np.full(len(n), np.nan), where=n > 0)
    tokens_at = torch.where(held, text.windows[peaks.window, peaks.position], -1)
    return Relation(n, share, p, tokens_at)
