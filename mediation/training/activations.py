"""Activations to train dictionaries on: several sites from one forward pass, attention sinks left out.

1. Cut texts into windows of equal length, so that nothing is padded.
2. Run the model up to the last site wanted, not further, and keep every position but the first: the first
   token of a sequence is an attention sink whose norm is many times that of all others.
3. Hand out shuffled batches, epoch after epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from mediation.errors import MediationError
from mediation.sites import Site
from mediation.subject import SubjectModel


@dataclass
class Activations:
    """`tokens` [n] and, for each site, `x` [n, d_model] in the dtype the model ran in."""

    tokens: Tensor
    x: dict[Site, Tensor]


def windows(texts: Iterable[str], model: SubjectModel, length: int) -> Iterator[list[int]]:
    """Windows of `length` tokens; each text is cut on its own, and texts shorter than a window are joined."""
    held: list[int] = []
    for text in texts:
        held += model.encode(text)
        while len(held) >= length:
            yield held[:length]
            held = held[length:]


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
        n = min(n_tokens - done, batch[:, 1:].numel())
        tokens[done : done + n] = batch[:, 1:].flatten()[:n]
        for site in sites:
            kept[site][done : done + n] = values[site][:, 1:].flatten(0, 1)[:n].to(dtype)
        done += n
        progress(done, n_tokens)
    if not done:
        raise MediationError("There is no text to take activations from; give longer or more files.")
    return Activations(tokens[:done], {site: x[:done] for site, x in kept.items()})


def shuffled_batches(x: Tensor, batch_size: int, *, seed: int = 0) -> Iterator[Tensor]:
    """Batches of rows of `x` in fp32, without end; every epoch is another permutation."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            if len(rows) == batch_size or len(x) < batch_size:
                yield x[rows].float()
