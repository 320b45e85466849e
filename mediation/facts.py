"""Hidden facts: meta-latents whose effect runs through latents that are not *for* them.

Algorithm
1. On every prompt, pool the latents' attribution by meta-latent (mediation.parts) and take the
   strongest by the linear screen; their Shapley values rank them, in the direction of the total effect.
   A fact counts as present in the clean prompt when its coefficient, summed over positions, is larger
   there than in the baseline; a fact of the baseline prompt names the attribute, not the clean value.
2. Facts come in kinds: "profession=baker" is of the kind "profession"; a label of another form is a kind of its
   own. Discovery prompts nominate, for their group (the question asked), the kinds of their strongest part.
3. Evaluation prompts of the group test every nominated kind, on the fact of that kind the prompt has most of:
   chosen by coefficient, never by effect, so that the choice cannot flatter the test. Removal: take the fact's
   part through non-carriers out of the residual stream and measure. Controls: the same coefficient at the same
   positions along other directions, the whole kind turned at once (mediation.removal).
4. Swap: also take out the baseline prompt's fact of the same kind (without one, its strongest fact), so that
   the counterpart stands in for it, and see whether the answer follows.
5. One test for each group and kind: the removals' mean size over prompts against that of its controls; q over all
   kinds and groups that could have been nominated (mediation.removal). A prompt is flagged when its test has
   q <= alpha, and on the prompt itself the hidden share is at least one half, all carriers are silent, and the
   removal moves the behaviour against the total effect, not negligibly beside the behaviour: a fact that is used
   brings about the effect.

Discovery and evaluation prompts are different types, so they cannot be confused.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mediation.dictionaries import Dictionary
from mediation.errors import FidelityWarning, MediationError
from mediation.estimators.common import behaviour
from mediation.estimators.integrated_gradients import path_gradient
from mediation.metalatents import Decomposition
from mediation.nodes import MeanState, site_states
from mediation.parts import PooledParts, Surgeon, pooled_parts, shapley_split
from mediation.prompts import Baseline, Batch, DiscoverySet, EvaluationSet, Example, Prompt, collate
from mediation.removal import least_q, q_values, removal_p, turned
from mediation.shapley import MAX_EXACT
from mediation.subject import SubjectModel

NEAREST = 3  # latents shown of a meta-latent that has no carrier
REST = ("other meta-latents", "bias", "residual")  # the parts of a split that are not single meta-latents


@dataclass(frozen=True)
class FactSettings:
    """Settings of the search; the defaults are those of the documentation's figures."""

    carrier_cosine: float = 0.7  # a latent with cos(w_i, u_j) at or above this is the fact's carrier
    parts: int = 8  # meta-latents that enter the Shapley split of a prompt
    permutations: int = 16  # antithetic permutations of that split
    kinds: int = 3  # kinds of fact a group's discovery prompts may nominate, most frequent first
    controls: int = 999  # matched controls of a removal test; p cannot fall below 1 / (controls + 1)
    steps: int = 5  # path integral of the screen
    alpha: float = 0.05  # false discovery rate of the flags
    least_effect: float = 0.1  # removal must move the behaviour by this share of max(|m|, |total effect|)
    chunk: int = 256  # sequences in a forward
    seed: int = 0

    def __post_init__(self) -> None:
        if self.controls < 20:
            raise MediationError(f"A removal test needs at least 20 controls, not {self.controls}.")

    @property
    def passes(self) -> float:
        """Forwards of each prompt, at most, on average of discovery and evaluation; a backward counts two."""
        n_parts = self.parts + len(REST)
        coalitions = 2**n_parts if n_parts <= MAX_EXACT else self.permutations * (n_parts - 1) + 2
        return 3 * self.steps + coalitions + self.kinds * (self.controls + 2) / 2


