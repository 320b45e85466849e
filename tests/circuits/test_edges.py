"""Edges against finite differences of the bare model in float64, and against each other under any packing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from circuits.edges import REST, EdgeBlock, Sources, Targets, _pack, behaviour_edges, edges
from circuits.graph import NodeKind
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.estimators.common import behaviour_gradient, contract
from mediation.nodes import SiteState, site_states
from mediation.prompts import Baseline, Batch, Example, collate
from mediation.sites import Site
from mediation.subject import SubjectModel
from tests.tiny_models import D_MODEL, save_tiny

UP, DOWN = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"
STEP = 1e-4  # of the finite differences, in float64


def save_dictionary(folder: Path, hook: str, architecture: str, d_sae: int = 48) -> Path:
    """A random SAELens dictionary, its decoder rows of various norms, about half of its latents on."""
    torch.manual_seed(len(hook) + d_sae)
    metadata = SAEMetadata(hook_name=hook)
    common: Any = {"d_in": D_MODEL, "d_sae": d_sae, "dtype": "float32", "device": "cpu", "metadata": metadata}
    sae: Any
    if architecture == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
        sae.threshold.data.uniform_(0, 0.2)
    else:
        sae = StandardSAE(StandardSAEConfig(**common))
    sae.W_enc.data.normal_(0, 0.5)
    sae.W_dec.data.normal_(0, 0.5)
    sae.b_enc.data.normal_(0, 0.1)
    sae.b_dec.data.normal_(0, 0.1)
    sae.save_model(folder)
    return folder


def make_batch(corrupt: bool = True) -> Batch:
    torch.manual_seed(3)
    examples = []
    for row, length in enumerate((4, 5, 7)):
        clean = torch.randint(3, 60, (length,)).tolist()
        other = list(clean)
        other[1] = (clean[1] + 5) % 60 + 3
        targets = [(length - 1, 10, 1), (length - 1, 11, -1)]
        examples.append(Example(row, clean, other if corrupt else None, targets, [""] * length))
    return collate(examples)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[SubjectModel, Batch, list[SiteState]]:
    folder = tmp_path_factory.mktemp("edges")
    model = SubjectModel.load(save_tiny("llama", folder / "model"), device="cpu")
    dictionaries = [
        Dictionary.load(save_dictionary(folder / "up", UP, "standard")),
        Dictionary.load(save_dictionary(folder / "down", DOWN, "jumprelu")),
    ]
    batch = make_batch()
    return model, batch, site_states(model, batch, dictionaries, Baseline.CORRUPT)


def some_targets(model: SubjectModel, batch: Batch, state: SiteState, n: int = 14) -> Targets:
    _, (gradient,) = behaviour_gradient(model, batch, [state.dictionary.site])
    chosen = torch.linspace(0, len(state.row) - 1, n).long()
    return Targets.of(state, gradient, chosen)


def in_float64(module: Any) -> Any:
    """A float64 copy of a Llama. Its norms cast to float32 inside, which would drown the differences."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        if isinstance(part, LlamaRMSNorm):

            def forward(x: Tensor, weight: Tensor = part.weight, eps: float = part.variance_epsilon) -> Tensor:
                return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

            vars(part)["forward"] = forward
    return module


