"""What a dictionary is worth, beside what others have published.

1. Fidelity on text (`mediation.dictionaries.measure_fidelity`): variance explained, L0, cross-entropy recovered; on the
   documents of the files that `mediation train saes` holds out with the same seed.
2. Use: latents are dead when they are on for fewer than one in 100,000 tokens of the text, dense when for more than
   one in ten. On a shorter text dead means never on.
3. Decoder: each row's largest cosine with another row. Rows that repeat each other split a feature, or share a parent
   that they have absorbed. In blocks, so that no [d_sae, d_sae] table is held.
4. Encoder against decoder: cos(encoder_i, w_i). A latent that has absorbed another reads along one direction and
   writes along two (Chanin et al. 2024, A.2), so a low cosine is absorption's trace in the weights.
5. Absorption on first letters (`mediation.absorption`).
6. The meta-SAE against a null: its variance explained on the rows in use, and that of one trained alike on the same
   rows each turned to a random direction, which share nothing. What `mediation train meta` found for both is in the
   meta-SAE's metadata; its null is taken from there, others are trained here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mediation.contexts import Reader, blocks, window_length
from mediation.dictionaries import Dictionary, measure_fidelity
from mediation.errors import MediationError
from mediation.metalatents import MetaDictionary, Progress, rotated
from mediation.subject import SubjectModel
from mediation.training.activations import windows
from mediation.training.text import documents_of, held_out

DEAD, DENSE = 1e-5, 0.1
SAME = 0.7  # cosine from which two rows are taken for one latent, as in the meta-SAE post
MAX_COSINES = 2**24  # held at once
NULL_STEPS = 800
FIDELITY_TOKENS = 8_192
MADE = (
    "dictionaries",
    "rows",
    "dead_dropped",
    "weights",
    "seed",
    "codes_per_row",
    "held_out",
    "variance_explained",
    "null_variance_explained",
)  # of a meta-SAE's metadata, see mediation.training.meta


@dataclass(frozen=True)
class Published:
    """A figure others have reported, and where."""

    value: str
    source: str


MATRYOSHKA = "Bussmann et al. 2025, Gemma-2-2B layer 12, 65k latents"
PUBLISHED = {
    "variance_explained": Published("BatchTopK .72, Matryoshka .70", MATRYOSHKA),
    "l0": Published("40", MATRYOSHKA),
    "mean_max_cosine": Published("OrtSAE 2.7 times below BatchTopK", "OrtSAE (2025)"),
    "absorption_fraction": Published("BatchTopK .49, Matryoshka .05", MATRYOSHKA),
    "meta_variance_explained": Published(
        ".55 (GPT-2); BatchTopK .55, Matryoshka .42 (Gemma)", "Bussmann et al. 2024, 2025"
    ),
}


@dataclass(frozen=True)
class Geometry:
    """Steps 3 and 4: largest cosine of a decoder row with another one, and cosine of encoder with decoder."""

    mean_max_cosine: float
    p95_max_cosine: float
    share_max_cosine_over_07: float
    mean_encoder_cosine: float
    p5_encoder_cosine: float
    median_encoder_cosine: float


@dataclass(frozen=True)
class TextQuality:
    """Steps 1 and 2. density [d_sae]: share of tokens on which each latent is on; basis: what both were measured on."""

    figures: dict[str, float | None]
    density: Tensor
    basis: str


def max_cosines(rows: Tensor, block: int | None = None) -> Tensor:
    """Each row's largest cosine with another, [n] of rows [n, d] but zero rows; `block` rows at a time."""
    unit = normalize(rows[rows.any(1)].float(), dim=1)
    found = []
    for part in torch.arange(len(unit), device=unit.device).split(block or max(1, MAX_COSINES // max(len(unit), 1))):
        cosines = unit[part] @ unit.T
        cosines[torch.arange(len(part), device=unit.device), part] = -torch.inf
        found.append(cosines.max(1).values)
    return torch.cat(found)


def geometry(dictionary: Dictionary) -> Geometry:
    """Steps 3 and 4."""
    largest = max_cosines(dictionary.decoder).double()
    alive = dictionary.decoder.any(1)
    encoder = torch.cosine_similarity(dictionary.encoder[alive], dictionary.decoder[alive], dim=1).double()
    return Geometry(
        mean_max_cosine=float(largest.mean()),
        p95_max_cosine=float(largest.quantile(0.95)),
        share_max_cosine_over_07=float((largest > SAME).double().mean()),
        mean_encoder_cosine=float(encoder.mean()),
        p5_encoder_cosine=float(encoder.quantile(0.05)),
        median_encoder_cosine=float(encoder.median()),
    )


@torch.no_grad()
def text_quality(
    model: SubjectModel,
    dictionary: Dictionary,
    texts: Sequence[Path],
    n_tokens: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TextQuality:
    """Steps 1 and 2 on `n_tokens` of text files, fidelity on `FIDELITY_TOKENS` at most: it takes three passes.

    A text too short to hold documents out is used as it is, and `basis` says so.
    """
    documents, length = documents_of(texts, seed), window_length(model)

    def some(source: Iterable[str]) -> list[list[int]]:
        return list(islice(windows(source, model, length), max(1, FIDELITY_TOKENS // length)))

    unseen = some(held_out(documents))
    few = torch.tensor(unseen or some(documents))
    if not len(few):
        raise MediationError("There is too little text to measure on; give longer or more files.")
    fidelity = measure_fidelity(model, dictionary, few, torch.ones_like(few), batch_size=16)
    on, seen = torch.zeros(dictionary.d_sae, dtype=torch.long), 0
    reading = blocks(
        model,
        windows(documents, model, length),
        [Reader(dictionary)],
        n_tokens=n_tokens,
        progress=lambda done: progress(done, n_tokens),
    )
    for block in reading:
        on += (block.values != 0).sum(dim=(0, 1)).cpu()
        seen += int(block.kept.sum())
    density = on / max(seen, 1)
    figures = {
        "variance_explained": _finite(fidelity.variance_explained),
        "l0": fidelity.l0,
        "cross_entropy_recovered": _finite(fidelity.cross_entropy_recovered),
        **use(density),
    }
    kind = "held out of these files in training" if unseen else "that may have been trained on"
    basis = f"Fidelity on {fidelity.tokens} tokens of documents {kind}, dead and dense on {seen} tokens."
    return TextQuality(figures, density, basis)


def held_out_figures(dictionary: Dictionary, x: Tensor) -> dict[str, float]:
    """variance_explained, l0 and silent (the share of latents that never fire) on x [n, d_model]."""
    error, active = 0.0, 0
    fired = torch.zeros(dictionary.d_sae, dtype=torch.bool)
    mean, spread = x.float().mean(dim=0), 0.0
    for block in x.float().split(1024):
        split = dictionary.split(block)
        on = split.latents != 0
        error += float(split.error.double().square().sum())
        spread += float((block - mean).double().square().sum())
        active += int(on.sum())
        fired |= on.any(dim=0)
    return {
        "variance_explained": 1 - error / spread,
        "l0": active / len(x),
        "silent": float((~fired).float().mean()),
    }


def use(density: Tensor) -> dict[str, float]:
    """Step 2: shares of dead and of dense latents, from the share of tokens on which each is on, [d_sae]."""
    return {
        "dead_share": float((density < DEAD).double().mean()),
        "dense_share": float((density > DENSE).double().mean()),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def meta_beside(dictionary: Dictionary) -> Path | None:
    """The meta-SAE in NAME-meta or meta/NAME beside a dictionary's folder NAME, or in ../meta/NAME; None if none is."""
    if dictionary.folder is None:
        return None
    folder = dictionary.folder.resolve()
    around = (folder.parent, folder.parent.parent)
    places = [folder.with_name(f"{folder.name}-meta"), *(each / "meta" / folder.name for each in around)]
    return next((place for place in places if (place / "cfg.json").is_file()), None)


def meta_against_null(
    meta: MetaDictionary, rows: Tensor, *, seed: int = 0, progress: Progress = lambda done, of: None
) -> dict[str, float]:
    """Step 6 on the decoder rows in use, [n, d]. progress: called with (steps done, of) while a null is trained."""
    on = (meta.codes(rows) != 0).sum(1).double().mean()
    null = meta.metadata.null_variance_explained
    if null is None:
        turned = rotated(rows, seed)
        alike = MetaDictionary.train(
            turned,
            width=len(meta.directions),
            k=max(1, round(float(on))),
            steps=NULL_STEPS,
            restarts=1,
            seed=seed,
            progress=progress,
        )
        null = alike.variance_explained(turned)
    return {
        "meta_variance_explained": meta.variance_explained(rows),
        "meta_variance_explained_null": null,
        "meta_l0": float(on),
    }


def meta_made_from(meta: MetaDictionary) -> dict[str, Any]:
    """What `mediation train meta` noted of a meta-SAE; empty for one made otherwise."""
    about = meta.metadata
    if about.null_variance_explained is None:
        return {}
    return {"method": about.training_architecture, "width": meta.d_meta} | {name: about[name] for name in MADE}


def with_published(figures: dict[str, float | None]) -> dict[str, dict[str, object]]:
    """Each figure with what has been published of it: {name: {value, published, source}}."""
    nothing = {"value": None, "source": None}
    rows = {name: asdict(PUBLISHED[name]) if name in PUBLISHED else nothing for name in figures}
    return {
        name: {"value": value, "published": rows[name]["value"], "source": rows[name]["source"]}
        for name, value in figures.items()
    }