@dataclass
class PromptSplit:
    """One prompt's facts: the Shapley split of the latents' exact effect at the site.

    `metas` are the meta-latents in the split; `values` and `stderr` [len(metas) + 3] end with `REST`.
    Of every meta-latent: `linear` and `carried` [n_meta] are the screen's A_j through non-carriers and
    carriers; `present` [n_meta] marks facts of the clean prompt.
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
    def direction(self) -> float:
        """Sign of the total effect."""
        return 1.0 if self.total_effect >= 0 else -1.0

    @property
    def support(self) -> Tensor:
        """Shapley values of `metas` in the direction of the total effect: positive = drives what was seen."""
        return self.values[: len(self.metas)] * self.direction

    @property
    def ranking(self) -> list[int]:
        """Indices into `metas`, strongest support first."""
        return self.support.argsort(descending=True).tolist()

    @property
    def top(self) -> int | None:
        """The meta-latent that drives the effect most, on either side of the contrast; None = abstention."""
        return self.metas[self.ranking[0]] if self.metas else None

    @property
    def top_present(self) -> int | None:
        """The strongest of the clean prompt's own facts."""
        return next((self.metas[index] for index in self.ranking if self.present[self.metas[index]]), None)

    @property
    def active(self) -> list[int]:
        """Meta-latents in the latents of the prompt, on either side of the contrast."""
        return (self.pooled.coefficient + self.pooled.carried).any(dim=0).any(dim=0).nonzero().squeeze(1).tolist()

    def hidden_share(self, meta: int) -> float:
        """H_j = |through non-carriers| / (|through non-carriers| + |through carriers|)."""
        hidden, open_ = abs(float(self.linear[meta])), abs(float(self.carried[meta]))
        return hidden / (hidden + open_) if hidden + open_ else 0.0

    def most_present(self, kind: Tensor) -> int | None:
        """Of the meta-latents that `kind` [n_meta] marks, the one the clean prompt has most of; None = it has none."""
        return _largest(self.pooled.coefficient.sum(dim=(0, 1)), kind & self.present)

    def counterpart(self, kind: Tensor) -> int | None:
        """The baseline prompt's fact of this kind; without one, its strongest fact of any kind (for the swap)."""
        own = _largest(-self.pooled.coefficient.sum(dim=(0, 1)), kind & ~self.present)
        if own is not None:
            return own
        return next((self.metas[index] for index in self.ranking if not self.present[self.metas[index]]), None)


def _largest(size: Tensor, among: Tensor) -> int | None:
    """Index of the largest positive `size` where `among`, both [n]."""
    size = size.masked_fill(~among, 0.0)
    best = int(size.argmax())
    return best if size[best] > 0 else None


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
    metas = [meta for meta in strongest.tolist() if linear[meta] != 0 or carried[meta] != 0]
    surgeon = Surgeon(model, batch, state, settings.chunk)
    split = shapley_split(surgeon, pooled, metas, permutations=settings.permutations, seed=settings.seed)
    return PromptSplit(
        surgeon=surgeon,
        pooled=pooled,
        metas=metas,
        values=split.values,
        stderr=split.stderr,
        linear=linear,
        carried=carried,
        present=(pooled.coefficient + pooled.carried).sum(dim=(0, 1)) > 0,
        total_effect=_total_effect(model, batch, baseline, surgeon, state.x - state.baseline_x),
    )


def _total_effect(model: SubjectModel, batch: Batch, baseline: Baseline, surgeon: Surgeon, difference: Tensor) -> float:
    if baseline is Baseline.CORRUPT:
        return float(surgeon.clean - behaviour(model, batch, corrupt=True).sum())
    return float(surgeon.effect(difference[None])[0])


