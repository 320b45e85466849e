"""Hidden facts: meta-latents whose effect runs through latents that are not *for* them.

Algorithm
1. On every prompt, pool the latents' attribution by meta-latent (mediation.parts) and take the
   strongest by the linear screen; their Shapley values rank them. A fact counts as present in the
   clean prompt when its coefficient, summed over positions, is larger there than in the baseline.
2. Discovery prompts nominate: the top present fact of each discovery prompt is a candidate.
3. Evaluation prompts test every candidate present in them. Removal: take the fact's part through
   non-carriers out of the residual stream and measure. Controls of the same size at the same
   positions: first the other meta-latents of the same latents, then random directions drawn from
   the span of the dictionary's own rows. p = (1 + #{|control| >= |removal|}) / (1 + n).
4. Swap: also take out the strongest fact of the baseline prompt that the clean one lacks, so that the
   counterpart's fact stands in for it, and see whether the answer follows.
5. q by Benjamini and Hochberg (1995) over all tests of the run. A test is flagged as hidden fact
   usage when q <= alpha, the hidden share is at least one half, all carriers are silent, and the
   removal is not negligible beside the behaviour itself.

Discovery and evaluation prompts are different types, so they cannot be confused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.estimators.common import behaviour
from mediation.estimators.integrated_gradients import path_gradient
from mediation.metalatents import Decomposition
from mediation.nodes import MeanState, site_states
from mediation.parts import PooledParts, Surgeon, pooled_parts, shapley_split
from mediation.prompts import Baseline, Batch, DiscoverySet, EvaluationSet, Example, Prompt, collate
from mediation.statistics import benjamini_hochberg, permutation_p
from mediation.subject import SubjectModel

REST = ("other meta-latents", "bias", "residual")  # the parts of a split that are not single meta-latents


@dataclass(frozen=True)
class FactSettings:
    """Settings of the search; the defaults are those of the documentation's figures."""

    carrier_cosine: float = 0.7  # a latent with cos(w_i, u_j) at or above this is the fact's carrier
    parts: int = 8  # meta-latents that enter the Shapley split of a prompt
    permutations: int = 16  # antithetic permutations of that split
    controls: int = 99  # matched controls of a removal test; p cannot fall below 1 / (controls + 1)
    steps: int = 5  # path integral of the screen
    alpha: float = 0.05  # false discovery rate of the flags
    least_effect: float = 0.1  # removal must move the behaviour by this share of max(|m|, |total effect|)
    chunk: int = 256  # sequences in a forward
    seed: int = 0

    def __post_init__(self) -> None:
        if self.controls < 20:
            raise MediationError(f"A removal test needs at least 20 controls, not {self.controls}.")


@dataclass
class PromptSplit:
    """One prompt's facts: the Shapley split of the latents' exact effect at the site.

    `metas` are the meta-latents in the split; `values` and `stderr` [len(metas) + 3] end with `REST`;
    `linear` and `carried` [len(metas)] are the screen's A_j through non-carriers and carriers;
    `present` [len(metas)] marks facts of the clean prompt.
    """

    surgeon: Surgeon
    pooled: PooledParts
    metas: list[int]
    values: Tensor
    stderr: Tensor
    linear: Tensor
    carried: Tensor
    present: Tensor
    total_effect: float

    @property
    def support(self) -> Tensor:
        """Shapley values of `metas` in the direction of the total effect: positive = drives what was seen."""
        return self.values[: len(self.metas)] * (1.0 if self.total_effect >= 0 else -1.0)

    @property
    def ranking(self) -> list[int]:
        """Indices into `metas` of the facts present, strongest support first."""
        return [index for index in self.support.argsort(descending=True).tolist() if self.present[index]]

    @property
    def top(self) -> int | None:
        """The meta-latent named as the fact used; None when no fact is present (abstention)."""
        return self.metas[self.ranking[0]] if self.ranking else None

    def hidden_share(self, index: int) -> float:
        """H_j = |through non-carriers| / (|through non-carriers| + |through carriers|)."""
        hidden, open_ = abs(float(self.linear[index])), abs(float(self.carried[index]))
        return hidden / (hidden + open_) if hidden + open_ else 0.0

    def counterpart(self) -> int | None:
        """The strongest fact of the baseline prompt that the clean one lacks (for the swap)."""
        absent = [i for i in range(len(self.metas)) if not self.present[i]]
        return self.metas[max(absent, key=lambda i: float(self.support[i]))] if absent else None


