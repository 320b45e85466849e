"""Edges against finite differences of the bare model in float64, and against each other under any packing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from circuits.edges import (
    REST,
    EdgeRows,
    Edges,
    Output,
    Plan,
    Sources,
    Targets,
    _jobs,
    _passes,
    _split,
    edges,
    first_sources,
    mean_embedding,
)
from mediation.dictionaries import Coordinates
from mediation.effects import total_effect
from mediation.errors import MediationError
from mediation.estimators.common import behaviour, behaviour_gradient
from mediation.frozen import Frozen, Semantics
from mediation.loading import ARCHITECTURES
from mediation.nodes import SiteState, site_states
from mediation.prompts import Baseline, Batch, Example, collate
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel
from tests.setups import alike, pairs, random_dictionary, tiny
from tests.tiny_models import D_MODEL, VOCAB

MIX = (
    "blocks.0.hook_attn_out",
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_mlp_out",
    "blocks.2.hook_attn_out",
    "blocks.2.hook_mlp_out",
)
TRANSCODED = {MIX[3]: "blocks.1.mlp.hook_in", MIX[5]: "blocks.2.mlp.hook_in"}
BETWEEN = Site.parse("blocks.1.hook_resid_post")  # a place of directions where no dictionary is
STEP = 1e-4  # of the finite differences, in float64


class Setting(NamedTuple):
    model: SubjectModel
    batch: Batch
    states: list[SiteState]
    sources: list[Sources]
    targets: list[Targets]


def make_batch() -> Batch:
    """Three pairs; the last one's behaviour is the log-probability of an answer of two tokens."""
    torch.manual_seed(3)
    examples = []
    for row, length in enumerate((4, 5, 6)):
        clean = torch.randint(3, 60, (length,)).tolist()
        other = list(clean)
        other[1] = (clean[1] + 5) % 60 + 3
        targets = [(length - 1, 10, 1), (length - 1, 11, -1)]
        if row == 2:
            targets = [(length - 2, clean[-1], 1), (length - 1, 12, 1)]
        examples.append(Example(row, clean, other, targets, [""] * length))
    return collate(examples)


def build(
    folder: Path, kind: str, baseline: Baseline, names: tuple[str, ...] = MIX, batch: Batch | None = None
) -> Setting:
    model, batch = tiny(folder / kind, kind), batch or make_batch()
    kinds = ("standard", "jumprelu")
    dictionaries = [
        random_dictionary(
            folder / f"{kind}-{i}", name, architecture=kinds[i % 2], d_sae=10, seed=i, reads=TRANSCODED.get(name)
        )
        for i, name in enumerate(names)
    ]
    states = site_states(model, batch, dictionaries, baseline)
    sources = [Sources.of(state) for state in states] + [Sources.embeddings(model, batch, baseline)]
    return Setting(model, batch, states, sources, all_targets(model, batch, states))


def all_targets(model: SubjectModel, batch: Batch, states: list[SiteState], each: int = 7) -> list[Targets]:
    """Some latents of every site, directions, logits and a logit difference at several positions, the behaviour."""
    _, gradients = behaviour_gradient(model, batch, [state.dictionary.site for state in states])
    targets = [
        Targets.latents(state, gradient, torch.linspace(0, len(state.row) - 1, each).long())
        for state, gradient in zip(states, gradients, strict=True)
    ]
    row, position = torch.tensor([0, 1, 2]), torch.tensor([2, 4, 3])
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, D_MODEL, generator=generator)
    targets.append(Targets.directions(BETWEEN, row, position, directions, ["a", "b", "c"]))
    targets.append(Targets.logits(model, row, position, torch.tensor([5, 9, 20])))
    targets.append(Targets.logits(model, row, position, torch.tensor([5, 9, 20]), torch.tensor([6, 7, 8])))
    targets.append(Targets.behaviour(batch))
    return targets


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return build(tmp_path_factory.mktemp("edges"), "llama", Baseline.CORRUPT)


# The oracle: the bare model in float64 with hooks of its own ------------------------------------------------


