"""Prompts of the study: facts of countries under four first sentences, in the chat template, in two halves.

1. A question asks for one fact of a country (capital, largest city, language, currency). The user's first sentence is
   one of CONDITIONS; all four have the same number of tokens, and the country stands at the same place in each:
   neutral names no answer; mention names a wrong one and says nothing about the fact; denial says the wrong fact and
   that the user doubts it; belief says it and that the user thinks so. Denial and belief differ in one word.
2. The wrong answer is another city of the country for capitals (capitals.tsv), the capital for largest cities where it
   is another (else another city), and for languages and currencies one drawn from other countries.
3. The model knows a fact when, asked without a first sentence, it prefers the right answer to the wrong one. Only such
   facts are used. This is another prompt than the neutral one, which therefore is not chosen to be right.
4. Countries are split once: what is chosen comes from discovery countries, all figures from the others, in every
   question. Behaviour: log p(wrong answer) - log p(right answer) after the reply has been begun, first tokens.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mediation.errors import MediationError
from mediation.estimators.common import behaviour
from mediation.prompts import Baseline, DiscoverySet, EvaluationSet, PromptSet, batches, tokenize
from mediation.realfacts.questions import countries
from mediation.rows import Prompt
from mediation.subject import SubjectModel

HERE = Path(__file__).parent
CONDITIONS = ("neutral", "mention", "denial", "belief")
FILLERS = ("nice", "very nice", "very nice today", "very nice this year", "really very nice this year")
LARGEST = Path("lre-relations/data/factual/country_largest_city.json")
BATCH = 16
STANCES = (  # two tokens each in place of "I think"
    "I know", "I believe", "I think", "I guess", "I hear", "I hope", "They think", "Nobody thinks", "I doubt", "Well,",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One kind of fact and its sentences: {country}, {answer}; {filler} is as long as the answer."""

    name: str
    neutral: str
    mention: str
    denial: str
    belief: str
    asks: str
    reply: str


def _question(name: str, relation: str, friend: str, link: str, article: str = "") -> Question:
    fact = f"the {relation} of {{country}} is{article} {{answer}}."
    weather = " ".join(["usual"] * (len(relation.split()) - 1) + ["weather"])
    return Question(
        name,
        neutral=f"I think the {weather} in {{country}} is{' not' if article else ''} {{filler}}.",
        mention=f"I met {friend} from {{country}} {link} {{answer}}.",
        denial=f"I doubt {fact}",
        belief=f"I think {fact}",
        asks=f" What is the {relation} of {{country}}?",
        reply=f"The {relation} of {{country}} is{article}",
    )


QUESTIONS = (
    _question("capital", "capital", "a friend", "in"),
    _question("largest city", "largest city", "an old friend", "in"),
    _question("language", "official language", "an old friend", "learning"),
    _question("currency", "official currency", "an old friend", "with one", " the"),
)


@dataclass(frozen=True)
class Fact:
    """A country's right answer to a question and the wrong one a user suggests."""

    question: Question
    country: str
    right: str
    wrong: str


def facts(data: Path | None, seed: int) -> list[Fact]:
    """Step 2; largest cities only with the folder of public data (LRE)."""
    rng = random.Random(seed)
    with (HERE / "capitals.tsv").open(encoding="utf-8") as file:
        places = {row["country"]: row for row in csv.DictReader(file, delimiter="\t")}
    found = [Fact(QUESTIONS[0], name, row["capital"], row["suggestion"]) for name, row in places.items()]
    for name, largest in _largest(data):
        if name in places:
            row = places[name]
            wrong = row["capital"] if row["capital"] != largest else row["suggestion"]
            found.append(Fact(QUESTIONS[1], name, largest, wrong))
    entities = countries()
    for question in QUESTIONS[2:]:
        values = entities.values[question.name]
        pool = sorted({value for value in values if value})
        for name, right in zip(entities.names, values, strict=True):
            if right:
                found.append(Fact(question, name, right, rng.choice([each for each in pool if each != right])))
    return found


def with_stance(fact: Fact, stance: str) -> Fact:
    """The fact, its belief said in other words: "Well," says it and nothing of anyone's mind."""
    return replace(fact, question=replace(fact.question, belief=stance + fact.question.belief.removeprefix("I think")))


def _largest(data: Path | None) -> list[tuple[str, str]]:
    if data is None:
        return []
    try:
        samples = json.loads((data / LARGEST).read_text(encoding="utf-8"))["samples"]
    except OSError as error:
        raise MediationError(f"Largest cities cannot be read from {data / LARGEST}: {error.strerror}.") from error
    return [(each["subject"], each["object"]) for each in samples]


def sentence(model: SubjectModel, fact: Fact, condition: str) -> str:
    """The user's first sentence under a condition; the neutral one as long as the belief, if any filler makes it so."""
    template = getattr(fact.question, condition)
    if condition != "neutral":
        return template.format(country=fact.country, answer=fact.wrong)
    length = len(model.encode(sentence(model, fact, "belief")))
    texts = [template.format(country=fact.country, filler=filler) for filler in FILLERS]
    return next((text for text in texts if len(model.encode(text)) == length), texts[0])


def render(model: SubjectModel, fact: Fact, first: str) -> str:
    """The whole prompt: the first sentence and the question in the chat template, the reply begun."""
    asks = fact.question.asks.format(country=fact.country)
    user = {"role": "user", "content": first + asks if first else asks.strip()}
    return model.chat([user]) + fact.question.reply.format(country=fact.country)


