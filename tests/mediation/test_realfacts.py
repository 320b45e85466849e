"""Real facts: surgery at the entity's token against the bare model, carries against sums, splits that keep apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mediation.errors import MediationError
from mediation.metalatents import MatchingPursuit
from mediation.realfacts.asking import Asked, Asking, Pairs, answer_tokens, draw_pairs, known
from mediation.realfacts.parts import average_parts, effects, latent_parts, meta_parts, screen, strongest
from mediation.realfacts.questions import (
    COUNTRY_QUESTIONS,
    DevelopmentEntities,
    Entities,
    HeldOutEntities,
    cities,
    countries,
    paraphrases,
    topics,
)
from mediation.realfacts.scores import Scorer, entity_mean, less, removal, swap
from mediation.realfacts.subspaces import contrasts, patches, trained
from mediation.sites import Site
from mediation.statistics import pair_interval
from mediation.subject import SubjectModel
from tests.setups import linear_model, random_dictionary, shared_data, tiny

SITE = Site.parse("blocks.1.hook_resid_pre")
NAMES = ("w10", "w11", "w12", "w13", "w14", "w15")


@pytest.fixture
def model(tmp_path: Path) -> SubjectModel:
    return tiny(tmp_path / "model")


def pairs_of(n: int = 4) -> Pairs:
    clean, other = torch.arange(n), torch.arange(n) + 1
    right, wrong = torch.arange(n) + 20, torch.arange(n) + 30
    yes = torch.ones(n, dtype=torch.bool)
    return Pairs(clean, other, {"q": right, "r": wrong}, {"q": wrong, "r": right}, {"q": yes, "r": yes})


def test_asking_is_the_bare_model(model: SubjectModel) -> None:
    asked = Asked(model, SITE, "w1 {} w2 w3", NAMES)
    rows = torch.tensor([4, 0, 2])
    tokens = torch.tensor([model.encode(f"w1 {NAMES[row]} w2 w3") for row in rows.tolist()])
    bare = model.module(input_ids=tokens, use_cache=False).logits[:, -1]
    torch.testing.assert_close(asked.logits(rows, asked.x[rows]), bare, atol=1e-5, rtol=1e-5)
    right, wrong = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10])
    every = torch.arange(3)
    expected = bare[every, right] - bare[every, wrong]
    torch.testing.assert_close(asked.margin(rows, asked.x[rows], right, wrong), expected, atol=1e-5, rtol=1e-5)


def test_a_patched_entity_is_the_model_with_a_hook(model: SubjectModel) -> None:
    """`effects` against a hook of our own on the block that follows the site."""
    asked = Asked(model, SITE, "w1 {} w2 w3", NAMES)
    pairs, patch = pairs_of(), torch.randn(4, 3, model.d_model, generator=torch.Generator().manual_seed(0))
    found = effects(asked, pairs, "q", patch)

    def margins(change: torch.Tensor | None) -> torch.Tensor:
        def hook(_: object, given: tuple, named: dict) -> tuple:
            hidden = given[0].clone()
            if change is not None:
                hidden[:, asked.position] -= change
            return (hidden, *given[1:]), named

        handle = model.module.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            logits = model.module(input_ids=asked.tokens[pairs.clean], use_cache=False).logits[:, -1].detach()
        finally:
            handle.remove()
        row = torch.arange(len(logits))
        return logits[row, pairs.right["q"]] - logits[row, pairs.wrong["q"]]

    for k in range(3):
        torch.testing.assert_close(found[:, k], margins(None) - margins(patch[:, k]), atol=1e-4, rtol=1e-4)


def test_entity_first_the_residual_does_not_depend_on_the_question(model: SubjectModel) -> None:
    first, second = (Asked(model, SITE, f"w1 {{}} {rest}", NAMES) for rest in ("w2 w3", "w7 w8 w9"))
    assert first.position == second.position == 1
    torch.testing.assert_close(first.x, second.x, atol=1e-6, rtol=1e-6)
    other_order = Asked(model, SITE, "w2 w3 {} w1", NAMES)
    assert (other_order.x - first.x).abs().max() > 1e-2


def test_whole_difference_is_the_swapped_entity(model: SubjectModel) -> None:
    """Where nothing but the entity's token can differ, taking out the whole difference is the total effect."""
    asked = Asked(model, Site.parse("blocks.0.hook_resid_pre"), "w1 {} w2 w3", NAMES)
    pairs = pairs_of()
    whole = (asked.x[pairs.clean] - asked.x[pairs.other])[:, None]
    effect = effects(asked, pairs, "q", whole)[:, 0]
    right, wrong = pairs.right["q"], pairs.wrong["q"]
    own, others = (asked.margin(rows, asked.x[rows], right, wrong) for rows in (pairs.clean, pairs.other))
    torch.testing.assert_close(effect, own - others, atol=1e-4, rtol=1e-4)


