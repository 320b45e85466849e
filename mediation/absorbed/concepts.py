"""Concepts beyond spelling: their members, the contexts these stand in, and what is asked of the model there.

Members are common words and names; a model is measured on those it writes as one token. In one family every word stands
in every context, so nothing but the word itself tells one concept from another. Contexts for discovery and for
evaluation are different ones, and the kinds named in them are none of those asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from mediation.absorbed.contexts import Context
from mediation.realfacts.questions import countries


@dataclass(frozen=True)
class Concept:
    """Its members, and the word that the model should give for them where the contexts ask for one."""

    name: str
    answer: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Concepts in common contexts. others: words that belong to none of them; asks: whether contexts ask anything."""

    name: str
    concepts: tuple[Concept, ...]
    others: tuple[str, ...]
    discovery: tuple[Context, ...]
    evaluation: tuple[Context, ...]
    asks: bool


KINDS = (
    Concept(
        "countries",
        " country",
        tuple(
            "Japan France Germany Italy Spain Canada Mexico Brazil India China Russia Egypt Greece Turkey Ireland "
            "Poland Sweden Norway Denmark Finland Portugal Austria Hungary Switzerland Belgium Israel Iran Iraq "
            "Pakistan Bangladesh Thailand Vietnam Indonesia Malaysia Australia Kenya Nigeria Ethiopia Argentina "
            "Chile Peru Colombia Cuba Ukraine Scotland Syria Lebanon Afghanistan Nepal Ghana Jamaica Iceland "
            "Haiti".split()
        ),
    ),
    Concept(
        "months",
        " month",
        tuple(
            "January February March April May June July August September October November December Jan Feb Mar "
            "Apr Aug Sept Oct Nov Dec".split()
        ),
    ),
    Concept(
        "numbers",
        " number",
        tuple(
            "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand "
            "million billion zero dozen".split()
        ),
    ),
    Concept(
        "professions",
        " job",
        tuple(
            "doctor nurse teacher lawyer engineer farmer soldier pilot chef baker writer artist musician singer "
            "dancer actor painter carpenter plumber mechanic electrician scientist professor journalist editor "
            "photographer dentist surgeon pharmacist accountant banker manager secretary clerk librarian judge "
            "tailor butcher barber fisherman miner sailor driver waiter architect programmer translator gardener "
            "hunter detective".split()
        ),
    ),
    Concept(
        "feelings",
        " emotion",
        tuple(
            "anger fear joy sadness happiness love hate jealousy envy pride shame guilt anxiety grief sorrow hope "
            "despair excitement boredom disgust surprise loneliness frustration rage delight regret contempt awe "
            "gratitude sympathy compassion affection embarrassment confusion passion terror panic misery "
            "enthusiasm relief".split()
        ),
    ),
)
OTHERS = tuple(
    "table chair window door house bridge river mountain forest garden bread cheese soup butter sugar shirt "
    "jacket shoes book paper letter music movie game ball school church hospital market street road train boat "
    "engine wheel stone iron glass paint brush box bottle basket rope clock mirror lamp candle fire water rain "
    "snow wind cloud moon star sand grass leaf root seed stick needle knife spoon pocket carpet pillow blanket "
    "story picture question answer reason method system theory process law tax price debt battle speech song poem "
    "novel".split()
)
EXAMPLES = (
    (("apple", "fruit"), ("horse", "animal"), ("blue", "color"), ("piano", "instrument"), ("oak", "tree"),
     ("hammer", "tool")),
    (("tennis", "sport"), ("lemon", "fruit"), ("tiger", "animal"), ("silver", "metal"), ("violin", "instrument"),
     ("green", "color")),
    (("carrot", "vegetable"), ("dog", "animal"), ("copper", "metal"), ("football", "sport"), ("truck", "vehicle"),
     ("rose", "flower")),
    (("guitar", "instrument"), ("banana", "fruit"), ("rabbit", "animal"), ("bicycle", "vehicle"), ("red", "color"),
     ("hockey", "sport")),
)  # fmt: skip


def _asked(line: str, number: int) -> Context:
    """Lines of examples and the beginning of one more; `line` has {} for the word and [] for its kind."""
    shown = "".join(f"{line.replace('{}', word).replace('[]', kind)}\n" for word, kind in EXAMPLES[number])
    before, after = line.removesuffix("[].").split(" {}")
    return Context(shown + before, after.rstrip(" "))


