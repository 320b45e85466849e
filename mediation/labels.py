"""What a meta-latent means, from evidence: tagged texts, the unembedding, and where its latents fire.

*Enrichment* (tagged texts)
1. Run texts that say nothing of the fact but name its bearer, each with tags such as
   {"profession": "baker"}; a meta-latent's score on a text is sum_i f_i z_ij over one role's tokens.
2. For every attribute=value, the Mann-Whitney statistic of the score on texts with the tag against all
   others, as a z-score corrected for ties. The label is the tag with the largest z, kept when its p-value
   survives Holm's correction over all tags of that meta-latent, and when the score tells such texts from others
   (area under the ROC curve at least `least_score`): among many texts a meta-latent that fires on three of
   them by chance is "significant" and names nothing.

*Logit lens* (nostalgebraist 2020): the tokens whose logit the direction raises most, with the final
norm's scale folded and the unembedding centred, so that no token wins by a common mean.

*Contexts* (a corpus): names that are scored on held-out text, see `mediation.labelling`.

*Imported* (other people's explanations): see `mediation.explanations`.

All are kept in one Parquet table beside the weights (`LABELS_FILE`). Labels made from contexts do not replace those
made otherwise; their evidence is put beside them.

Labels are hypotheses. Make them on other data than the figures they appear in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scipy import stats
from torch import Tensor

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.metalatents import Decomposition
from mediation.subject import SubjectModel

LEAST_SCORE = 0.75  # a name that holds for half of the texts it names scores this
OWN = "contexts"  # source of the labels that `mediation.labelling` makes
LABELS_FILE = "labels.parquet"  # beside the weights of the dictionary or meta-dictionary it describes


def meta_scores(
    model: SubjectModel, dictionary: Dictionary, decomposition: Decomposition, tokens: Tensor, where: Tensor
) -> Tensor:
    """sum_i f_i z_ij over the positions marked in `where`; tokens and where [B, T] -> [B, n_meta]."""
    site = dictionary.reads
    mask = (tokens != -1).long()
    x = model.forward(tokens.clamp(min=0), mask, read=[site], logits=False).sites[site]
    latents = (dictionary.encode(x) * where.unsqueeze(-1)).sum(dim=1)
    used = (latents != 0).any(dim=0).nonzero().squeeze(1)
    codes = decomposition.decompose(dictionary.decoder[used], used).codes
    return latents[:, used] @ codes


def enrichment(
    scores: Tensor, tags: Sequence[Mapping[str, str]], *, alpha: float = 0.01, least_score: float = LEAST_SCORE
) -> pl.DataFrame:
    """Label meta-latents by the tag they are enriched for; scores [n_texts, n_meta], one dict of tags a text.

    Returns columns meta, label ("attribute=value"), score (area under the ROC curve), p (Holm-corrected),
    for the meta-latents that have one.
    """
    names = sorted({f"{key}={value}" for row in tags for key, value in row.items()})
    member = np.array(
        [
            [f"{k}={v}" in {f"{a}={b}" for a, b in row.items()} for row in tags]
            for k, v in (name.split("=", 1) for name in names)
        ],
        dtype=np.float64,
    )
    values = scores.double().cpu().numpy()
    n = len(values)
    ranks = stats.rankdata(values, axis=0)
    inside = member.sum(axis=1, keepdims=True)
    outside = n - inside
    u = member @ ranks - inside * (inside + 1) / 2
    # The variance of U with ties: proportional to the variance of the ranks themselves.
    spread = np.sqrt(np.maximum(inside * outside / (n * (n - 1)) * ranks.var(axis=0) * n, 1e-12))
    z = np.where(inside * outside > 0, (u - inside * outside / 2) / spread, 0.0)
    best = z.argmax(axis=0)
    columns = np.arange(values.shape[1])
    p = np.minimum(stats.norm.sf(z[best, columns]) * len(names), 1.0)
    auc = u[best, columns] / np.maximum(inside * outside, 1)[best, 0]
    table = pl.DataFrame({"meta": columns, "label": [names[k] for k in best], "score": auc, "p": p})
    return table.filter((pl.col("p") <= alpha) & (pl.col("score") >= least_score))


def logit_effects(model: SubjectModel, directions: Tensor, n: int) -> tuple[list[list[str]], list[list[str]]]:
    """Logit lens: the `n` tokens each direction [m, d_model] raises most, and the `n` it lowers most."""
    unembedding = model.module.get_output_embeddings().weight.detach().float()
    centred = (unembedding - unembedding.mean(dim=0)) * final_norm_scale(model)
    up, down = [], []
    for part in directions.to(centred).split(256):
        effects = part @ centred.T
        up += effects.topk(n, dim=1).indices.tolist()
        down += effects.topk(n, dim=1, largest=False).indices.tolist()
    decode = model.tokenizer.decode
    return [[decode([t]) for t in row] for row in up], [[decode([t]) for t in row] for row in down]


def final_norm_scale(model: SubjectModel) -> Tensor:
    """What the final norm multiplies each coordinate by, [d_model], beside its division by the vector's size.

    Measured on a vector of alternating signs (mean 0, mean square 1), so that it holds for RMSNorm, LayerNorm
    and Gemma's 1 + weight alike.
    """
    signs = torch.ones(1, model.d_model, device=model.device)
    signs[:, 1::2] = -1.0
    norm = model.final_norm
    dtype = next(model.module.parameters()).dtype
    with torch.no_grad():
        scale = (norm(signs.to(dtype)) - norm(-signs.to(dtype))) / 2 * signs
    return scale[0].float()


def save_labels(folder: str | Path, table: pl.DataFrame) -> None:
    """Write labels beside the weights they describe; columns index (or meta) and label at least."""
    path = Path(folder) / LABELS_FILE
    partial = path.with_suffix(".tmp")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        table.write_parquet(partial, compression_level=19)  # labels are written once and shipped
        os.replace(partial, path)
    except OSError as error:
        raise MediationError(f"The labels in {path} cannot be written: {error.strerror}.") from error


def read_labels(folder: str | Path) -> pl.DataFrame | None:
    """The table of labels in a folder, its first column called index; None when the folder has none."""
    path = Path(folder) / LABELS_FILE
    if not path.exists():
        return None
    try:
        table = pl.read_parquet(path)
        return table.rename({"meta": "index"}, strict=False).select("index", "label", pl.exclude("index", "label"))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise MediationError(f"The labels in {path} cannot be read: {error}; delete the file to go without.") from error


def load_labels(folder: str | Path | None) -> dict[int, str]:
    """Labels by index, empty when there are none."""
    table = None if folder is None else read_labels(folder)
    if table is None:
        return {}
    named = table.drop_nulls("label")
    return dict(zip(named["index"].to_list(), named["label"].to_list(), strict=True))


def update_labels(folder: str | Path, table: pl.DataFrame) -> pl.DataFrame:
    """Save `table` over the folder's labels, but keep what it does not replace; returns what was saved.

    Only an imported label replaces one that was not made from contexts. Columns that `table` lacks stay.
    """
    old = read_labels(folder)
    if old is not None:
        given = {"source": pl.lit("enrichment"), "score": pl.lit(None, dtype=pl.Float64)}
        old = old.with_columns(**{name: value for name, value in given.items() if name not in old.columns})
        table = _joined(old, table.with_columns(pl.col("index").cast(old.schema["index"])))
    save_labels(folder, table)
    return table


def _joined(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    both = old.join(new, on="index", how="full", coalesce=True, suffix=":new").sort("index")
    kept = pl.col("label").is_not_null() & (pl.col("source") != OWN)
    imported = pl.col("source:new").is_not_null() & (pl.col("source:new") != OWN)
    own = pl.when(pl.col("source:new").is_null() | (kept & ~imported))
    columns = []
    for name in new.columns[1:]:
        if name not in old.columns:
            columns.append(pl.col(name))
        elif name in ("label", "score", "source"):
            columns.append(own.then(pl.col(name)).otherwise(pl.col(f"{name}:new")).alias(name))
        else:
            columns.append(pl.coalesce(f"{name}:new", name).alias(name))
    rest = [name for name in old.columns[1:] if name not in new.columns]
    return both.select("index", *columns, *rest)