def test_questions_that_are_not_asked_have_no_effect(model: SubjectModel) -> None:
    asked, pairs = Asked(model, SITE, "w1 {} w2 w3", NAMES), pairs_of()
    patch = torch.randn(4, 2, model.d_model, generator=torch.Generator().manual_seed(0))
    everyone = effects(asked, pairs, "q", patch)
    pairs.asked["q"][1] = False
    some = effects(asked, pairs, "q", patch)
    assert some[1].isnan().all()
    torch.testing.assert_close(some[[0, 2, 3]], everyone[[0, 2, 3]], atol=1e-5, rtol=1e-5)
    pairs.asked["q"][:] = False
    assert effects(asked, pairs, "q", patch).isnan().all()


def test_parts_sum_to_the_difference(model: SubjectModel, tmp_path: Path) -> None:
    dictionary = random_dictionary(tmp_path / "sae", SITE.name)
    asked, pairs = Asked(model, SITE, "w1 {} w2 w3", NAMES), pairs_of()
    latents = latent_parts(dictionary, asked.x[pairs.clean], asked.x[pairs.other])
    metas = meta_parts(latents, MatchingPursuit(dictionary.decoder, 3))
    for split in (latents, metas):
        every = torch.arange(split.coefficient.shape[1]).expand(len(pairs), -1)
        summed = split.parts(every).sum(1)
        torch.testing.assert_close(summed, split.only(torch.ones(every.shape[1])), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(summed + split.bias + split.residual, split.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(split.latents + split.error, split.whole, atol=1e-4, rtol=1e-4)
    assert metas.residual.norm() > 0.01


def test_no_row_is_its_own_part(model: SubjectModel, tmp_path: Path) -> None:
    dictionary = random_dictionary(tmp_path / "sae", SITE.name)
    asked, pairs = Asked(model, SITE, "w1 {} w2 w3", NAMES), pairs_of(1)
    latents = latent_parts(dictionary, asked.x[pairs.clean], asked.x[pairs.other])
    assert not latents.coefficient.any(0).all()  # so that places among the used rows are not those among all
    nearest = meta_parts(latents, MatchingPursuit(dictionary.decoder, 1))
    # Were rows allowed to stand for themselves, nothing would be left over.
    assert nearest.residual.norm(dim=1).min() > 0.1 * latents.latents.norm(dim=1).min()


def test_in_a_linear_model_effects_add_up_and_the_screen_is_exact(tmp_path: Path) -> None:
    model = linear_model(tmp_path / "model")
    dictionary = random_dictionary(tmp_path / "sae", SITE.name)
    asked, pairs = Asked(model, SITE, "w1 {} w2 w3", NAMES), pairs_of()
    split = latent_parts(dictionary, asked.x[pairs.clean], asked.x[pairs.other])
    gradient = asked.path_gradient(
        pairs.clean, asked.x[pairs.other], asked.x[pairs.clean], pairs.right["q"], pairs.wrong["q"]
    )
    first_order = screen(split, gradient)
    every = torch.arange(split.coefficient.shape[1]).expand(len(pairs), -1)
    measured = effects(asked, pairs, "q", split.parts(every))
    torch.testing.assert_close(measured, first_order, atol=2e-4, rtol=1e-3)
    whole = effects(asked, pairs, "q", torch.stack([split.latents, split.error, split.whole], dim=1))
    torch.testing.assert_close(measured.sum(1), whole[:, 0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(whole[:, 0] + whole[:, 1], whole[:, 2], atol=1e-3, rtol=1e-3)


def test_strongest_weighs_every_question_alike() -> None:
    screens = {"q": torch.tensor([[10.0, 0.0, 1.0]]), "r": torch.tensor([[0.0, 0.2, 0.01]])}
    totals = {"q": torch.tensor([-20.0]), "r": torch.tensor([0.2])}
    assert set(strongest(screens, totals, 2)[0].tolist()) == {0, 1}
    nothing = {"r": torch.full((1, 3), torch.nan)}
    assert set(strongest(screens | nothing, totals | {"r": torch.tensor([torch.nan])}, 2)[0].tolist()) == {0, 2}


def test_pairs_ask_only_what_is_known_and_differs() -> None:
    answers = {"q": torch.tensor([5, 5, 6, 7]), "r": torch.tensor([1, 2, 3, -1]), "s": torch.tensor([8, 9, 9, 9])}
    knows = {"q": torch.tensor([True] * 4), "r": torch.tensor([True, True, True, False]), "s": torch.tensor([True] * 4)}
    pairs = draw_pairs(answers, knows, 50, seed=3)
    seen = set(zip(pairs.clean.tolist(), pairs.other.tolist(), strict=True))
    expected = {(a, b) for a in range(4) for b in range(4) if a != b}
    expected -= {(1, 3), (3, 1), (2, 3), (3, 2)}  # only q differs and is known
    assert seen == expected
    for row, (a, b) in enumerate(zip(pairs.clean.tolist(), pairs.other.tolist(), strict=True)):
        for q in answers:
            asked = bool(knows[q][a] and knows[q][b] and answers[q][a] != answers[q][b])
            assert bool(pairs.asked[q][row]) is asked
            assert pairs.right[q][row] == answers[q][a]
            assert pairs.wrong[q][row] == answers[q][b]


def test_knowing_means_the_best_of_all_answers(model: SubjectModel) -> None:
    asked = Asked(model, SITE, "w1 {} w2 w3", NAMES)
    logits = asked.logits(torch.arange(6), asked.x)
    candidates = [20, 21, 22]
    best = torch.tensor(candidates)[logits[:, candidates].argmax(1)]
    answers = best.clone()
    answers[0] = candidates[(candidates.index(int(best[0])) + 1) % 3]
    answers[1] = -1
    answers = torch.cat([answers[:2], torch.tensor(candidates)[:3], answers[5:]])
    expected = (answers == best) & (answers >= 0)
    assert known(asked, answers).tolist() == expected.tolist()


def test_names_of_unequal_length_are_refused(model: SubjectModel) -> None:
    with pytest.raises(MediationError, match="unequal token length"):
        Asked(model, SITE, "w1 {} w2", ("w3", "w4 w5"))
    with pytest.raises(MediationError, match="same prompt"):
        Asked(model, SITE, "w1 w2", ("w3", "w4"))


def test_entities_are_split_by_type_and_share_no_name() -> None:
    everyone = countries()
    development, held_out = everyone.split(seed=0)
    assert isinstance(development, DevelopmentEntities)
    assert isinstance(held_out, HeldOutEntities)
    assert not set(development.names) & set(held_out.names)
    assert sorted(development.names + held_out.names) == sorted(everyone.names)
    row = held_out.names.index(sorted(held_out.names)[0])
    origin = everyone.names.index(held_out.names[row])
    assert held_out.tags()[row] == everyone.tags()[origin]
    assert everyone.split(seed=0)[0].names == development.names


def test_unknown_values_have_no_answer(model: SubjectModel) -> None:
    entities = Entities(("w10", "w11"), {"q": ("w20", None)})
    assert answer_tokens(model, "w1 {} w2", entities, "q") == [model.encode("w20")[-1], -1]


def test_our_facts_agree_with_lre() -> None:
    own = countries()
    index = {name: row for row, name in enumerate(own.names)}
    for attribute, file in (("capital", "country_capital_city"), ("language", "country_language")):
        samples = json.loads(shared_data("lre-relations", "data", "factual", f"{file}.json").read_text())["samples"]
        for sample in samples:
            if sample["subject"] in index:
                ours = own.values[attribute][index[sample["subject"]]]
                assert ours is not None
                assert ours[:4].lower() == sample["object"][:4].lower(), sample


def test_paraphrases_end_with_the_answer() -> None:
    root = shared_data("pararel").parent
    found = paraphrases(root, "capital")
    assert "The capital of {} is" in found
    assert all(wording.count("{}") == 1 and not wording.startswith("{}") for wording in found)
    with pytest.raises(MediationError, match="ParaRel"):
        paraphrases(root / "nowhere", "capital")


def test_wordings_put_the_entity_where_they_say() -> None:
    for question in COUNTRY_QUESTIONS:
        assert all(w.startswith("In {},") for w in (question.asked, *question.other_wordings))
        assert not question.fact_first.startswith("In {}")
        assert question.asked not in question.other_wordings


def planted(n: int = 400, d: int = 12, own: int = 3) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of three questions, each of a subspace of its own and weakly of all, in an oblique frame [d, d]."""
    generator = torch.Generator().manual_seed(1)
    frame = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q + 0.2 * torch.randn(d, d, generator=generator)
    found = {}
    for number, q in enumerate("abc"):
        scale = torch.full((d,), 0.05)
        scale[own * number : own * (number + 1)] = 1.0
        found[q] = (torch.randn(n, d, generator=generator) * scale) @ frame
    return found, frame


def test_contrasts_find_the_planted_subspaces() -> None:
    """What q reads of the exchange is what it reads of the whole difference; what the others read is nothing."""
    gradients, _ = planted()
    operators = contrasts(gradients, width=9)
    difference = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    for q in gradients:
        exchanged = difference @ operators[q].T
        for r, g in gradients.items():
            whole, part = difference @ g.T, exchanged @ g.T
            slope = float((whole * part).sum() / whole.square().sum())
            assert slope == pytest.approx(1.0 if q == r else 0.0, abs=0.05), (q, r)
        torch.testing.assert_close(operators[q] @ operators[q], operators[q], atol=1e-4, rtol=1e-3)  # a projection
    turned = contrasts(gradients, width=9, turned=0)
    for q in gradients:
        assert torch.linalg.matrix_rank(turned[q], rtol=1e-3) == torch.linalg.matrix_rank(operators[q], rtol=1e-3) == 3
        assert (turned[q] - operators[q]).norm() > 0.5


def test_training_a_subspace_lowers_its_loss(model: SubjectModel) -> None:
    """A subspace of the whole residual can do no better than nothing or all; training it must find which is better."""
    wordings = {"q": "w1 {} w2 w3", "r": "w1 {} w7 w8"}
    by_question = {q: Asked(model, SITE, wording, NAMES) for q, wording in wordings.items()}
    every = torch.arange(6)
    answers = {q: asked.logits(every, asked.x).argmax(1) for q, asked in by_question.items()}
    knows = {q: torch.ones(6, dtype=torch.bool) for q in wordings}
    asking = Asking(by_question, answers, knows, pairs_of(), {}, {})
    generator = torch.Generator().manual_seed(0)
    gradients = {q: torch.randn(60, model.d_model, generator=generator) for q in wordings}
    if min(len(each.unique()) for each in answers.values()) < 2:
        answers["q"] = answers["r"] = torch.tensor([20, 21, 22, 20, 21, 22])
    found = trained(asking, gradients, width=8, rank=3, steps=5, seed=0)
    for operator in found.values():
        torch.testing.assert_close(operator @ operator, operator, atol=1e-4, rtol=1e-4)
        assert torch.linalg.matrix_rank(operator, rtol=1e-3) == 3
    answers["q"] = torch.full((6,), 20)
    with pytest.raises(MediationError, match="too few answers"):
        trained(asking, gradients, width=8, rank=3, steps=5, seed=0)


def test_a_swap_counts_what_follows_and_what_stays() -> None:
    yes, no = [True], [False]
    asked = {"q": torch.tensor(yes * 4), "r": torch.tensor(yes * 3 + no)}
    tokens = {q: torch.arange(4) for q in asked}
    pairs = Pairs(torch.arange(4), torch.arange(4) + 4, tokens, tokens, asked)
    totals = {"q": torch.full((4,), 2.0), "r": torch.tensor([2.0, 2.0, 2.0, torch.nan])}
    asking = Asking({"q": None, "r": None}, {}, {}, pairs, {}, totals)  # type: ignore[dict-item]
    margin = {q: torch.ones(4) for q in asked}
    effects_ = {
        "q": torch.tensor([[1.5, 0.0], [1.5, 0.0], [0.5, 1.5], [1.5, 0.0]]),
        "r": torch.tensor([[0.0, 1.5], [1.2, 0.5], [0.0, 0.5], [torch.nan, torch.nan]]),
    }
    found = swap(Scorer(asking, 0), effects_, margin)
    assert found["follows"]["value"] == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert found["others_stay"]["value"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["both"]["value"] == pytest.approx((13 / 24 + 2 / 3) / 2)
    assert found["own"]["value"] == pytest.approx((5 / 8 + 2.5 / 6) / 2)
    assert found["others"]["value"] == pytest.approx((1.2 / 6 + 1.5 / 6) / 2)


def test_removing_everything_gives_every_entity_the_same_answer(model: SubjectModel, tmp_path: Path) -> None:
    dictionary = random_dictionary(tmp_path / "sae", SITE.name)
    asked = Asked(model, SITE, "w1 {} w2 w3", NAMES)
    answers = torch.tensor([20, 21, 22, 23, 24, 25])
    knows = torch.ones(6, dtype=torch.bool)
    asking = Asking(
        {"q": asked, "r": asked}, {"q": answers, "r": answers}, {"q": knows, "r": knows}, pairs_of(), {}, {}
    )
    away = average_parts(dictionary, asked.x, asked.x)
    torch.testing.assert_close(away.latents + away.error, asked.x - asked.x.mean(0), atol=1e-5, rtol=1e-5)
    patch = torch.stack([away.whole, torch.zeros_like(away.whole)], dim=1)
    logits = asked.logits(torch.arange(6), asked.x.mean(0).expand(6, -1))[:, answers]
    # "r" takes nothing away: it "forgets" what was wrong to begin with, and so many of q's stay.
    right = asked.logits(torch.arange(6), asked.x)[:, answers].argmax(1) == torch.arange(6)
    found = removal(asking, patch, 0)
    gone = float((logits.argmax(1) != torch.arange(6)).float().mean())
    wrong = 1 - float(right.float().mean())
    assert found["forgotten"]["value"] == pytest.approx((gone + wrong) / 2)
    assert found["others_kept"]["value"] == pytest.approx(1 - (gone + wrong) / 2)


def asking_of(clean: torch.Tensor, other: torch.Tensor) -> Asking:
    """Pairs with nothing but their entities, for a scorer."""
    tokens, yes = {"q": clean}, {"q": torch.ones(len(clean), dtype=torch.bool)}
    return Asking({"q": None}, {}, {}, Pairs(clean, other, tokens, tokens, yes), {}, {})  # type: ignore[dict-item]


def test_means_over_pairs_have_the_intervals_of_the_pair_bootstrap() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, other = torch.arange(20), (torch.arange(20) + 7) % 20
    values, over = torch.rand(20, generator=generator), 0.5 + torch.rand(20, generator=generator)
    found = Scorer(asking_of(clean, other), 3).mean({"q": values}, {"q": over})
    low, high = pair_interval(values, over, clean, other, seed=3)
    assert found["value"] == pytest.approx(float(values.sum() / over.sum()))
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)


def test_a_difference_is_paired() -> None:
    """Two ways that differ by the same in every pair differ for sure, however much pairs differ; unpaired, they do
    not.
    """
    clean, other = torch.arange(12), (torch.arange(12) + 5) % 12
    scorer = Scorer(asking_of(clean, other), 0)
    values = torch.linspace(0, 1, 12)
    first, second = scorer.mean({"q": values + 0.1}), scorer.mean({"q": values})
    found = less(first, second)
    assert [found[key] for key in ("value", "low", "high")] == pytest.approx([0.1] * 3, abs=1e-6)
    assert first["low"] < second["high"]
    shuffled = scorer.mean({"q": values.flip(0) + 0.1})
    assert less(shuffled, second)["low"] < 0 < less(shuffled, second)["high"]
    mean = entity_mean({"q": values}, 0)
    assert less(entity_mean({"q": values - 0.2}, 0), mean)["high"] == pytest.approx(-0.2)
    with_a_gap = scorer.mean({"q": torch.where(clean == 3, torch.nan, values)})
    assert less(with_a_gap, second)["n"] == 11


def test_entities_count_in_every_group_they_are_in() -> None:
    nan = float("nan")
    found = entity_mean({"q": torch.tensor([1.0, 0.0, nan, 1.0]), "r": torch.tensor([nan, nan, nan, 1.0])}, 0)
    assert found["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["n"] == 3
    assert found["low"] < found["value"] < found["high"] or found["high"] == pytest.approx(1.0)


def test_patches_are_operators_on_differences() -> None:
    operator, difference = torch.randn(5, 5), torch.randn(3, 5)
    found = patches({"q": operator, "r": 2 * operator}, difference, ("q", "r"))
    torch.testing.assert_close(found[1, 0], operator @ difference[1])
    torch.testing.assert_close(found[:, 1], 2 * found[:, 0])


def test_cities_have_one_language_or_none() -> None:
    found = cities(shared_data("ravel").parent)
    row = found.names.index("Aalborg")
    assert {q: values[row] for q, values in found.values.items()} == {
        "Country": "Denmark", "Language": "Danish", "Continent": "Europe",
    }  # fmt: skip
    assert all(value is None or "," not in value for value in found.values["Language"])


def test_countries_of_two_tokens_are_other_countries_with_the_same_attributes() -> None:
    one, two = (topics()[name].load(None) for name in ("countries", "countries of two tokens"))
    assert len(two) > 30
    assert one.values.keys() == two.values.keys()
    assert "New Zealand" in set(two.names) - set(one.names)
    assert dict(zip(two.names, two.values["currency"], strict=True))["South Korea"] == "won"


def test_laureates_have_one_field_a_country_and_a_pronoun(tmp_path: Path) -> None:
    table = {
        "Ann Example": {"Field": "Physics", "Country of Birth": "the Netherlands", "Gender": "female"},
        "Bob Example": {"Field": "Peace,Chemistry", "Country of Birth": "", "Gender": ""},
        "Cid Example Jr.": {"Field": "Peace", "Country of Birth": "Japan", "Gender": "male"},
    }
    folder = tmp_path / "ravel" / "data"
    folder.mkdir(parents=True)
    (folder / "ravel_nobel_prize_winner_entity_attributes.json").write_text(json.dumps(table))
    found = topics()["laureates"].load(tmp_path)
    assert found.names == ("Ann Example", "Bob Example")
    assert found.values == {
        "Field": ("Physics", None), "Country of Birth": ("Netherlands", None), "Gender": ("she", None),
    }  # fmt: skip
    assert set(topics()["laureates"].attributes) == set(found.values)


def test_topics_ask_with_the_entity_at_one_place(tmp_path: Path) -> None:
    for topic in topics().values():
        for question in topic.questions:
            wordings = (question.asked, *question.other_wordings)
            assert all(w.startswith(f"{topic.before} {{}} ") or w.startswith(f"{topic.before} {{}},") for w in wordings)
            assert not question.fact_first.startswith(f"{topic.before} {{}}")
    for data in (None, tmp_path):
        for name in ("cities", "laureates"):
            with pytest.raises(MediationError, match="ravel"):
                topics()[name].load(data)


def test_some_entities_are_a_sample_of_them() -> None:
    development, _ = countries().split(0)
    few = development.some(10, 3)
    assert isinstance(few, DevelopmentEntities)
    assert len(few) == 10
    assert set(few.names) < set(development.names)
    assert few.names == development.some(10, 3).names != development.some(10, 4).names
    assert len(development.some(1000, 0)) == len(development)
