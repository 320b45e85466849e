"""Entities with known facts, and questions about them.

1. Facts of countries are in `countries.tsv` and, of those whose names have two tokens for SmolLM2,
   `countries_of_two_tokens.tsv`; those of cities and Nobel laureates come from RAVEL (Huang et al. 2024),
   other wordings from ParaRel (Elazar et al. 2021).
2. A question is asked with the entity first ("In {}, the capital city is": what the model has computed at the entity
   cannot depend on the question, which comes later) or with the fact first ("The capital of {} is the city of").
3. Entities are split once into development and held-out ones, of different types: directions, labels and thresholds
   come from the first, figures from the second. Wordings are split alike: the first is kept for figures.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mediation.errors import MediationError

COUNTRIES = Path(__file__).with_name("countries.tsv")
LONGER_COUNTRIES = Path(__file__).with_name("countries_of_two_tokens.tsv")
PARAREL_RELATIONS = {"capital": "P36", "language": "P37"}


@dataclass(frozen=True)
class Question:
    """One attribute, and how it is asked for; {} stands for the entity and the answer comes right after.

    `asked` and `fact_first` are for figures; `other_wordings` for development, entity first as `asked` is.
    """

    attribute: str
    asked: str
    other_wordings: tuple[str, ...]
    fact_first: str


COUNTRY_QUESTIONS = (
    Question(
        "capital",
        "In {}, the capital city is",
        ("In {}, the capital is the city of", "In {}, the government sits in the city of"),
        "The capital of {} is the city of",
    ),
    Question(
        "language",
        "In {}, the official language is",
        ("In {}, most people speak", "In {}, children learn to read and write in"),
        "The official language of {} is",
    ),
    Question(
        "currency",
        "In {}, the official currency is the",
        ("In {}, the money is called the", "In {}, prices are given in the local currency, the"),
        "The official currency of {} is the",
    ),
    Question(
        "continent",
        "In {}, which lies on the continent of",
        ("In {}, a country on the continent of", "In {}, as in the rest of the continent of"),
        "On the map, {} lies on the continent of",
    ),
)

CITY_QUESTIONS = (
    Question(
        "Country",
        "The city of {} lies in the country of",
        ("The city of {} belongs to the country of", "The city of {} is on the map of the country of"),
        "The country around the city of {} is",
    ),
    Question(
        "Language",
        "The city of {} is a place where people speak",
        ("The city of {} is home to people whose language is", "The city of {} has schools where children write in"),
        "The language that people speak in the city of {} is",
    ),
    Question(
        "Continent",
        "The city of {} lies on the continent of",
        ("The city of {} is part of the continent of", "The city of {} is on the map of the continent of"),
        "The continent around the city of {} is",
    ),
)


LAUREATE_QUESTIONS = (
    Question(
        "Field",
        "The Nobel laureate {} received the Nobel Prize in",
        ("The Nobel laureate {} won the Nobel Prize in", "The Nobel laureate {} was honoured for work in"),
        "The field of the Nobel Prize of {} was",
    ),
    Question(
        "Country of Birth",
        "The Nobel laureate {} is a native of",
        ("The Nobel laureate {} grew up in", "The Nobel laureate {} was born in the country of"),
        "The native country of {} is",
    ),
    Question(
        "Gender",
        "The Nobel laureate {} said that",
        ("The Nobel laureate {} was happy because", "The Nobel laureate {} was well known before"),
        "A short biography of {} says that",
    ),
)
PRONOUNS = {"male": "he", "female": "she"}


@dataclass(frozen=True)
class Topic:
    """Entities whose names have `tokens` tokens, and what is asked about them; `load` takes the folder of data."""

    name: str
    questions: tuple[Question, ...]
    load: Callable[[Path | None], Entities]
    tokens: int = 1

    @property
    def attributes(self) -> tuple[str, ...]:
        """The questions' attributes, in order."""
        return tuple(question.attribute for question in self.questions)

    @property
    def before(self) -> str:
        """What stands before the entity, where the entity comes first."""
        return self.questions[0].asked.partition(" {}")[0]


