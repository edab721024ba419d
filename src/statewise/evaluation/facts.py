"""Facts in plain sentences: what is stated, how it is changed, how it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from statewise.evaluation.words import ADJECTIVES, CITIES, FIRST_NAMES, JOBS, LAST_NAMES, NOUNS, ROOMS


@dataclass(frozen=True)
class Relation:
    """One kind of fact. In the sentences `{e}` is who or what it is about and `{v}` the value."""

    name: str
    statements: tuple[str, ...]
    changes: tuple[str, ...]
    questions: tuple[str, ...]
    entity: Callable[[Random], str]
    value: Callable[[Random], str]


@dataclass(frozen=True)
class Fact:
    """A value that an entity has under a relation."""

    relation: Relation
    entity: str
    value: str

    @property
    def key(self) -> tuple[str, str]:
        """What a later statement must share to replace this one."""
        return self.relation.name, self.entity

    @property
    def content(self) -> str:
        """The text that decides on which side of the train/eval split the fact lies."""
        return f"{self.relation.name}|{self.entity}|{self.value}"

    def statement(self, rng: Random) -> str:
        return rng.choice(self.relation.statements).format(e=self.entity, v=self.value)

    def change(self, rng: Random) -> str:
        return rng.choice(self.relation.changes).format(e=self.entity, v=self.value)

    def question(self, rng: Random) -> str:
        return rng.choice(self.relation.questions).format(e=self.entity)


def _object(rng: Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _person(rng: Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


RELATIONS = (
    Relation(
        "code",
        ("The code of the {e} is {v}.", "The {e} has the code {v}."),
        ("The code of the {e} is now {v}.", "Correction: the code of the {e} is {v}."),
        ("What is the code of the {e}?", "Which code does the {e} have?", "Tell me the code of the {e}."),
        _object,
        lambda rng: str(rng.randrange(1000, 10000)),
    ),
    Relation(
        "place",
        ("The {e} is in the {v}.", "You can find the {e} in the {v}."),
        ("The {e} is now in the {v}.", "Correction: the {e} is in the {v}."),
        ("Where is the {e}?", "In which place is the {e}?"),
        _object,
        lambda rng: rng.choice(ROOMS),
    ),
    Relation(
        "owner",
        ("The {e} belongs to {v}.", "The owner of the {e} is {v}."),
        ("The {e} now belongs to {v}.", "Correction: the {e} belongs to {v}."),
        ("Who owns the {e}?", "To whom does the {e} belong?"),
        _object,
        lambda rng: rng.choice(FIRST_NAMES),
    ),
    Relation(
        "city",
        ("{e} lives in {v}.", "The home of {e} is in {v}."),
        ("{e} now lives in {v}.", "Correction: {e} lives in {v}."),
        ("Where does {e} live?", "In which city does {e} live?"),
        _person,
        lambda rng: rng.choice(CITIES),
    ),
    Relation(
        "job",
        ("{e} works as a {v}.", "The job of {e} is {v}."),
        ("{e} now works as a {v}.", "Correction: {e} works as a {v}."),
        ("What is the job of {e}?", "What does {e} do for a living?"),
        _person,
        lambda rng: rng.choice(JOBS),
    ),
)


def random_fact(rng: Random) -> Fact:
    relation = rng.choice(RELATIONS)
    return Fact(relation, relation.entity(rng), relation.value(rng))


def changed(fact: Fact, rng: Random) -> Fact:
    """The same entity and relation with another value."""
    value = fact.value
    while value == fact.value:
        value = fact.relation.value(rng)
    return Fact(fact.relation, fact.entity, value)