ASKED = (
    _asked("Word: {}, which is a kind of [].", 0),
    _asked("The word {} means a type of [].", 1),
    _asked("Entry: {}, a sort of [].", 2),
    _asked("Consider {}: this is a [].", 3),
)
PLAIN = (
    Context("In the letter they wrote about"),
    Context("All that anyone could talk about was"),
    Context("The first word on the page was"),
    Context("He thought for a long time about"),
)

WOMEN = tuple(
    "Mary Elizabeth Sarah Emma Anna Julia Jane Alice Margaret Susan Helen Laura Emily Jessica Jennifer Amy Rachel "
    "Lisa Karen Nancy Barbara Linda Patricia Michelle Diana Sophie Charlotte Lucy Kate Rebecca Victoria Catherine "
    "Maria Amanda Stephanie Angela Melissa Nicole Hannah Olivia Ruth Martha Grace Claire Julie Christine Carol "
    "Eva Rose Lily".split()
)
MEN = tuple(
    "John David Michael James Robert William Thomas George Charles Peter Paul Mark Steven Richard Edward Henry "
    "Daniel Joseph Brian Kevin Jason Matthew Andrew Frank Jack Adam Simon Martin Stephen Patrick Eric Tom Jim "
    "Bill Mike Bob Joe Sam Ben Harry Philip Arthur Roger Alan Samuel Walter Ryan Scott Jeff Larry".split()
)
FEMALE = tuple(
    "queen princess mother daughter sister aunt wife lady girl woman actress widow bride waitress grandmother "
    "niece girlfriend goddess mistress nun duchess heroine".split()
)
MALE = tuple(
    "king prince father son brother uncle husband gentleman boy man actor monk groom waiter grandfather nephew "
    "boyfriend god master priest duke hero".split()
)


def _pronoun(article: str) -> tuple[Context, ...]:
    return (
        Context(f"Yesterday{article}", " came home late because"),
        Context(f"Everybody knows that{article}", " was so tired that"),
        Context(f"Last week{article}", " was happy, and"),
        Context(f"They told us that{article}", " left early because"),
    )


def _gender(name: str, women: tuple[str, ...], men: tuple[str, ...], article: str) -> Family:
    contexts = _pronoun(article)
    concepts = (Concept(f"female {name}", " she", women), Concept(f"male {name}", " he", men))
    return Family(f"gender of {name}", concepts, (), contexts[:2], contexts[2:], asks=True)


def _shared(name: str, attribute: str, values: tuple[str, ...], contexts: tuple[Context, ...]) -> Family:
    """Countries by what they have in common, the facts themselves; countries with another value are the others."""
    entities = countries()
    by_value = dict(zip(entities.names, entities.values[attribute], strict=True))
    concepts = tuple(
        Concept(value, f" {value}", tuple(name for name, own in by_value.items() if own == value)) for value in values
    )
    others = tuple(name for name, own in by_value.items() if own is not None and own not in values)
    return Family(name, concepts, others, contexts[:2], contexts[2:], asks=True)


CONTINENT = (
    Context("In", ", which lies on the continent of"),
    Context("The people of", " live on the continent of"),
    Context("On the map,", " lies on the continent of"),
    Context("My friend lives in", ", a country on the continent of"),
)
LANGUAGE = (
    Context("In", ", most people speak"),
    Context("The children of", " learn to read and write in"),
    Context("The people of", " speak"),
    Context("My friend moved to", ", where the official language is"),
)

FAMILIES = (
    Family("kinds, asked for", KINDS, OTHERS, ASKED[:2], ASKED[2:], asks=True),
    Family("kinds, in sentences", KINDS, OTHERS, PLAIN[:2], PLAIN[2:], asks=False),
    _gender("names", WOMEN, MEN, ""),
    _gender("nouns", FEMALE, MALE, " the"),
    _shared("continent of countries", "continent", ("Europe", "Asia", "Africa"), CONTINENT),
    _shared("language of countries", "language", ("English", "Spanish", "Arabic", "French"), LANGUAGE),
)
