"""Ways to take a dictionary's rows apart, learned from development entities alone.

| way | what it is |
|---|---|
| latents | every latent a part: what a latent-level graph shows |
| meta-SAE | the meta-dictionary given with the dictionary |
| meta-SAE by use | rows drawn as often as their latents are on at development entities |
| meta-SAE with differences | rows, and differences of development entities at the entity's token as rows |
| meta-SAE as read | rows measured in what questions read (mediation.readings, step 2), with more codes a row |
| factored | mediation.factored, on rows of latents that are on at development entities |
| readings | mediation.readings |
| own-row pursuit, nearest row | each row as 4 other rows, or 1 |
| means | differences of means: attribute=value against the other development entities; needs labels of facts |
| rotated meta-SAE | a meta-SAE of rows that were turned to random directions |
| rotated readings | a random rotation of the reading space, in place of the joint diagonaliser |
| coordinates | the residual's own axes |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.factored import train_factored
from mediation.metalatents import Decomposition, MatchingPursuit, MetaDictionary, rotated
from mediation.readings import Readings, reading_space, rotated_readings
from mediation.realfacts.questions import DevelopmentEntities

LEAST_ENTITIES = 3  # with a value, for a difference of means
ROW_PARTS = 4  # of the matching pursuit
READ_CODES = 8  # per row, of the meta-SAE as read


@dataclass
class Development:
    """What may be learned from: the dictionary, development entities, their residuals x [n, d] at the entity's token,
    and gradients there by question (see `bench`).
    """

    dictionary: Dictionary
    entities: DevelopmentEntities
    x: Tensor
    gradients: Mapping[str, Tensor]


class Linear(Decomposition):
    """Codes linear in the row: directions [m, d] of unit norm and their readers [m, d]; bias 0."""

    def __init__(self, directions: Tensor) -> None:
        self.directions = normalize(directions, dim=1)
        self.readers = torch.linalg.pinv(self.directions.T.double()).to(directions)
        self.bias = torch.zeros_like(directions[0])

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        return rows.to(self.readers) @ self.readers.T


class AsRead(Decomposition):
    """A meta-SAE in the reading space W [d, k] (W^T M W = 1), written in the model's own.

    A row w is read as M^(1/2) w there, which is Q w with Q = pinv(W); a direction u of the meta-SAE writes W u.
    """

    def __init__(self, meta: MetaDictionary, whiten: Tensor) -> None:
        self.meta, self.into = meta, torch.linalg.pinv(whiten.double()).float()
        written = meta.directions @ whiten.T
        self.size = written.norm(dim=1)
        self.directions = written / self.size[:, None]
        self.bias = meta.bias @ whiten.T

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        read = rows.to(self.into) @ self.into.T
        # The meta-SAE knows unit rows; its bias is 0, so that codes scale with the row.
        norms = read.norm(dim=1, keepdim=True)
        return self.meta.codes(read / norms.clamp_min(1e-12)) * norms * self.size


def ways(
    learn: Development,
    meta: MetaDictionary | None,
    width: int,
    seed: int,
    only: Sequence[str] | None,
    progress: Callable[[str], None],
) -> dict[str, Decomposition | None]:
    """All ways, or `only` these (the latents always); None stands for the latents themselves. `width` is that of the
    readings.
    """
    rows = learn.dictionary.decoder
    f = learn.dictionary.encode(learn.x)
    on = (f != 0).sum(0).float()
    meta_width = meta.d_meta if meta is not None else max(8, len(rows) // 16)
    generator = torch.Generator().manual_seed(seed)

    def sparse(data: Tensor, k: int = 4) -> MetaDictionary:
        return MetaDictionary.train(data, width=meta_width, k=k, steps=1000, restarts=1, seed=seed)

    def by_use() -> Decomposition:
        return sparse(rows[torch.multinomial(on, len(rows), True, generator=generator)])

    def with_differences() -> Decomposition:
        first = torch.randperm(len(learn.x), generator=generator)
        steps = torch.cat([learn.x[first] - learn.x[first.roll(k)] for k in range(1, min(9, len(first)))])
        return sparse(torch.cat([rows, steps]))

    def as_read() -> Decomposition:
        _, whiten = reading_space(learn.gradients, width)
        return AsRead(sparse(rows @ torch.linalg.pinv(whiten).T, READ_CODES), whiten)

    makers: dict[str, Callable[[], Decomposition | None]] = {
        "latents": lambda: None,
        "meta-SAE": lambda: meta if meta is not None else sparse(rows),
        "meta-SAE by use": by_use,
        "meta-SAE with differences": with_differences,
        "meta-SAE as read": as_read,
        "factored": lambda: train_factored(rows[on > 0], seed=seed),
        "readings": lambda: Readings.learn(learn.gradients, width=width, seed=seed),
        "own-row pursuit": lambda: MatchingPursuit(rows, ROW_PARTS),
        "nearest row": lambda: MatchingPursuit(rows, 1),
        "means": lambda: Linear(mean_differences(learn.entities, learn.x)),
        "rotated meta-SAE": lambda: sparse(rotated(rows, seed)),
        "rotated readings": lambda: rotated_readings(learn.gradients, width, generator),
        "coordinates": lambda: Linear(torch.eye(rows.shape[1])),
    }
    if unknown := set(only or ()) - makers.keys():
        raise MediationError(f"There is no way called {sorted(unknown)[0]!r}; give some of {', '.join(makers)}.")
    found: dict[str, Decomposition | None] = {}
    for name, make in makers.items():
        if only is not None and name not in {"latents", *only}:
            continue
        progress(name)
        try:
            found[name] = make()
        except MediationError:  # such as rows that share no fact
            continue
    return found


def mean_differences(entities: DevelopmentEntities, x: Tensor) -> Tensor:
    """Mean of x [n, d] over entities with a value less that over the others, for values of LEAST_ENTITIES at least."""
    found = []
    for values in entities.values.values():
        for value in sorted({v for v in values if v is not None}):
            own = torch.tensor([v == value for v in values])
            if LEAST_ENTITIES <= int(own.sum()) < len(own):
                found.append(x[own].mean(0) - x[~own].mean(0))
    if not found:
        raise MediationError("No value is shared by enough entities for a difference of means.")
    return torch.stack(found)
