"""Nodes of one batch at one site: what the dictionary says of the clean and of the baseline residual.

Algorithm
1. Encode the clean value x and the baseline value x' of the site, a few rows at a time.
2. Gather only what is active in either: node (row, position, latent) with values f and f'.
3. Everything the active latents do not explain of x - x' is the error node's difference
   (eps - eps', plus the change of a run-time normalisation's constant, plus, under the mean
   baseline, the mean of latents that are off), so that
   sum_i (f_i - f'_i) w_i + error = x - x' holds by construction at every position.

Positions where clean and corrupt cannot differ (before their first differing token; the first
token, an attention sink, under the other baselines; padding) are held: they carry no node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mediation.dictionaries import Dictionary
from mediation.heads import Heads
from mediation.prompts import Baseline, Batch
from mediation.sites import Site
from mediation.subject import SubjectModel

ENCODE_TOKENS = 512  # tokens encoded at a time: the only dense [tokens, d_sae] block ever held
SHORTEST_PREFIX = 8  # fewer positions than that are computed again rather than kept


@dataclass
class SiteState:
    """One site of one batch. Shapes: B rows, T positions, d = d_model, n active nodes.

    `x`, `baseline_x` and `read` are [B, T, d], the last what the latents were read off: `x` itself but for a
    transcoder; `row`, `position`, `latent`, `clean`, `baseline` are [n]; `error` is [B, T, d], the error
    node's difference; `free` is [B, T], True where nodes may be. `directions` [B * T * heads, d] is for attention
    heads alone, which write along another direction at every place (mediation.heads).
    """

    dictionary: Dictionary
    x: Tensor
    read: Tensor
    baseline_x: Tensor
    row: Tensor
    position: Tensor
    latent: Tensor
    clean: Tensor
    baseline: Tensor
    error: Tensor
    free: Tensor
    directions: Tensor | None = None

    @property
    def decoder(self) -> Tensor:
        """What nodes write along: the dictionary's decoder rows, or `directions`; `index` says which is whose."""
        return self.dictionary.decoder if self.directions is None else self.directions

    @property
    def index(self) -> Tensor:
        """Each node's row of `decoder`, long [n]."""
        if self.directions is None:
            return self.latent
        return (self.row * self.x.shape[1] + self.position) * self.dictionary.d_sae + self.latent

    def readers(self, nodes: Tensor) -> Tensor:
        """What nodes (long [k]) are read along when they are targets, [k, width]."""
        if self.directions is not None:
            return self.directions[self.index[nodes]]
        return self.dictionary.rows(self.read[self.row[nodes], self.position[nodes]], self.latent[nodes])

    @property
    def delta(self) -> Tensor:
        """f - f' of every node, [n]."""
        return self.clean - self.baseline

    def subset(self, nodes: Tensor, errors: Tensor) -> SiteState:
        """The same state with only some nodes: `nodes` indexes them, `errors` [B, T] marks error nodes."""
        chosen = {name: getattr(self, name)[nodes] for name in ("row", "position", "latent", "clean", "baseline")}
        return replace(self, free=self.free & errors, **chosen)


At = tuple[Tensor, Tensor]  # rows and positions, long [n] each


@dataclass
class MeanState:
    """Mean over a prompt set of a site's value [d] and of its latents [d_sae]."""

    x: Tensor
    latents: Tensor

    def at(self, _: At) -> MeanState:
        """The same at every place."""
        return self


def free_positions(batch: Batch, baseline: Baseline) -> Tensor:
    """[B, T]: positions whose residual may differ between the clean and the baseline run."""
    real = batch.mask.bool()
    if baseline is Baseline.CORRUPT:
        assert batch.corrupt is not None  # tokenize() has refused prompts without one
        differs = (batch.clean != batch.corrupt) & real
        return (differs.cumsum(dim=1) > 0) & real
    free = real.clone()
    free[:, 0] = False
    return free


def first_free(batch: Batch, free: Tensor) -> Tensor:
    """Long [B]: positions before it are the same in clean and baseline run and need not be run again (`Prefix`).

    free [B, T] as `free_positions` has it. 0 where the saving would not pay, and never beyond a position whose logits
    the behaviour needs.
    """
    begins = free.int().argmax(dim=1)
    scored = torch.where(batch.target_signs != 0, batch.target_positions, begins[:, None])
    begins = torch.minimum(begins, scored.min(dim=1).values)
    return torch.where(begins >= SHORTEST_PREFIX, begins, 0)


def mean_state(model: SubjectModel, batches: list[Batch], dictionary: Dictionary) -> MeanState:
    """The mean baseline: over all real tokens but the first of every clean prompt."""
    site, reads = dictionary.site, dictionary.reads
    total_x = torch.zeros(dictionary.decoder.shape[1], dtype=torch.float64, device=model.device)
    total_f = torch.zeros(dictionary.d_sae, dtype=torch.float64, device=model.device)
    count = 0
    for batch in batches:
        values = model.forward(batch.clean, batch.mask, read=[site, reads], logits=False).sites
        free = free_positions(batch, Baseline.MEAN)
        chosen = values[site][free]
        for part in values[reads][free].split(ENCODE_TOKENS):
            total_f += dictionary.encode(part).sum(dim=0, dtype=torch.float64)
        total_x += chosen.sum(dim=0, dtype=torch.float64)
        count += len(chosen)
    return MeanState((total_x / count).float(), (total_f / count).float())