def run_layers(module: Any, tokens: Tensor, first: int, change: Tensor) -> Tensor:
    """resid_post of the last block, [T, d], with `change` [T, d] added to resid_pre of block `first`."""
    held: list[Tensor] = []

    def push(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] + change, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] + change}

    def catch(_: Any, args: tuple[Any, ...], output: Any) -> None:
        held.append(output[0] if isinstance(output, tuple) else output)

    layers = module.model.layers
    hooks = [layers[first].register_forward_pre_hook(push, with_kwargs=True)]
    hooks.append(layers[-1].register_forward_hook(catch))
    with torch.no_grad():
        module(input_ids=tokens[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return held[0].reshape(tokens.shape[0], -1)


def source_direction(sources: Sources, block: EdgeBlock, edge: int, row: int) -> tuple[Tensor, float]:
    """The direction a source writes and how far it moves."""
    position, latent = int(block.position[edge]), int(block.latent[edge])
    if latent == REST:
        return sources.rest[row, position].double(), 1.0
    where = (sources.row == row) & (sources.position == position) & (sources.latent == latent)
    return sources.decoder[latent].double(), float(sources.delta[where])


def check_against_differences(
    model: SubjectModel, batch: Batch, sources: Sources, state: SiteState, block: EdgeBlock
) -> int:
    """Every edge equals delta * d(e_d . x_down) / d(source), by central differences in float64."""
    module = in_float64(model.module)
    targets = block.targets
    assert targets is not None
    cache: dict[tuple[int, int, int], Tensor] = {}
    for edge in range(len(block.weight)):
        k = int(block.target[edge])
        row, position = int(targets.row[k]), int(block.position[edge])
        key = (row, position, int(block.latent[edge]))
        if key not in cache:
            direction, delta = source_direction(sources, block, edge, row)
            tokens = batch.clean[row, : int(batch.mask[row].sum())]
            change = torch.zeros(len(tokens), len(direction), dtype=torch.float64)
            change[position] = STEP * direction
            first = sources.site.layer
            rise = run_layers(module, tokens, first, change) - run_layers(module, tokens, first, -change)
            cache[key] = delta * rise / (2 * STEP)
        encoder = state.dictionary.encoder[targets.latent[k]].double()
        expected = float(cache[key][targets.position[k]] @ encoder)
        assert float(block.weight[edge]) == pytest.approx(expected, rel=1e-3, abs=2e-6)
    return len(block.weight)


def test_edges_are_the_models_own_derivatives(
    setting: tuple[SubjectModel, Batch, list[SiteState]],
) -> None:
    model, batch, (up, down) = setting
    targets = some_targets(model, batch, down)
    block = edges(model, batch, Sources.of(up), down, targets, chunk=5)
    assert set(targets.row.tolist()) == {0, 1, 2}  # prompts of different lengths share a backward
    assert (block.latent == REST).any()
    assert (block.latent != REST).any()
    assert block.weight.abs().max() > 0.05
    assert check_against_differences(model, batch, Sources.of(up), down, block) > 300


def test_embedding_edges_are_the_models_own_derivatives(
    setting: tuple[SubjectModel, Batch, list[SiteState]],
) -> None:
    model, batch, (_, down) = setting
    sources = Sources.embeddings(model, batch, Baseline.CORRUPT)
    targets = some_targets(model, batch, down)
    block = edges(model, batch, sources, down, targets)
    assert block.rest_kind is NodeKind.EMBEDDING
    assert (block.latent == REST).all()
    assert block.weight.abs().max() > 0.05
    assert check_against_differences(model, batch, sources, down, block) > 20


def test_no_source_that_could_act_is_missing(setting: tuple[SubjectModel, Batch, list[SiteState]]) -> None:
    """Active sources at or before the target's position, each once, and an error node per free position."""
    model, batch, (up, down) = setting
    targets = some_targets(model, batch, down)
    block = edges(model, batch, Sources.of(up), down, targets)
    for k in range(len(targets.row)):
        row, last = int(targets.row[k]), int(targets.position[k])
        here = (up.row == row) & (up.position <= last)
        expected = set(zip(up.position[here].tolist(), up.latent[here].tolist(), strict=True))
        expected |= {(p, REST) for p in up.free[row].nonzero()[:, 0].tolist() if p <= last}
        mine = block.target == k
        found = list(zip(block.position[mine].tolist(), block.latent[mine].tolist(), strict=True))
        assert sorted(found) == sorted(expected)


def test_in_edges_sum_to_the_targets_change_as_the_perturbation_shrinks(
    setting: tuple[SubjectModel, Batch, list[SiteState]],
) -> None:
    """A Llama is curved: the gap must vanish quadratically, and be small beside the change itself."""
    model, batch, (up, down) = setting
    x, site = up.x, up.dictionary.site
    gaps = []
    for size in (0.02, 0.01):
        baseline_x = x + size * (up.baseline_x - x)
        written = baseline_x

        def edit(_: Tensor, value: Tensor = written) -> Tensor:
            return value

        moved = model.forward(
            batch.clean, batch.mask, read=[down.dictionary.site], edit={site: edit}, logits=False
        ).sites[down.dictionary.site]
        sources = Sources.of(up)
        scaled = Sources(**(vars(sources) | {"delta": size * sources.delta, "rest": size * sources.rest}))
        there = SiteState(**(vars(down) | {"baseline_x": moved.detach()}))
        block = edges(model, batch, scaled, there, some_targets(model, batch, down))
        assert block.gap.abs().max() < 0.05 * block.change.abs().max()
        assert torch.allclose(
            block.total, torch.zeros_like(block.total).index_add(0, block.target, block.weight), atol=1e-6
        )
        gaps.append(float(block.gap.abs().max()))
    assert gaps[1] < 0.35 * gaps[0]


def test_contribution_is_the_edge_times_the_targets_own_effect(
    setting: tuple[SubjectModel, Batch, list[SiteState]],
) -> None:
    """dm/df_d by finite differences: move x along d's decoder row at d's place."""
    model, batch, (up, down) = setting
    targets = some_targets(model, batch, down, 5)
    block = edges(model, batch, Sources.of(up), down, targets)
    assert torch.equal(block.contribution, block.weight * targets.gain[block.target])
    module = in_float64(model.module)
    decoder = down.dictionary.decoder.double()
    for k in range(5):
        row, at = int(targets.row[k]), int(targets.position[k])
        tokens = batch.clean[row, : int(batch.mask[row].sum())]
        x = run_layers(module, tokens, 0, torch.zeros(len(tokens), D_MODEL, dtype=torch.float64))
        values = []
        for sign in (1, -1):
            pushed = x.clone()
            pushed[at] += sign * STEP * decoder[targets.latent[k]]
            logits = module.lm_head(module.model.norm(pushed))[-1]
            values.append(float(logits[10] - logits[11]))
        assert float(targets.gain[k]) == pytest.approx((values[0] - values[1]) / (2 * STEP), rel=1e-3, abs=1e-5)


def by_id(block: EdgeBlock) -> dict[tuple[int, str, str], tuple[float, float]]:
    return {(r, s, t): (w, c) for r, s, t, w, c in block.table().iter_rows()}


@settings(max_examples=12, deadline=None)
@given(chunk=st.integers(1, 20), order=st.permutations(range(14)))
def test_packing_changes_nothing(
    setting: tuple[SubjectModel, Batch, list[SiteState]], chunk: int, order: list[int]
) -> None:
    model, batch, (up, down) = setting
    targets = some_targets(model, batch, down)
    reference = by_id(edges(model, batch, Sources.of(up), down, targets, chunk=64))
    mixed = Targets(*(value[torch.tensor(order)] for value in vars(targets).values()))
    found = by_id(edges(model, batch, Sources.of(up), down, mixed, chunk=chunk))
    assert found.keys() == reference.keys()
    for key, (weight, contribution) in reference.items():
        assert found[key][0] == pytest.approx(weight, rel=1e-4, abs=1e-5)
        assert found[key][1] == pytest.approx(contribution, rel=1e-4, abs=1e-5)


@given(rows=st.lists(st.integers(0, 6), max_size=60), chunk=st.integers(1, 12))
def test_pack_carries_every_target_once_on_a_copy_of_its_row(rows: list[int], chunk: int) -> None:
    seen = []
    for copies, passes in _pack(rows, chunk):
        assert 0 < len(copies) <= chunk
        assert all(passes)
        for chosen in passes:
            seen += list(chosen.values())
            assert all(copies[place] == rows[target] for place, target in chosen.items())
    assert sorted(seen) == list(range(len(rows)))


def test_keep_leaves_the_strongest_and_totals_count_all(
    setting: tuple[SubjectModel, Batch, list[SiteState]],
) -> None:
    model, batch, (up, down) = setting
    targets = some_targets(model, batch, down)
    full = edges(model, batch, Sources.of(up), down, targets)
    few = edges(model, batch, Sources.of(up), down, targets, keep=3)
    assert torch.allclose(full.total, few.total, atol=1e-6)
    for k in range(len(targets.row)):
        strongest = full.weight[full.target == k].abs().sort(descending=True).values[:3]
        assert torch.allclose(few.weight[few.target == k].abs(), strongest, atol=1e-6)


def test_behaviour_edges_are_node_attribution(setting: tuple[SubjectModel, Batch, list[SiteState]]) -> None:
    model, batch, (_, down) = setting
    m, (gradient,) = behaviour_gradient(model, batch, [down.dictionary.site])
    block = behaviour_edges(Sources.of(down), gradient, m)
    scores = contract(down, gradient)
    expected = {
        (r, f"{DOWN}/{p}/{i}", "target"): float(a)
        for r, p, i, a in zip(
            down.row.tolist(), down.position.tolist(), down.latent.tolist(), scores.latents, strict=True
        )
    }
    expected |= {(r, f"{DOWN}/{p}/error", "target"): float(scores.error[r, p]) for r, p in down.free.nonzero().tolist()}
    found = by_id(block)
    assert found.keys() == expected.keys()
    assert all(found[key][0] == pytest.approx(value, abs=1e-5) for key, value in expected.items())
    assert torch.allclose(block.total.double(), scores.per_row(down), atol=1e-4)
    assert torch.equal(block.weight, block.contribution)


def test_zero_and_mean_baseline_of_embeddings(setting: tuple[SubjectModel, Batch, list[SiteState]]) -> None:
    model, _, _ = setting
    batch = make_batch(corrupt=False)
    module: Any = model.module
    table = module.get_input_embeddings().weight[batch.clean]
    zero = Sources.embeddings(model, batch, Baseline.ZERO)
    mean = Sources.embeddings(model, batch, Baseline.MEAN, torch.ones(D_MODEL))
    assert torch.allclose(zero.rest[zero.free], table[zero.free])
    assert torch.allclose(mean.rest[mean.free], table[mean.free] - 1)
    assert not zero.rest[~zero.free].any()
    assert not zero.free[:, 0].any()


def test_no_targets_gives_no_edges(setting: tuple[SubjectModel, Batch, list[SiteState]]) -> None:
    model, batch, (up, down) = setting
    block = edges(model, batch, Sources.of(up), down, some_targets(model, batch, down, 0))
    assert block.table().height == 0
    assert block.table().columns == ["row", "source", "target", "weight", "contribution"]


def test_refusals(setting: tuple[SubjectModel, Batch, list[SiteState]]) -> None:
    model, batch, (up, down) = setting
    targets = some_targets(model, batch, down, 1)
    with pytest.raises(MediationError, match="comes first"):
        edges(model, batch, Sources.of(down), up, targets)
    with pytest.raises(MediationError, match="1 or more"):
        edges(model, batch, Sources.of(up), down, targets, chunk=0)
    sources = Sources(**(vars(Sources.of(up)) | {"site": Site.parse("blocks.1.hook_mlp_out")}))
    with pytest.raises(MediationError, match="residual"):
        edges(model, batch, sources, down, targets)
