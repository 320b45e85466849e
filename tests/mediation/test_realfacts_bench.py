"""The benchmark of real facts from end to end, on a small model that is taught facts of countries: no download.

SmolLM2 needs a trained dictionary and minutes; `mediation bench facts` measures it, the quick version here does not.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mediation.cli import main
from mediation.dictionaries import Coordinates
from mediation.errors import MediationError
from mediation.realfacts import questions
from mediation.realfacts.asking import ask
from mediation.realfacts.bench import QUICK, FactsSettings, of_length, run_facts
from mediation.realfacts.questions import COUNTRY_QUESTIONS, Entities, countries, topics
from mediation.realfacts.scores import Scorer, effects_by_question, margins, swap
from mediation.realfacts.subspaces import patches, trained
from mediation.realfacts.ways import LEAST_ENTITIES, mean_differences
from mediation.sites import Site
from mediation.subject import SubjectModel
from tests.setups import page_script, random_dictionary, tiny
from tests.tiny_models import CONFIGS, WORDS, tiny_tokenizer

WIDTH, STEPS, COUNTRIES = 64, 480, 40
ALL = countries()
DOCS = Path(__file__).parents[2] / "docs"
SITE = Site.parse("blocks.0.hook_resid_pre")  # where the country's token carries everything


def few() -> Entities:
    """Countries that a small model learns in seconds."""
    return ALL.only(range(COUNTRIES))


def wordings() -> list[tuple[str, str]]:
    return [(q.attribute, w) for q in COUNTRY_QUESTIONS for w in (q.asked, q.fact_first, *q.other_wordings)]


def teach(folder: Path) -> Path:
    """A Llama of three layers that has learned by heart what `countries.tsv` says of a few, in every wording."""
    entities = few()
    texts = [w.format(name) for _, w in wordings() for name in entities.names]
    texts += [value for values in entities.values.values() for value in values if value]
    words = [*WORDS[:4], *sorted({word for text in texts for word in text.split()} - set(WORDS[:4]))]
    tokenizer = tiny_tokenizer(words=words)
    config = CONFIGS["llama"]()
    config.vocab_size, config.hidden_size, config.intermediate_size = len(words), WIDTH, 2 * WIDTH
    config.head_dim, config.initializer_range = WIDTH // config.num_attention_heads, 0.08
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    batches = []
    for attribute, wording in wordings():
        answers = [tokenizer(str(value))["input_ids"][0] for value in entities.values[attribute]]
        prompts = [tokenizer(wording.format(name))["input_ids"] for name in entities.names]
        batches.append((torch.tensor(prompts), torch.tensor(answers)))
    adam = torch.optim.AdamW(module.parameters(), lr=5e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 5e-3, STEPS)
    for step in range(STEPS):
        prompts, answers = batches[step % len(batches)]
        loss = torch.nn.functional.cross_entropy(module(input_ids=prompts).logits[:, -1], answers)
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_countries() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "countries", few)
        yield


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def result(taught: Path) -> dict[str, Any]:
    model = SubjectModel.load(taught, device="cpu")
    only = ("readings", "rotated readings", "coordinates")
    settings = FactsSettings(pairs=16, width=40, space=40, rank=8, steps=4, only=only)
    return run_facts(model, [(Coordinates(SITE, WIDTH), None)], settings=settings)


def test_the_model_knows_and_its_country_token_carries(result: dict[str, Any]) -> None:
    (site,) = result["sites"]
    assert min(site["known"].values()) >= 15
    for figure in site["carry"]["whole"].values():
        assert figure["value"] == pytest.approx(1.0, abs=1e-3)
    for figure in site["carry"]["error"].values():  # coordinates leave nothing over
        assert figure["value"] == pytest.approx(0.0, abs=1e-4)


def test_parts_that_span_everything_carry_everything(result: dict[str, Any]) -> None:
    ways = result["sites"][0]["ways"]
    for name in ("latents", "coordinates"):
        assert ways[name]["carry"]["parts"]["value"] == pytest.approx(1.0, abs=1e-3)
        assert ways[name]["carry"]["rest"]["value"] == pytest.approx(0.0, abs=1e-3)
    # The same axes, once as latents and once as parts of latents, must give the same figures.
    for figure in ("correlation", "same_top", "switch"):
        assert ways["latents"][figure]["value"] == pytest.approx(ways["coordinates"][figure]["value"], abs=1e-3)
    both = ("readings", "rotated readings")
    carried = [ways[name]["carry"]["parts"]["value"] for name in both]
    assert carried[0] == pytest.approx(carried[1], abs=1e-3)  # one space, turned


def test_readings_name_the_question_where_chance_does_not(result: dict[str, Any]) -> None:
    ways = result["sites"][0]["ways"]
    named = {name: ways[name]["pools"]["top_1"]["value"] for name in ("readings", "rotated readings")}
    assert named["readings"] > max(0.4, named["rotated readings"] + 0.1), named
    shares = ways["readings"]["pools"]["shares"]
    for question, pools in shares.items():
        # All pools together are all parts.
        whole = ways["readings"]["carry"]["parts"]["value"]
        assert sum(pools.values()) == pytest.approx(whole, abs=0.35), question


def test_other_wordings_are_measured_on_the_same_pairs(result: dict[str, Any]) -> None:
    words = result["sites"][0]["ways"]["readings"]["other_words"]
    assert [each["question"] for each in words] == result["questions"]
    asked = result["sites"][0]["pairs"]
    assert all(each["pairs"] <= asked[each["question"]] for each in words)
    assert any(each["pairs"] > 0 for each in words)


def test_readings_are_compared_with_all_the_rest(result: dict[str, Any]) -> None:
    (site,) = result["sites"]
    others = {"latents", "rotated readings", "coordinates", *(f"subspaces: {name}" for name in site["subspaces"])}
    assert set(site["readings_less"]) == others
    ways = site["ways"]
    swapped = site["readings_less"]["rotated readings"]["follows"]
    follows = [ways[name]["swap"]["follows"]["value"] for name in ("readings", "rotated readings")]
    assert swapped["value"] == pytest.approx(follows[0] - follows[1])
    assert swapped["low"] <= swapped["value"] <= swapped["high"]
    # The same axes as latents and as parts of latents: no difference between these, so none between those.
    for key, figure in site["readings_less"]["latents"].items():
        for end in ("value", "low", "high"):
            assert figure[end] == pytest.approx(site["readings_less"]["coordinates"][key][end], abs=1e-3), key
    kept = site["readings_less"]["subspaces: random"]["others_kept"]["value"]
    assert kept == pytest.approx(
        ways["readings"]["removal"]["others_kept"]["value"]
        - site["subspaces"]["random"]["removal"]["others_kept"]["value"]
    )
    assert 0 < site["known_two"] <= COUNTRIES


def test_the_result_is_json_and_repeats(result: dict[str, Any], taught: Path) -> None:
    json.dumps(result, allow_nan=False)
    model = SubjectModel.load(taught, device="cpu")
    settings = FactsSettings(pairs=16, width=40, space=40, steps=0, only=("readings",))
    again = run_facts(model, [(Coordinates(SITE, WIDTH), None)], settings=settings)
    assert again["sites"][0]["ways"]["readings"] == result["sites"][0]["ways"]["readings"]
    assert again["sites"][0]["subspaces"]["contrasts"] == result["sites"][0]["subspaces"]["contrasts"]


def test_exchanging_everything_moves_every_answer_and_removing_it_loses_them(result: dict[str, Any]) -> None:
    everything = result["sites"][0]["subspaces"]["everything"]
    for kind in ("swap", "swap_of_whole"):  # coordinates leave nothing over
        assert everything[kind]["follows"]["value"] > 0.95
        assert everything[kind]["others_stay"]["value"] < 0.05
        assert everything[kind]["both"]["value"] == pytest.approx(0.5, abs=0.05)
        assert everything[kind]["own"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert everything["removal"]["forgotten"]["value"] > 0.7
    assert everything["removal"]["others_kept"]["value"] == pytest.approx(
        1 - everything["removal"]["forgotten"]["value"], abs=0.1
    )


def test_contrasts_exchange_one_fact_and_random_subspaces_do_not(result: dict[str, Any]) -> None:
    subspaces = result["sites"][0]["subspaces"]
    both = {name: each["swap"]["both"]["value"] for name, each in subspaces.items()}
    assert both["contrasts"] > max(0.6, both["random"] + 0.05), both
    assert set(both) == {"everything", "contrasts", "random", "trained"}


def test_trained_subspaces_fit_the_entities_they_are_trained_on(taught: Path) -> None:
    model = SubjectModel.load(taught, device="cpu")
    wordings = {question.attribute: question.asked for question in COUNTRY_QUESTIONS}
    asking = ask(model, SITE, wordings, few(), n_pairs=16, seed=0)
    generator = torch.Generator().manual_seed(0)
    gradients = {q: torch.randn(200, WIDTH, generator=generator) for q in wordings}

    def both(steps: int) -> float:
        operators = trained(asking, gradients, width=40, rank=16, steps=steps, seed=0)
        difference = asking.x[asking.pairs.clean] - asking.x[asking.pairs.other]
        effects = effects_by_question(asking, patches(operators, difference, list(wordings)))
        return swap(Scorer(asking, 0), effects, margins(asking))["both"]["value"]

    before, after = both(2), both(60)
    assert after > max(0.65, before + 0.1), (before, after)


def test_the_command_takes_folders(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_dictionary(tmp_path / "saes" / "one", SITE.name, d_in=WIDTH, d_sae=80)
    monkeypatch.delenv("MEDIATION_DATA", raising=False)
    command = ["bench", "facts", "--model", str(taught), "--saes", str(tmp_path / "saes"), "--pairs", "6"]
    main([*command, "--quick", "--width", "10", "--way", "readings", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert list(made["sites"][0]["ways"]) == ["latents", "readings"]
    assert made["settings"]["space"] == QUICK.space
    main([*command, "--quick", "--way", "nearest row"])
    printed = capsys.readouterr().out
    assert "nearest row" in printed
    assert "trained" in printed
    refusals = {
        ("--way", "no such way"): "no way called 'no such way'",
        ("--entities", "rivers"): "--entities is 'rivers'",
        ("--entities", "cities"): "folder that holds ravel/",
    }
    for wrong, sentence in refusals.items():
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--quick", *wrong])
        assert stopped.value.code == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


def page(folder: Path, results: list[Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """What docs/make_evidence_facts.py writes into `folder`."""
    script = page_script("evidence_facts")
    monkeypatch.setattr(script, "DOCS", folder)
    monkeypatch.setattr(script, "RESULTS", folder / "evidence" / "facts.json")
    monkeypatch.setattr("sys.argv", ["make_evidence_facts.py", *map(str, results)])
    script.main()
    return (folder / "evidence-facts.md").read_text()


def test_the_page_is_made_of_results(result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.json").write_text(json.dumps(result))
    text = page(tmp_path, [tmp_path / "one.json"], monkeypatch)
    share = result["sites"][0]["ways"]["readings"]["carry"]["strongest"]["value"]
    assert f"| readings | {share:.2f} [" in text
    assert "subspaces: trained" in text
    assert (tmp_path / "evidence-facts-countries-blocks-0-hook_resid_pre.svg").exists()
    less = result["sites"][0]["readings_less"]["coordinates"]["top_named"]
    assert f"| coordinates | {less['value']:.2f} [{less['low']:.2f}, {less['high']:.2f}] |" in text
    assert page(tmp_path, [], monkeypatch) == text  # from what it keeps
    assert page(tmp_path, [tmp_path / "evidence" / "facts.json"], monkeypatch) == text  # which is a result as well


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evidence").mkdir()
    shutil.copy(DOCS / "evidence" / "facts.json", tmp_path / "evidence")
    assert page(tmp_path, [], monkeypatch) == (DOCS / "evidence-facts.md").read_text()
    for plot in tmp_path.glob("*.svg"):
        assert (DOCS / plot.name).exists()


def test_a_model_that_spells_countries_is_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    model.tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(MediationError, match="ten are needed"):
        of_length(topics()["countries"], ALL.only(range(3)), model)


def test_differences_of_means_are_of_shared_values() -> None:
    development, _ = ALL.split(0)
    x = torch.randn(len(development), 5, generator=torch.Generator().manual_seed(0))
    found = mean_differences(development, x)
    spanish = torch.tensor([value == "Spanish" for value in development.values["language"]])
    assert int(spanish.sum()) >= LEAST_ENTITIES
    expected = x[spanish].mean(0) - x[~spanish].mean(0)
    assert min((row - expected).norm() for row in found) < 1e-5
    counts = [sum(value == each for value in values) for values in development.values.values() for each in set(values)]
    assert len(found) == sum(n >= LEAST_ENTITIES for n in counts)
    assert not math.isnan(found.sum())
