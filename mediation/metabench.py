"""Are planted facts named right? Ways to decompose rows, where what each row is made of is known.

1. Rows: unit norm, d = 128, each the sum of one value of every attribute (random directions, norms exp(N(0, .3))) and
   Gaussian noise of `noise` times the sum's mean norm. `correlation`: probability that an attribute's value is
   copied from the attribute before it. Or the embeddings of a small network trained to answer for every entity and
   attribute; there a value's direction is the least squares of rows on values.
2. Every method decomposes all rows. Parts are named on half of them, by enrichment (mediation.labels).
3. On the other half, for every row and attribute: replace the row by one that differs in all attributes. The readout g
   of the attribute is the dual (pseudo-inverse) direction of its value less that of the other row's: it reads this
   contrast and nothing else. Part j is worth (z_ij - z_i'j) g.u_j. `attribute`: the part worth most is named by the
   attribute. `value`: the first part that the row has more of is named by attribute and value. No name is wrong.
4. Methods: `factored`; `batchtopk` (`MetaDictionary.train`, as many codes as attributes, 1.5 times as many directions
   as values; also 1 and 3 times); `SAELens` (its BatchTopK trainer, same size); dictionary learning (scikit-learn,
   matching pursuit codes); independent components, each split by sign; matching pursuit over own rows; nearest row;
   and `null`, batchtopk trained on rotated rows and applied to the real ones.

Seeds from 1000 on were not looked at while methods were developed.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.decomposition import FastICA, MiniBatchDictionaryLearning
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from mediation.errors import MediationError
from mediation.factored import train_factored
from mediation.labels import enrichment
from mediation.metalatents import MatchingPursuit, MetaDictionary, rotated
from mediation.sites import Site, Stream
from mediation.training.activations import shuffled_batches
from mediation.training.saes import SAESettings, train_sae

DIM = 128
MIXED = (2, 4, 4, 8, 8, 16)
SEEDS, QUICK_SEEDS = (1000, 1001, 1002), (1000,)

Parts = tuple[Tensor, Tensor]  # codes [n, m], unit directions [m, d]


@dataclass(frozen=True)
class Setting:
    values: tuple[int, ...] = MIXED
    rows: int = 256
    noise: float = 0.3
    correlation: float = 0.0
    trained: bool = False

    def __str__(self) -> str:
        made = "embeddings" if self.trained else f"noise {self.noise}, correlation {self.correlation}"
        sizes = (
            f"{len(self.values)} x {self.values[0]}" if len(set(self.values)) == 1 else " ".join(map(str, self.values))
        )
        return f"{sizes}; {self.rows} rows; {made}"


SETTINGS = (
    Setting((8,) * 5),
    Setting((16,) * 4),
    Setting((24,) * 4, rows=1024),
    Setting((12, 12, 10, 10, 8), rows=1024),
    Setting(noise=0.1),
    Setting(),
    Setting(noise=0.5),
    Setting(correlation=0.3),
    Setting(correlation=0.5),
    Setting(rows=1024),
    Setting((2, 2, 3, 4, 8, 16)),
    Setting(trained=True),
)
QUICK = (Setting((8,) * 5), Setting(), Setting(trained=True))


@dataclass
class Planted:
    """Unit rows [n, d], each row's value of every attribute [n, attributes], and every value's direction."""

    rows: Tensor
    facts: Tensor
    directions: list[Tensor]


def run_bench(
    *, quick: bool = False, progress: Callable[[str, int, int], None] = lambda stage, done, of: None
) -> dict[str, Any]:
    """All methods on all settings and seeds: means over seeds, and every seed's figure."""
    started = time.perf_counter()
    settings, seeds = (QUICK, QUICK_SEEDS) if quick else (SETTINGS, SEEDS)
    results = []
    for number, setting in enumerate(settings):
        scores: dict[str, list[dict[str, float]]] = {}
        for at, seed in enumerate(seeds):
            progress(str(setting), number * len(seeds) + at, len(settings) * len(seeds))
            planted = plant(setting, seed)
            for name, method in methods(setting).items():
                began = time.perf_counter()
                codes, directions = method(planted.rows, setting, seed)
                seconds = time.perf_counter() - began
                attribute, value = named_right(planted, codes, directions, seed)
                figures = {"attribute": attribute, "value": value, "parts": float((codes != 0).any(0).sum())}
                scores.setdefault(name, []).append(figures | {"seconds": seconds})
        mean = {
            key: {name: sum(one[key] for one in each) / len(each) for name, each in scores.items()}
            for key in ("attribute", "value", "parts", "seconds")
        }
        every = {name: [one["value"] for one in each] for name, each in scores.items()}
        results.append({"setting": str(setting), **mean, "value_by_seed": every})
    return {
        "methods": list(dict.fromkeys(name for row in results for name in row["value"])),
        "settings": results,
        "seeds": list(seeds),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
    }


