"""Training a meta-dictionary on the decoder rows of one dictionary, or of several pooled.

1. Rows: all decoder rows at unit norm, less dead ones. A latent is dead when it fires on at most one token in 100,000
   (SAELens' sparsity.safetensors); without that file only all-zero rows are left out, and the result says so.
2. Two ways, judged on a fifth of the rows that is held out: *factored* (mediation.factored) finds its size itself;
   *sparse* (`MetaDictionary.train`) gets as many codes per row and WIDTH_PER_META times the meta-latents. Factored is
   taken when it explains at least FACTORED_SHARE of what sparse does: its parts are whole facts, and more of them are
   named right (docs/meta-benchmark.md), while sparse gains a little variance with parts that mean nothing. Where rows
   share no facts that a readout could tell, sparse takes the published recipe: 4 codes per row, a quarter as many
   meta-latents as rows. The way taken is trained again on all rows.
   A width or k that the user gives, and rows weighted by use, mean sparse. Rows are weighted by use by drawing as many
   of them as there are, with replacement, in proportion to how often their latents fire; rows are held out, and turned
   for the null, before any is drawn twice.
3. The null: every row turned to a random direction on its own, then the same training. What is explained beyond it is
   shared between rows.
4. `cfg.json` keeps, under metadata, what it was made from and how it came out: dictionaries (sha256 of the weights, and
   the folder's name), rows, dead_dropped, weights, seed, codes_per_row, held_out, variance_explained,
   null_variance_explained.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import load_file
from torch import Tensor

from mediation.dictionaries import Autoencoder, open_folder, weight_file_hash
from mediation.errors import FidelityWarning, MediationError
from mediation.factored import train_factored
from mediation.metalatents import FEW_ROWS, TRAINED_ON, MetaDictionary, checked_rows, rotated
from mediation.metalatents import Progress as Tick

DEAD_LOG_DENSITY = -5.0
HELD_OUT = 0.2
FACTORED_SHARE = 0.9
WIDTH_PER_META = 1.5
K, WIDTH_PER_ROW = 4, 0.25
STEPS, RESTARTS = 2000, 3
WEIGHTS = ("uniform", "use")

Progress = Callable[[str, int, int], None]


@dataclass
class Rows:
    """Decoder rows [n, d] of the dictionaries, how often their latents fire where known, and what was left out."""

    rows: Tensor
    use: Tensor | None
    dead: int
    density_known: bool
    hashes: dict[str, str]  # name of each dictionary's folder by the content hash of its weights

    @property
    def base_hash(self) -> str | None:
        """The one dictionary's content hash; pooled rows belong to none."""
        return next(iter(self.hashes)) if len(self.hashes) == 1 else None


@dataclass
class _Way:
    """How to train: factored, or sparse of a width and k."""

    width: int | None = None
    k: int | None = None
    restarts: int = RESTARTS

    def train(self, rows: Tensor, seed: int, tick: Tick, base_hash: str | None = None) -> MetaDictionary:
        if self.width is None or self.k is None:
            return train_factored(rows, seed=seed, base_hash=base_hash, progress=tick)
        return MetaDictionary.train(
            rows,
            width=self.width,
            k=self.k,
            steps=STEPS,
            restarts=self.restarts,
            seed=seed,
            base_hash=base_hash,
            progress=tick,
        )


def read_rows(folders: Sequence[str | Path]) -> Rows:
    """Step 1. A folder of dictionary folders counts as all of them, less meta-dictionaries."""
    within = [config for folder in map(Path, folders) for config in sorted(folder.glob("*/cfg.json"))]
    expanded = [config.parent for config in within if not _is_meta(config)]
    named = [Path(folder) for folder in folders if not any(Path(folder).glob("*/cfg.json"))] + expanded
    rows, use = [], []
    dead = 0
    for folder in named:
        decoder = Autoencoder(open_folder(folder, "cpu")).decoder
        density = _log_density(folder, len(decoder))
        alive = decoder.any(1) if density is None else decoder.any(1) & (density > DEAD_LOG_DENSITY)
        rows.append(decoder[alive])
        use.append(None if density is None else 10 ** density[alive])
        dead += int((~alive).sum())
    widths = {part.shape[1] for part in rows}
    if len(widths) > 1:
        raise MediationError(
            f"Dictionaries of different widths ({', '.join(map(str, sorted(widths)))}) cannot be pooled; "
            "give dictionaries of one model."
        )
    known = [each for each in use if each is not None]
    return Rows(
        torch.cat(rows),
        torch.cat(known) if len(known) == len(use) else None,
        dead,
        len(known) == len(use),
        {weight_file_hash(folder): folder.resolve().name for folder in named},
    )