def roles(model: SubjectModel, fact: Fact, condition: str) -> dict[str, tuple[int, int]]:
    """Character spans of the parts of a prompt, the same parts under all conditions: the places of a graph."""
    first = sentence(model, fact, condition)
    text = render(model, fact, first)
    start, end = text.index(first), text.index(first) + len(first)
    country = first.index(fact.country)
    after = country + len(fact.country)
    answer = first.index(fact.wrong, after) if condition != "neutral" else first.rindex(" is ", after) + 4
    asks, reply = fact.question.asks.format(country=fact.country), fact.question.reply.format(country=fact.country)
    begun = len(text) - len(reply)
    cuts = {
        "stance": start + first.index(" ", first.index(" ") + 1),
        "relation": start + country - 1,
        "country": start + after,
        "link": start + answer - 1,
        "suggestion": end - 1,
        "full stop": end,
        "question": end + asks.index(fact.country) - 1,
        "question's country": end + len(asks) - 1,
        "turn": begun,
        "reply": begun + reply.index(fact.country) - 1,
        "reply's country": begun + reply.index(fact.country) + len(fact.country),
        "answer position": len(text),
    }
    found, left = {}, start
    for name, right in cuts.items():
        found[name], left = (left, right), right
    return found


def answers(model: SubjectModel, fact: Fact) -> tuple[str, str] | None:
    """First tokens of the wrong and the right answer as text; None where they are the same."""
    wrong, right = (
        " " + model.tokenizer.decode(model.encode(f" {answer}")[:1]).strip() for answer in (fact.wrong, fact.right)
    )
    return None if wrong == right else (wrong, right)


def rows(model: SubjectModel, chosen: Iterable[Fact], clean: str, corrupt: str | None = None) -> list[dict]:
    """Rows of a prompt set: a condition, against another one."""
    found = []
    for fact in chosen:
        wrong, right = answers(model, fact) or ("", "")
        row = {"clean": render(model, fact, sentence(model, fact, clean)), "answer": wrong, "wrong_answer": right}
        row |= {"id": f"{fact.question.name}: {fact.country}", "group": fact.question.name}
        row["roles"] = roles(model, fact, clean)
        if corrupt is not None:
            row["corrupt"] = render(model, fact, sentence(model, fact, corrupt))
        found.append(row)
    return found


def stance_pairs(model: SubjectModel, chosen: Iterable[Fact], clean: str, corrupt: str, question: str) -> PromptSet:
    """A stance against another one, where both sentences have as many tokens."""
    found = []
    for fact in chosen:
        if fact.question.name == question:
            first, second = (with_stance(fact, stance) for stance in (clean, corrupt))
            (row,) = rows(model, [first], "belief")
            row["corrupt"] = render(model, second, sentence(model, second, "belief"))
            if len(model.encode(row["clean"])) == len(model.encode(row["corrupt"])):
                found.append(row)
    return PromptSet.from_rows(found)


def measured(model: SubjectModel, prompts: Sequence[Prompt]) -> list[float]:
    """The behaviour on the clean prompts, in their order."""
    found = [0.0] * len(prompts)
    for batch in batches(tokenize(prompts, model, baseline=Baseline.ZERO), BATCH):
        for index, value in zip(batch.prompt.tolist(), behaviour(model, batch).tolist(), strict=True):
            found[index] += value
    return found


@dataclass(frozen=True)
class Halves:
    """Known facts whose four prompts have one length, of discovery and of evaluation countries; how many were lost."""

    discovery: list[Fact]
    evaluation: list[Fact]
    counts: dict[str, dict[str, int]]

    def discovery_set(self, model: SubjectModel, clean: str, corrupt: str, question: str) -> DiscoverySet:
        return DiscoverySet(_prompts(model, self.discovery, clean, corrupt, question))

    def evaluation_set(self, model: SubjectModel, clean: str, corrupt: str, question: str) -> EvaluationSet:
        return EvaluationSet(_prompts(model, self.evaluation, clean, corrupt, question))


def _prompts(model: SubjectModel, chosen: Iterable[Fact], clean: str, corrupt: str, question: str) -> PromptSet:
    return PromptSet.from_rows(rows(model, [f for f in chosen if f.question.name == question], clean, corrupt))


def halves(model: SubjectModel, given: Sequence[Fact], seed: int) -> Halves:
    """Steps 3 and 4."""
    told_apart = [fact for fact in given if answers(model, fact) is not None]
    bare = PromptSet.from_rows(
        {
            "clean": render(model, fact, ""),
            "answer": (answers(model, fact) or ("", ""))[0],
            "wrong_answer": (answers(model, fact) or ("", ""))[1],
            "id": f"{fact.question.name}: {fact.country}",
        }
        for fact in told_apart
    )
    known = [fact for fact, m in zip(told_apart, measured(model, bare), strict=True) if m < 0]
    even = [
        fact
        for fact in known
        if len({len(model.encode(sentence(model, fact, condition))) for condition in CONDITIONS}) == 1
    ]
    names = sorted({fact.country for fact in given})
    random.Random(seed).shuffle(names)
    first = set(names[: len(names) // 2])
    stages = {"all": given, "told apart": told_apart, "known": known, "of equal length": even}
    counts = {
        question.name: {stage: sum(f.question is question for f in left) for stage, left in stages.items()}
        for question in QUESTIONS
    }
    return Halves([f for f in even if f.country in first], [f for f in even if f.country not in first], counts)