@dataclass(frozen=True)
class Entities:
    """Names, and for every attribute the value of each, None where unknown."""

    names: tuple[str, ...]
    values: Mapping[str, tuple[str | None, ...]]

    def __post_init__(self) -> None:
        for attribute, values in self.values.items():
            if len(values) != len(self.names):
                raise ValueError(f"{len(values)} values of {attribute} for {len(self.names)} entities.")

    def __len__(self) -> int:
        return len(self.names)

    def only(self, rows: Sequence[int]) -> Self:
        """These entities, of the same type."""
        return type(self)(*self._pick(rows))

    def some(self, most: int, seed: int) -> Self:
        """At most so many of them, drawn at random."""
        rows = random.Random(seed).sample(range(len(self)), min(most, len(self)))
        return self.only(sorted(rows))

    def tags(self) -> list[dict[str, str]]:
        """Each entity's known facts, as `mediation.labels.enrichment` takes them."""
        return [
            {attribute: value for attribute, values in self.values.items() if (value := values[row]) is not None}
            for row in range(len(self))
        ]

    def split(self, seed: int) -> tuple[DevelopmentEntities, HeldOutEntities]:
        """Two halves at random."""
        if len(self) < 2:
            raise MediationError("Entities are split in two halves; give two or more.")
        rows = list(range(len(self)))
        random.Random(seed).shuffle(rows)
        half = len(rows) // 2
        return (
            DevelopmentEntities(*self._pick(sorted(rows[:half]))),
            HeldOutEntities(*self._pick(sorted(rows[half:]))),
        )

    def _pick(self, rows: Sequence[int]) -> tuple[tuple[str, ...], dict[str, tuple[str | None, ...]]]:
        return (
            tuple(self.names[row] for row in rows),
            {attribute: tuple(values[row] for row in rows) for attribute, values in self.values.items()},
        )


class DevelopmentEntities(Entities):
    """Entities that directions, labels and settings may be made from."""


class HeldOutEntities(Entities):
    """Entities kept aside: figures are measured on these and nothing is chosen on them."""


def countries(file: Path = COUNTRIES) -> Entities:
    """Countries with capital, language, currency and continent; of several languages or capitals none."""
    with file.open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))
    attributes = [name for name in rows[0] if name != "country"]
    return Entities(
        tuple(row["country"] for row in rows),
        {attribute: tuple(row[attribute] or None for row in rows) for attribute in attributes},
    )


def cities(data: Path | None) -> Entities:
    """RAVEL's cities with country, language and continent; of several languages none is the answer."""
    table = _ravel(data, "city")
    names = tuple(sorted(table))
    values = {q.attribute: tuple(table[name][q.attribute] or None for name in names) for q in CITY_QUESTIONS}
    values["Language"] = tuple(map(_the_only, values["Language"]))
    return Entities(names, values)


def laureates(data: Path | None) -> Entities:
    """RAVEL's Nobel laureates with field, country of birth and, for their gender, the pronoun that stands for them.

    Of several fields none is the answer. Names that end in a full stop (Jr.) are left out: it, not the name, would be
    the entity's last token.
    """
    table = _ravel(data, "nobel_prize_winner")
    names = tuple(sorted(name for name in table if not name.endswith(".")))
    rows = [table[name] for name in names]
    return Entities(
        names,
        {
            "Field": tuple(_the_only(row["Field"]) for row in rows),
            "Country of Birth": tuple(row["Country of Birth"].removeprefix("the ") or None for row in rows),
            "Gender": tuple(PRONOUNS.get(row["Gender"]) for row in rows),
        },
    )


def _ravel(data: Path | None, kind: str) -> dict[str, dict[str, str]]:
    """RAVEL's entities of a kind, with their attributes; "" where one is not known."""
    if data is None:
        raise MediationError("These entities are RAVEL's; give the folder that holds ravel/ with --data.")
    file = data / "ravel" / "data" / f"ravel_{kind}_entity_attributes.json"
    try:
        table: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MediationError(
            f"RAVEL's entities cannot be read from {file}: {error.strerror}; give the folder that holds ravel/."
        ) from error
    return table


def _the_only(value: str | None) -> str | None:
    """None for several values, or none."""
    return None if not value or "," in value else value


def topics() -> dict[str, Topic]:
    """What can be asked about, by name."""
    every = (
        Topic("countries", COUNTRY_QUESTIONS, lambda _: countries()),
        Topic("countries of two tokens", COUNTRY_QUESTIONS, lambda _: countries(LONGER_COUNTRIES), tokens=2),
        Topic("cities", CITY_QUESTIONS, cities),
        Topic("cities of two tokens", CITY_QUESTIONS, cities, tokens=2),
        Topic("laureates", LAUREATE_QUESTIONS, laureates, tokens=4),
    )
    return {topic.name: topic for topic in every}


def paraphrases(data: Path, attribute: str) -> list[str]:
    """ParaRel's wordings of an attribute: those that begin with neither entity nor answer and end with the answer."""
    relation = PARAREL_RELATIONS[attribute]
    file = data / "pararel" / "data" / "pattern_data" / "graphs_json" / f"{relation}.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MediationError(
            f"ParaRel's wordings cannot be read from {file}: {error.strerror}; give the folder that holds pararel/."
        ) from error
    patterns = [json.loads(line)["pattern"] for line in lines if line.strip()]
    plain = [pattern.rstrip(" .") for pattern in patterns]
    kept = [p for p in plain if p.endswith("[Y]") and not p.startswith(("[X]", "[Y]")) and p.count("[X]") == 1]
    return [p.removesuffix("[Y]").rstrip().replace("[X]", "{}") for p in kept]