def train_meta(
    folders: Sequence[str | Path],
    out: Path,
    *,
    width: int | None = None,
    k: int | None = None,
    weights: str = "uniform",
    restarts: int = RESTARTS,
    seed: int = 0,
    progress: Progress = lambda stage, done, of: None,
    announce: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Steps 1 to 3, into the folder `out`, which must be new or empty. Returns the figures.

    weights: "uniform", or "use": rows are drawn as often as their latents fire. restarts: of a sparse training whose
    width or k is given; the best counts. announce: gets one line on what is
    about to be done and about how long it takes. progress: called with (stage, done, of) of that stage's training.
    """
    if weights not in WEIGHTS:
        raise MediationError(f"--weights is {weights!r}; give one of {', '.join(WEIGHTS)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MediationError(f"{out} already holds something; choose a new folder.")
    started = time.perf_counter()
    read = read_rows(folders)
    rows = checked_rows(read.rows)
    use = read.use if weights == "use" else None
    if weights == "use" and use is None:
        raise MediationError(
            f"Rows cannot be weighted by use: not every folder has a {SPARSITY_FILENAME}; use --weights uniform."
        )
    given = replace(_sparse(len(rows), width, k), restarts=restarts) if width or k or use is not None else None
    announce(f"{len(rows)} rows of width {rows.shape[1]}; about {_estimate(rows, given is not None):.0f} s")

    def tick(stage: str) -> Tick:
        return lambda done, of: progress(stage, done, of)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FidelityWarning)  # said once above
        way, held_out = _choose(rows, use, seed, given, tick("choosing, on held-out rows"))
        drawn = _drawn(rows, use, seed)
        meta = way.train(drawn, seed, tick("training"), read.base_hash)
        null = _null(rows, use, way, seed, tick("null"))
    explained = meta.variance_explained(drawn)
    made = {
        "rows": len(rows),
        "dead_dropped": read.dead,
        "weights": weights,
        "seed": seed,
        "codes_per_row": (meta.codes(drawn) > 0).sum(1).float().mean().item(),
        "variance_explained": explained,
        "held_out": held_out,
        "null_variance_explained": null,
    }
    about = meta.metadata
    for name, value in made.items():
        about[name] = value
    about.dictionaries = read.hashes
    _save(meta, out)
    attributes = about.attribute or []
    return made | {
        "out": str(out),
        "method": about.training_architecture,
        "few_rows": len(rows) < FEW_ROWS,
        "density_known": read.density_known,
        "width": meta.d_meta,
        "attributes": [attributes.count(number) for number in range(max(attributes, default=-1) + 1)],
        "gap_to_null": explained - null,
        "seconds": time.perf_counter() - started,
    }


def _choose(
    rows: Tensor, use: Tensor | None, seed: int, given: _Way | None, tick: Tick
) -> tuple[_Way, dict[str, float]]:
    """Step 2: the way to train, and the variance of held-out rows that each way tried explains."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    n_held = max(1, round(HELD_OUT * len(rows)))
    held, kept = (
        _drawn(rows[part], None if use is None else use[part], seed) for part in (order[:n_held], order[n_held:])
    )
    if given is not None:
        return given, {"sparse": given.train(kept, seed, tick).variance_explained(held)}
    try:
        factored = train_factored(kept, seed=seed, progress=tick)
    except MediationError:  # no shared facts
        sparse = _sparse(len(rows), None, None)
        return sparse, {"sparse": sparse.train(kept, seed, tick).variance_explained(held)}
    per_row = max(1, round((factored.codes(kept) > 0).sum(1).float().mean().item()))
    sparse = _sparse(len(rows), max(per_row + 1, round(WIDTH_PER_META * factored.d_meta)), per_row)
    tried = {
        "factored": factored.variance_explained(held),
        "sparse": sparse.train(kept, seed, tick).variance_explained(held),
    }
    return (_Way() if tried["factored"] >= FACTORED_SHARE * tried["sparse"] else sparse), tried


def _drawn(rows: Tensor, use: Tensor | None, seed: int) -> Tensor:
    """As many rows, drawn in proportion to use: training takes rows uniformly, so that these are weighted."""
    if use is None:
        return rows
    return rows[torch.multinomial(use, len(rows), True, generator=torch.Generator().manual_seed(seed))]


def _sparse(n_rows: int, width: int | None, k: int | None) -> _Way:
    k = k or K
    return _Way(width or max(k + 1, round(WIDTH_PER_ROW * n_rows)), k)


def _null(rows: Tensor, use: Tensor | None, way: _Way, seed: int, tick: Tick) -> float:
    """Step 3; a factored training that finds nothing shared explains nothing."""
    turned = _drawn(rotated(rows, seed), use, seed)
    try:
        return way.train(turned, seed, tick).variance_explained(turned)
    except MediationError:
        return 0.0


def _estimate(rows: Tensor, sparse: bool) -> float:
    """Seconds, from a few steps of sparse training on these rows."""
    way = _sparse(len(rows), None, None)
    assert way.width is not None
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FidelityWarning)
        MetaDictionary.train(rows, width=way.width, k=K, steps=10, restarts=1)
    one = (time.perf_counter() - started) / 10 * STEPS * RESTARTS
    # Two or three sparse trainings, or one and three factored ones, which take about as long as a single start each.
    return 3 * one if sparse else 2 * one


def _is_meta(config: Path) -> bool:
    """Whether a cfg.json is a meta-dictionary's, whose rows are facts already."""
    try:
        about = json.loads(config.read_text(encoding="utf-8")).get("metadata") or {}
    except (OSError, ValueError):  # opening it says what is wrong
        return False
    return bool(about.get("trained_on") == TRAINED_ON)


def _log_density(folder: Path, d_sae: int) -> Tensor | None:
    """log10 of the share of tokens each latent fires on, where the folder has SAELens' file."""
    file = folder / SPARSITY_FILENAME
    if not file.is_file():
        return None
    try:
        (density,) = load_file(file).values()
    except Exception as reason:  # safetensors raises its own types
        raise MediationError(f"{file} cannot be read: {reason}; delete it to keep all rows.") from reason
    if density.shape != (d_sae,):
        raise MediationError(f"{file} is not about the {d_sae} latents beside it; delete it to keep all rows.")
    return density.float()


def _save(meta: MetaDictionary, out: Path) -> None:
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        meta.save(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise MediationError(f"{out} cannot be written ({error.strerror}); choose another folder.") from error
