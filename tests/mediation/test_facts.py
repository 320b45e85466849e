"""Hidden facts: conservation of every split, and a planted fact in a linear model where all is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mediation.dictionaries import Dictionary
from mediation.errors import FidelityWarning, MediationError
from mediation.estimators import EstimatorSettings, ig
from mediation.estimators.integrated_gradients import path_gradient
from mediation.facts import (
    NEAREST,
    FactSettings,
    find_hidden_facts,
    kind_of,
    nearest_latents,
    split_prompt,
)
from mediation.metalatents import Decomposition, MatchingPursuit
from mediation.metasplit import split_nodes
from mediation.nodes import site_states
from mediation.parts import Surgeon, pooled_parts, shapley_split
from mediation.prompts import Baseline, DiscoverySet, EvaluationSet, Example, Prompt, collate
from mediation.removal import q_values, removal_p
from mediation.subject import SubjectModel
from tests.setups import batch_of, linear_model, random_dictionary, tiny
from tests.tiny_models import D_MODEL

SITE = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    return tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Dictionary:
    return random_dictionary(tmp_path_factory.mktemp("sae"), SITE)


def pursuit(seed: int = 0, n: int = 20, k: int = 3) -> MatchingPursuit:
    return MatchingPursuit(torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed)), k=k)


class Foreign(MatchingPursuit):
    """Directions that are not the dictionary's rows: a row's own index means nothing."""

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        return super().codes(rows)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 4), tau=st.floats(0.1, 0.9))
def test_pooled_parts_are_the_latents_whole_difference(
    llama: SubjectModel, dictionary: Dictionary, seed: int, k: int, tau: float
) -> None:
    batch = batch_of(3)
    (state,) = site_states(llama, batch, [dictionary], Baseline.CORRUPT)
    base = pursuit(seed, k=k)
    pooled = pooled_parts(state, Foreign(base.directions, k), tau)
    chosen = [3, 8]
    total = pooled.rest(chosen) + pooled.bias + pooled.residual + sum(map(pooled.whole, chosen))
    expected = (state.x - state.baseline_x) * state.free.unsqueeze(-1) - state.error * state.free.unsqueeze(-1)
    assert torch.allclose(total, expected, atol=1e-4)


def test_screen_and_rest_sum_to_the_latents_attribution(llama: SubjectModel, dictionary: Dictionary) -> None:
    batch = batch_of(3)
    (state,) = site_states(llama, batch, [dictionary], Baseline.CORRUPT)
    (scores,) = ig(llama, batch, [state], EstimatorSettings(steps=6))
    gradient = path_gradient(llama, batch, state, 6)
    pooled = pooled_parts(state, Foreign(pursuit().directions, 3), 0.5)
    through, carried = pooled.screen(gradient)
    others = ((pooled.bias + pooled.residual) * gradient).sum()
    assert float(through.sum() + carried.sum() + others) == pytest.approx(float(scores.latents.sum()), abs=1e-4)


def test_meta_split_is_exact(llama: SubjectModel, dictionary: Dictionary) -> None:
    batch = batch_of()
    (state,) = site_states(llama, batch, [dictionary], Baseline.CORRUPT)
    gradient = path_gradient(llama, batch, state, 4).double()
    split, worst = split_nodes(state, gradient, Foreign(pursuit().directions, 3))
    assert worst < 1e-5
    whole = state.delta * (gradient.float()[state.row, state.position] * dictionary.decoder[state.latent]).sum(1)
    total = split.meta.sum(1) + split.bias + split.residual
    assert torch.allclose(total.float(), whole, atol=1e-5)


def test_shapley_split_sums_to_the_exact_effect_of_the_latents(llama: SubjectModel, dictionary: Dictionary) -> None:
    batch = collate([batch_of().examples[2]])
    (state,) = site_states(llama, batch, [dictionary], Baseline.CORRUPT)
    pooled = pooled_parts(state, Foreign(pursuit().directions, 3), 0.7)
    surgeon = Surgeon(llama, batch, state, 16)
    whole = ((state.x - state.baseline_x) - state.error) * state.free.unsqueeze(-1)
    for metas in ([4], [0, 5, 9, 12, 17]):  # exact by subsets, then sampled orders
        split = shapley_split(surgeon, pooled, metas, permutations=8, seed=0)
        assert float(split.values.sum()) == pytest.approx(float(surgeon.effect(whole[None])[0]), abs=1e-4)


# A planted fact: a linear model, a dictionary whose latents are people, people that are sums of facts.


class People(Decomposition):
    """Meta-latents that are the facts themselves: two attributes of four values, orthogonal directions."""

    def __init__(self, directions: Tensor) -> None:
        self.directions, self.bias = directions, torch.zeros(D_MODEL)

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        return rows @ self.directions.T


LABELS = {i: f"{'job' if i < 4 else 'town'}={'abcd'[i % 4]}" for i in range(8)}


class Planted:
    """16 people (a token each), x at the site = job direction + town direction; the answer reads the job alone."""

    def __init__(self, folder: Path) -> None:
        self.model = linear_model(folder / "model")
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=generator)).Q
        self.facts = basis[:8]
        people = torch.stack([self.facts[p // 4] + self.facts[4 + p % 4] for p in range(16)])
        self.dictionary = random_dictionary(folder / "sae", SITE, d_sae=16)
        self.dictionary.decoder = people / people.norm(dim=1, keepdim=True)
        self._read(people)

    def _read(self, people: Tensor) -> None:
        """Embed people as such, keep blocks silent, and let the logits of tokens 50 and 51 read the job."""
        transformer = self.model.module.transformer
        table = torch.zeros_like(transformer.wte.weight)
        table[20:36] = people
        self.model.module.lm_head.weight = torch.nn.Parameter(torch.zeros_like(table), requires_grad=False)
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0])
        self.model.module.lm_head.weight[50] = 3 * signs @ self.facts[:4]
        transformer.wte.weight.data = table
        transformer.wpe.weight.data.zero_()
        for block in transformer.h:
            block.attn.c_proj.weight.data.zero_()
            block.attn.c_proj.bias.data.zero_()
            block.mlp.c_proj.weight.data.zero_()
            block.mlp.c_proj.bias.data.zero_()

        def encode(x: Tensor) -> Tensor:
            score = x @ self.dictionary.decoder.T
            return torch.zeros_like(score).scatter(-1, score.argmax(-1, keepdim=True), 2**0.5)

        self.dictionary.encode = encode  # type: ignore[method-assign]
        self.dictionary.explain = lambda read: (encode(read), torch.zeros_like(read))  # type: ignore[method-assign]

    def sets(self) -> tuple[tuple[DiscoverySet, list[Example]], tuple[EvaluationSet, list[Example]]]:
        prompts, examples = [], []
        for person in range(16):
            partner = (person + 8) % 16 // 4 * 4 + (person + 1) % 4  # the opposite job, another town
            sign = 1 if person < 8 else -1
            prompts.append(Prompt(f"p{person}", person + 1, "x", "a", "b", group="q", fact=LABELS[person // 4]))
            targets = [(1, 50, sign), (1, 51, -sign)]
            examples.append(Example(len(prompts) - 1, [5, 20 + person], [5, 20 + partner], targets, ["", ""]))
        half = [list(range(0, 16, 2)), list(range(1, 16, 2))]

        def of(indices: list[int]) -> tuple[list[Prompt], list[Example]]:
            chosen = [examples[i] for i in indices]
            renumbered = [Example(k, e.clean, e.corrupt, e.targets, e.roles) for k, e in enumerate(chosen)]
            return [prompts[i] for i in indices], renumbered

        (d, de), (e, ee) = of(half[0]), of(half[1])
        return (DiscoverySet(d), de), (EvaluationSet(e), ee)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    with torch.no_grad():
        return Planted(tmp_path_factory.mktemp("planted"))


def test_the_planted_fact_is_named_and_flagged_and_nothing_else(planted: Planted) -> None:
    discovery, evaluation = planted.sets()
    table = find_hidden_facts(
        planted.model, planted.dictionary, People(planted.facts), discovery, evaluation, labels=LABELS,
        settings=FactSettings(carrier_cosine=0.9, permutations=4, controls=199),
    )  # fmt: skip
    tops = table.filter(pl.col("present") & (pl.col("shapley").abs() > 1e-3))
    assert (tops["label"] == tops["expected"]).all()
    assert tops["prompt"].n_unique() == 16
    # The job's part carries its half of the contrast exactly: 3 of the total effect of 6.
    assert tops["shapley"].to_numpy() == pytest.approx(3.0, abs=1e-4)
    assert table.filter(pl.col("kind") == "town")["shapley"].abs().max() < 1e-4  # type: ignore[operator]
    flagged = table.filter("flagged")
    assert (flagged["kind"] == "job").all()
    assert flagged["prompt"].n_unique() == len(evaluation[0])
    assert flagged["removal"].to_numpy() == pytest.approx(3.0, abs=1e-4)
    assert flagged["swap_follows"].all()
    assert flagged["counterpart"].is_not_null().all()
    tested = table.drop_nulls("removal")
    null = np.stack([np.array(each) for each in tested["controls"]])
    # Controls are turned within the span of the towns, which the answer does not read.
    assert null.max() < 1e-5
    assert tested["p"].to_numpy() == pytest.approx(removal_p(tested["removal"], null)) == 1 / 200
    assert tested["q"].to_numpy() == pytest.approx(float(q_values([1 / 200], 2)[0]))  # towns could have been tested too
    assert set(flagged["role"]) == {"evaluation"}
    assert table.filter(pl.col("role") == "discovery")["p"].is_null().all()


def test_what_is_tested_does_not_depend_on_what_passed_the_screen(planted: Planted) -> None:
    """A test on a fact picked by its effect would be flattered: one part in the split or eight, same removals."""
    discovery, evaluation = planted.sets()
    narrow, wide = (
        find_hidden_facts(
            planted.model, planted.dictionary, People(planted.facts), discovery, evaluation, labels=LABELS,
            settings=FactSettings(carrier_cosine=0.9, permutations=4, controls=39, parts=parts),
        ).drop_nulls("removal")
        for parts in (1, 8)
    )  # fmt: skip
    assert narrow["rank"].is_null().any()  # tested, and not in the split
    columns = ["prompt", "label", "removal", "swap", "p", "flagged"]
    assert narrow.select(columns).equals(wide.select(columns))
    assert len(narrow) == len(evaluation[0])


def test_an_overt_fact_is_used_but_not_hidden(planted: Planted) -> None:
    """With a carrier threshold that makes every person a carrier of both facts, nothing is hidden."""
    discovery, evaluation = planted.sets()
    table = find_hidden_facts(
        planted.model, planted.dictionary, People(planted.facts), discovery, evaluation, labels=LABELS,
        settings=FactSettings(carrier_cosine=0.5, permutations=4, controls=39),
    )  # fmt: skip
    assert not table["flagged"].any()
    tops = table.filter(pl.col("present") & (pl.col("shapley").abs() > 1e-3))
    assert (tops["label"] == tops["expected"]).all()  # still named: used, and in the open
    used = table.filter(pl.col("label") == pl.col("expected"))
    assert used["prompt"].n_unique() == 16
    assert used["hidden_share"].max() < 1e-6  # type: ignore[operator]
    assert not used["carriers_silent"].any()


def test_nearest_latents_are_the_carriers_or_the_closest(dictionary: Dictionary) -> None:
    base = pursuit()
    cosines = torch.nn.functional.cosine_similarity(dictionary.decoder[:, None], base.directions[[3, 7]][None], dim=-1)
    tau = float(cosines[:, 0].topk(6).values[-2:].mean())  # meta-latent 3 has five carriers
    table = nearest_latents(dictionary, base, [3, 7], tau)
    for column, meta in enumerate((3, 7)):
        mine = table.filter(pl.col("meta") == meta)
        n = max(NEAREST, int((cosines[:, column] >= tau).sum()))
        best = cosines[:, column].topk(n)
        assert mine["latent"].to_list() == best.indices.tolist()
        assert mine["cosine"].to_list() == pytest.approx(best.values.tolist(), abs=1e-6)
        assert mine["carrier"].to_list() == [value >= tau for value in best.values.tolist()]
    assert len(table.filter(pl.col("meta") == 3)) == 5
    assert nearest_latents(dictionary, base, [], tau).is_empty()


def test_prompt_order_and_labels_do_not_change_the_measurements(planted: Planted) -> None:
    (ds, de), (es, ee) = planted.sets()
    settings_ = FactSettings(permutations=4, controls=39)
    decomposition = People(planted.facts)
    one = find_hidden_facts(
        planted.model, planted.dictionary, decomposition, (ds, de), (es, ee), settings=settings_, labels=LABELS
    )
    order = list(reversed(range(len(es))))
    turned = [Example(k, ee[i].clean, ee[i].corrupt, ee[i].targets, ee[i].roles) for k, i in enumerate(order)]
    two = find_hidden_facts(
        planted.model, planted.dictionary, decomposition, (ds, de), (EvaluationSet(es[i] for i in order), turned),
        settings=settings_, labels=LABELS,
    )  # fmt: skip
    keys = ["prompt", "meta"]
    assert one.sort(keys).drop("rank").equals(two.sort(keys).drop("rank"))


def test_a_prompt_without_parts_abstains(planted: Planted) -> None:
    """Clean and corrupt of the same person's facts: nothing differs, nothing is named."""
    example = Example(0, [5, 20], [5, 20], [(1, 50, 1), (1, 51, -1)], ["", ""])
    split = split_prompt(
        planted.model, collate([example]), planted.dictionary, People(planted.facts), Baseline.CORRUPT, FactSettings()
    )
    assert split.top is None
    assert split.top_present is None
    everything = torch.ones(8, dtype=torch.bool)
    assert split.most_present(everything) is None
    assert split.counterpart(everything) is None


def test_too_few_controls_for_any_flag_are_told(planted: Planted) -> None:
    discovery, evaluation = planted.sets()
    with pytest.warns(FidelityWarning, match=r"1 were: with 20 controls no q falls below 0.10"):
        table = find_hidden_facts(
            planted.model, planted.dictionary, People(planted.facts), discovery, evaluation, labels=LABELS,
            settings=FactSettings(carrier_cosine=0.9, permutations=4, controls=20),
        )  # fmt: skip
    assert not table["flagged"].any()


def test_settings_and_kinds() -> None:
    with pytest.raises(MediationError, match="20 controls"):
        FactSettings(controls=19)
    assert kind_of("profession=baker") == "profession"
    for label in ("on paris | london", "on x = | =", "=", "meta-latent 7"):
        assert kind_of(label) == label
