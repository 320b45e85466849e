"""`mediation trace`: which latents mediate a behaviour on a prompt set, by how much, how sure.

Algorithm
1. Measure every dictionary's fidelity on the prompts at hand.
2. For each batch: gather the nodes of every site; attribute them with `atp` and `ig` (and `exact` when it
   is the chosen estimator); measure the total effect; patch a stratified sample of nodes exactly.
   One shard of nodes, prompts and calibration per batch, so that a killed run resumes at the next batch.
3. Over the set: conservation gap at each site, agreement of each estimator with `exact`, share of
   attribution on error nodes, and the top latents with bootstrap intervals over prompts.
4. For the top latents, total indirect and natural indirect effects, measured.

A prompt whose answers have several tokens is two sequences; its attributions are their sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mediation.behaviours import Behaviour
from mediation.dictionaries import Dictionary, Fidelity, measure_fidelity
from mediation.effects import effects, total_effect
from mediation.errors import MediationError
from mediation.estimators import ESTIMATORS, Estimator, EstimatorSettings, NodeScores, exact
from mediation.estimators.common import contract, states_and_gradients
from mediation.frozen import Semantics
from mediation.nodes import MeanState, SiteState, mean_state, site_states
from mediation.prompts import Baseline, Batch, Example, Half, PromptSet, batches, tokenize
from mediation.runs import Run
from mediation.statistics import agreement, bootstrap_interval, stratified_sample
from mediation.subject import SubjectModel

NODE_KEYS = ["prompt", "site", "position", "latent"]  # latent is null for an error node
ERROR_SHARE = 0.2  # of a site's attribution on error nodes, above which a run warns


@dataclass(frozen=True)
class TraceSettings:
    """Settings of a trace. `sample` nodes of each site are patched exactly; `top` latents are reported."""

    baseline: Baseline = Baseline.CORRUPT
    behaviour: Behaviour = Behaviour.LOGIT_DIFF
    estimator: Estimator = Estimator.IG
    semantics: Semantics = Semantics.GRADIENT
    steps: int = 16
    batch_size: int = 16
    chunk: int = 64
    sample: int = 128
    top: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "chunk", "top"):
            if getattr(self, name) < 1:
                raise MediationError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give 1 or more.")

    @property
    def estimators(self) -> EstimatorSettings:
        return EstimatorSettings(steps=self.steps, chunk=self.chunk)


@dataclass
class Prepared:
    """A prompt set tokenised for a model: its batches, and the mean state where the baseline needs it."""

    prompts: PromptSet
    batches: list[Batch]
    means: dict[str, MeanState] | None
    halves: dict[str, Half | None]

    def share(self, batch: Batch) -> float:
        """The batch's part of all tokens, so that a sample over the batches takes all nodes alike."""
        return int(batch.mask.sum()) / sum(int(each.mask.sum()) for each in self.batches)


def prepare(
    prompts: PromptSet,
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    settings: TraceSettings,
    *,
    alone: bool = False,
) -> Prepared:
    """Tokenise and batch; everything that can be wrong with the input is found here, before any work.

    `alone`: nothing is aligned with these prompts, so that every token keeps its own position as a role. Not for a half
    of a set, be it of one prompt, since the other half's roles have to be the same.
    """
    names = [dictionary.site.canonical() for dictionary in dictionaries]
    if len(set(names)) < len(names):
        raise MediationError("Two dictionaries read the same site; give one dictionary for each site.")
    for dictionary in dictionaries:
        dictionary.check(model)
    examples = tokenize(prompts, model, baseline=settings.baseline, behaviour=settings.behaviour)
    if alone:
        examples = [by_position(example) for example in examples]
    prepared = [batch.to(model.device) for batch in batches(examples, settings.batch_size)]
    means = None
    if settings.baseline is Baseline.MEAN:
        means = {d.name: mean_state(model, prepared, d) for d in dictionaries}
    return Prepared(prompts, prepared, means, prompts.halves(settings.seed))


