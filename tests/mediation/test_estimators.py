"""Estimators against exact interventions, conservation at a cut, and themselves under any packing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from mediation.dictionaries import Dictionary
from mediation.effects import effects, total_effect
from mediation.estimators import ESTIMATORS, Estimator, EstimatorSettings, NodeScores, atp, exact, ig
from mediation.estimators.common import contract, states_and_gradients
from mediation.nodes import first_free, mean_state, site_states
from mediation.prompts import Baseline, Example, collate
from mediation.subject import SubjectModel
from tests.setups import alike, batch_of, linear_model, pairs, random_dictionary, shared_data, tiny

SITES = ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out")
SETTINGS = EstimatorSettings(steps=16, chunk=7)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    return tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory: pytest.TempPathFactory) -> list[Dictionary]:
    folder = tmp_path_factory.mktemp("saes")
    return [random_dictionary(folder / site, site, seed=i) for i, site in enumerate(SITES)]


def close(a: NodeScores, b: NodeScores, tolerance: float) -> bool:
    scale = b.latents.abs().max()
    return bool(
        (a.latents - b.latents).abs().max() <= tolerance * scale
        and (a.error - b.error).abs().max() <= tolerance * max(scale, b.error.abs().max())
    )


@pytest.mark.parametrize("baseline", list(Baseline))
def test_one_pass_gives_what_states_and_atp_give(
    llama: SubjectModel, dictionaries: list[Dictionary], baseline: Baseline
) -> None:
    batch = batch_of(5)
    means = {d.name: mean_state(llama, [batch], d) for d in dictionaries} if baseline is Baseline.MEAN else None
    states = site_states(llama, batch, dictionaries, baseline, means)
    scores = atp(llama, batch, states, EstimatorSettings())
    together, gradients = states_and_gradients(llama, batch, dictionaries, baseline, means)
    for state, one, score, gradient in zip(states, together, scores, gradients, strict=True):
        assert torch.equal(state.latent, one.latent)
        assert torch.allclose(state.error, one.error, atol=1e-5)
        assert not one.x.requires_grad
        assert close(contract(one, gradient), score, 1e-4)


@pytest.mark.parametrize("baseline", list(Baseline))
def test_all_estimators_agree_on_a_linear_model(
    tmp_path: Path, dictionaries: list[Dictionary], baseline: Baseline
) -> None:
    model, batch = linear_model(tmp_path), batch_of(corrupt=baseline is Baseline.CORRUPT)
    means = {d.name: mean_state(model, [batch], d) for d in dictionaries}
    states = site_states(model, batch, dictionaries, baseline, means)
    first, path, measured = (each(model, batch, states, SETTINGS) for each in ESTIMATORS.values())
    for a, b, c, state in zip(first, path, measured, states, strict=True):
        assert len(state.row) > 20
        assert close(a, c, 1e-5)
        assert close(b, c, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_what_comes_before_the_first_difference_is_run_once_and_changes_nothing(
    tmp_path: Path, dictionaries: list[Dictionary], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(tmp_path, kind), alike()
    states = site_states(model, batch, dictionaries, Baseline.CORRUPT)
    assert [int(first_free(batch, state.free).min()) for state in states] == [8, 8, 8]
    short = ig(model, batch, states, SETTINGS)
    monkeypatch.setattr("mediation.nodes.SHORTEST_PREFIX", 1000)
    for few, all_positions in zip(short, ig(model, batch, states, SETTINGS), strict=True):
        assert close(few, all_positions, 1e-4)


@pytest.mark.parametrize("baseline", list(Baseline))
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_ig_conserves_the_total_effect_at_a_residual_cut(
    tmp_path: Path, dictionaries: list[Dictionary], baseline: Baseline, kind: str
) -> None:
    model, batch = tiny(tmp_path, kind), batch_of(corrupt=baseline is Baseline.CORRUPT)
    means = {d.name: mean_state(model, [batch], d) for d in dictionaries}
    (state,) = site_states(model, batch, dictionaries[:1], baseline, means)
    (scores,) = ig(model, batch, [state], EstimatorSettings(steps=48))
    clean, off = total_effect(model, batch, state, baseline)
    assert (clean - off).abs().min() > 1e-3
    assert torch.allclose(scores.per_row(state).float(), clean - off, rtol=5e-3, atol=2e-3)


def test_nodes_and_error_make_up_the_whole_difference(llama: SubjectModel, dictionaries: list[Dictionary]) -> None:
    batch = batch_of()
    for state in site_states(llama, batch, dictionaries, Baseline.CORRUPT):
        total = state.error.clone()
        rows = state.delta[:, None] * state.dictionary.decoder[state.latent]
        total.index_put_((state.row, state.position), rows, accumulate=True)
        difference = (state.x - state.baseline_x) * state.free.unsqueeze(-1)
        assert torch.allclose(total, difference, atol=1e-5)
        # Before the exchanged token (position 1) and in the padding there is nothing to attribute.
        assert not state.free[:, 0].any()
        assert not (state.free & ~batch.mask).any()


def test_exact_is_what_a_plain_hook_measures(tmp_path: Path, dictionaries: list[Dictionary]) -> None:
    """The oracle has nothing of ours in it: a forward pre-hook on the Hugging Face module."""
    model, batch = tiny(tmp_path), batch_of()
    (state,) = site_states(model, batch, dictionaries[:1], Baseline.CORRUPT)
    (scores,) = exact(model, batch, [state], SETTINGS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)

    def difference(row: int, position: int, patch: torch.Tensor) -> float:
        def subtract(_module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0].clone()
            x[0, position] -= patch
            return (x, *args[1:])

        example = batch.examples[row]
        handle = plain.model.layers[1].register_forward_pre_hook(subtract)
        logits = plain(torch.tensor([example.clean])).logits[0, -1]
        handle.remove()
        return (logits[10] - logits[11]).item()

    for node in range(0, len(state.row), 17):
        row, position = int(state.row[node]), int(state.position[node])
        patch = state.delta[node] * state.dictionary.decoder[state.latent[node]]
        expected = difference(row, position, 0 * patch) - difference(row, position, patch)
        assert scores.latents[node].item() == pytest.approx(expected, abs=2e-5)
    row, position = (int(each) for each in state.free.nonzero()[-1])
    patch = state.error[row, position]
    expected = difference(row, position, 0 * patch) - difference(row, position, patch)
    assert scores.error[row, position].item() == pytest.approx(expected, abs=2e-5)


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(4)), chunk=st.integers(1, 9), alone=st.booleans())
def test_packing_does_not_change_a_score(
    llama: SubjectModel, dictionaries: list[Dictionary], order: list[int], chunk: int, alone: bool
) -> None:
    """Any order of prompts, one by one or together, any chunk: the same score for the same node."""
    setting = EstimatorSettings(steps=4, chunk=chunk)

    def scored(packs: list[list[int]]) -> dict[tuple[int, ...], tuple[float, ...]]:
        found = {}
        for pack in packs:
            batch = collate([pairs()[i] for i in pack])
            (state,) = site_states(llama, batch, dictionaries[:1], Baseline.CORRUPT)
            keep = torch.arange(0, len(state.row), 5)
            part = state.subset(keep, torch.zeros_like(state.free))
            values = [each(llama, batch, [part], setting)[0].latents for each in (atp, ig, exact)]
            for k in range(len(part.row)):
                key = (int(batch.prompt[part.row[k]]), int(part.position[k]), int(part.latent[k]))
                found[key] = tuple(float(v[k]) for v in values)
        return found

    reference = scored([[0], [1], [2], [3]])
    for key, value in scored([[i] for i in order] if alone else [list(order)]).items():
        if key in reference:  # every fifth node of another packing is partly another node
            assert value == pytest.approx(reference[key], abs=1e-4)


def test_effects_are_what_pearl_says(tmp_path: Path, dictionaries: list[Dictionary]) -> None:
    model, batch = linear_model(tmp_path), batch_of()
    (state,) = site_states(model, batch, dictionaries[:1], Baseline.CORRUPT)
    everything = torch.arange(len(state.row))
    half = everything[::2]
    found = effects(model, batch, state, Baseline.CORRUPT, [everything, half])
    clean, off = total_effect(model, batch, state, Baseline.CORRUPT)
    assert torch.allclose(found.te, clean - off)
    assert torch.allclose(found.nde + found.tie, found.te[:, None].expand_as(found.tie), atol=1e-5)
    # Linear: no interaction, so what is lost without the mediator is what it brings about alone, and
    # both are the sum of its nodes' exact effects.
    assert torch.allclose(found.tie, found.nie, atol=1e-4)
    (scores,) = exact(model, batch, [state], SETTINGS)
    summed = torch.zeros(len(batch)).index_add_(0, state.row[half], scores.latents[half])
    assert torch.allclose(found.tie[:, 1], summed, atol=1e-4)


def test_a_mediator_that_is_the_whole_site_carries_everything(tmp_path: Path) -> None:
    """With a dictionary that spans the space exactly (latents on both sides), the latents are the site."""
    model, batch = tiny(tmp_path), batch_of()
    dictionary = random_dictionary(tmp_path / "sae", SITES[0], d_sae=32)
    identity = torch.eye(16)
    dictionary.decoder = torch.cat([identity, -identity])
    dictionary.encode = lambda x: torch.cat([x.relu(), (-x).relu()], dim=-1)  # type: ignore[method-assign]
    dictionary.explain = lambda read: (dictionary.encode(read), torch.zeros_like(read))  # type: ignore[method-assign]
    (state,) = site_states(model, batch, [dictionary], Baseline.CORRUPT)
    assert state.error.abs().max() < 1e-5
    found = effects(model, batch, state, Baseline.CORRUPT, [torch.arange(len(state.row))])
    assert torch.allclose(found.tie[:, 0], found.te, atol=1e-4)
    assert torch.allclose(found.nie[:, 0], found.te, atol=1e-4)
    assert found.nde.abs().max() < 1e-4


def own_stories(model: SubjectModel, n: int = 8) -> list[Example]:
    """Pairs from a trained model itself: its own samples, one token exchanged for its next best guess, and the
    difference of its two best continuations as the behaviour."""
    torch.manual_seed(0)
    start = torch.full((n, 1), 1)
    stories = model.module.generate(start, max_new_tokens=20, do_sample=True, top_p=0.9, pad_token_id=0)
    best = model.module(stories).logits.topk(2).indices.tolist()
    examples = []
    for row in range(n):
        length = 12 + row
        clean = stories[row, :length].tolist()
        first, second = best[row][3]
        corrupt = [*clean[:4], first if first != clean[4] else second, *clean[5:]]
        targets = [(length - 1, best[row][length - 1][0], 1), (length - 1, best[row][length - 1][1], -1)]
        examples.append(Example(row, clean, corrupt, targets, [""] * length))
    return examples


def test_on_a_trained_model_ig_conserves_and_signs_hold(tmp_path: Path) -> None:
    model = SubjectModel.load(shared_data("stories260k", "hf_llama"), device="cpu")
    site = "blocks.2.hook_resid_pre"
    dictionary = random_dictionary(tmp_path / "sae", site, d_in=model.d_model, d_sae=256)
    batch = collate(own_stories(model))
    (state,) = site_states(model, batch, [dictionary], Baseline.CORRUPT)
    clean, off = total_effect(model, batch, state, Baseline.CORRUPT)
    (scores,) = ig(model, batch, [state], EstimatorSettings(steps=16))
    gap = (scores.per_row(state).float() - (clean - off)).abs()
    assert gap.mean() < 0.02 * (clean - off).abs().mean()
    chosen = torch.randperm(len(state.row), generator=torch.Generator().manual_seed(0))[:96]
    part = state.subset(chosen, torch.zeros_like(state.free))
    (measured,) = exact(model, batch, [part], SETTINGS)
    large = measured.latents.abs() > measured.latents.abs().median()
    for estimator in (Estimator.ATP, Estimator.IG):
        (estimate,) = ESTIMATORS[estimator](model, batch, [part], EstimatorSettings(steps=8))
        same = estimate.latents[large].sign() == measured.latents[large].sign()
        assert same.float().mean() > 0.8, estimator


def test_contraction_is_every_nodes_own_product_in_any_order(tmp_path: Path, dictionaries: list[Dictionary]) -> None:
    """Against the formula, for nodes in shuffled order, and for none."""
    model, batch = tiny(tmp_path), batch_of()
    (state,) = site_states(model, batch, dictionaries[:1], Baseline.CORRUPT)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(state.x.shape, generator=generator)
    mixed = state.subset(torch.randperm(len(state.row), generator=generator), state.free)
    found = contract(mixed, gradient).latents
    expected = mixed.delta * (gradient[mixed.row, mixed.position] * mixed.decoder[mixed.latent]).sum(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(contract(state.subset(torch.zeros(0, dtype=torch.long), state.free), gradient).latents) == 0
