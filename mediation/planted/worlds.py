"""Worlds of the nine families: who has which facts, and which facts decide a reply.

1. A subject is one token (`Person12`), or two for a flatterer (`user with Thing3 and Thing10040`); a token has one
   value of every attribute of its place. Values are balanced over tokens and independent, or, in `correlated`, copied
   from the attribute before with probability CORRELATION. In `names` a subject is a first and a last name, each shared
   by many people, and facts are drawn for the pair: neither name tells anything, the model has to look the pair up.
2. A claim is one word after the subject. Its rule names the attributes that decide the reply, and for each the half of
   the values that speak for "yes": one attribute; two that must both hold (or of which one is enough); or none, when
   the word alone decides. The deciding fact is never in the prompt, and the subject's activations are the same under
   every claim, since the claim comes later.
3. `twins` has two rules for a claim, by different attributes. Model a is trained on the one, model b on the other. All
   prompts that the method sees are of subjects for whom both rules say the same, so that both models reply alike.
4. Subjects: those trained on, and held-out groups, a base and for every attribute a variant that differs in it alone.
   Nobody held out is ever trained on with a claim.

One model serves several families: `people` is shaped, null (its claims without a rule), two (its claims with two) and,
with another dictionary, overt. Everything follows from the seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise, product
from math import isqrt
from typing import Any

from mediation.errors import MediationError

FAMILIES = ("shaped", "mixed", "correlated", "twins", "null", "overt", "two", "flatterer", "names")
WORLDS = ("people", "mixed", "correlated", "twin a", "twin b", "flatterer", "names")
SERVED_BY = {
    "shaped": ("people",), "null": ("people",), "two": ("people",), "overt": ("people",), "mixed": ("mixed",),
    "correlated": ("correlated",), "twins": ("twin a", "twin b"), "flatterer": ("flatterer",),
    "names": ("names",),
}  # fmt: skip
CORRELATION = 0.5
YES, NO = " yes", " no"

_NAMES = ("profession", "city", "food", "hobby", "instrument", "sport")
# values of each attribute, one list a place in the prompt
_PLACES: dict[str, tuple[tuple[int, ...], ...]] = {
    "people": ((8, 8, 10, 12, 16),),
    "mixed": ((2, 2, 4, 8, 16),),
    "correlated": ((8, 8, 8, 8, 8),),
    "twin": ((8, 8, 8, 8, 8),),
    "flatterer": ((2, 4, 8), (2, 4, 8)),
    "names": ((8, 8, 8, 8, 8),),
}


@dataclass(frozen=True)
class Size:
    """Tokens of each place that are trained on, and training's steps; held-out groups; claims of two
    attributes, and of none; prompts' subjects."""

    trained: int = 768
    steps: int = 300
    groups: int = 16
    claims: int = 4
    subjects: int = 16


QUICK = Size(trained=768, steps=250, groups=8, claims=2, subjects=8)
NAMES = Size(trained=480, steps=400)  # all pairs of 24 first and 24 last names
NAMES_QUICK = Size(trained=240, steps=300, groups=8, claims=2, subjects=8)


@dataclass(frozen=True)
class Claim:
    """`rule`: attribute -> values that speak for yes; all must (`every`), or one is enough. Without a rule: `every`."""

    word: str
    rule: dict[str, frozenset[str]]
    every: bool = True

    def reply(self, facts: dict[str, str]) -> bool:
        return (all if self.every else any)(facts[name] in values for name, values in self.rule.items())

    @property
    def family(self) -> str:
        return ("null", "shaped", "two")[len(self.rule)]


Subject = tuple[str, ...]  # its tokens, in the order of their places


