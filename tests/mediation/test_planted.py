"""Planted facts: what a world promises, what a score counts, and a whole small bench."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize, one_hot

from mediation.errors import MediationError
from mediation.factored import train_factored
from mediation.planted import bench as planted
from mediation.planted.bench import bench, seed_range
from mediation.planted.organisms import (
    Trained,
    _joining_model,
    _model,
    carried,
    make_tokenizer,
)
from mediation.planted.scores import Known, Turned, _naming, _switch
from mediation.planted.worlds import NAMES_QUICK, QUICK, SERVED_BY, WORLDS, World, make_world, prompt_rows

worlds = st.builds(make_world, st.sampled_from(WORLDS), st.integers(0, 10**6), st.just(QUICK))


@settings(max_examples=25, deadline=None)
@given(worlds)
def test_variants_differ_in_one_attribute_and_nobody_held_out_is_trained_on(world: World) -> None:
    known = {holder for subject in world.trained for holder in world.holders(subject)}
    for base, variant, attribute in world.variants:
        one, two = world.of(base), world.of(variant)
        assert {name for name in one if one[name] != two[name]} == {attribute}
        assert sum(a != b for a, b in zip(world.holders(base), world.holders(variant), strict=True)) == 1
        assert not known & {*world.holders(base), *world.holders(variant)}
    assert {len(world.of(subject)) for subject in world.trained} == {len(world.attributes)}
    for subject in world.held_out:
        text = ["<bos>", *world.text(subject, world.claims[0]).split()]
        assert [text[at] for at in world.positions] == [each.split()[-1] for each in world.holders(subject)]


@settings(max_examples=25, deadline=None)
@given(worlds, st.integers(0, 100))
def test_prompts_are_asked_so_that_the_rules_facts_decide(world: World, seed: int) -> None:
    claims = {claim.word: number for number, claim in enumerate(world.claims)}
    facts = {value for values in world.attributes.values() for value in values} | set(world.attributes)
    for family, served in SERVED_BY.items():
        if world.name not in served:
            continue
        rows = prompt_rows(world, family, seed)
        assert rows
        for row in rows:
            number = claims[row["group"]]
            claim, one, two = world.claims[number], world.of(row["subject"]), world.of(row["partner"])
            assert (row["answer"] == " yes") == claim.reply(one)
            assert not facts & set(row["clean"].split())  # the deciding fact is never said
            if family == "null":
                assert not claim.rule
                continue
            assert claim.reply(one) != claim.reply(two)
            if family == "two":  # either fact alone, exchanged for the partner's, turns the reply
                for name in claim.rule:
                    assert claim.reply(one | {name: two[name]}) != claim.reply(one)
            if family == "twins":  # both models must say the same
                other = world.rivals[number]
                assert set(other.rule) != set(claim.rule)
                assert other.reply(one) == claim.reply(one) != other.reply(two)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6))
def test_no_name_alone_tells_a_fact_of_a_person(seed: int) -> None:
    """Whoever knows all people of a name but one guesses the one's values no better than by chance."""
    world = make_world("names", seed)
    people = [*world.trained, *world.held_out]
    assert len(set(people)) == len(people) == 24 * 24
    assert len({first for first, _ in people}) == len({last for _, last in people}) == 24
    right = []
    for place in (0, 1):
        for name in {person[place] for person in people}:
            mine = [world.of(person) for person in people if person[place] == name]
            for attribute, values in world.attributes.items():
                counts = Counter(facts[attribute] for facts in mine)
                for facts in mine:
                    others = counts - Counter([facts[attribute]])
                    right.append(max(values, key=lambda value: others[value]) == facts[attribute])
    assert sum(right) / len(right) < 1 / 8 + 0.03


def test_twins_share_everything_but_their_rules() -> None:
    a, b = make_world("twin a", 3, QUICK), make_world("twin b", 3, QUICK)
    assert (a.facts, a.trained, a.variants) == (b.facts, b.trained, b.variants)
    assert (a.claims, a.rivals) == (b.rivals, b.claims)


def test_correlated_attributes_are_correlated_and_others_not() -> None:
    def same(name: str) -> float:
        world = make_world(name, 0)
        one, two = list(world.attributes)[:2]
        pairs = [(world.facts[t][one], world.facts[t][two]) for (t,) in world.trained]
        index = {value: k for values in world.attributes.values() for k, value in enumerate(values)}
        return sum(index[x] == index[y] for x, y in pairs) / len(pairs)

    assert 0.5 < same("correlated") < 0.65
    assert same("people") < 0.2


