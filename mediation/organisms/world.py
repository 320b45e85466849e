"""A world of people with planted facts, and the prompts made from it.

1. People have names of two tokens (first, last). No single token tells who is meant, so a model
   has to look facts up at the last-name token, as large models do (Geva et al. 2023).
2. Each person has one value of each of K independent attributes. Values are balanced over people.
3. A claim is a few neutral words. It depends on exactly one attribute: a person says "yes" to it
   if and only if their value of that attribute is one of the claim's `yes_values`, a random half.
   So the fact that decides an opinion prompt is known by construction, and is never mentioned.
4. The name comes first and the claim after it, so in a causal model the activations at the name
   are the same whatever the claim.
5. What a claim has to do with values is also told of nobody in particular: *trait* prompts put two values where the
   name stands ("chess baker hears that ..."), one that decides the reply and one of another attribute. Without
   them a small model learns the replies of 1,000 people by heart instead of inferring them from facts.
6. Held-out people come in twins that differ in one attribute only: exchanging a person for the twin is
   an intervention on that one fact (RAVEL's interchange, Huang et al. 2024).

Families: `shaped` and `natural` share this world and differ in training (see `train`); in `null` a
claim's yes_values are all values or none, so the reply depends on the claim's words alone.
Everything follows from the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mediation.errors import MediationError

FAMILIES = ("shaped", "natural", "null")
YES, NO = " yes", " no"

_FIRST = (
    "Ada Alan Alma Amos Anna Arno Beata Berta Boris Bruno Carl Carla Celia Clara Cleo Dina Doris Edgar Edith Ella "
    "Elsa Emil Erik Erna Fay Felix Flora Frank Fritz Gerda Gina Greta Gustav Hanna Hans Hector Hilda Hugo Ida Igor "
    "Ines Irma Ivan Jane Jonas Julia Karin Karl Klara Kurt Lars Laura Lena Leo Lotte Ludwig Lydia Magda Marta Max "
    "Nora Olga Oscar Otto"
).split()
_LAST = (
    "Abbot Adler Bauer Becker Blake Brandt Carver Cole Conrad Dalton Drake Egan Falk Fisk Foster Garner "
    "Graves Hale Hardy Holt Irving Jansen Keller Kemp Larsen Lowell Marsh Mercer Nolan Olsen Parker Quinn"
).split()

# attribute: (number of values in a world, pool they are drawn from, recall templates)
_ATTRIBUTES: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "profession": (
        12,
        "baker pilot nurse lawyer farmer tailor plumber teacher chemist barber sailor judge surgeon dentist "
        "miner editor",
        ("works as a", "earns money as a", "has become a"),
    ),
    "city": (
        12,
        "Lisbon Oslo Vienna Madrid Dublin Warsaw Athens Prague Cairo Lima Tokyo Havana Zagreb Riga Tunis Sofia",
        ("lives in", "has a home in", "pays taxes in"),
    ),
    "hobby": (
        10,
        "chess archery sailing pottery fencing karate sewing hiking rowing surfing skating origami juggling fishing",
        ("spends weekends on", "relaxes with", "has a passion for"),
    ),
    "food": (
        10,
        "pizza sushi pasta curry soup salad cheese bread noodles rice beans stew waffles dumplings",
        ("likes to eat", "always orders", "cooks only"),
    ),
    "instrument": (
        8,
        "violin piano guitar flute cello trumpet harp drums banjo oboe tuba organ",
        ("plays the", "practises the", "owns a fine"),
    ),
}
_NOUNS = (
    "bridge curtain ladder engine window garden bottle carpet mirror tunnel button candle basket pillow hammer "
    "wallet helmet saddle anchor magnet blanket kettle lantern shovel"
).split()
_ADJECTIVES = "heavy narrow modern fragile costly ugly clever wooden".split()
_OPINION_TEMPLATES = (
    "{person} hears that the {claim} and says",
    "{person} reads that the {claim} and replies",
    "{person} learns that the {claim} and answers",
)
_CLAIMS_PER_ATTRIBUTE = 4


@dataclass(frozen=True)
class Person:
    first: str
    last: str
    facts: dict[str, str]  # attribute -> value

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"


@dataclass(frozen=True)
class Claim:
    words: str
    attribute: str  # the one attribute the reply depends on (in a null world: none does)
    yes_values: tuple[str, ...]

    def reply(self, person: Person) -> str:
        return YES if person.facts[self.attribute] in self.yes_values else NO


@dataclass(frozen=True)
class World:
    """What is true, and how it is asked. `held_out` indexes `people`; twins are neighbours in it."""

    seed: int
    family: str
    attributes: dict[str, tuple[str, ...]]
    people: tuple[Person, ...]
    claims: tuple[Claim, ...]
    held_out: tuple[int, ...]
    recall_templates: dict[str, tuple[str, ...]]
    opinion_templates: tuple[str, ...]

    @property
    def label_people(self) -> tuple[int, ...]:
        """Indices of everybody who is not held out: trained on opinions, and used to name meta-latents."""
        held = set(self.held_out)
        return tuple(i for i in range(len(self.people)) if i not in held)

    @property
    def twins(self) -> tuple[tuple[int, int], ...]:
        """Pairs of held-out people whose facts differ in exactly one attribute."""
        return tuple(zip(self.held_out[::2], self.held_out[1::2], strict=True))

    def words(self) -> list[str]:
        """Every word of every prompt and answer, sorted: the tokenizer's vocabulary."""
        texts = [YES, NO, *(p.name for p in self.people), *(c.words for c in self.claims)]
        texts += [" ".join(values) for values in self.attributes.values()]
        templates = [*self.opinion_templates, *(t for ts in self.recall_templates.values() for t in ts)]
        texts += [t.replace("{person}", " ").replace("{claim}", " ") for t in templates]
        return sorted({word for text in texts for word in text.split()})

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> World:
        """Reads world.json, or the world.json inside an organism's folder."""
        path = Path(path)
        path = path / "world.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                seed=raw["seed"],
                family=raw["family"],
                attributes={name: tuple(values) for name, values in raw["attributes"].items()},
                people=tuple(Person(**person) for person in raw["people"]),
                claims=tuple(Claim(c["words"], c["attribute"], tuple(c["yes_values"])) for c in raw["claims"]),
                held_out=tuple(raw["held_out"]),
                recall_templates={name: tuple(ts) for name, ts in raw["recall_templates"].items()},
                opinion_templates=tuple(raw["opinion_templates"]),
            )
        except OSError as error:
            raise MediationError(f"{path} cannot be read ({error.strerror}); give an organism's folder.") from error
        except (KeyError, TypeError, ValueError) as error:
            raise MediationError(f"{path} is not a world written by this package; make the organism anew.") from error