def in_float64(module: Any) -> Any:
    """A float64 copy of a Llama. Its norms cast to float32 inside, which would drown the differences."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        if isinstance(part, LlamaRMSNorm):

            def forward(x: Tensor, weight: Tensor = part.weight, eps: float = part.variance_epsilon) -> Tensor:
                return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

            vars(part)["forward"] = forward
    return module


def held_run(module: Any, tokens: Tensor, held: Mapping[Site, Tensor], read: list[Site]) -> tuple[dict, Tensor]:
    """What arrives at the sites `read` [T, d], and the logits [T, vocab], the sites `held` going on as given."""
    arrived: dict[Site, Tensor] = {}

    def swap(site: Site, x: Tensor) -> Tensor:
        arrived[site] = x[0]
        return held[site][None] if site in held else x

    def at_input(site: Site) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (swap(site, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": swap(site, kwargs["hidden_states"])}

        return hook

    def at_output(site: Site) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], output: Any) -> Any:
            return (swap(site, output[0]), *output[1:]) if isinstance(output, tuple) else swap(site, output)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for site in {*held, *read}:
            block = module.model.layers[site.layer]
            if site.stream is Stream.RESID_PRE:
                handle = block.register_forward_pre_hook(at_input(site), with_kwargs=True)
            elif site.stream is Stream.MLP_IN:
                handle = block.mlp.register_forward_pre_hook(at_input(site), with_kwargs=True)
            else:
                part = {Stream.ATTN_OUT: block.self_attn, Stream.MLP_OUT: block.mlp}.get(site.stream, block)
                handle = part.register_forward_hook(at_output(site))
            hooks.callback(handle.remove)
        logits = module(input_ids=tokens[None], use_cache=False).logits[0]
    return arrived, logits


def target_values(batch: Batch, targets: list[Targets], row: int, arrived: dict, logits: Tensor) -> dict[int, float]:
    """Value of every target of a row, by its index over all places."""
    values, first = {}, 0
    for each in targets:
        for k in range(len(each)):
            if int(each.row[k]) != row:
                continue
            at, vector = int(each.position[k]), each.vector[k].double()
            if isinstance(each.place, Site):
                values[first + k] = float(arrived[each.place][at] @ vector)
            elif each.place is Output.LOGITS:
                values[first + k] = float(logits[at] @ vector)
            else:
                sums = [
                    sign * logits[place].log_softmax(-1)[token] for place, token, sign in batch.examples[row].targets
                ]
                values[first + k] = float(sum(sums))
        first += len(each)
    return values


def test_edges_are_the_models_own_derivatives_with_all_other_sites_held(setting: Setting) -> None:
    """Every edge of every kind of source and target, by central differences in float64."""
    model, batch, _, sources, targets = setting
    found = edges(model, batch, sources, targets, chunk=5)
    module = in_float64(model.module)
    places = [each.place for each in targets if isinstance(each.place, Site)]
    sites = [each.site for each in found.sources]
    seen: dict[tuple[int, int, int, int], dict[int, float]] = {}
    kinds = set()
    for edge in range(len(found.weight)):
        k, source = int(found.target[edge]), int(found.source[edge])
        row, position, latent = int(found.row[k]), int(found.position[edge]), int(found.latent[edge])
        if (key := (row, source, position, latent)) not in seen:
            tokens = batch.clean[row, : int(batch.mask[row].sum())]
            clean, _ = held_run(module, tokens, {}, sites)
            ends = []
            for sign in (1, -1):
                moved = clean[sites[source]].clone()
                moved[position] += sign * STEP * found.sources[source].vector(row, position, latent).double()
                arrived, logits = held_run(module, tokens, clean | {sites[source]: moved}, places + sites)
                ends.append(target_values(batch, targets, row, arrived, logits))
            seen[key] = {target: (ends[0][target] - ends[1][target]) / (2 * STEP) for target in ends[0]}
        expected = seen[key].pop(k)
        assert float(found.weight[edge]) == pytest.approx(expected, rel=2e-3, abs=1e-5)
        if abs(expected) > 1e-3:
            kinds.add((source, latent == REST, found.names[k].rsplit("/", 1)[0]))
    assert {source for source, _, _ in kinds} == set(range(len(sources)))
    for (row, source, position, latent), rest in seen.items():  # no edge that acts is missing
        assert all(abs(value) < 1e-6 for value in rest.values()), (row, source, position, latent)
    assert len(seen) > 200
    assert len(found.weight) > 2000


def test_contribution_is_the_edge_times_the_targets_effect_on_the_behaviour(setting: Setting) -> None:
    """dm/df_d by finite differences: move x along d's decoder row at d's place, everything after it free."""
    model, batch, states, sources, targets = setting
    found = edges(model, batch, sources, targets)
    gain = torch.cat([each.gain for each in targets])
    assert torch.equal(found.contribution, found.weight * gain[found.target])
    module = in_float64(model.module)
    for state, each in zip(states, targets, strict=False):
        for k in (1, 4):
            row, at, site = int(each.row[k]), int(each.position[k]), state.dictionary.site
            tokens = batch.clean[row, : int(batch.mask[row].sum())]
            clean, _ = held_run(module, tokens, {}, [site])
            latent = int(each.names[k].rsplit("/", 1)[1])
            values = []
            for sign in (1, -1):
                moved = clean[site].clone()
                moved[at] += sign * STEP * state.dictionary.decoder[latent].double()
                _, logits = held_run(module, tokens, {site: moved}, [])
                (value,) = target_values(batch, [Targets.behaviour(batch)], row, {}, logits).values()
                values.append(value)
            assert float(each.gain[k]) == pytest.approx((values[0] - values[1]) / (2 * STEP), rel=1e-3, abs=1e-5)


def test_a_latents_target_is_its_pre_activation(setting: Setting) -> None:
    """Where a latent is on, target and activation differ by its bias, the same at every row and position."""
    model, batch, states, sources, _ = setting
    for state in states:
        on = (state.clean > 0).nonzero()[:, 0]
        found = edges(model, batch, sources, [Targets.latents(state, torch.zeros_like(state.x), on)])
        for latent in state.latent[on].unique():
            biases = (state.clean[on] - found.value)[state.latent[on] == latent]
            assert (biases.max() - biases.min()) < 1e-4
        counts = state.latent[on].bincount()
        assert counts.max() > 1


# Sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("baseline", [Baseline.CORRUPT, Baseline.ZERO])
def test_linear_in_edges_and_constant_are_the_targets_value(tmp_path: Path, kind: str, baseline: Baseline) -> None:
    """Latents, errors, embeddings and the constant; the behaviour's log-softmax is the one part that bends."""
    model, batch, _, sources, targets = build(tmp_path, kind, baseline)
    targets = targets[:-1]
    found = edges(model, batch, sources, targets, semantics=Semantics.LINEAR)
    assert torch.allclose(found.total + found.constant, found.value, atol=1e-4, rtol=1e-4)
    sums = torch.zeros_like(found.total).index_add(0, found.target, found.weight)
    assert torch.allclose(sums, found.total, atol=1e-4)
    assert found.change.abs().max() > 0.1
    bent = edges(model, batch, sources, targets)
    assert bent.gap.abs().max() > 1e-2
    assert torch.allclose(bent.value, found.value, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_doubling_a_latent_moves_everything_by_its_column(tmp_path: Path, kind: str) -> None:
    """100 random nodes; the non-linearities frozen and every other site held, as circuit-tracer is tested."""
    model, batch, states, sources, _ = build(tmp_path, kind, Baseline.ZERO)
    targets = [
        Targets.latents(state, torch.zeros_like(state.x), torch.arange(len(state.row)))
        for state in sorted(states, key=lambda state: state.dictionary.site.depth)
    ]
    row = torch.arange(3).repeat_interleave(VOCAB)
    last = batch.mask.sum(1)[row] - 1
    targets.append(Targets.logits(model, row, last, torch.arange(VOCAB).repeat(3)))
    found = edges(model, batch, sources, targets, semantics=Semantics.LINEAR, chunk=64)
    offsets = torch.tensor([0, *(len(each) for each in targets)]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    frozen = Frozen(model)
    with frozen.record():
        clean = values_of(model, batch, found, targets, {})
    moved_most = 0.0
    for _ in range(100):
        index = int(torch.randint(len(states), (1,), generator=generator))
        state = states[index]
        node = int(torch.randint(len(state.row), (1,), generator=generator))
        at = (int(state.row[node]), int(state.position[node]))
        latent = int(state.latent[node])
        source = next(i for i, each in enumerate(found.sources) if each.site == state.dictionary.site)
        doubled = state.x.clone()
        doubled[at] += state.clean[node] * state.dictionary.decoder[latent]
        with frozen.replay():
            moved = values_of(model, batch, found, targets, {state.dictionary.site: doubled})
        column = torch.zeros(int(offsets[-1]))
        mine = (found.source == source) & (found.position == at[1]) & (found.latent == latent)
        mine &= found.row[found.target] == at[0]
        column[found.target[mine]] = found.weight[mine]
        assert torch.allclose(moved - clean, column, atol=5e-4)
        moved_most = max(moved_most, float(column.abs().max()))
    assert moved_most > 0.1


def values_of(
    model: SubjectModel, batch: Batch, found: Edges, targets: list[Targets], changed: dict[Site, Tensor]
) -> Tensor:
    """Values of latents' pre-activations and of last-position logits with every source site held."""
    held = {each.site: each.x for each in found.sources} | changed
    read = [each.place for each in targets if isinstance(each.place, Site)]
    edit = {s: lambda _, v=v: v for s, v in held.items()}
    run = model.forward(batch.clean, batch.mask, read=read, cut=list(held), edit=edit)
    assert run.logits is not None
    parts = []
    for each in targets:
        value = run.sites[each.place] if isinstance(each.place, Site) else run.logits
        parts.append((value[each.row, each.position] * each.vector).sum(-1))
    return torch.cat(parts)


def test_gap_vanishes_quadratically_as_the_perturbation_shrinks(setting: Setting) -> None:
    model, batch, _, sources, targets = setting
    gaps, changes = [], []
    for size in (0.02, 0.01):
        scaled = [
            replace(each, delta=size * each.delta, rest=size * each.rest, base=torch.lerp(each.x, each.base, size))
            for each in sources
        ]
        found = edges(model, batch, scaled, targets)
        gaps.append(float(found.gap.abs().max()))
        changes.append(float(found.change.abs().max()))
    assert gaps[1] < 0.35 * gaps[0]
    assert gaps[1] < 0.05 * changes[1]


@pytest.mark.parametrize("names", [MIX, MIX[:2], ("blocks.2.hook_resid_pre",), ("blocks.1.hook_resid_post",)])
def test_behaviour_edges_along_the_path_sum_to_the_total_effect(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Whatever sites there are: those that reach the behaviour directly carry all of it."""
    model, batch, states, sources, _ = build(tmp_path, "llama", Baseline.CORRUPT, names)
    found = edges(model, batch, sources, [Targets.behaviour(batch)], steps=48)
    clean, off = total_effect(model, batch, states[0], Baseline.CORRUPT)
    assert torch.allclose(found.change, clean - off, atol=1e-4)
    assert torch.allclose(found.total, clean - off, atol=5e-3)
    assert torch.allclose(found.value, behaviour(model, batch), atol=1e-4)
    assert set(found.table()["target"]) == {"target"}


# Packing -----------------------------------------------------------------------------------------------------


def by_id(found: Edges, rows: list[int] | None = None) -> dict[tuple[int, str, str], tuple[float, float]]:
    table = found.table()
    return {(rows[r] if rows else r, s, t): (w, c) for r, s, t, w, c in table.iter_rows()}


def same(found: dict, reference: dict) -> None:
    assert found.keys() == reference.keys()
    for key, (weight, contribution) in reference.items():
        assert found[key][0] == pytest.approx(weight, rel=1e-4, abs=2e-5)
        assert found[key][1] == pytest.approx(contribution, rel=1e-4, abs=2e-5)


@settings(max_examples=12, deadline=None)
@given(data=st.data(), chunk=st.integers(1, 24), semantics=st.sampled_from(Semantics))
def test_packing_changes_nothing(setting: Setting, data: st.DataObject, chunk: int, semantics: Semantics) -> None:
    """Any chunk, order of places, order of targets, grouping of targets, and choice of rows in the batch."""
    model, batch, _, sources, targets = setting
    reference = by_id(edges(model, batch, sources, targets, chunk=64, semantics=semantics))
    rows = data.draw(st.lists(st.sampled_from(range(3)), min_size=1, max_size=3, unique=True))
    part = torch.tensor(rows)
    mixed = []
    for number in data.draw(st.permutations(range(len(targets)))):
        of_rows = targets[number].take(torch.isin(targets[number].row, part).nonzero()[:, 0])
        order = torch.tensor(data.draw(st.permutations(range(len(of_rows)))), dtype=torch.long)
        middle = data.draw(st.integers(0, len(of_rows)))
        for piece in (order[:middle], order[middle:]):
            chosen = of_rows.take(piece)
            mixed.append(chosen.on_rows(torch.tensor([rows.index(r) for r in chosen.row.tolist()], dtype=torch.long)))
    there = [on_rows(each, rows) for each in sources]
    found = by_id(edges(model, batch.rows(part), there, mixed, chunk=chunk, semantics=semantics), rows)
    same(found, {key: value for key, value in reference.items() if key[0] in rows})


def on_rows(sources: Sources, rows: list[int]) -> Sources:
    """The sources of some rows of the batch, in that order."""
    where = [(sources.row == row).nonzero()[:, 0] for row in rows]
    at = torch.cat(where)
    fields = {name: getattr(sources, name)[at] for name in ("position", "latent", "delta")}
    fields |= {name: getattr(sources, name)[torch.tensor(rows)] for name in ("rest", "x", "base", "free")}
    new = torch.cat([torch.full_like(each, k) for k, each in enumerate(where)])
    return replace(sources, row=new, **fields)


@settings(deadline=None)
@given(
    ends=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=30), min_size=1, max_size=4),
    begins=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    chunk=st.integers(1, 12),
)
def test_jobs_carry_every_target_once_on_its_row_and_within_their_length(
    setting: Setting, ends: list[list[tuple[int, int]]], begins: list[int], chunk: int
) -> None:
    """Whatever targets at whatever places; jobs hold at most `chunk` prompts, passes one target of a row in a turn."""
    sources = setting.sources
    batch = collate([Example(row, [row + 3] * 6, None, [(5, 10, 1)], [""] * 6) for row in range(4)])
    places = [Site.parse(name) for name in MIX] + [BETWEEN]
    targets = [
        Targets.directions(
            places[number % len(places)],
            torch.tensor([row for row, _ in each], dtype=torch.long),
            torch.tensor([position for _, position in each], dtype=torch.long),
            torch.zeros(len(each), D_MODEL),
            [""] * len(each),
        )
        for number, each in enumerate(ends)
    ]
    plan = Plan.of(sorted(sources, key=lambda each: each.site.depth), targets)
    seen: list[list[int]] = [[] for _ in targets]
    for job in _jobs(plan, batch, torch.tensor(begins), chunk):
        assert 0 < len(job.rows) <= chunk
        used = set()
        for place, chosen, row in job.targets:
            seen[place] += chosen.tolist()
            assert torch.equal(job.rows[row], targets[place].row[chosen])
            assert (targets[place].position[chosen] < job.length).all()
            assert (targets[place].position[chosen] >= job.begin).all()
            assert job.begin <= min(begins[row] for row in job.rows.tolist())
            assert job.wall == (plan.reach[place] or [-1])[0]
            carried = []
            for some, turn in _passes(row, 3):
                assert len({(int(row[each]), int(at)) for each, at in zip(some, turn, strict=True)}) == len(some)
                assert turn.max() < 3
                carried += some.tolist()
            assert sorted(carried) == list(range(len(row)))
            used |= set(row.tolist())
        assert used == set(range(len(job.rows)))
    assert [sorted(each) for each in seen] == [list(range(len(each))) for each in ends]


@given(ends=st.lists(st.integers(1, 12), min_size=1, max_size=7), starting=st.floats(0, 100))
def test_a_prompts_targets_are_split_where_that_costs_least(ends: list[int], starting: float) -> None:
    """Against every way to cut the sorted ends."""

    def cost(groups: list[list[int]]) -> float:
        return sum(starting + max(group) * (1 + len(group)) for group in groups)

    ordered = sorted(ends)
    best = float("inf")
    for cuts in product([False, True], repeat=len(ends) - 1):
        groups = [[ordered[0]]]
        for end, new in zip(ordered[1:], cuts, strict=True):
            groups = [*groups, [end]] if new else [*groups[:-1], [*groups[-1], end]]
        best = min(best, cost(groups))
    found = _split(np.array(ends), starting)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(ends)))
    assert cost([[ends[each] for each in group] for group in found]) == pytest.approx(best)


def test_in_edges_averaged_along_the_path_sum_to_the_targets_change(setting: Setting) -> None:
    """Where the gradient at the clean prompt leaves a gap; whatever the chunk. A path of one step has its middle."""
    model, batch, _, sources, targets = setting
    clean = edges(model, batch, sources, targets)
    found = edges(model, batch, sources, targets, steps=24)
    scale = clean.change.abs().max()
    assert clean.gap.abs().max() > 1e-2 * scale
    assert found.gap.abs().max() < 2e-4 * scale
    assert torch.allclose(found.value, clean.value, atol=1e-5)
    same(by_id(edges(model, batch, sources, targets, steps=24, chunk=3)), by_id(found))
    with pytest.raises(MediationError, match="leave steps out"):
        edges(model, batch, sources, targets, steps=4, semantics=Semantics.LINEAR)


def test_keep_leaves_the_strongest_and_totals_count_all(setting: Setting) -> None:
    model, batch, _, sources, targets = setting
    full = edges(model, batch, sources, targets)
    few = edges(model, batch, sources, targets, keep=3)
    assert torch.allclose(full.total, few.total, atol=1e-5)
    for k in range(len(full.total)):
        strongest = full.weight[full.target == k].abs().sort(descending=True).values[:3]
        assert torch.allclose(few.weight[few.target == k].abs().sort(descending=True).values, strongest, atol=1e-5)


def test_a_sink_is_given_every_edge_once(setting: Setting) -> None:
    model, batch, _, sources, targets = setting
    full = edges(model, batch, sources, targets, chunk=7)
    given: list[EdgeRows] = []
    rest = edges(model, batch, sources, targets, chunk=7, sink=given.append)
    assert len(given) > 3
    assert len(rest.weight) == 0
    assert torch.equal(rest.total, full.total)
    assert torch.equal(rest.gap, full.gap)
    frame = pl.concat([each.frame() for each in given]).sort("target", maintain_order=True)
    for name in ("target", "source", "position", "latent", "weight"):
        assert frame[name].to_list() == getattr(full, name).tolist()


@pytest.mark.parametrize("semantics", Semantics)
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_positions_before_the_first_source_are_run_once_and_change_nothing(
    tmp_path: Path, kind: str, semantics: Semantics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that begin alike, and to differ from their counterparts at the 10th, 9th and 13th token."""
    setting = build(tmp_path, kind, Baseline.CORRUPT, batch=alike())
    model, batch, _, sources, targets = setting
    tokens = []
    run = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *args, **kw: tokens.append(ids.numel()) or run(ids, *args, **kw))

    def found() -> tuple[dict, dict]:
        along = edges(model, batch, sources, targets, steps=3)
        return by_id(edges(model, batch, sources, targets, semantics=semantics)), by_id(along)

    assert first_sources(sources, batch).tolist() == [9, 8, 12]
    saved, run_saved = found(), sum(tokens)
    tokens.clear()
    monkeypatch.setattr("mediation.nodes.SHORTEST_PREFIX", 1000)
    whole = found()
    assert run_saved < 0.7 * sum(tokens)
    for short, long in zip(saved, whole, strict=True):
        same(short, long)


# Edges of the definition -------------------------------------------------------------------------------------


def test_a_residual_site_hides_what_is_before_it_and_a_branch_only_itself(setting: Setting) -> None:
    model, batch, _, sources, targets = setting
    table = edges(model, batch, sources, targets).table()
    heads = table.with_columns(
        source=table["source"].str.split("/").list.get(0), target=table["target"].str.split("/").list.get(0)
    )
    reached = {(s, t) for s, t in heads.select("source", "target").iter_rows()}
    start, wall = ("embed", *MIX[:2]), MIX[2]
    assert {s for s, t in reached if t == MIX[0]} == {"embed"}
    assert {s for s, t in reached if t == MIX[1]} == {"embed", MIX[0]}
    assert {s for s, t in reached if t == wall} == set(start)
    assert {s for s, t in reached if t == MIX[4]} == {wall, MIX[3]}
    assert {s for s, t in reached if t == "target"} == set(MIX[2:])
    assert {s for s, t in reached if t == "a"} == {wall, MIX[3]}


def test_coordinates_are_nodes_without_a_dictionary(setting: Setting) -> None:
    """They read what they write, leave no error, and carry together what latents and errors carry."""
    model, batch, states, sources, targets = setting
    plain = [Coordinates(state.dictionary.site, D_MODEL) for state in states]
    there = site_states(model, batch, plain, Baseline.CORRUPT)
    assert all(not state.error.any() for state in there)
    assert torch.equal(there[0].clean, there[0].x[there[0].row, there[0].position, there[0].latent])
    found = edges(model, batch, [Sources.of(state) for state in there] + [sources[-1]], targets)
    reference = edges(model, batch, sources, targets)
    for source in range(len(sources)):
        sums = []
        for each in (found, reference):
            mine = each.source == source
            sums.append(torch.zeros_like(each.total).index_add(0, each.target[mine], each.weight[mine]))
        assert torch.allclose(*sums, atol=1e-4)
    assert set(found.latent[found.source == 1].tolist()) == {REST, *range(D_MODEL)}
    node = Targets.latents(there[2], torch.zeros_like(there[2].x), torch.tensor([5]))
    own = edges(model, batch, sources, [node])
    assert torch.allclose(own.value, there[2].clean[5], atol=1e-5)


def test_parallel_branches_do_not_feed_each_other(tmp_path: Path) -> None:
    model, batch, _, sources, targets = build(tmp_path, "gpt_neox", Baseline.CORRUPT)
    table = edges(model, batch, sources, targets).table()
    mlp = table.filter(table["target"].str.starts_with(MIX[1]))
    assert len(mlp)
    assert not mlp["source"].str.starts_with(MIX[0]).any()


def test_zero_and_mean_baseline_of_embeddings(setting: Setting) -> None:
    model, batch = setting.model, setting.batch
    module: Any = model.module
    table = module.get_input_embeddings().weight[batch.clean]
    zero = Sources.embeddings(model, batch, Baseline.ZERO)
    mean = Sources.embeddings(model, batch, Baseline.MEAN, torch.ones(D_MODEL))
    assert torch.allclose(zero.rest[zero.free], table[zero.free])
    assert torch.allclose(mean.rest[mean.free], table[mean.free] - 1)
    assert torch.equal(zero.base + zero.rest, zero.x)
    assert not zero.rest[~zero.free].any()
    assert not zero.free[:, 0].any()


def test_no_targets_gives_no_edges(setting: Setting) -> None:
    model, batch, _, sources, targets = setting
    none = targets[0].take(torch.zeros(0, dtype=torch.long))
    found = edges(model, batch, sources, [none])
    assert found.table().height == 0
    assert found.table().columns == ["row", "source", "target", "weight", "contribution"]
    assert found.value.shape == (0,)


def test_refusals(setting: Setting) -> None:
    model, batch, _, sources, targets = setting
    with pytest.raises(MediationError, match="1 or more"):
        edges(model, batch, sources, targets, chunk=0)
    twice = replace(sources[0], site=Site(0, Stream.RESID_POST))
    with pytest.raises(MediationError, match=r"blocks\.1\.hook_resid_pre"):
        edges(model, batch, [*sources, twice], targets)


# Embeddings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_embeddings_around_their_mean_add_up_to_nothing(tmp_path: Path, kind: str) -> None:
    """Over the set, whatever a family makes of its table: Gemma scales the embeddings, GPT-2 adds positions."""
    model = tiny(tmp_path, kind)
    made = [collate(pairs(n, corrupt=False, seed=n)) for n in (3, 2)]
    mean = mean_embedding(model, made)
    changes = [Sources.embeddings(model, batch, Baseline.MEAN, mean).rest.sum((0, 1)) for batch in made]
    assert changes[0].abs().max() > 1e-2
    assert torch.allclose(sum(changes), torch.zeros_like(mean), atol=1e-4)