def split_prompt(
    model: SubjectModel,
    batch: Batch,
    dictionary: Dictionary,
    decomposition: Decomposition,
    baseline: Baseline,
    settings: FactSettings,
    mean: MeanState | None = None,
) -> PromptSplit:
    """Step 1 for the rows of one prompt."""
    means = {dictionary.name: mean} if mean is not None else None
    (state,) = site_states(model, batch, [dictionary], baseline, means)
    pooled = pooled_parts(state, decomposition, settings.carrier_cosine)
    gradient = path_gradient(model, batch, state, settings.steps)
    linear, carried = pooled.screen(gradient)
    strongest = (linear.abs() + carried.abs()).argsort(descending=True)[: settings.parts]
    metas = [meta for meta in strongest.tolist() if linear[meta] != 0]
    surgeon = Surgeon(model, batch, state, settings.chunk)
    split = shapley_split(surgeon, pooled, metas, permutations=settings.permutations, seed=settings.seed)
    present = (pooled.coefficient + pooled.carried)[..., metas].sum(dim=(0, 1)) > 0
    return PromptSplit(
        surgeon=surgeon,
        pooled=pooled,
        metas=metas,
        values=split.values,
        stderr=split.stderr,
        linear=linear[metas],
        carried=carried[metas],
        present=present,
        total_effect=_total_effect(model, batch, baseline, surgeon, state.x - state.baseline_x),
    )


def _total_effect(
    model: SubjectModel, batch: Batch, baseline: Baseline, surgeon: Surgeon, difference: Tensor
) -> float:
    if baseline is Baseline.CORRUPT:
        return float(surgeon.clean - behaviour(model, batch, corrupt=True).sum())
    return float(surgeon.effect(difference[None])[0])


