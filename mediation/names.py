"""Short names for latents that can be wrong: a name spells out tokens, and is scored on text it has not seen.

1. A name says where a token has to stand for the latent to be on: it is the token itself, the token before, one of
   the ten before, or the one after. Words are compared without case and surrounding space.
2. For each of those places, words are taken greedily from the strongest contexts, each adding the most to the share of
   contexts covered, less the share of all tokens on which it would fire by chance. The place is the one whose words,
   taken from every other context, do best on the rest: ten tokens before a peak always share something by chance. Its
   words are then taken from all contexts, and each must cover two that no word before it covers.
3. Contexts that share no word leave what the latent promotes: it is on before the tokens its direction raises most.
4. The score, on held-out text: area under the ROC curve of "one of the words stands there" against "the latent is on".
   With a prediction of yes or no it is (1 + hit rate - false-alarm rate) / 2. A half is chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from mediation.contexts import Block, Context

WORDS = 5  # in a name at most
SHARED = 2  # contexts that a word must cover
FLOOR = 0.15  # of hit rate less false-alarm rate, up to which contexts are said to share nothing
FEW = 5  # held-out activations below which a name has no score


class Place(StrEnum):
    """Where the name's word stands, seen from the token the latent is on; the value is how a name begins."""

    HERE = "on"
    AFTER = "right after"
    NEAR = "soon after"
    BEFORE = "before"
    PROMOTES = "promotes"


OFFSETS = {
    Place.HERE: (0,),
    Place.AFTER: (-1,),
    Place.NEAR: tuple(range(-10, 0)),
    Place.BEFORE: (1,),
    Place.PROMOTES: (1,),
}


@dataclass(frozen=True)
class Name:
    """A prediction in words: the latent is on where one of `words` stands at `place`."""

    place: Place
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place} {' | '.join(self.words)}"


def plain_words(decode: Callable[[list[int]], str], vocabulary: int) -> list[str]:
    """What each token id reads as in names."""
    return [plain(decode([token])) for token in range(vocabulary)]


def plain(text: str) -> str:
    """A token's text in lower case and without space around; white space itself is made visible."""
    return text.strip().lower() or repr(text)[1:-1].replace(" ", "␣")


def find_name(
    contexts: Sequence[Context], words: Sequence[str], frequency: Counter[str], promoted: Sequence[str]
) -> Name | None:
    """Steps 2 and 3 for one latent; None for one that is never on.

    words: by token id; frequency: tokens by word, over all text read; promoted: what the direction raises.
    """
    if not contexts:
        return None
    total = max(frequency.total(), 1)
    best, best_gain = None, FLOOR
    for place in (Place.HERE, Place.AFTER, Place.NEAR, Place.BEFORE):
        offsets = OFFSETS[place]
        sets = [_around(context, offsets, words) for context in contexts]
        chance = {word: 1 - (1 - frequency[word] / total) ** len(offsets) for word in set().union(*sets)}
        gain = (_gain(sets[::2], sets[1::2], chance) + _gain(sets[1::2], sets[::2], chance)) / 2
        if gain > best_gain and (chosen := _greedy(sets, chance, SHARED)):
            best, best_gain = Name(place, chosen), gain
    if best is None and promoted:
        kept = dict.fromkeys(plain(token) for token in promoted)
        best = Name(Place.PROMOTES, tuple(kept)[:WORDS])
    return best


def _around(context: Context, offsets: Sequence[int], words: Sequence[str]) -> set[str]:
    places = (context.position + offset for offset in offsets)
    return {words[context.tokens[place]] for place in places if 0 <= place < len(context.tokens)}


def _gain(seen: Sequence[set[str]], held: Sequence[set[str]], chance: dict[str, float]) -> float:
    """Hit rate less false-alarm rate on held contexts of the words that others give."""
    chosen = _greedy(seen, chance, 1)
    hits = sum(not found.isdisjoint(chosen) for found in held)
    return hits / max(len(held), 1) - sum(chance[word] for word in chosen)


def _greedy(sets: Sequence[set[str]], chance: dict[str, float], least: int) -> tuple[str, ...]:
    """Words that cover the sets, each `least` that no word before it covers."""
    chosen: list[str] = []
    left = list(sets)
    while len(chosen) < WORDS:
        counts = Counter(word for found in left for word in found)
        shared = {word: count / len(sets) - chance[word] for word, count in counts.items() if count >= least}
        word = max(shared, key=lambda each: (shared[each], each), default=None)
        if word is None or shared[word] <= 0:
            break
        chosen.append(word)
        left = [found for found in left if word not in found]
    return tuple(chosen)


class Trial:
    """Step 4 for all latents of a reader: counts predictions and activations block by block."""

    def __init__(self, names: Sequence[Name | None], words: Sequence[str]) -> None:
        """names: one for each latent; words: by token id."""
        wanted = sorted({(OFFSETS[name.place], word) for name in names if name for word in name.words})
        column = {feature: number for number, feature in enumerate(wanted)}
        self._none = len(wanted)  # the column of what no name asks for; never present
        self._members = torch.full((len(names), WORDS), self._none)
        for index, name in enumerate(names):
            for slot, word in enumerate(name.words if name else ()):
                self._members[index, slot] = column[OFFSETS[name.place], word]  # type: ignore[union-attr]
        self._columns = {
            offsets: torch.tensor([column.get((offsets, word), self._none) for word in words])
            for offsets in sorted({offsets for offsets, _ in wanted})
        }
        self.named = torch.tensor([name is not None for name in names])
        self.seen = 0
        self.on, self.fires, self.hits = (torch.zeros(len(names), dtype=torch.long) for _ in range(3))

    def add(self, block: Block) -> None:
        """Count a block's windows in."""
        kept = block.kept.cpu()
        fires = self._predict(block.tokens.cpu())[kept]
        on = block.values.cpu()[kept] > 0
        self.seen += len(on)
        self.on += on.sum(0)
        self.fires += fires.sum(0)
        self.hits += (on & fires).sum(0)

    def _predict(self, tokens: Tensor) -> Tensor:
        """Whether each name predicts its latent on, [w, T, width]."""
        present = torch.zeros(*tokens.shape, self._none + 1, dtype=torch.bool)
        for offsets, columns in self._columns.items():
            ids = columns[tokens]
            for offset in offsets:
                start, stop = max(0, -offset), tokens.shape[1] - max(0, offset)
                there = ids[:, start + offset : stop + offset, None]
                present[:, start:stop].scatter_(2, there, torch.ones_like(there, dtype=torch.bool))
        present[..., self._none] = False
        fires = present[..., self._members[:, 0]]
        for slot in range(1, WORDS):
            fires |= present[..., self._members[:, slot]]
        return fires

    def scores(self) -> Tensor:
        """Areas under the ROC curve [width]; NaN without a name, or with too few held-out activations."""
        off = self.seen - self.on
        auc = (1 + self.hits / self.on - (self.fires - self.hits) / off) / 2
        known = self.named & (self.on >= FEW) & (off > 0)
        return torch.where(known, auc, torch.nan)