def nearest_latents(
    dictionary: Dictionary, decomposition: Decomposition, metas: Sequence[int], carrier_cosine: float
) -> pl.DataFrame:
    """The latents whose rows are most like each of some meta-latents, its carriers among them.

    Columns meta, latent, cosine, carrier; of every meta-latent all carriers, and NEAREST latents in any case, most
    alike first.
    """
    cosines = dictionary.decoder @ decomposition.directions[list(metas)].T  # rows are of length 1, or 0
    rows = []
    for meta, column in zip(metas, cosines.T, strict=True):
        best = column.topk(max(min(NEAREST, len(column)), int((column >= carrier_cosine).sum())))
        rows += [(meta, *each) for each in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    schema = {"meta": pl.Int64, "latent": pl.Int64, "cosine": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(carrier=pl.col("cosine") >= carrier_cosine)


def kind_of(label: str) -> str:
    """ "profession" of "profession=baker" (no space before the sign); any other label is a kind of its own."""
    attribute, sign, _ = label.partition("=")
    return attribute if sign and attribute and not any(map(str.isspace, attribute)) else label


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
    hypotheses: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> pl.DataFrame:
    """Steps 1 to 5. One row per fact in a prompt's split or tested on it; `role` says discovery or evaluation.

    Each set comes with its tokenised examples. hypotheses: kinds to test for each group, stated beforehand, in place of
    those that discovery prompts nominate. Columns: prompt, group, expected, role, meta, label, kind; for facts
    in the split (null otherwise) shapley, stderr, rank (1 = drives the effect most); present (in the clean prompt),
    linear, hidden_share, carriers_silent, total_effect, behaviour; for tested facts (null otherwise) removal,
    swap, swap_follows, counterpart (the meta-latent that the swap takes out too), controls (how far each control moved
    the behaviour, without its sign), p, q; and flagged. Warns when so few controls can flag nothing.
    """
    settings = settings or FactSettings()
    names = [(labels or {}).get(meta, f"meta-latent {meta}") for meta in range(len(decomposition.directions))]
    kinds = [kind_of(name) for name in names]
    rows: list[dict] = []
    nominated: dict[str, Counter[str]] = defaultdict(Counter)
    active: dict[str, set[int]] = defaultdict(set)  # meta-latents in the latents of a group's discovery prompts
    turns: dict[tuple[str, str], Tensor] = {}
    measured: dict[tuple[str, str], list[tuple[float, np.ndarray]]] = defaultdict(list)
    for role, (prompts, examples) in (("discovery", discovery), ("evaluation", evaluation)):
        for prompt, batch in _prompt_batches(prompts, examples, model):
            split = split_prompt(model, batch, dictionary, decomposition, baseline, settings, mean)
            if role == "discovery":
                active[prompt.group].update(split.active)
                if split.top is not None:
                    nominated[prompt.group][kinds[split.top]] += 1
            tested: dict[int, dict] = {}
            if role == "evaluation":
                best = [kind for kind, _ in nominated[prompt.group].most_common(settings.kinds)]
                for kind in best if hypotheses is None else hypotheses.get(prompt.group, ()):
                    same = torch.tensor([each == kind for each in kinds], device=split.values.device)
                    meta = split.most_present(same)
                    if meta is None:
                        continue
                    test = (prompt.group, kind)
                    own = same.nonzero().squeeze(1).tolist()
                    if test not in turns:
                        others = [j for j in sorted(active[prompt.group]) if kinds[j] != kind]
                        turns[test] = _turns(decomposition, own, others, dictionary, settings, test)
                    tested[meta] = _test(split, meta, same, turns[test][:, own.index(meta)])
                    measured[test].append((tested[meta]["removal"], np.array(tested[meta]["controls"])))
            shown = [*split.metas, *(meta for meta in tested if meta not in split.metas)]
            rows += [_row(prompt, role, split, meta, names) | tested.get(meta, {}) for meta in shown]
            progress(prompt.id)
    candidates = sum(len({kinds[meta] for meta in metas}) for metas in active.values())
    if hypotheses is not None:
        candidates = sum(map(len, hypotheses.values()))
    return _flags(rows, measured, candidates, settings)


def _prompt_batches(
    prompts: Iterable[Prompt], examples: list[Example], model: SubjectModel
) -> Iterable[tuple[Prompt, Batch]]:
    by_prompt: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        by_prompt[example.prompt].append(example)
    for index, prompt in enumerate(prompts):
        yield prompt, collate(by_prompt[index]).to(model.device)


def _row(prompt: Prompt, role: str, split: PromptSplit, meta: int, names: list[str]) -> dict:
    row = {
        "prompt": prompt.id,
        "group": prompt.group,
        "expected": prompt.fact,
        "role": role,
        "meta": meta,
        "label": names[meta],
        "kind": kind_of(names[meta]),
        "present": bool(split.present[meta]),
        "linear": float(split.linear[meta]),
        "hidden_share": split.hidden_share(meta),
        "carriers_silent": not bool(split.pooled.carrier_on[meta]),
        "total_effect": split.total_effect,
        "behaviour": float(split.surgeon.clean),
    }
    if meta in split.metas:
        index = split.metas.index(meta)
        row |= {
            "shapley": float(split.values[index]),
            "stderr": float(split.stderr[index]),
            "rank": split.ranking.index(index) + 1,
        }
    return row


def _turns(
    decomposition: Decomposition,
    own: list[int],
    others: list[int],
    dictionary: Dictionary,
    settings: FactSettings,
    test: tuple[str, str],
) -> Tensor:
    """The controls' directions of one test, [controls, len(own), d]."""
    # One seed per test, so that a test's controls do not depend on which tests ran before it.
    seed = np.random.SeedSequence((settings.seed, *"\n".join(test).encode())).generate_state(1)[0]
    directions = decomposition.directions
    generator = torch.Generator().manual_seed(int(seed))
    return turned(directions[own], directions[others], dictionary.decoder, settings.controls, generator)


def _test(split: PromptSplit, meta: int, same_kind: Tensor, turns: Tensor) -> dict:
    """Steps 3 and 4 for one fact of one prompt; turns [controls, d] stand in for its direction."""
    surgeon, coefficient, own = split.surgeon, split.pooled.coefficient[..., meta], split.pooled.hidden(meta)
    counterpart = split.counterpart(same_kind)
    swapped = own if counterpart is None else own + split.pooled.hidden(counterpart)
    removal, swap = surgeon.effect(torch.stack([own, swapped])).tolist()
    # A forward pass at a time: the patches of all controls of a long prompt are gigabytes.
    parts = (torch.einsum("rt,nd->nrtd", coefficient, part) for part in turns.split(surgeon.chunk))
    null = torch.cat([surgeon.effect(part) for part in parts]).double().cpu().numpy()
    clean = float(surgeon.clean)
    follows = (clean - swap) * clean < 0
    measured = {"removal": removal, "swap": swap, "swap_follows": follows, "counterpart": counterpart}
    return measured | {"controls": np.abs(null).tolist()}


def _flags(
    rows: list[dict],
    measured: dict[tuple[str, str], list[tuple[float, np.ndarray]]],
    candidates: int,
    settings: FactSettings,
) -> pl.DataFrame:
    """Step 5."""
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    schema = {"group": pl.String, "kind": pl.String, "p": pl.Float64}
    found = [
        (*test, removal_p([effect for effect, _ in each], np.stack([null for _, null in each])))
        for test, each in measured.items()
    ]
    tests = pl.DataFrame(found, schema=schema, orient="row")
    tests = tests.with_columns(q=pl.Series(q_values(tests["p"].to_numpy(), candidates), dtype=pl.Float64))
    if found and (least := least_q(len(found), candidates, settings.controls)) > settings.alpha:
        warnings.warn(
            f"{candidates} pairs of question and kind could have been tested, {len(found)} were: with "
            f"{settings.controls} controls no q falls below {least:.2f}, so nothing can be flagged; "
            "give more controls.",
            FidelityWarning,
            stacklevel=3,
        )
    table = table.join(tests, on=["group", "kind"], how="left", maintain_order="left").with_columns(
        pl.when(pl.col("removal").is_not_null()).then(pl.col("p", "q"))
    )
    scale = pl.max_horizontal(pl.col("behaviour").abs(), pl.col("total_effect").abs())
    flagged = (
        (pl.col("q") <= settings.alpha)
        & (pl.col("hidden_share") >= 0.5)
        & pl.col("carriers_silent")
        & (pl.col("removal") * pl.col("total_effect").sign() >= settings.least_effect * scale)
    )
    return table.with_columns(flagged.fill_null(False).alias("flagged"))


SCHEMA: dict[str, type[pl.DataType] | pl.DataType] = {
    "prompt": pl.String,
    "group": pl.String,
    "expected": pl.String,
    "role": pl.String,
    "meta": pl.Int64,
    "label": pl.String,
    "kind": pl.String,
    "shapley": pl.Float64,
    "stderr": pl.Float64,
    "rank": pl.Int64,
    "present": pl.Boolean,
    "linear": pl.Float64,
    "hidden_share": pl.Float64,
    "carriers_silent": pl.Boolean,
    "total_effect": pl.Float64,
    "behaviour": pl.Float64,
    "removal": pl.Float64,
    "swap": pl.Float64,
    "swap_follows": pl.Boolean,
    "counterpart": pl.Int64,
    "controls": pl.List(pl.Float64),
}