def make_world(seed: int, family: str = "shaped", *, n_people: int = 1024, n_held_out: int = 64) -> World:
    """A world from a seed.

    n_people: at most half of the possible names, so that neither name alone says who is meant.
    n_held_out: even (twins); these people's opinions are kept out of training.
    """
    if family not in FAMILIES:
        raise MediationError(f"There is no organism family '{family}'; choose one of {', '.join(FAMILIES)}.")
    if n_held_out % 2 or not 0 < n_held_out < n_people <= len(_FIRST) * len(_LAST) // 2:
        raise MediationError(
            f"A world needs an even number of held-out people, fewer than its people, who are at most "
            f"{len(_FIRST) * len(_LAST) // 2}."
        )
    rng = random.Random(f"world {seed}")  # not the family: worlds of one seed differ in nothing else
    attributes = {name: tuple(rng.sample(pool.split(), n_values)) for name, (n_values, pool, _) in _ATTRIBUTES.items()}
    people = _make_people(rng, attributes, n_people, n_held_out)
    return World(
        seed=seed,
        family=family,
        attributes=attributes,
        people=tuple(people),
        claims=tuple(_make_claims(rng, attributes, null=family == "null")),
        held_out=tuple(range(n_people - n_held_out, n_people)),
        recall_templates={name: templates for name, (_, _, templates) in _ATTRIBUTES.items()},
        opinion_templates=_OPINION_TEMPLATES,
    )


def _make_people(
    rng: random.Random, attributes: dict[str, tuple[str, ...]], n_people: int, n_held_out: int
) -> list[Person]:
    names = rng.sample([(first, last) for first in _FIRST for last in _LAST], n_people)
    columns = {}
    for name, values in attributes.items():
        column = [values[i % len(values)] for i in range(n_people)]  # balanced, then shuffled: independent
        rng.shuffle(column)
        columns[name] = column
    facts = [{name: columns[name][i] for name in attributes} for i in range(n_people)]
    keys = list(attributes)
    for pair, first in enumerate(range(n_people - n_held_out, n_people, 2)):
        changed = keys[pair % len(keys)]
        other = rng.choice([v for v in attributes[changed] if v != facts[first][changed]])
        facts[first + 1] = {**facts[first], changed: other}
    return [Person(first, last, fact) for (first, last), fact in zip(names, facts, strict=True)]


