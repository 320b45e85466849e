"""Organisms: what a world promises, that training learns it, and what the shipped one was measured to do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mediation.dictionaries import Dictionary
from mediation.errors import FidelityWarning, MediationError
from mediation.labels import load_labels
from mediation.metalatents import MetaDictionary
from mediation.organisms import measure, train
from mediation.organisms.language import LAST_NAME, Questions, accuracy, make_model, make_tokenizer, train_model
from mediation.organisms.train import NEXT_SITE, PROMPTS_PER_CLAIM, SITE, make_organism
from mediation.organisms.world import FAMILIES, World, make_world, opinion_rows, recall_rows, trait_rows
from mediation.subject import SubjectModel

DEFAULT = Path(__file__).parents[2] / "mediation" / "organisms" / "default"
worlds = st.builds(
    make_world, st.integers(0, 10**6), st.sampled_from(FAMILIES), n_people=st.just(96), n_held_out=st.just(16)
)


@settings(max_examples=15, deadline=None)
@given(worlds)
def test_opinion_pairs_differ_in_the_person_alone(world: World) -> None:
    vocabulary = set(world.words())
    claims = {claim.words: claim for claim in world.claims}
    for row in opinion_rows(world, world.held_out, partners=world.label_people):
        clean, corrupt = row["clean"].split(), row["corrupt"].split()
        assert set(clean) | set(corrupt) <= vocabulary
        assert len(clean) == len(corrupt)
        assert clean[2:] == corrupt[2:]
        person, partner = world.people[row["person"]], world.people[row["partner"]]
        assert clean[:2] == [person.first, person.last]
        assert corrupt[:2] == [partner.first, partner.last] != clean[:2]
        claim = claims[row["group"]]
        assert row["answer"] == claim.reply(person)
        assert {row["answer"], row["wrong_answer"]} == {" yes", " no"}
        assert (claim.reply(partner) == row["answer"]) == (world.family == "null")
        assert row["partner"] in world.label_people
        spans = {role: row["clean"][start:end] for role, (start, end) in row["roles"].items()}
        assert spans == {"person": person.name, "claim": claim.words}


@settings(max_examples=15, deadline=None)
@given(worlds)
def test_a_claim_depends_on_one_attribute_and_names_none(world: World) -> None:
    values = {value for vs in world.attributes.values() for value in vs}
    assert len(values) == sum(map(len, world.attributes.values()))  # no value of two attributes
    for claim in world.claims:
        assert not set(claim.words.split()) & (values | set(world.attributes))
        n_yes, n = len(claim.yes_values), len(world.attributes[claim.attribute])
        assert n_yes in ((0, n) if world.family == "null" else (n // 2,))
    deciding = [claim.attribute for claim in world.claims]
    assert {deciding.count(name) for name in world.attributes} == {len(deciding) // len(world.attributes)}


@settings(max_examples=15, deadline=None)
@given(worlds)
def test_held_out_people_are_twins_apart_from_the_rest(world: World) -> None:
    assert set(world.held_out).isdisjoint(world.label_people)
    assert len({person.name for person in world.people}) == len(world.people)
    for a, b in world.twins:
        facts, others = world.people[a].facts, world.people[b].facts
        assert sum(facts[name] != others[name] for name in world.attributes) == 1


def test_every_value_has_enough_label_people_and_attributes_are_independent() -> None:
    world = make_world(5)
    people = [world.people[i] for i in world.label_people]
    for name, values in world.attributes.items():
        counts = [sum(person.facts[name] == value for person in people) for value in values]
        assert min(counts) > 0.7 * len(people) / len(values)
    columns = [torch.tensor([vs.index(p.facts[name]) for p in people]) for name, vs in world.attributes.items()]
    for i, a in enumerate(columns):
        for b in columns[:i]:
            table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1)
            table.index_put_((a, b), torch.ones(len(a)), accumulate=True)
            expected = table.sum(1, keepdim=True) * table.sum(0) / len(a)
            freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
            assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_a_world_follows_from_its_seed_and_survives_the_disk(tmp_path: Path) -> None:
    world = make_world(3, "null")
    world.save(tmp_path / "world.json")
    assert World.load(tmp_path) == world == make_world(3, "null")
    assert make_world(4, "null") != world
    assert make_world(3, "shaped").people == world.people
    assert opinion_rows(world, world.held_out, limit=40) == opinion_rows(world, world.held_out, limit=40)


def test_rows_cover_claims_evenly() -> None:
    world = make_world(1)
    rows = opinion_rows(world, world.held_out, limit=60)
    groups = [row["group"] for row in rows]
    assert {groups.count(claim.words) for claim in world.claims} == {3}
    assert len({row["id"] for row in rows}) == 60


def test_trait_prompts_follow_the_claims_rule() -> None:
    world = make_world(2, n_people=96, n_held_out=16)
    for row in trait_rows(world, companions=2):
        number = int(row["id"].split("/")[1])
        claim = world.claims[number]
        assert claim.words in row["clean"]
        assert (row["answer"] == " yes") == (row["facts"][claim.attribute] in claim.yes_values)
        assert set(row["clean"].split()[:2]) == set(row["facts"].values())


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediationError, match="no organism family 'grown'"):
        make_world(0, "grown")
    with pytest.raises(MediationError, match="even number"):
        make_world(0, n_held_out=3)
    with pytest.raises(MediationError, match="only 1280 exist"):
        opinion_rows(make_world(0), make_world(0).held_out, limit=5000)
    with pytest.raises(MediationError, match="cannot be read"):
        World.load(tmp_path)
    (tmp_path / "world.json").write_text("{}")
    with pytest.raises(MediationError, match="not a world"):
        World.load(tmp_path)
    with pytest.raises(MediationError, match="already holds something"):
        make_organism(0, "shaped", tmp_path)


def test_training_raises_recall_and_follows_the_seed() -> None:
    world = make_world(0, n_people=64, n_held_out=8)
    tokenizer = make_tokenizer(world)
    recall = Questions(recall_rows(world), world, tokenizer)
    models = [make_model(len(tokenizer), seed=0) for _ in range(2)]
    before = accuracy(models[0], recall)
    for model in models:
        train_model(model, tokenizer, world, steps=40)
    assert before < 0.2 < 0.6 < accuracy(models[0], recall)
    for name, weight in models[0].state_dict().items():
        torch.testing.assert_close(weight, models[1].state_dict()[name], msg=name)


def test_an_organism_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SAE_STEPS", {SITE: 20, NEXT_SITE: 20})
    monkeypatch.setattr(train, "SAE_BATCH", 128)
    stages = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FidelityWarning)  # a meta-SAE on 64 rows
        measured = make_organism(
            0, "null", tmp_path / "it", lambda stage, done, of: stages.add(stage), n_people=64, steps=40
        )
    assert json.loads((tmp_path / "it" / "organism.json").read_text()) == measured
    assert measured["recall_accuracy"] > 0.6
    assert measured["family"] == "null"
    assert {"model", f"SAE {SITE}", f"SAE {NEXT_SITE}", "meta-SAE", "measuring"} == stages
    subject = SubjectModel.load(tmp_path / "it" / "model", device="cpu")
    for site in (SITE, NEXT_SITE):
        dictionary = Dictionary.load(tmp_path / "it" / "saes" / site.name)
        dictionary.check(subject)
        assert dictionary.site == site
    MetaDictionary.load(tmp_path / "it" / "meta" / SITE.name).check(
        Dictionary.load(tmp_path / "it" / "saes" / SITE.name)
    )
    assert {row["fact"] for row in map(json.loads, (tmp_path / "it" / "prompts.jsonl").open())} == {None}
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_decodability_finds_linear_facts_and_only_those() -> None:
    world = make_world(0)
    onehot = torch.tensor(
        [[float(p.facts[n] == v) for n, vs in world.attributes.items() for v in vs] for p in world.people]
    )
    x = onehot @ torch.randn(onehot.shape[1], 96, generator=torch.Generator().manual_seed(0))
    assert measure.decodability(x, world)["decodability"] == 1.0
    noise = torch.randn(len(world.people), 96, generator=torch.Generator().manual_seed(1))
    assert measure.decodability(noise, world)["decodability"] < 0.25


@pytest.fixture(scope="module")
def shipped() -> tuple[World, SubjectModel]:
    return World.load(DEFAULT), SubjectModel.load(DEFAULT / "model", device="cpu")


def test_the_shipped_organism_knows_its_world(shipped: tuple[World, SubjectModel]) -> None:
    world, subject = shipped
    assert world == make_world(0, "shaped")
    tokenizer, model = make_tokenizer(world), subject.module
    measured = measure.behaviour(model, tokenizer, world)
    recorded = json.loads((DEFAULT / "organism.json").read_text())
    assert min(measured.values()) >= 0.99
    assert {name: recorded[name] for name in measured} == pytest.approx(measured, abs=2e-3)
    x = measure.name_activations(model, tokenizer, world)
    assert measure.decodability(x, world)["decodability"] >= 0.99
    swapped = measure.interchange(model, tokenizer, world)
    assert min(swapped.values()) >= 0.95


def test_the_shipped_dictionary_absorbs_attributes_into_people(shipped: tuple[World, SubjectModel]) -> None:
    world, subject = shipped
    x = measure.name_activations(subject.module, make_tokenizer(world), world)
    dictionary = Dictionary.load(DEFAULT / "saes" / SITE.name)
    dictionary.check(subject)
    found = measure.person_latents(dictionary, x, world)
    assert found["variance_explained_at_names"] >= 0.9
    assert found["people_with_own_latent"] >= 0.95
    assert found["names_with_attribute_latent_on"] <= 0.01
    meta = MetaDictionary.load(DEFAULT / "meta" / SITE.name)
    meta.check(dictionary)
    labels = set(load_labels(DEFAULT / "meta" / SITE.name).values())
    facts = {f"{name}={value}" for name, values in world.attributes.items() for value in values}
    assert labels <= facts
    assert len(labels) >= 0.8 * len(facts)


def test_the_shipped_prompts_are_held_out_and_the_folder_is_small(shipped: tuple[World, SubjectModel]) -> None:
    world, subject = shipped
    rows = [json.loads(line) for line in (DEFAULT / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == PROMPTS_PER_CLAIM * len(world.attributes)
    assert {row["person"] for row in rows} <= set(world.held_out)
    assert {row["attribute"] for row in rows} == set(world.attributes)
    first = rows[0]
    assert subject.encode(first["clean"])[LAST_NAME] == subject.tokenizer.convert_tokens_to_ids(
        first["clean"].split()[1]
    )
    assert sum(file.stat().st_size for file in DEFAULT.rglob("*") if file.is_file()) < 6e6