@dataclass
class SiteValue:
    """What a dictionary writes to and reads off on a batch, [B, T, d] each; the same but for a transcoder."""

    x: Tensor
    read: Tensor

    @classmethod
    def of(cls, dictionary: Dictionary, sites: dict[Site, Tensor]) -> SiteValue:
        return cls(sites[dictionary.site], sites[dictionary.reads])

    def at(self, where: At) -> SiteValue:
        """The value at n places, [n, d]."""
        return SiteValue(self.x[where], self.read[where])


Reference = SiteValue | MeanState | None
"""What gives a latent its baseline: the corrupt prompts, the set's mean, or (None) zero."""


@dataclass
class Changes:
    """A dictionary's latents at n places, all [n, d_sae]: value, baseline, which are nodes, and for these value
    minus baseline (elsewhere 0). baseline_x [n, d]: the site with all its parts at their baseline.
    """

    latents: Tensor
    baseline: Tensor
    active: Tensor
    delta: Tensor
    baseline_x: Tensor


def changes(dictionary: Dictionary, value: SiteValue, other: Reference) -> Changes:
    """Latents at n places; `value` and `other` hold their values there, [n, d]. Dense: see ENCODE_TOKENS."""
    latents, constant = dictionary.explain(value.read)
    active = latents != 0
    if isinstance(other, SiteValue):
        f0, x0 = dictionary.encode(other.read), other.x
        active = active | (f0 != 0)
    elif other is None:
        f0, x0 = torch.zeros((), device=latents.device).expand_as(latents), constant
    else:
        f0, x0 = other.latents.expand_as(latents), other.x.expand_as(value.x)
    return Changes(latents, f0, active, torch.where(active, latents - f0, 0.0), x0)


def site_state(
    value: SiteValue, other: Reference, batch: Batch, dictionary: Dictionary, baseline: Baseline
) -> SiteState:
    """Gather the nodes of one site.

    `value` is the clean one; `other` the one on the corrupt prompts, the set's mean, or None for the zero
    baseline.
    """
    x = value.x
    free = free_positions(batch, baseline)
    if isinstance(dictionary, Heads):
        return _head_state(x, other, free, dictionary)
    where = free.nonzero()
    baseline_x = x.clone()
    pieces: list[tuple[Tensor, ...]] = []
    explained = torch.zeros_like(x)
    for part in where.split(ENCODE_TOKENS):
        at = (part[:, 0], part[:, 1])
        here = changes(dictionary, value.at(at), other.at(at) if other is not None else None)
        baseline_x[at] = here.baseline_x
        explained[at] = dictionary.decode(here.delta)
        token, latent = here.active.nonzero(as_tuple=True)
        both = (here.latents[token, latent], here.baseline[token, latent])
        pieces.append((part[token, 0], part[token, 1], latent, *both))
    if pieces:
        row, position, latent, clean, off = (torch.cat(group) for group in zip(*pieces, strict=True))
    else:
        row = position = latent = torch.zeros(0, dtype=torch.long, device=x.device)
        clean = off = torch.zeros(0, device=x.device)
    error = x - baseline_x - explained
    return SiteState(dictionary, x, value.read, baseline_x, row, position, latent, clean, off, error, free)


def _head_state(x: Tensor, other: Reference, free: Tensor, heads: Heads) -> SiteState:
    base = other.x if other is not None else torch.zeros_like(x)
    baseline_x = torch.where(free.unsqueeze(-1), base, x)
    directions = heads.directions((x - baseline_x).flatten(0, 1))
    row, position, latent = directions.any(-1).view(*x.shape[:2], -1).nonzero(as_tuple=True)
    along = directions[(row * x.shape[1] + position) * heads.d_sae + latent]
    clean, off = ((value[row, position] * along).sum(-1) for value in (x, baseline_x))
    error = torch.zeros_like(x)
    return SiteState(heads, x, x, baseline_x, row, position, latent, clean, off, error, free, directions)


def site_values(
    model: SubjectModel,
    batch: Batch,
    dictionaries: list[Dictionary],
    baseline: Baseline,
    means: dict[str, MeanState] | None = None,
    clean: dict[Site, Tensor] | None = None,
) -> list[tuple[SiteValue, Reference]]:
    """The clean value of every dictionary's site on one batch, and what gives its baseline: one forward, two with
    corrupt prompts.

    `means`, by dictionary name, is needed for the mean baseline only; `clean` are the sites' values on the clean
    prompts where a forward pass has read them already.
    """
    sites = [site for dictionary in dictionaries for site in (dictionary.site, dictionary.reads)]
    if clean is None:
        clean = model.forward(batch.clean, batch.mask, read=sites, logits=False).sites
    corrupt: dict | None = None
    if baseline is Baseline.CORRUPT:
        assert batch.corrupt is not None
        corrupt = model.forward(batch.corrupt, batch.mask, read=sites, logits=False).sites
    found = []
    for dictionary in dictionaries:
        other: Reference = None
        if corrupt is not None:
            other = SiteValue.of(dictionary, corrupt)
        elif means is not None:
            other = means[dictionary.name]
        found.append((SiteValue.of(dictionary, clean), other))
    return found


def site_states(
    model: SubjectModel,
    batch: Batch,
    dictionaries: list[Dictionary],
    baseline: Baseline,
    means: dict[str, MeanState] | None = None,
    clean: dict[Site, Tensor] | None = None,
) -> list[SiteState]:
    """The state of every dictionary's site on one batch; `means` and `clean` as in `site_values`."""
    values = site_values(model, batch, dictionaries, baseline, means, clean)
    return [
        site_state(value, other, batch, dictionary, baseline)
        for dictionary, (value, other) in zip(dictionaries, values, strict=True)
    ]