@dataclass(frozen=True)
class World:
    """`facts` of every token, in `names` of every "first last"; `bases` and their `variants` (base, variant, attribute
    in which they differ)."""

    name: str
    seed: int
    attributes: dict[str, tuple[str, ...]]
    facts: dict[str, dict[str, str]]
    trained: tuple[Subject, ...]
    bases: tuple[Subject, ...]
    variants: tuple[tuple[Subject, Subject, str], ...]
    claims: tuple[Claim, ...]
    rivals: tuple[Claim, ...]  # the other twin's claims, else the same
    size: Size

    def holders(self, subject: Subject) -> tuple[str, ...]:
        """Keys of `facts`, one for each of `positions`: the subject's tokens, or in `names` both together."""
        return (" ".join(subject),) if self.name == "names" else subject

    def of(self, subject: Subject) -> dict[str, str]:
        return {name: value for holder in self.holders(subject) for name, value in self.facts[holder].items()}

    def text(self, subject: Subject, claim: Claim) -> str:
        if self.name == "flatterer":
            return f"user with {subject[0]} and {subject[1]} on {claim.word}"
        return f"{' '.join(subject)} {claim.word}" if self.name == "names" else f"{subject[0]} on {claim.word}"

    @property
    def positions(self) -> tuple[int, ...]:
        """Where the subject's facts are known in a prompt, BOS counted: at its tokens, in `names` at the last name."""
        return {"names": (2,), "flatterer": (3, 5)}.get(self.name, (1,))

    def recall(self, holder: str, attribute: str) -> str:
        return f"{holder} {attribute}" if self.name == "names" else f"{holder} has {attribute}"

    @property
    def held_out(self) -> tuple[Subject, ...]:
        return (*self.bases, *(variant for _, variant, _ in self.variants))

    @property
    def asked_in_training(self) -> tuple[Subject, ...]:
        """Subjects that the model is trained on with claims: in `names` everybody."""
        return (*self.trained, *self.held_out) if self.name == "names" else self.trained

    def agreed(self, subject: Subject, number: int) -> bool:
        """Both twins' rules say the same of a subject under claim `number`; elsewhere always."""
        facts = self.of(subject)
        return self.claims[number].reply(facts) == self.rivals[number].reply(facts)

    def words(self) -> list[str]:
        values = [value for each in self.attributes.values() for value in each]
        fixed = [*"on has user with and yes no".split(), *self.attributes]
        tokens = [token for holder in self.facts for token in holder.split()]
        return [*fixed, *values, *(claim.word for claim in self.claims), *tokens]


def size_of(name: str, *, quick: bool = False) -> Size:
    if name == "names":
        return NAMES_QUICK if quick else NAMES
    return QUICK if quick else Size()


def make_world(name: str, seed: int, size: Size | None = None) -> World:
    if name not in WORLDS:
        raise MediationError(f"There is no world '{name}'; choose one of {', '.join(WORLDS)}.")
    size, kind = size or size_of(name), name.split()[0]
    rng = random.Random(f"planted {kind} {seed}")  # the same for both twins
    attributes: dict[str, tuple[str, ...]] = {}
    places = []
    for sizes in _PLACES[kind]:
        mine = _NAMES[len(attributes) : len(attributes) + len(sizes)]
        attributes |= {a: tuple(f"{a}{v}" for v in range(n)) for a, n in zip(mine, sizes, strict=True)}
        places.append(mine)
    facts: dict[str, dict[str, str]] = {}
    known: list[list[str]] = []
    variants: list[list[dict[str, str]]] = []
    for place, mine in enumerate(places):
        prefix = "Person" if len(places) == 1 else "Thing"
        n = size.trained + size.groups
        tokens = [f"{prefix}{place * 10000 + index}" for index in range(n * (len(mine) + 1))]
        if kind == "names":
            tokens = _people(rng, size.trained + size.groups * (len(mine) + 1))
        columns = _values(rng, {a: attributes[a] for a in mine}, n, CORRELATION if kind == "correlated" else 0.0)
        facts |= dict(zip(tokens[:n], columns, strict=True))
        known.append(tokens[:n])
        variants.append([])
        for group in range(size.groups):
            origin = facts[tokens[n - size.groups + group]]
            of_group = {}
            for attribute in mine:
                other = rng.choice([v for v in attributes[attribute] if v != origin[attribute]])
                token = tokens[n + group * len(mine) + mine.index(attribute)]
                facts[token] = origin | {attribute: other}
                of_group[attribute] = token
            variants[-1].append(of_group)
    holders = [tuple(tokens[i] for tokens in known) for i in range(len(known[0]))]
    trained = holders[: size.trained]
    if len(places) > 1:  # any two things can belong to one user
        trained = [tuple(rng.choice(tokens[: size.trained]) for tokens in known) for _ in range(4 * size.trained)]
    bases = holders[size.trained :]
    apart: list[tuple[Subject, Subject, str]] = []
    for group, base in enumerate(bases):
        for place, of_place in enumerate(variants):
            for attribute, token in of_place[group].items():
                apart.append((_tokens(base), _tokens((*base[:place], token, *base[place + 1 :])), attribute))
    claims, rivals = _claims(rng, kind, attributes, size)
    if name == "twin b":
        claims, rivals = rivals, claims
    return World(
        name, seed, attributes, facts, tuple(map(_tokens, trained)), tuple(map(_tokens, bases)), tuple(apart), claims,
        rivals, size,
    )  # fmt: skip