def controls(
    pooled: PooledParts, meta: int, dictionary: Dictionary, n: int, generator: torch.Generator
) -> Tensor:
    """Matched controls of one removal, [n, R, T, d]: the coefficient of `meta` along other directions."""
    active = pooled.coefficient.abs().sum(dim=(0, 1))
    active[meta] = 0.0
    order = active.argsort(descending=True)
    others = order[: min(n // 2, int((active > 0).sum()))]
    rows = dictionary.decoder
    mixture = torch.randn(n - len(others), len(rows), generator=generator).to(rows) @ rows
    directions = torch.cat([pooled.directions[others], torch.nn.functional.normalize(mixture, dim=1)])
    return torch.einsum("rt,nd->nrtd", pooled.coefficient[..., meta], directions)


def find_hidden_facts(
    model: SubjectModel,
    dictionary: Dictionary,
    decomposition: Decomposition,
    discovery: tuple[DiscoverySet, list[Example]],
    evaluation: tuple[EvaluationSet, list[Example]],
    baseline: Baseline = Baseline.CORRUPT,
    settings: FactSettings | None = None,
    *,
    mean: MeanState | None = None,
    labels: dict[int, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> pl.DataFrame:
    """Steps 1 to 5. One row per fact in a prompt's split; `role` says discovery or evaluation.

    Each set comes with its tokenised examples. Columns: prompt, group, expected, role, meta, label,
    shapley, stderr, rank (1 = named as the fact used; 0 = not present), linear, hidden_share,
    carriers_silent, total_effect, behaviour; and for tests (null otherwise) removal, control_mean,
    control_max, swap, swap_follows, p, q, flagged.
    """
    settings = settings or FactSettings()
    labels = labels or {}
    rows: list[dict] = []
    candidates: set[int] = set()
    for role, (prompts, examples) in (("discovery", discovery), ("evaluation", evaluation)):
        for prompt, batch in _prompt_batches(prompts, examples, model):
            split = split_prompt(model, batch, dictionary, decomposition, baseline, settings, mean)
            if role == "discovery" and split.top is not None:
                candidates.add(split.top)
            for index, meta in enumerate(split.metas):
                row = _split_row(prompt, role, split, index, labels)
                if role == "evaluation" and meta in candidates and split.present[index]:
                    row |= _test(split, index, dictionary, settings, seed=(prompt.row, meta))
                rows.append(row)
            progress(prompt.id)
    return _flags(rows, settings)


def _prompt_batches(
    prompts: Iterable[Prompt], examples: list[Example], model: SubjectModel
) -> Iterable[tuple[Prompt, Batch]]:
    by_prompt: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        by_prompt[example.prompt].append(example)
    for index, prompt in enumerate(prompts):
        yield prompt, collate(by_prompt[index]).to(model.device)


def _split_row(prompt: Prompt, role: str, split: PromptSplit, index: int, labels: dict[int, str]) -> dict:
    meta = split.metas[index]
    ranking = split.ranking
    return {
        "prompt": prompt.id,
        "group": prompt.group,
        "expected": prompt.fact,
        "role": role,
        "meta": meta,
        "label": labels.get(meta, f"meta-latent {meta}"),
        "shapley": float(split.values[index]),
        "stderr": float(split.stderr[index]),
        "rank": ranking.index(index) + 1 if index in ranking else 0,
        "linear": float(split.linear[index]),
        "hidden_share": split.hidden_share(index),
        "carriers_silent": not bool(split.pooled.carrier_on[meta]),
        "total_effect": split.total_effect,
        "behaviour": float(split.surgeon.clean),
    }


def _test(
    split: PromptSplit, index: int, dictionary: Dictionary, settings: FactSettings, seed: tuple[int, int]
) -> dict:
    """Steps 3 and 4 for one fact of one prompt."""
    meta = split.metas[index]
    # One seed per test, so that a test's controls do not depend on which tests ran before it.
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence([settings.seed, *seed]).generate_state(1)[0])
    )
    own = split.pooled.patch(meta)
    patches = controls(split.pooled, meta, dictionary, settings.controls, generator)
    removal = float(split.surgeon.effect(own[None])[0])
    null = split.surgeon.effect(patches)
    counterpart = split.counterpart()
    swap = removal
    if counterpart is not None:
        swap = float(split.surgeon.effect((own + split.pooled.patch(counterpart))[None])[0])
    clean = float(split.surgeon.clean)
    return {
        "removal": removal,
        "control_mean": float(null.mean()),
        "control_max": float(null.abs().max()),
        "swap": swap,
        "swap_follows": bool((clean - swap) * clean < 0),
        "p": permutation_p(abs(removal), null.abs().cpu().numpy()),
    }


def _flags(rows: list[dict], settings: FactSettings) -> pl.DataFrame:
    """Step 5."""
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row", infer_schema_length=None)
    tested = table["p"].is_not_null()
    q = np.full(len(table), np.nan)
    if tested.any():
        q[tested.to_numpy()] = benjamini_hochberg(table.filter(tested)["p"].to_numpy())
    scale = pl.max_horizontal(pl.col("behaviour").abs(), pl.col("total_effect").abs())
    flagged = (
        (pl.col("q") <= settings.alpha)
        & (pl.col("hidden_share") >= 0.5)
        & pl.col("carriers_silent")
        & (pl.col("removal").abs() >= settings.least_effect * scale)
    )
    return table.with_columns(pl.Series("q", q).fill_nan(None)).with_columns(
        flagged.fill_null(False).alias("flagged")
    )


SCHEMA = {
    "prompt": pl.String,
    "group": pl.String,
    "expected": pl.String,
    "role": pl.String,
    "meta": pl.Int64,
    "label": pl.String,
    "shapley": pl.Float64,
    "stderr": pl.Float64,
    "rank": pl.Int64,
    "linear": pl.Float64,
    "hidden_share": pl.Float64,
    "carriers_silent": pl.Boolean,
    "total_effect": pl.Float64,
    "behaviour": pl.Float64,
    "removal": pl.Float64,
    "control_mean": pl.Float64,
    "control_max": pl.Float64,
    "swap": pl.Float64,
    "swap_follows": pl.Boolean,
    "p": pl.Float64,
}
