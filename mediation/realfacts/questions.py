"""Entities with known facts, and questions about them.

1. Facts of countries are in `countries.tsv`; those of cities come from RAVEL, other wordings from ParaRel.
2. A question is asked with the entity first ("In {}, the capital city is": what the model has computed at the entity
   cannot depend on the question, which comes later) or with the fact first ("The capital of {} is the city of").
3. Entities are split once into development and held-out ones, of different types: directions, labels and thresholds
   come from the first, figures from the second. Wordings are split alike: the first is kept for figures.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mediation.errors import MediationError

COUNTRIES = Path(__file__).with_name("countries.tsv")
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


def countries() -> Entities:
    """124 countries with capital, language, currency and continent."""
    with COUNTRIES.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    attributes = [name for name in rows[0] if name != "country"]
    return Entities(
        tuple(row["country"] for row in rows),
        {attribute: tuple(row[attribute] or None for row in rows) for attribute in attributes},
    )


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