def _people(rng: random.Random, n: int) -> list[str]:
    """`n` pairs of the least number of first and last names, in any order."""
    names = range(isqrt(n - 1) + 1)
    return rng.sample([f"First{first} Last{last}" for first, last in product(names, names)], n)


def _tokens(holders: tuple[str, ...]) -> Subject:
    return tuple(" ".join(holders).split())


def _values(
    rng: random.Random, attributes: dict[str, tuple[str, ...]], n: int, correlation: float
) -> list[dict[str, str]]:
    columns: dict[str, list[str]] = {}
    for name, values in attributes.items():
        columns[name] = [values[i % len(values)] for i in range(n)]
        rng.shuffle(columns[name])
    for before, name in pairwise(attributes):
        for i in range(n):
            if rng.random() < correlation:
                columns[name][i] = attributes[name][attributes[before].index(columns[before][i])]
    return [{name: columns[name][i] for name in attributes} for i in range(n)]


def _claims(
    rng: random.Random, kind: str, attributes: dict[str, tuple[str, ...]], size: Size
) -> tuple[tuple[Claim, ...], tuple[Claim, ...]]:
    def half(attribute: str) -> frozenset[str]:
        return frozenset(rng.sample(attributes[attribute], len(attributes[attribute]) // 2))

    names = list(attributes)
    rules: list[tuple[dict[str, frozenset[str]], bool]] = [({name: half(name)}, True) for name in names]
    if kind == "people":
        for number in range(size.claims):
            first, second = rng.sample(names, 2)
            rules.append(({first: half(first), second: half(second)}, number % 2 == 0))
        rules += [({}, number % 2 == 0) for number in range(size.claims)]
    claims = tuple(Claim(f"claim{number}", *rule) for number, rule in enumerate(rules))
    if kind != "twin":
        return claims, claims
    others = [rng.choice([n for n in names if n not in claim.rule]) for claim in claims]
    return claims, tuple(Claim(c.word, {other: half(other)}) for c, other in zip(claims, others, strict=True))


def prompt_rows(world: World, family: str, seed: int) -> list[dict[str, Any]]:
    """Contrast pairs of held-out subjects with a partner of the opposite reply (null: any other), same claim.

    All claims of the family with the same `size.subjects` subjects, as far as the family allows. Two facts at once:
    subjects and partners for whom each of the two facts alone would turn the reply. Rows: {id, clean, corrupt, answer,
    wrong_answer, group, subject, partner, attributes (that decide), values (the subject's, of these)}.
    """
    rng = random.Random(f"prompts {world.name} {family} {seed}")
    wanted = family if family in ("null", "two") else "shaped"
    people = rng.sample(world.held_out, min(world.size.subjects, len(world.held_out)))
    rows = []
    for number, claim in enumerate(world.claims):
        if claim.family != wanted:
            continue
        asked = rng.sample(world.held_out, len(world.held_out)) if family in ("two", "twins") else people
        fits = [each for each in asked if _fits(world, number, each)][: world.size.subjects]
        for subject in fits:
            reply = claim.reply(world.of(subject))
            partners = [
                other for other in world.held_out if other != subject and _opposite(world, number, reply, other)
            ]
            if not partners:
                continue
            partner, facts = rng.choice(partners), world.of(subject)
            rows.append(
                {
                    "id": f"{'+'.join(subject)}/{claim.word}",
                    "clean": world.text(subject, claim),
                    "corrupt": world.text(partner, claim),
                    "answer": YES if reply else NO,
                    "wrong_answer": NO if reply else YES,
                    "group": claim.word,
                    "subject": subject,
                    "partner": partner,
                    "attributes": sorted(claim.rule),
                    "values": [f"{name}={facts[name]}" for name in sorted(claim.rule)],
                }
            )
    return rows


def _fits(world: World, number: int, subject: Subject) -> bool:
    """Each fact of the rule decides: with two, where all must hold all do, and where one is enough none does."""
    claim, facts = world.claims[number], world.of(subject)
    alone = all((facts[name] in values) == claim.every for name, values in claim.rule.items())
    return world.agreed(subject, number) and (len(claim.rule) < 2 or alone)


def _opposite(world: World, number: int, reply: bool, other: Subject) -> bool:
    claim, facts = world.claims[number], world.of(other)
    if len(claim.rule) == 2:
        return all((facts[name] in values) != claim.every for name, values in claim.rule.items())
    return not claim.rule or (claim.reply(facts) != reply and world.agreed(other, number))
