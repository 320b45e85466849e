"""Words of one token at one place in a text, with the residual stream at the word open to surgery.

1. The text before the word is run once and its keys and values kept; every word is then one token more, so what is read
   at the word costs one token a word.
2. To measure a change of x, the residual at a site and the word, the model goes on from that site (the blocks before it
   are passed over) through the word and the text after it, with all positions after the word as they were there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mediation.errors import MediationError
from mediation.sites import Site
from mediation.subject import Forward, SubjectModel

CHUNK = 64  # sequences in a forward
WORD, END = 0, -1  # positions: the word's, and the last


@dataclass(frozen=True)
class Context:
    """Text before a word (which begins with a space) and after it; what is asked of the model comes at its end."""

    before: str
    after: str = ""


class InContext:
    """Words, token ids [n], in one context."""

    def __init__(self, model: SubjectModel, context: Context, words: Tensor) -> None:
        before = model.encode(context.before)
        if not before:
            raise MediationError("The text before a word is empty; a word is not read as the first token of a text.")
        after = model.tokenizer(context.after, add_special_tokens=False)["input_ids"] if context.after else []
        self.model = model
        self.tokens = torch.cat([words[:, None], torch.tensor(after, dtype=torch.long).expand(len(words), -1)], dim=1)
        self.tokens = self.tokens.to(model.device)
        self._prefix = model.prefix(torch.tensor([before]))
        self._residual: dict[Site, Tensor] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @torch.no_grad()
    def x(self, sites: Sequence[Site], position: int = WORD) -> dict[Site, Tensor]:
        """The residual at the word, or at the end of the text, [n, d] by site."""
        found: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for tokens in self.tokens.split(CHUNK):
            values = self._forward(tokens[:, :1] if position == WORD else tokens, read=sites, logits=False).sites
            for site in sites:
                found[site].append(values[site][:, position])
        return {site: torch.cat(parts) for site, parts in found.items()}

    @torch.no_grad()
    def asked(self) -> Tensor:
        """Logits at the end of the context, [n, vocab], nothing changed."""
        found = []
        for tokens in self.tokens.split(CHUNK):
            logits = self._forward(tokens, positions=self._last).logits
            assert logits is not None
            found.append(logits[:, 0])
        return torch.cat(found)

    def logits(self, site: Site, rows: Tensor, x: Tensor, tokens: Tensor, position: int = WORD) -> Tensor:
        """Logits of `tokens` [m] at the end for words `rows` [k] with `x` [k, d] at the position: [k, m]."""
        with torch.no_grad():
            return torch.cat([self._run(site, r, v, position)[0][:, tokens] for r, v in _chunks(rows, x)])

    def gradient(
        self, site: Site, rows: Tensor, x: Tensor, weights: Tensor, tokens: Tensor, position: int = WORD
    ) -> Tensor:
        """Gradient [k, d], with respect to `x` [k, d], of the logits of `tokens` [m] times `weights` [k, m]."""
        found = []
        for r, v, w in _chunks(rows, x, weights):
            logits, residual = self._run(site, r, v, position, grad=True)
            (gradient,) = torch.autograd.grad((logits[:, tokens] * w).sum(), [residual])
            found.append(gradient[:, position])
        return torch.cat(found)

    @property
    def _last(self) -> Tensor:
        return torch.tensor([self.tokens.shape[1] - 1])

    def _forward(self, tokens: Tensor, **options: Any) -> Forward:
        n, length = len(tokens), self._prefix.length
        mask = torch.ones(n, length + tokens.shape[1], dtype=torch.long, device=tokens.device)
        before = self._prefix.take(torch.zeros(n, dtype=torch.long), length)
        return self.model.forward(tokens, mask, prefix=before, **options)

    @torch.no_grad()
    def _here(self, site: Site) -> Tensor:
        """The residual at the site, word and what follows it, [n, T, d]."""
        if site not in self._residual:
            parts = [
                self._forward(tokens, read=[site], logits=False).sites[site] for tokens in self.tokens.split(CHUNK)
            ]
            self._residual = {site: torch.cat(parts)}  # one site at a time is worked on
        return self._residual[site]

    def _run(self, site: Site, rows: Tensor, x: Tensor, position: int, *, grad: bool = False) -> tuple[Tensor, Tensor]:
        residual = self._here(site)[rows].clone()
        residual[:, position] = x
        forward = self._forward(
            self.tokens[rows],
            edit={site: lambda _: residual},
            start=site,
            read=[site] if grad else [],
            positions=self._last,
            grad=grad,
        )
        assert forward.logits is not None
        return forward.logits[:, 0], forward.sites[site] if grad else residual


def single_tokens(model: SubjectModel, words: Sequence[str]) -> dict[str, int]:
    """The words that are one token after a space, and that token."""
    unknown = model.tokenizer.unk_token_id
    found = {}
    for word in words:
        ids = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != unknown:
            found[word] = ids[0]
    return found


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors CHUNK rows at a time."""
    yield from zip(*(each.split(CHUNK) for each in tensors), strict=True)