def plant(setting: Setting, seed: int) -> Planted:
    """Step 1."""
    generator = torch.Generator().manual_seed(seed)
    facts = torch.empty(setting.rows, len(setting.values), dtype=torch.long)
    for attribute, n_values in enumerate(setting.values):
        own = (torch.arange(setting.rows) % n_values)[torch.randperm(setting.rows, generator=generator)]
        if attribute:
            before = facts[:, attribute - 1] * n_values // setting.values[attribute - 1]
            own = torch.where(torch.rand(setting.rows, generator=generator) < setting.correlation, before, own)
        facts[:, attribute] = own
    if setting.trained:
        rows = _embeddings(facts, setting.values, seed)
        belongs = torch.cat([one_hot(facts[:, a], n).float() for a, n in enumerate(setting.values)], dim=1)
        means = torch.linalg.pinv(belongs - belongs.mean(0)) @ (rows - rows.mean(0))
        return Planted(rows, facts, list(means.split(setting.values)))
    directions = [
        normalize(torch.randn(n, DIM, generator=generator), dim=1)
        * (0.3 * torch.randn(n, 1, generator=generator)).exp()
        for n in setting.values
    ]
    total = torch.stack([each[facts[:, a]] for a, each in enumerate(directions)]).sum(0)
    noise = torch.randn(total.shape, generator=generator) * total.norm(dim=1).mean() / DIM**0.5
    return Planted(normalize(total + setting.noise * noise, dim=1), facts, directions)


def _embeddings(facts: Tensor, n_values: tuple[int, ...], seed: int) -> Tensor:
    """Unit embeddings [n, d] of entities in a network that answers for any entity and attribute."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        entities = nn.Parameter(0.3 * torch.randn(len(facts), DIM) / DIM**0.5)
        asked = nn.Embedding(len(n_values), DIM)
        answer = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 256), nn.GELU(), nn.Linear(256, sum(n_values)))
        adam = torch.optim.Adam([entities, *asked.parameters(), *answer.parameters()], lr=3e-3)
        first = torch.tensor([0, *n_values]).cumsum(0)
        for _ in range(1500):
            entity, attribute = torch.randint(len(facts), (256,)), torch.randint(len(n_values), (256,))
            right = first[attribute] + facts[entity, attribute]
            loss = cross_entropy(answer(entities[entity] + asked(attribute)), right)
            adam.zero_grad()
            loss.backward()
            adam.step()
    return normalize(entities.detach(), dim=1)


def named_right(planted: Planted, codes: Tensor, directions: Tensor, seed: int) -> tuple[float, float]:
    """Steps 2 and 3: shares of (row, attribute) whose attribute, and whose attribute and value, are named right."""
    facts = planted.facts
    generator = torch.Generator().manual_seed(seed)
    label, test = _half(len(facts), seed)
    tags = [{str(a): str(v) for a, v in enumerate(row)} for row in facts[label].tolist()]
    names = enrichment(codes[label], tags, least_score=0.0)  # weak names too: some methods have no others
    named = torch.full((len(directions), 2), -1)
    for meta, name in zip(names["meta"].to_list(), names["label"].to_list(), strict=True):
        named[meta] = torch.tensor([int(part) for part in name.split("=")])

    differs = (facts[test][:, None] != facts[test]).all(-1)
    test, differs = test[differs.any(1)], differs[differs.any(1)]
    other = _half(len(facts), seed)[1][torch.multinomial(differs.float(), 1, generator=generator)[:, 0]]
    change = codes[test] - codes[other]
    readouts = torch.linalg.pinv(torch.cat(planted.directions).double()).T.float()  # [values, d]
    attribute_right, value_right, first = [], [], 0
    for attribute, values in enumerate(planted.directions):
        own = facts[test, attribute]
        readout = readouts[first + own] - readouts[first + facts[other, attribute]]
        worth = change * (readout @ directions.T)
        attribute_right.append(named[worth.argmax(1), 0] == attribute)
        top = named[worth.masked_fill(change <= 0, -torch.inf).argmax(1)]
        value_right.append((top[:, 0] == attribute) & (top[:, 1] == own))
        first += len(values)
    return torch.cat(attribute_right).float().mean().item(), torch.cat(value_right).float().mean().item()


def _half(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two halves of n rows: to name parts on, to test names on."""
    first, second = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tensor_split(2)
    return first, second


