"""Factored meta-dictionaries: the facts of decoder rows, also those that half of the rows share.

A row that is a sum of one value for each attribute (profession, party, sex, ...) is sparse in professions and dense
in sexes, and a sparse autoencoder finds the first only. But every value, rare or common, has one thing in common:
some linear function of the row takes two levels only, one on the rows with the value and one on all others, however
the attributes are correlated. A set of rows is called *linear* to the degree R^2 that its indicator is a linear
function of the rows. Values are the smallest sets that are far more linear than chance, and that many starts agree on.

1. Centre and whiten the rows in their signal space: the principal directions above the largest that noise alone
   would give (Marchenko and Pastur 1967).
2. Climb from many directions (rows, and random ones). The set of the t n rows furthest out, t fixed and small; the
   direction that best predicts the set by least squares; repeat. Whoever starts in the far tail ends at one value,
   not at a union of several. Then let the set grow or shrink to all rows nearer to its own mean than to the others'.
   Both steps raise R^2 (the alternation is that of binary matrix factorisation, Slawski, Hein and Lutsik 2013).
3. Keep sets where at least STABLE starts meet (stability selection, Meinshausen and Buehlmann 2010) and whose R^2
   exceeds what the same climb finds in random data; drop unions of others. Remove what is explained, climb again in
   what is left, first with small tails, then with large ones, until nothing new is found.
4. Sets that exclude each other and leave no row out are the values of one attribute; one missing value is what
   the others leave over. Reassign every row to its nearest value. Remove the attributes found, start again at 2.
   Sets that fit no attribute stay as facts of their own, when attributes do not explain them.
5. Fit all attributes at once: every row to the value nearest to what the other attributes leave of it. A value whose
   residuals fall clearly in two is divided, the clearest first, and all are fitted again.
6. Directions: least squares of rows on memberships, of least norm, so that an attribute's values are told from
   their middle; the bias takes the rest. A two-valued attribute becomes two opposite meta-latents, so that codes are
   never negative.
7. Encoder: least squares of memberships on rows in the signal space, and a threshold half-way between the mean
   of members and others. That is an affine map and a threshold: a JumpReLU autoencoder in SAELens' format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from mediation.errors import MediationError
from mediation.metalatents import TRAINED_ON, MetaDictionary, Progress, checked_rows

STARTS = 256  # of each kind: rows, random directions, directions of much variance
TAILS = ((1 / 32, 1 / 16, 1 / 8), (1 / 4, 1 / 2))  # t, small ones until they find nothing more
STABLE = 5  # starts that must meet at a set
LEAST_MEMBERS = 4
LEAST_EXCESS = 0.15  # R^2 above chance, of what is left to 1
CLEAR_EXCESS = 0.35  # of an attribute's values on average, of a value left over, and of a fact of its own
RELATIVE_EXCESS = 0.5  # and relative to the clearest set of the round
SAME = 0.7  # intersection over union from which two sets are one
INSIDE = 0.85  # share of a set in another from which it counts as its subset
OVERLAP = 0.12  # share of a value's rows that may also have another value of the attribute
BIMODAL = 0.8  # share of variance between halves from which a value is two; .64 of a normal distribution's
APART = 1 / 8
ABOVE_EDGE = 1.5  # and how far beyond noise that variance must be
LEAST_SPREAD = 1e-2  # of the residual in a direction, relative to its mean: a bound on its weight
UNEXPLAINED = 0.5  # least part of a set's variance that attributes must leave, for a fact of its own
CLIMB, POLISH, ROUNDS, PASSES = 20, 12, 6, 3
MAX_ROWS = 4096  # rows the facts are searched on


@dataclass
class Values:
    """Memberships [n, m] of rows in sets, and for each set its attribute, -1 for a fact of its own."""

    members: Tensor
    attribute: Tensor


def train_factored(
    rows: Tensor, *, seed: int = 0, base_hash: str | None = None, progress: Progress = lambda done, of: None
) -> MetaDictionary:
    """A meta-dictionary of the facts in rows [n, d], of MAX_ROWS of them at most; how many follows from the rows.

    Its metadata names each meta-latent's attribute (`attribute`, -1 for none). Warns below 200 rows; MediationError
    when the rows share no fact. progress: called with (pass, most passes).
    """
    rows = checked_rows(rows).cpu()
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:MAX_ROWS].sort().values
    rows = rows[chosen]
    if len(rows) < 4 * LEAST_MEMBERS:
        raise MediationError(f"{len(rows)} decoder rows are too few to share facts; use MatchingPursuit.")
    values = find_values(rows, seed=seed, progress=progress)
    if not values.members.shape[1]:
        raise MediationError("These rows share no fact that a linear readout could tell; use a sparse meta-SAE.")
    return MetaDictionary(_to_sae(rows, values, base_hash))


def find_values(rows: Tensor, *, seed: int = 0, progress: Progress = lambda done, of: None) -> Values:
    """Steps 1 to 5, on unit rows [n, d]."""
    search = _Search(rows, seed)
    attributes: list[Tensor] = []
    known = sets = torch.zeros(len(rows), 0, dtype=torch.bool)
    for number in range(PASSES):
        progress(number, PASSES)
        sets = search.sets(known)
        new = search.attributes(sets, known)
        if not new:
            break
        attributes = search.refined(attributes + new)
        known = torch.cat(attributes, dim=1)
    if attributes:
        attributes = search.divided(attributes)
        known = torch.cat(attributes, dim=1)
    sets = sets[:, search.excess(sets) > CLEAR_EXCESS]
    if known.shape[1]:
        sets = sets[:, explained(sets, known) < 1 - UNEXPLAINED]
    index = [torch.full((part.shape[1],), number) for number, part in enumerate(attributes)]
    index.append(torch.full((sets.shape[1],), -1))
    return Values(torch.cat([known, sets], dim=1), torch.cat(index))


def explained(sets: Tensor, by: Tensor) -> Tensor:
    """Share of the variance of indicators [n, m] that other indicators [n, k] explain linearly, [m]."""
    target, basis = _centred(sets), _centred(by)
    u, s, _ = torch.linalg.svd(basis, full_matrices=False)
    u = u[:, s > 1e-3 * s.max()]
    return (u.T @ target).square().sum(0) / target.square().sum(0).clamp_min(1e-9)


def signal_space(rows: Tensor) -> Tensor:
    """Step 1: the map [d, D] that whitens centred rows [n, d] in their D signal directions."""
    n, d = rows.shape
    centred = (rows - rows.mean(0)).double()
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    power = s.square() / n
    left = power.flip(0).cumsum(0).flip(0)  # power from each direction on
    rest = d - torch.arange(len(s))
    edge = left / rest * (1 + (rest / n).sqrt()).square()
    noise = (power < edge) | (power < 1e-9 * power[0])
    rank = int(noise.nonzero()[0, 0]) if noise.any() else len(s)
    return (v[:rank].T / s[:rank] * n**0.5).to(rows)


class _Search:
    """Steps 2 to 5 on rows in signal space, x [n, D], or q [n, D] whitened. A set is a column of zeros and ones."""

    def __init__(self, rows: Tensor, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        whiten = signal_space(rows)
        self.q = (rows - rows.mean(0)) @ whiten
        self.n = len(rows)
        self.power = whiten.square().sum(0).reciprocal()  # variance of the rows along each direction
        self.x = self.q * self.power.sqrt()  # as long as they are, in which noise is alike in all directions
        self.chance = self._chance()

    def sets(self, known: Tensor) -> Tensor:
        """Steps 2 and 3: stable linear sets [n, m] beside the known ones."""
        found = known
        for tails in TAILS:
            for _ in range(ROUNDS):
                basis = self._unexplained(found)
                if not basis.shape[1]:
                    return found[:, known.shape[1] :]
                before = found
                found = self._merge(found, self._stable(basis, tails), keep=known.shape[1])
                if torch.equal(found, before):
                    break
        return found[:, known.shape[1] :]

    def attributes(self, sets: Tensor, known: Tensor) -> list[Tensor]:
        """Step 4: the attributes [n, values] that the sets make up, finest first."""
        taken: set[int] = set()
        found: list[Tensor] = []
        for parts in partitions(sets):
            if taken & set(parts):
                continue
            members = sets[:, parts]
            left = ~members.any(1)
            if left.float().mean() > OVERLAP / 4 and self.excess(left[:, None]) > CLEAR_EXCESS:
                members = torch.cat([members, left[:, None]], dim=1)
            if members.shape[1] < 2:
                continue
            members = self._reassign(members)
            before = torch.cat([known, *found], dim=1)
            new = not before.shape[1] or explained(members, before).median() < UNEXPLAINED
            if new and self.excess(members).mean() > CLEAR_EXCESS:
                taken |= set(parts)
                found.append(members)
        return found

    def refined(self, attributes: list[Tensor]) -> list[Tensor]:
        """Step 5: every row to the value nearest to what the other attributes leave of it, until nothing moves."""
        attributes = list(attributes)
        for _ in range(POLISH):
            before = list(attributes)
            means, residual = self._fit(attributes)
            # Attributes that are not found yet are in the residual too: distances are relative to its spread.
            spread, axes = torch.linalg.eigh(residual.T @ residual / self.n)
            level = axes * spread.clamp_min(LEAST_SPREAD * spread.mean()).rsqrt()
            residual = residual @ level
            for number, mean in enumerate(means):
                mean = mean @ level
                target = residual + attributes[number].float() @ mean
                members = one_hot(torch.cdist(target, mean).argmin(1), len(mean)).bool()
                if members.sum(0).min() >= LEAST_MEMBERS:
                    attributes[number] = members
                    residual = target - members.float() @ mean
            if all(map(torch.equal, attributes, before)):
                return attributes
        return attributes

    def divided(self, attributes: list[Tensor]) -> list[Tensor]:
        """Step 5: attributes whose merged values are told apart, the clearest first, and refined again after each."""
        while True:
            means, residual = self._fit(attributes)
            halves = [
                (*_half(residual, members[:, value], float(torch.pdist(mean).square().mean())), number, value)
                for number, (members, mean) in enumerate(zip(attributes, means, strict=True))
                for value in range(members.shape[1])
            ]
            clear, half, number, value = max(halves, key=lambda found: found[0], default=(0.0, torch.empty(0), 0, 0))
            if clear < BIMODAL:
                return attributes
            members = torch.cat([attributes[number], half[:, None]], dim=1)
            members[half, value] = False
            attributes = self.refined([*attributes[:number], members, *attributes[number + 1 :]])

    def _fit(self, attributes: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Least squares of rows on memberships: each attribute's means [values, D], and the residual [n, D]."""
        if not attributes:
            return [], self.x
        inside = _centred(torch.cat(attributes, dim=1))
        means = torch.linalg.pinv(inside, rtol=1e-3) @ self.x
        return list(means.split([members.shape[1] for members in attributes])), self.x - inside @ means

    def excess(self, sets: Tensor) -> Tensor:
        """R^2 above chance, as a share of what chance leaves to 1, [m]."""
        share = sets.float().mean(0)
        place = torch.searchsorted(self.chance[0], share).clamp(1, len(self.chance[0]) - 1)
        (low, high), (below, above) = ((table[place - 1], table[place]) for table in self.chance)
        chance = below + (above - below) * ((share - low) / (high - low)).clamp(0, 1)
        return (_linearity(self.q, sets) - chance) / (1 - chance)

    def _chance(self) -> tuple[Tensor, Tensor]:
        """Shares of rows in ascending order, and the largest R^2 that climbs find for them in random data."""
        q = torch.linalg.qr(torch.randn(self.q.shape, generator=self.generator)).Q * self.n**0.5
        shares, best = [0.0], [0.0]
        for tail in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2):
            sets = _climb(q, torch.randn(q.shape[1], STARTS // 2, generator=self.generator), tail)
            shares.append(float(sets[:, 0].float().mean()))
            best.append(float(_linearity(q, sets).max()))
        return torch.tensor(shares), torch.tensor(best)

    def _starts(self, basis: Tensor) -> Tensor:
        """Rows, random directions, and directions in which rows vary most, [D', 3 STARTS]."""
        rows = torch.randperm(self.n, generator=self.generator)[:STARTS]
        random = torch.randn(2, len(basis), STARTS, generator=self.generator)
        return basis.T @ torch.cat([self.q[rows].T, random[0], self.power[:, None] * random[1]], dim=1)

    def _stable(self, basis: Tensor, tails: tuple[float, ...]) -> Tensor:
        """Sets where enough climbs in a subspace meet, grown in the whole signal space; the clearest first."""
        climbed = torch.cat([_climb(self.q @ basis, self._starts(basis), tail) for tail in tails], dim=1)
        climbed, times = _distinct(climbed, torch.ones(climbed.shape[1]))
        sets, times = _distinct(self._grow(climbed), times)
        near = intersection_over_union(sets, sets) > SAME
        hits = near.float() @ times
        sets, near = sets[:, hits >= STABLE], near[hits >= STABLE][:, hits >= STABLE]
        excess = self.excess(sets)
        free = torch.ones_like(excess, dtype=torch.bool)
        chosen = []
        for j in excess.argsort(descending=True).tolist():
            if free[j] and excess[j] > max(LEAST_EXCESS, RELATIVE_EXCESS * float(excess.max())):
                chosen.append(j)
                free &= ~near[j]
        return sets[:, chosen]

    def _grow(self, sets: Tensor) -> Tensor:
        """Free the sets' sizes: rows nearer to the mean of members than to the mean of others."""
        for _ in range(POLISH):
            y = self.q @ _predictor(self.q, sets)
            inside, total = sets.float(), y.sum(0)
            size = inside.sum(0)
            middle = ((y * inside).sum(0) / size + (total - (y * inside).sum(0)) / (self.n - size)) / 2
            grown = y > middle
            count = grown.sum(0)
            usable = (count >= LEAST_MEMBERS) & (count <= self.n - LEAST_MEMBERS)
            grown = torch.where(usable, grown, sets)
            if torch.equal(grown, sets):
                break
            sets = grown
        return torch.where(sets.float().mean(0) > 0.5, ~sets, sets)

    def _unexplained(self, sets: Tensor) -> Tensor:
        """The directions of the signal space that the sets do not account for, [D, D']."""
        if not sets.shape[1]:
            return torch.eye(self.q.shape[1])
        u, s, _ = torch.linalg.svd(self.q.T @ _centred(sets))
        return u[:, int((s > 0.15 * s.max()).sum()) :]

    def _merge(self, old: Tensor, new: Tensor, keep: int) -> Tensor:
        """Old and new sets without doubles and unions; the first `keep` stay whatever comes."""
        if old.shape[1] and new.shape[1]:
            new = new[:, intersection_over_union(new, old).max(1).values < SAME]
        both = torch.cat([old, new], dim=1)
        unions = unions_of_others(both)
        unions[:keep] = False
        return both[:, ~unions]

    def _reassign(self, members: Tensor) -> Tensor:
        """Every row to the value whose mean prediction is nearest, repeated until nothing moves."""
        for _ in range(POLISH):
            inside = members.float()
            predicted = self.q @ (self.q.T @ _centred(members)) / self.n
            means = inside.T @ predicted / inside.sum(0)[:, None]
            again = one_hot(torch.cdist(predicted, means).argmin(1), members.shape[1]).bool()
            if again.sum(0).min() < LEAST_MEMBERS or torch.equal(again, members):
                break
            members = again
        return members


def two_means(y: Tensor) -> tuple[Tensor, float]:
    """Which numbers [n] are the lower ones when cut in two so that least variance is left; the share it explains."""
    y = y - y.mean()
    order = y.sort().values
    lower = torch.arange(1, len(y))
    between = order.cumsum(0)[:-1].square() * (1 / lower + 1 / (len(y) - lower))
    cut = int(between.argmax())
    return y <= order[cut], float(between[cut] / y.square().sum().clamp_min(1e-12))


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """Of sets [n, k] and [n, m]: [k, m]."""
    both = a.float().T @ b.float()
    return both / (a.sum(0)[:, None] + b.sum(0) - both).clamp_min(1)


def unions_of_others(sets: Tensor) -> Tensor:
    """Which sets [n, m] are the disjoint union of two or more smaller ones, [m]."""
    both = sets.float().T @ sets.float()
    size = both.diagonal()
    union = torch.zeros(len(size), dtype=torch.bool)
    for j in size.argsort(descending=True).tolist():
        inside = (both[:, j] > INSIDE * size) & (size < INSIDE * size[j]) & ~union
        chosen: list[int] = []
        for k in inside.nonzero()[:, 0][size[inside].argsort(descending=True)].tolist():
            if both[k, chosen].sum() < (1 - INSIDE) * size[k]:
                chosen.append(k)
        union[j] = len(chosen) > 1 and both[chosen, j].sum() > INSIDE * size[j]
    return union


def partitions(sets: Tensor) -> list[list[int]]:
    """Families of sets [n, m] that exclude each other and miss at most one value's rows, finest first: indices into m.

    Greedy from every pair: add the set that shares fewest rows with the family, measured against independence.
    """
    n, both = len(sets), sets.float().T @ sets.float()
    size = both.diagonal()
    exclude = both <= OVERLAP * torch.minimum(size, size[:, None])
    families: dict[tuple[int, ...], tuple[int, float]] = {}
    for first in range(len(size)):
        for second in exclude[first].nonzero()[:, 0].tolist():
            family = [first, second]
            shared = both[first] + both[second]
            covered = size[first] + size[second]
            while True:
                free = exclude[family].all(0) & (shared <= OVERLAP * size)
                if not free.any():
                    break
                expected = size * covered / n
                surprise = ((shared - expected) / expected.sqrt()).masked_fill(~free, torch.inf)
                best = int(surprise.argmin())
                family.append(best)
                shared = shared + both[best]
                covered = covered + size[best]
            # Two rare values of different attributes meet in few rows too; all others of the family cover such a stray.
            while (stray := (shared[family] / size[family] - 1).max(0)).values > OVERLAP:
                gone = family.pop(int(stray.indices))
                shared, covered = shared - both[gone], covered - size[gone]
            miss = float(n - covered)
            if -OVERLAP * n <= miss <= 2 * size[family].max():
                families[tuple(sorted(family))] = (len(family), -abs(miss))
        if size[first] > 0.3 * n:
            families.setdefault((first,), (1, 0.0))
    return [list(family) for family in sorted(families, key=families.__getitem__, reverse=True)]


def _climb(q: Tensor, directions: Tensor, tail: float) -> Tensor:
    """From directions [D, m] to sets [n, m] of the `tail` rows furthest out along their own best predictor."""
    count = max(LEAST_MEMBERS, round(tail * len(q)))
    sets = torch.zeros(len(q), directions.shape[1], dtype=torch.bool)
    for _ in range(CLIMB):
        y = q @ directions
        further = y >= y.topk(count, dim=0).values[-1]
        if torch.equal(further, sets):
            break
        sets = further
        directions = _predictor(q, sets)
    return sets


def _half(residual: Tensor, inside: Tensor, apart: float) -> tuple[float, Tensor]:
    """One half [n] of a value's rows, and how clearly they fall in two: the share of variance along their direction.

    0 unless they vary more than all other rows do along it, and than noise in so many dimensions would (the edge of
    Marchenko and Pastur): an attribute not found yet divides the rows of all values alike. And 0 unless the halves are
    APART of the attribute's values apart (their mean squared distance): rows are of unit length, so that a value
    counts for less beside long ones.
    """
    own = residual[inside] - residual[inside].mean(0)
    half = torch.zeros_like(inside)
    if len(own) < 2 * LEAST_MEMBERS:
        return 0.0, half
    direction = torch.linalg.svd(own, full_matrices=False).Vh[0]
    along = own @ direction
    edge = (1 + (own.shape[1] / len(own)) ** 0.5) ** 2
    if along.var() < ABOVE_EDGE * edge * (residual[~inside] @ direction).var():
        return 0.0, half
    low, share = two_means(along)
    half[inside] = low
    gap = float(along[~low].mean() - along[low].mean())
    enough = LEAST_MEMBERS <= int(low.sum()) <= len(own) - LEAST_MEMBERS and gap**2 > APART * apart
    return (share if enough else 0.0), half


def _predictor(q: Tensor, sets: Tensor) -> Tensor:
    """Least squares of standardised indicators on whitened rows, [D, m]."""
    share = sets.float().mean(0)
    return q.T @ (_centred(sets) / (share * (1 - share)).sqrt().clamp_min(1e-6)) / len(q)


def _linearity(q: Tensor, sets: Tensor) -> Tensor:
    """R^2 of each set's indicator on whitened rows, [m]."""
    return _predictor(q, sets).square().sum(0)


def _centred(sets: Tensor) -> Tensor:
    return sets.float() - sets.float().mean(0)


def _distinct(sets: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct columns and how many times each came."""
    key = torch.rand(len(sets), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, index = (key @ sets.double()).unique(return_inverse=True)
    first = torch.empty(int(index.max()) + 1, dtype=torch.long).scatter_(0, index, torch.arange(len(index)))
    return sets[:, first], torch.zeros(len(first)).index_add_(0, index, times)


def _to_sae(rows: Tensor, values: Values, base_hash: str | None) -> JumpReLUSAE:
    """Steps 6 and 7."""
    inside = values.members.float()
    mean, share = rows.mean(0), inside.mean(0)
    directions = torch.linalg.pinv(_centred(values.members), rtol=0.02) @ (rows - mean)
    size = directions.norm(dim=1)
    bias = mean - share @ directions
    whiten = signal_space(rows)
    encoder = whiten @ (((rows - mean) @ whiten).T @ _centred(values.members) / len(rows))
    membership = (rows - mean) @ encoder + share
    at_members = (membership * inside).sum(0) / inside.sum(0)
    at_others = (membership * (1 - inside)).sum(0) / (1 - inside).sum(0)
    about = SAEMetadata(
        training_architecture="factored",
        trained_on=TRAINED_ON,
        attribute=values.attribute.tolist(),
        base_hash=base_hash,
    )
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=rows.shape[1], d_sae=len(size), metadata=about))
    sae.load_state_dict(
        {
            "W_enc": encoder * size,
            "W_dec": normalize(directions, dim=1),
            "b_enc": (share + (bias - mean) @ encoder) * size,
            "b_dec": bias,
            "threshold": (at_members + at_others).clamp_min(0) / 2 * size,
        }
    )
    return sae