def seconds_per_token(model: SubjectModel, prepared: Prepared) -> float:
    """Of a forward, measured on the middle batch."""
    probe = prepared.batches[len(prepared.batches) // 2]
    start = time.perf_counter()
    model.forward(probe.clean, probe.mask, positions=probe.target_positions.unique())
    return (time.perf_counter() - start) / probe.clean.numel()


def trace(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prepared: Prepared,
    run: Run,
    settings: TraceSettings,
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Steps 1 to 4; everything it finds is in the run folder (see `summary`)."""
    with run.timed("fidelity"):
        run.record(fidelity={d.name: asdict(fidelity(model, d, prepared)) for d in dictionaries})
    with run.timed("attribution"):
        for number, batch in enumerate(prepared.batches):
            name = f"{number:05d}"
            if not run.has_shard("prompts", name):  # written last, so it marks the batch as done
                _trace_batch(model, dictionaries, batch, prepared, run, settings, name)
            progress(number + 1, len(prepared.batches))
    with run.timed("effects"):
        run.record(trust=trust(run), effects=top_effects(model, dictionaries, prepared, run, settings))


def fidelity(model: SubjectModel, dictionary: Dictionary, prepared: Prepared) -> Fidelity:
    """The dictionary's fidelity on the clean prompts."""
    rows = [row for batch in prepared.batches for row in batch.clean.split(1)]
    masks = [row for batch in prepared.batches for row in batch.mask.split(1)]
    longest = max(row.shape[1] for row in rows)
    tokens = torch.cat([torch.nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(row, (0, longest - row.shape[1])) for row in masks])
    return measure_fidelity(model, dictionary, tokens, mask, batch_size=len(prepared.batches[0]))


def _trace_batch(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    batch: Batch,
    prepared: Prepared,
    run: Run,
    settings: TraceSettings,
    name: str,
) -> None:
    """Step 2 for one batch."""
    states, gradients = states_and_gradients(model, batch, dictionaries, settings.baseline, prepared.means)
    wanted = dict.fromkeys([Estimator.ATP, Estimator.IG, settings.estimator])
    scores = {Estimator.ATP: list(map(contract, states, gradients))}
    scores |= {
        each: ESTIMATORS[each](model, batch, states, settings.estimators) for each in wanted if each not in scores
    }
    nodes, prompts, calibration = [], [], []
    for index, state in enumerate(states):
        of_state = {each: scores[each][index] for each in wanted}
        nodes.append(node_table(state, of_state, batch, prepared.prompts))
        clean, off = total_effect(model, batch, state, settings.baseline)
        totals = {each.value: of_state[each].per_row(state).cpu().numpy() for each in wanted}
        ids = [prepared.prompts[i].id for i in batch.prompt.tolist()]
        prompts.append(
            pl.DataFrame(
                {
                    "prompt": ids,
                    "half": pl.Series([prepared.halves[each] for each in ids], dtype=pl.String),
                    "site": state.dictionary.site.name,
                    "clean": clean.double().cpu().numpy(),
                    "baseline": off.double().cpu().numpy(),
                    **totals,
                }
            )
        )
        wanted_here = ceil(settings.sample * prepared.share(batch))
        calibration.append(calibrate(model, batch, state, of_state, prepared.prompts, wanted_here, settings))
    run.write_shard("nodes", name, pl.concat(nodes))
    run.write_shard("calibration", name, pl.concat(calibration))
    run.write_shard("prompts", name, pl.concat(prompts))


def node_table(state: SiteState, scores: dict[Estimator, NodeScores], batch: Batch, prompts: PromptSet) -> pl.DataFrame:
    """Nodes of one state by prompt: NODE_KEYS, id, role, token, clean, baseline and a column per estimator."""
    error_row, error_position = state.free.nonzero(as_tuple=True)
    row = torch.cat([state.row, error_row]).cpu().numpy()
    position = torch.cat([state.position, error_position]).cpu().numpy()
    errors = len(error_row)
    nothing = np.full(errors, np.nan)
    columns: dict[str, object] = {
        "prompt": [prompts[batch.examples[r].prompt].id for r in row],
        "site": state.dictionary.site.name,
        "position": position,
        "latent": pl.Series([*state.latent.tolist(), *[None] * errors], dtype=pl.Int64),
        "role": [role_of(batch.examples[r], p) for r, p in zip(row, position, strict=True)],
        "token": [batch.examples[r].clean[p] for r, p in zip(row, position, strict=True)],
        "clean": np.concatenate([state.clean.cpu().numpy(), nothing]),
        "baseline": np.concatenate([state.baseline.cpu().numpy(), nothing]),
    }
    for name, each in scores.items():
        values = torch.cat([each.latents, each.error[error_row, error_position]])
        columns[name.value] = values.double().cpu().numpy()
    table = pl.DataFrame(columns)
    sums = [pl.col(each.value).sum() for each in scores]
    return table.group_by(NODE_KEYS, maintain_order=True).agg(
        pl.col("role", "token", "clean", "baseline").first(), *sums
    )


def by_position(example: Example) -> Example:
    """With a role of its own for every token that has none."""
    end = min(target[0] for target in example.targets)
    roles = [role or (f"@{at}" if at < end else "") for at, role in enumerate(example.roles)]
    return replace(example, roles=roles)


def role_of(example: Example, position: int) -> str:
    """The prompt's own role of a token; else "end" for the prompt's last, "answer" beyond it, "rest" before."""
    end = min(target[0] for target in example.targets)
    if position > end:
        return "answer"
    return example.roles[position] or ("end" if position == end else "rest")


def prompt_table(run: Run) -> pl.DataFrame:
    """One row per prompt and site: half, clean, baseline, and the sum of each estimator over all nodes."""
    return run.read("prompts").group_by("prompt", "half", "site", maintain_order=True).sum()


def prompt_ids(run: Run, half: Half) -> list[str]:
    """Sorted ids of one half of the run's prompts; of all, where they are too few to be split."""
    prompts = run.read("prompts").select("prompt", "half").unique()
    return prompts.filter((pl.col("half") == half) | pl.col("half").is_null())["prompt"].sort().to_list()


def calibrate(
    model: SubjectModel,
    batch: Batch,
    state: SiteState,
    scores: dict[Estimator, NodeScores],
    prompts: PromptSet,
    n: int,
    settings: TraceSettings,
) -> pl.DataFrame:
    """Patch a stratified sample of n of the state's nodes exactly, latents and errors (no latent) alike."""
    error_at = state.free.nonzero()
    ranked = scores[settings.estimator]
    sizes = torch.cat([ranked.latents, ranked.error[error_at[:, 0], error_at[:, 1]]])
    chosen = torch.from_numpy(stratified_sample(sizes.cpu().numpy(), n, seed=settings.seed)).to(sizes.device)
    latents = chosen[chosen < len(state.row)]
    errors = error_at[chosen[chosen >= len(state.row)] - len(state.row)]
    marked = torch.zeros_like(state.free)
    marked[errors[:, 0], errors[:, 1]] = True
    (measured,) = exact(model, batch, [state.subset(latents, marked)], settings.estimators)

    def flat(values: NodeScores, chosen_latents: Tensor) -> np.ndarray:
        parts = [values.latents[chosen_latents], values.error[errors[:, 0], errors[:, 1]]]
        return torch.cat(parts).double().cpu().numpy()

    every = torch.arange(len(latents), device=latents.device)
    row = [*state.row[latents].tolist(), *errors[:, 0].tolist()]
    position = [*state.position[latents].tolist(), *errors[:, 1].tolist()]
    return pl.DataFrame(
        {
            "prompt": pl.Series([prompts[batch.examples[r].prompt].id for r in row], dtype=pl.String),
            "site": pl.Series([state.dictionary.site.name] * len(chosen), dtype=pl.String),
            "position": pl.Series(position, dtype=pl.Int64),
            "latent": pl.Series([*state.latent[latents].tolist(), *[None] * len(errors)], dtype=pl.Int64),
            "role": pl.Series(
                [role_of(batch.examples[r], p) for r, p in zip(row, position, strict=True)], dtype=pl.String
            ),
            "exact_effect": flat(measured, every),
            Estimator.ATP.value: flat(scores[Estimator.ATP], latents),
            Estimator.IG.value: flat(scores[Estimator.IG], latents),
        }
    )


def trust(run: Run) -> dict[str, object]:
    """Step 3: what the numbers of a run can bear, and a warning wherever the errors carry much of the attribution."""
    prompts, sample, nodes = prompt_table(run), run.read("calibration"), run.read("nodes")
    effect = prompts["clean"] - prompts["baseline"]
    per_site = prompts.with_columns(te=effect, gap=(pl.col("ig") - effect).abs()).group_by("site", maintain_order=True)
    gaps = per_site.agg(gap=pl.col("gap").mean() / pl.col("te").abs().mean())
    on_error = error_shares(nodes)
    measured = sample["exact_effect"].to_numpy()
    compared = {name: asdict(agreement(sample[name].to_numpy(), measured)) for name in (Estimator.ATP, Estimator.IG)}
    return {
        "conservation_gap": dict(gaps.iter_rows()),
        "error_share": on_error,
        "estimator_vs_exact": {name.value: value for name, value in compared.items()},
        "warnings": error_warnings(on_error),
    }


def error_shares(nodes: pl.DataFrame) -> dict[str, float]:
    """Of each site, the share of absolute `ig` attribution that is on error nodes; nodes: site, latent, ig."""
    size, error = pl.col("ig").abs(), pl.col("latent").is_null()
    return dict(nodes.group_by("site", maintain_order=True).agg(size.filter(error).sum() / size.sum()).iter_rows())


def error_warnings(shares: Mapping[str, float]) -> list[str]:
    """One sentence for each site whose error nodes hold more than ERROR_SHARE of its absolute attribution."""
    return [
        f"{share:.0%} of the attribution at {site} is on error nodes: its dictionary misses that much of the behaviour."
        for site, share in shares.items()
        if share > ERROR_SHARE
    ]


def set_effect(run: Run, *, seed: int = 0) -> dict[str, float]:
    """Mean total effect over the prompts at the first site, with its bootstrap interval."""
    prompts = prompt_table(run)
    first = prompts.filter(pl.col("site") == prompts["site"][0])
    values = (first["clean"] - first["baseline"]).to_numpy()
    low, high = bootstrap_interval(values, seed=seed)
    return {
        "mean": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "clean": float(first["clean"].mean()),  # type: ignore[arg-type]
        "baseline": float(first["baseline"].mean()),  # type: ignore[arg-type]
        "prompts": len(values),
    }


def top_latents(
    run: Run,
    n: int,
    *,
    by_site: bool = False,
    estimator: Estimator = Estimator.IG,
    seed: int = 0,
    chosen_on: Collection[str] | None = None,
) -> pl.DataFrame:
    """The n strongest (site, role, latent) of the set by |mean attribution|, errors included.

    With `by_site`, the n strongest latents of each site and all its error nodes. With `chosen_on`, the ids of some
    prompts, the latents are chosen and ordered by their mean over those; every figure is still of the whole set.

    Attribution is summed over a role's positions in each prompt and averaged over all prompts, counting
    zero where the latent has no node; low and high are the bootstrap interval of that mean. `prompts` counts
    those on whose clean side it is active, `token` is the id of the token it fires hardest on.
    """
    nodes, prompts = run.read("nodes"), run.read("prompts")["prompt"].unique(maintain_order=True)
    keys = ["site", "role", "latent"]
    sums = nodes.group_by([*keys, "prompt"], maintain_order=True).agg(
        attribution=pl.col(estimator.value).sum(),
        peak=pl.col("clean").max(),
        token=pl.col("token").sort_by("clean", descending=True).first(),
    )
    choosing = pl.col("prompt").is_in(list(prompts if chosen_on is None else chosen_on))
    strongest = (
        sums.group_by(keys, maintain_order=True)
        .agg(
            attribution=pl.col("attribution").sum() / len(prompts),
            chosen_by=pl.col("attribution").filter(choosing).sum().abs(),
            prompts=(pl.col("peak") != 0).sum(),
            token=pl.col("token").sort_by("peak", descending=True).first(),
        )
        .sort("chosen_by", descending=True, maintain_order=True)
        .drop("chosen_by")
    )
    if by_site:
        place = pl.col("attribution").cum_count().over("site", pl.col("latent").is_null())
        strongest = strongest.filter((place <= n) | pl.col("latent").is_null())
    else:
        strongest = strongest.head(n)
    strongest = strongest.with_row_index("rank")
    chosen = sums.join(strongest.select("rank", *keys), on=keys, nulls_equal=True)
    values = np.zeros((len(prompts), len(strongest)))
    order = {prompt: i for i, prompt in enumerate(prompts)}
    rows = [order[prompt] for prompt in chosen["prompt"]]
    values[rows, chosen["rank"].to_numpy()] = chosen["attribution"].to_numpy()
    low, high = bootstrap_interval(values, seed=seed)
    return strongest.with_columns(low=pl.Series(low), high=pl.Series(high))


def top_effects(
    model: SubjectModel,
    dictionaries: Sequence[Dictionary],
    prepared: Prepared,
    run: Run,
    settings: TraceSettings,
) -> list[dict[str, object]]:
    """Step 4: mean TE, TIE, NIE, NDE over the prompts of each top latent, at all its positions together."""
    table = top_latents(run, settings.top, estimator=settings.estimator, seed=settings.seed)
    found = []
    for dictionary in dictionaries:
        here = table.filter((pl.col("site") == dictionary.site.name) & pl.col("latent").is_not_null())
        latents = here["latent"].unique(maintain_order=True).to_list()
        if not latents:
            continue
        sums = np.zeros((4, len(latents)))
        for batch, state in _states(model, dictionary, prepared, settings):
            mediators = [(state.latent == latent).nonzero().squeeze(1) for latent in latents]
            measured = effects(model, batch, state, settings.baseline, mediators)
            te = measured.te[:, None].expand_as(measured.tie)
            sums += torch.stack([te, measured.tie, measured.nie, measured.nde]).double().sum(dim=1).cpu().numpy()
        for latent, column in zip(latents, (sums / len(prepared.prompts)).T, strict=True):
            named = dict(zip(("te", "tie", "nie", "nde"), column.tolist(), strict=True))
            found.append({"site": dictionary.site.name, "latent": latent, **named})
    return found


def _states(
    model: SubjectModel, dictionary: Dictionary, prepared: Prepared, settings: TraceSettings
) -> Iterator[tuple[Batch, SiteState]]:
    for batch in prepared.batches:
        (state,) = site_states(model, batch, [dictionary], settings.baseline, prepared.means)
        yield batch, state