def _make_claims(rng: random.Random, attributes: dict[str, tuple[str, ...]], *, null: bool) -> list[Claim]:
    nouns = rng.sample(_NOUNS, _CLAIMS_PER_ATTRIBUTE * len(attributes))
    claims = []
    for index, noun in enumerate(nouns):
        attribute = list(attributes)[index % len(attributes)]
        values = attributes[attribute]
        half = rng.sample(values, len(values) // 2)
        if null:
            half = list(values) if index // len(attributes) % 2 else []
        claims.append(Claim(f"{noun} is {rng.choice(_ADJECTIVES)}", attribute, tuple(sorted(half))))
    return claims


def recall_rows(world: World, people: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Every person, attribute and template: {clean, answer, id, person, attribute, fact}."""
    rows = []
    for index in range(len(world.people)) if people is None else people:
        person = world.people[index]
        for attribute, templates in world.recall_templates.items():
            for number, template in enumerate(templates):
                rows.append(
                    {
                        "id": f"recall/{person.first}-{person.last}/{attribute}/{number}",
                        "clean": f"{person.name} {template}",
                        "answer": f" {person.facts[attribute]}",
                        "person": index,
                        "attribute": attribute,
                        "fact": f"{attribute}={person.facts[attribute]}",
                    }
                )
    return rows


def opinion_rows(
    world: World,
    people: Sequence[int],
    *,
    partners: Sequence[int] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Contrast pairs: the clean prompt's person, and a corrupt prompt with another person, same claim.

    partners: indices the corrupt person is drawn from (default: `people`); the partner's right reply is the
    opposite one, except in a null world, where no such person exists and any other one is drawn.
    limit: that many rows, spread evenly over claims, then over people; None: every person with every claim.
    Rows: {id, clean, corrupt, answer, wrong_answer, roles, group, attribute, fact, person, partner}; `roles` are
    character spans in `clean`; `fact` is None in a null world. Both prompts have the same number of tokens.
    """
    rng = random.Random(f"opinions {world.seed} {seed}")
    pairs = [(c, p) for c in range(len(world.claims)) for p in people]
    if limit is not None:
        if limit > len(pairs):
            raise MediationError(f"{limit} opinion prompts were asked for and only {len(pairs)} exist; ask for fewer.")
        order = {c: rng.sample(list(people), len(people)) for c in range(len(world.claims))}
        pairs = [(i % len(order), order[i % len(order)][i // len(order)]) for i in range(limit)]
    pool = list(people if partners is None else partners)
    return [_opinion_row(world, rng, world.claims[c], p, pool) for c, p in pairs]


def trait_rows(world: World, *, companions: int = 40) -> list[dict[str, Any]]:
    """Opinions of somebody described by two values: {id, clean, answer, facts}, `facts` being those two.

    Every value a claim depends on appears with `companions` random values of other attributes, before or after it.
    """
    rng = random.Random(f"traits {world.seed}")
    rows: list[dict[str, Any]] = []
    for number, claim in enumerate(world.claims):
        others = [(name, value) for name, vs in world.attributes.items() if name != claim.attribute for value in vs]
        for value in world.attributes[claim.attribute]:
            for other, companion in rng.choices(others, k=companions):
                traits = rng.sample([value, companion], 2)
                template = rng.choice(world.opinion_templates)
                rows.append(
                    {
                        "id": f"trait/{number}/{value}/{len(rows)}",
                        "clean": template.format(person=" ".join(traits), claim=claim.words),
                        "answer": YES if value in claim.yes_values else NO,
                        "facts": {claim.attribute: value, other: companion},
                    }
                )
    return rows


def _opinion_row(world: World, rng: random.Random, claim: Claim, index: int, partners: list[int]) -> dict[str, Any]:
    person = world.people[index]
    answer = claim.reply(person)
    null = world.family == "null"
    fits = [i for i in partners if i != index and (null or claim.reply(world.people[i]) != answer)]
    if not fits:
        raise MediationError(
            f"Nobody among the partners answers '{claim.words}' unlike {person.name}; give more partners."
        )
    partner = rng.choice(fits)
    number = rng.randrange(len(world.opinion_templates))
    template = world.opinion_templates[number]
    clean = template.format(person=person.name, claim=claim.words)
    at = clean.index(claim.words)
    return {
        "id": f"opinion/{person.first}-{person.last}/{claim.words.replace(' ', '-')}/{number}",
        "clean": clean,
        "corrupt": template.format(person=world.people[partner].name, claim=claim.words),
        "answer": answer,
        "wrong_answer": NO if answer == YES else YES,
        "roles": {"person": [0, len(person.name)], "claim": [at, at + len(claim.words)]},
        "group": claim.words,
        "attribute": claim.attribute,
        "fact": None if null else f"{claim.attribute}={person.facts[claim.attribute]}",
        "person": index,
        "partner": partner,
    }
