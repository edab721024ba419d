"""The skills of the demo model: generators of conversations with one exact answer.

Training and `statewise eval` draw from the same generators. What an instance is about (its operands, its list, its
fact) is hashed, and the hash alone decides whether it may appear in training or in evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from statewise.evaluation.documents import Message, Writer
from statewise.evaluation.filler import CountTokens, approximate_tokens, shipped_prose
from statewise.evaluation.words import FIRST_NAMES, THINGS

Split = Literal["train", "eval"]
Drawn = tuple[str, str, str]  # content that is hashed, question, answer
DISTANCES = (256, 1024, 2048, 4096)


@dataclass(frozen=True)
class Instance:
    """A conversation that ends with a user turn, and the one right reply to it."""

    messages: list[Message]
    answer: str
    skill: str
    distance: int  # tokens between the fact and the question; 0 where nothing is looked up


@dataclass(frozen=True)
class Skill:
    name: str
    summary: str
    distances: tuple[int, ...]
    make: Callable[[Random, int, Split, Sequence[str], CountTokens], tuple[list[Message], str]]


def held_out(skill: str, content: str) -> bool:
    """Whether `content` belongs to the evaluation split: one in eight, by a stable hash."""
    digest = hashlib.blake2b(f"{skill}\0{content}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 8 == 0


def in_split(skill: str, content: str, split: Split) -> bool:
    return held_out(skill, content) == (split == "eval")


def _number(rng: Random) -> int:
    """A number of one to four digits, each length equally often."""
    digits = rng.randrange(1, 5)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _add(rng: Random) -> Drawn:
    a, b = _number(rng), _number(rng)
    text = rng.choice(("What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "How much is {a} plus {b}?"))
    return f"{min(a, b)}+{max(a, b)}", text.format(a=a, b=b), f"{a} + {b} = {a + b}"


def _subtract(rng: Random) -> Drawn:
    b, a = sorted((_number(rng), _number(rng)))
    text = rng.choice(("What is {a} - {b}?", "Subtract {b} from {a}.", "{a} - {b} = ?", "How much is {a} minus {b}?"))
    return f"{a}-{b}", text.format(a=a, b=b), f"{a} - {b} = {a - b}"


def _multiply(rng: Random) -> Drawn:
    a, b = rng.randrange(10, 100), rng.randrange(2, 10)
    tens, ones = a // 10 * 10 * b, a % 10 * b
    text = rng.choice(("What is {a} * {b}?", "Multiply {a} by {b}.", "{a} * {b} = ?", "How much is {a} times {b}?"))
    return f"{a}*{b}", text.format(a=a, b=b), f"{a} * {b} = {tens} + {ones} = {a * b}"


def _copy(rng: Random) -> Drawn:
    size = rng.randrange(2, 25)
    kind = rng.randrange(3)
    if kind == 0:
        items: list[str] = rng.sample(THINGS, size)
    elif kind == 1:
        items = [str(n) for n in rng.sample(range(10, 100), size)]
    else:
        items = rng.sample(FIRST_NAMES, size)
    listed = ", ".join(items)
    text = rng.choice(("Repeat this list: {l}", "Copy exactly: {l}", "Say this again: {l}"))
    return listed, text.format(l=listed), listed


def _sort(rng: Random) -> Drawn:
    numbers = rng.sample(range(100), rng.randrange(2, 9))
    falling = rng.random() < 0.3
    if falling:
        text = rng.choice(("Sort from largest to smallest: {l}", "Sort these numbers in falling order: {l}"))
    else:
        text = rng.choice(
            ("Sort from smallest to largest: {l}", "Sort these numbers: {l}", "Put these numbers in order: {l}")
        )
    listed = ", ".join(map(str, numbers))
    ordered = sorted(numbers, reverse=falling)
    return f"{sorted(numbers)}", text.format(l=listed), ", ".join(map(str, ordered))


def _count(rng: Random) -> Drawn:
    items = rng.sample(THINGS, rng.randrange(1, 13))
    text = rng.choice(("How many words are in this list: {l}?", "Count the words: {l}"))
    listed = ", ".join(items)
    return f"words:{listed}", text.format(l=listed), str(len(items))


def _short(
    name: str,
    draw: Callable[[Random], Drawn],
    rng: Random,
    distance: int,
    split: Split,
    prose: Sequence[str],
    count: CountTokens,
) -> tuple[list[Message], str]:
    while True:
        content, question, answer = draw(rng)
        if in_split(name, content, split):
            return [{"role": "user", "content": question}], answer


def document_writer(split: Split, prose: Sequence[str], count: CountTokens) -> Writer:
    """The writer of look-up documents; in training no fact of the evaluation split is ever stated."""
    if split == "train":
        return Writer(prose, count, lambda fact: not held_out("fact", fact.content))
    return Writer(prose, count)


def _recall(
    with_change: bool,
    rng: Random,
    distance: int,
    split: Split,
    prose: Sequence[str],
    count: CountTokens,
) -> tuple[list[Message], str]:
    writer = document_writer(split, prose, count)
    target = writer.fresh_fact(rng, {})
    while not in_split("fact", target.content, split):
        target = writer.fresh_fact(rng, {})
    document = writer.document(rng, distance, with_change, target)
    return document.ask(target, rng), target.value


def _short_skill(name: str, summary: str, draw: Callable[[Random], Drawn]) -> Skill:
    return Skill(name, summary, (0,), partial(_short, name, draw))


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        _short_skill("add", "sum of two numbers of up to four digits", _add),
        _short_skill("subtract", "difference of two numbers of up to four digits", _subtract),
        _short_skill("multiply", "two-digit times one-digit number", _multiply),
        _short_skill("copy", "repeat a list of up to 24 items", _copy),
        _short_skill("sort", "order up to eight numbers", _sort),
        _short_skill("count", "count the words of a list of up to twelve", _count),
        Skill("lookup", "a fact stated once, at a distance", DISTANCES, partial(_recall, False)),
        Skill("update", "a fact stated and later changed, at a distance", DISTANCES, partial(_recall, True)),
    )
}


def make(
    skill: str,
    distance: int,
    seed: int,
    split: Split = "eval",
    *,
    prose: Sequence[str] | None = None,
    count_tokens: CountTokens | None = None,
) -> Instance:
    """One instance of `skill`; the same arguments give the same instance on every machine.

    `distance` is the number of tokens between the fact and the question (0 for skills that look nothing up), measured
    with `count_tokens`, which by default estimates the demo model's tokenizer. `prose` are the lines of the filler
    text, by default those of the package. Raises KeyError for an unknown skill.
    """
    rng = Random(f"{split}:{skill}:{distance}:{seed}")
    messages, answer = SKILLS[skill].make(
        rng, distance, split, shipped_prose() if prose is None else prose, count_tokens or approximate_tokens
    )
    return Instance(messages, answer, skill, distance)
