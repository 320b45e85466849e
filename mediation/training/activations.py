"""Activations to train dictionaries on: several sites from one forward pass, attention sinks left out.

1. Cut texts into windows of equal length, so that nothing is padded.
2. Run the model up to the last site wanted, not further, and keep every position but the first: the first
   token of a sequence is an attention sink whose norm is many times that of all others. Later sinks, at any of
   the sites, go too, and every BOS that stands for the beginning of a text.
3. Hand out shuffled batches, epoch after epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from mediation.dictionaries import attention_sinks
from mediation.errors import MediationError
from mediation.sites import Site
from mediation.subject import SubjectModel


@dataclass
class Activations:
    """`tokens` [n] and, for each site, `x` [n, d_model] in the dtype the model ran in."""

    tokens: Tensor
    x: dict[Site, Tensor]

    def __len__(self) -> int:
        return len(self.tokens)


def windows(texts: Iterable[str], model: SubjectModel, length: int) -> Iterator[list[int]]:
    """Windows of `length` tokens; each text is cut on its own, and texts shorter than a window are joined."""
    held: list[int] = []
    for text in texts:
        held += model.encode(text)
        while len(held) >= length:
            yield held[:length]
            held = held[length:]


def token_windows(texts: Iterable[str], model: SubjectModel, length: int, n_tokens: int) -> Tensor:
    """Windows [n, length] as int32 with `n_tokens` positions that are no first token, fewer when the text ends.

    Raises:
        MediationError: Not one window of text.
    """
    wanted = -(-n_tokens // (length - 1))
    found = [torch.tensor(window, dtype=torch.int32) for window in islice(windows(texts, model, length), wanted)]
    if not found:
        raise MediationError("There is no text to take activations from; give longer or more files.")
    return torch.stack(found)


def collect_activations(
    model: SubjectModel,
    sequences: Iterable[Sequence[int]],
    sites: Sequence[Site],
    *,
    n_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Activations:
    """Activations at `n_tokens` positions of sequences of one length (fewer when the sequences run out).

    Memory is n_tokens * d_model * len(sites) numbers of the model's dtype.
    """
    dtype = next(model.module.parameters()).dtype
    kept = {site: torch.empty(n_tokens, model.d_model, dtype=dtype) for site in sites}
    tokens = torch.empty(n_tokens, dtype=torch.long)
    done, source = 0, iter(sequences)
    while done < n_tokens and (rows := list(islice(source, batch_size))):
        batch = torch.tensor(rows)
        values = model.forward(batch.to(model.device), read=sites, logits=False).sites
        plain = torch.ones_like(batch, dtype=torch.bool)
        for site in sites:
            plain &= ~attention_sinks(values[site], torch.ones_like(plain).to(model.device)).cpu()
        plain[:, 0] = False
        if model.prepend_bos:  # texts joined in one window each begin with it
            plain &= batch != model.bos_id
        plain &= plain.flatten().cumsum(0).view_as(plain) <= n_tokens - done
        end = done + int(plain.sum())
        tokens[done:end] = batch[plain]
        for site in sites:
            kept[site][done:end] = values[site][plain.to(model.device)].to("cpu", dtype)
        done = end
        progress(done, n_tokens)
    return Activations(tokens[:done], {site: x[:done] for site, x in kept.items()})


def shuffled_batches(x: Tensor, batch_size: int, *, seed: int = 0) -> Iterator[Tensor]:
    """Batches of rows of `x` in fp32, without end; every epoch is another permutation."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            if len(rows) == batch_size or len(x) < batch_size:
                yield x[rows].float()