def methods(setting: Setting) -> dict[str, Callable[[Tensor, Setting, int], Parts]]:
    """Step 4. Other widths of batchtopk are tried on the plain mixed setting only."""
    found = {
        "factored": _factored,
        "batchtopk": lambda rows, setting, seed: _batchtopk(rows, rows, setting, seed, 1.5),
        "SAELens": _saelens,
        "dictionary learning": _dictionary_learning,
        "ICA": _independent_components,
        "own-row pursuit": lambda rows, setting, _: _own_rows(rows, len(setting.values)),
        "nearest row": lambda rows, *_: _own_rows(rows, 1),
        "null": lambda rows, setting, seed: _batchtopk(rotated(rows, seed), rows, setting, seed, 1.5),
    }
    if setting == Setting():
        found["batchtopk x1"] = lambda rows, setting, seed: _batchtopk(rows, rows, setting, seed, 1.0)
        found["batchtopk x3"] = lambda rows, setting, seed: _batchtopk(rows, rows, setting, seed, 3.0)
    return found


def _factored(rows: Tensor, setting: Setting, seed: int) -> Parts:
    try:
        meta = train_factored(rows, seed=seed)
    except MediationError:  # found nothing
        return rows.new_zeros(len(rows), 1), rows[:1]
    return meta.codes(rows), meta.directions


def _batchtopk(train: Tensor, rows: Tensor, setting: Setting, seed: int, width: float) -> Parts:
    meta = MetaDictionary.train(
        train, width=round(width * sum(setting.values)), k=len(setting.values), restarts=1, seed=seed
    )
    return meta.codes(rows), meta.directions


def _saelens(rows: Tensor, setting: Setting, seed: int) -> Parts:
    # SAELens draws a bar of its own on standard error.
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        made = train_sae(
            shuffled_batches(rows, 256, seed=seed),
            Path(folder) / "meta",
            SAESettings(round(1.5 * sum(setting.values)), k=len(setting.values), steps=1000, seed=seed),
            site=Site(0, Stream.RESID_PRE),
            model_name="none",
        )
        meta = MetaDictionary.load(made)
    return meta.codes(rows), meta.directions


def _dictionary_learning(rows: Tensor, setting: Setting, seed: int) -> Parts:
    learner = MiniBatchDictionaryLearning(
        round(1.5 * sum(setting.values)),
        transform_algorithm="omp",
        transform_n_nonzero_coefs=len(setting.values),
        random_state=seed,
    )
    centred = (rows - rows.mean(0)).double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the pursuit stops early on rows it has explained
        codes = torch.from_numpy(learner.fit_transform(centred)).float()
    return _signed(codes, torch.from_numpy(learner.components_).float())


def _independent_components(rows: Tensor, setting: Setting, seed: int) -> Parts:
    count = sum(setting.values) - len(setting.values)
    ica = FastICA(min(count, DIM, len(rows) // 2), whiten="unit-variance", max_iter=400, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        codes = torch.from_numpy(ica.fit_transform(rows.double().numpy())).float()
    return _signed(codes, torch.from_numpy(ica.mixing_.T).float())


def _own_rows(rows: Tensor, k: int) -> Parts:
    pursuit = MatchingPursuit(rows, k)
    return pursuit.codes(rows, torch.arange(len(rows))), pursuit.directions


def _signed(codes: Tensor, directions: Tensor) -> Parts:
    """Codes of both signs as twice as many that are not negative, along u and -u."""
    size = directions.norm(dim=1)
    unit = normalize(directions, dim=1)
    return torch.cat([codes, -codes], dim=1).relu() * size.repeat(2), torch.cat([unit, -unit])