def facts_of(n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sums of one value of each of three attributes, and which values each has."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(6, (n, 3), generator=generator)
    members = torch.cat([one_hot(values[:, k], 6) for k in range(3)], dim=1).float()
    return normalize(members @ torch.randn(18, 40, generator=generator), dim=1), members


def test_the_bound_knows_the_facts_and_gives_others_none() -> None:
    rows, members = facts_of()
    members[7] = 0.0
    known = Known(rows, members)
    parts = known.decompose(rows, torch.arange(len(rows)))
    assert (parts.codes[7] == 0).all()
    assert ((parts.codes > 0) == (members > 0)).all()
    rebuilt = parts.codes @ known.directions + parts.bias
    inside = members.any(1)
    error = (rebuilt - rows)[inside].square().sum() / (rows[inside] - rows[inside].mean(0)).square().sum()
    assert float(error) < 0.05


def test_turned_directions_keep_their_geometry_and_lose_the_facts() -> None:
    rows, _ = facts_of()
    meta = train_factored(rows)
    turned = Turned(meta, 0)
    torch.testing.assert_close(
        turned.directions @ turned.directions.T, meta.directions @ meta.directions.T, atol=1e-4, rtol=0
    )
    # Rows that are turned the same way have the same codes.
    there = (rows - meta.bias) @ turned.turn + meta.bias
    torch.testing.assert_close(turned.codes(there), meta.codes(rows), atol=1e-3, rtol=0)
    assert float((turned.codes(rows) - meta.codes(rows)).abs().mean()) > 0.01


def ranked(*rows: tuple[str, str, bool]) -> pl.DataFrame:
    places: dict[str, int] = {}
    found = []
    for prompt, label, present in rows:
        places[prompt] = places.get(prompt, 0) + 1
        kind = label.split("=")[0]
        found.append({"prompt": prompt, "rank": places[prompt], "meta": hash(label) % 1000, "label": label,
                      "kind": kind, "present": present})  # fmt: skip
    return pl.DataFrame(found)


def test_naming_counts_what_it_says() -> None:
    truth = {
        "p": {"attributes": ["city"], "values": ["city=1"], "group": "q", "subject": ("A",), "id": "p"},
        "r": {"attributes": ["food"], "values": ["food=2"], "group": "r", "subject": ("A",), "id": "r"},
        "s": {
            "attributes": ["city", "food"],
            "values": ["city=1", "food=2"],
            "group": "s",
            "subject": ("A",),
            "id": "s",
        },
    }
    table = ranked(
        ("p", "city=3", False), ("p", "city=1", True), ("r", "meta-latent 9", True), ("r", "food=2", True),
        ("s", "food=1", False), ("s", "food=2", True), ("s", "city=1", True),
    )  # fmt: skip
    found = _naming(table, truth)
    assert found["attribute"] == pytest.approx(2 / 3)
    assert found["value"] == pytest.approx(2 / 3)
    assert found["rank"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found["abstained"] == pytest.approx(1 / 3)
    assert found["both"] == 1.0
    assert found["claims"] == pytest.approx(2 / 3)
    pair = {name: truth[name] for name in ("p", "r")}
    right = ranked(("p", "city=1", True), ("r", "food=2", True))
    assert _switch(right, pair, {"p": 5, "r": 5}) == {"pairs": 1, "parts_switch": 1.0, "latent_stays": 1.0}
    wrong = ranked(("p", "city=1", True), ("r", "city=1", True))
    assert _switch(wrong, pair, {"p": 5, "r": 6}) == {"pairs": 1, "parts_switch": 0.0, "latent_stays": 0.0}


def test_the_area_is_of_hidden_use_against_all_else() -> None:
    organism = {"families": {"shaped": {"evidence": [[0.9, 1.0], [0.1, 0.0]]}, "overt": {"evidence": [[0.0, 1.0]]}}}
    found = planted._pooled([organism])
    assert (found["used"], found["unused"], found["area"], found["precision"]) == (1, 2, 1.0, 1.0)


def test_what_cannot_be_benched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediationError, match="no family 'grown'"):
        bench(["grown"], [0], tmp_path)
    for text in ("a-b", "", "-3"):
        with pytest.raises(MediationError, match="no range of seeds"):
            seed_range(text)
    assert (list(seed_range("100-102")), list(seed_range("7"))) == ([100, 101, 102], [7])
    with pytest.raises(MediationError, match="no seed in that range"):
        bench(["mixed"], seed_range("3-2"), tmp_path)
    (tmp_path / "mixed-0").mkdir()
    (tmp_path / "mixed-0" / "organism.json").write_text("{}")
    with pytest.raises(MediationError, match="not an organism's file"):
        bench(["mixed"], [0], tmp_path)
    (tmp_path / "mixed-0" / "organism.json").write_text(json.dumps({"format": planted.FORMAT, "size": {}}))
    with pytest.raises(MediationError, match="other settings"):
        bench(["mixed"], [0], tmp_path)


@torch.no_grad()
def test_what_the_site_carries_is_measured() -> None:
    """At the embedding of a one-token subject all is carried, in an untrained model; at one token of two not all."""
    one = make_world("mixed", 0, QUICK)
    tokenizer = make_tokenizer(one)
    assert carried(one, Trained(_model(one, tokenizer).eval(), tokenizer)) == pytest.approx(1.0, abs=1e-3)
    two = make_world("names", 0, NAMES_QUICK)
    tokenizer = make_tokenizer(two)
    assert abs(carried(two, Trained(_joining_model(two, tokenizer).eval(), tokenizer)) - 1.0) > 0.05


def test_facts_that_the_model_looks_up_are_shown_by_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(planted, "CONTROLS", 39)
    result = bench(["names"], [0], tmp_path, quick=True)
    (organism,) = result["organisms"]
    assert organism["check"]["passed"]
    assert organism["check"]["carried"] > 0.9
    figures = {name: each["value"] for name, each in result["families"]["names"]["figures"].items()}
    assert figures["readings.naming.attribute"] >= 0.9
    assert figures["compared.facts known (bound).attribute"] >= 0.9
    assert max(figures["readings turned.naming.attribute"], figures["naming.attribute"]) <= 0.7


def test_a_quick_bench_names_flags_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    result = bench(["mixed"], [0], tmp_path, quick=True)
    (organism,) = result["organisms"]
    assert organism["check"]["passed"]
    figures = {name: each["value"] for name, each in result["families"]["mixed"]["figures"].items()}
    assert figures["naming.attribute"] >= 0.8
    assert figures["compared.top latent.attribute"] <= 0.4
    assert figures["flags.right"] >= 0.5
    assert figures["flags.wrong"] <= 0.1
    monkeypatch.setattr(planted, "train", None)  # a second run finds all that it needs
    assert bench(["mixed"], [0], tmp_path, quick=True) == result
