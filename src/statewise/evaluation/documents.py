"""Conversations in which facts are stated, changed and asked for at a chosen distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from statewise.evaluation.facts import Fact, changed, random_fact
from statewise.evaluation.filler import CountTokens, prose_lines

Message = dict[str, str]

INTRODUCTIONS = (
    "Read these notes.",
    "Here are some notes. A question follows.",
    "Read the text and answer the question.",
)
ACKNOWLEDGEMENT = "Noted."
MORE = ("Here is some more to read.", "Read this too.", "Keep reading.")
REMEMBER = ("Remember this:", "Please remember:", "Note this:")


@dataclass
class Document:
    """What stands before the question, and what is true at its end."""

    messages: list[Message]  # ends inside a user turn: the question is appended to its last message
    target: Fact
    true: dict[tuple[str, str], Fact] = field(default_factory=dict)  # every fact in force at the end

    def ask(self, fact: Fact, rng: Random) -> list[Message]:
        """The conversation with the question for `fact` as the end of its last user turn."""
        last = self.messages[-1]
        text = f"{last['content']}\n{fact.question(rng)}" if last["content"] else fact.question(rng)
        return [*self.messages[:-1], {"role": "user", "content": text}]


@dataclass
class Writer:
    """Writes documents from random facts and the given prose."""

    prose: Sequence[str]
    count: CountTokens
    allowed: Callable[[Fact], bool] = lambda fact: True

    def fresh_fact(self, rng: Random, taken: dict[tuple[str, str], Fact]) -> Fact:
        """A fact whose entity has no value yet under its relation."""
        while True:
            fact = random_fact(rng)
            if fact.key not in taken and self.allowed(fact):
                return fact

    def changed_fact(self, rng: Random, fact: Fact) -> Fact:
        while True:
            other = changed(fact, rng)
            if self.allowed(other):
                return other

    def filler(self, rng: Random, tokens: int, share_of_facts: float, true: dict[tuple[str, str], Fact]) -> list[str]:
        """Lines of about `tokens` tokens: facts (some of them changed later on) and runs of prose."""
        lines: list[str] = []
        own: list[Fact] = []  # stated here and not changed yet
        left = tokens
        while left > 4:
            if rng.random() < share_of_facts:
                if own and rng.random() < 0.12:
                    fact = self.changed_fact(rng, own.pop(rng.randrange(len(own))))
                    line = fact.change(rng)
                else:
                    fact = self.fresh_fact(rng, true)
                    own.append(fact)
                    line = fact.statement(rng)
                size = self.count(line) + 1
                if size > left + 6:
                    break
                true[fact.key] = fact
                lines.append(line)
                left -= size
            else:
                run = left if share_of_facts == 0.0 else min(left, rng.randrange(20, 160))
                added = prose_lines(rng, run, self.prose, self.count)
                lines += added
                left -= sum(self.count(line) + 1 for line in added) or run
        return lines

    def document(self, rng: Random, distance: int, with_change: bool, target: Fact | None = None) -> Document:
        """A document whose target fact is stated about `distance` tokens before its end.

        With `with_change` the target has had another value before, stated up to 300 tokens earlier.
        """
        share = rng.choice((0.0, 0.3, 0.8, 1.0))
        true: dict[tuple[str, str], Fact] = {}
        if target is None:
            target = self.fresh_fact(rng, true)
        true[target.key] = target
        before = rng.randrange(0, 1 + min(120, distance // 4))
        head = self.filler(rng, before, share, true)
        if with_change:
            head.append(self.changed_fact(rng, target).statement(rng))
            head += self.filler(rng, rng.randrange(0, 1 + min(300, distance)), share, true)
            stated = target.change(rng)
        else:
            stated = target.statement(rng)
        true[target.key] = target
        if rng.random() < 0.5:
            tail = self.filler(rng, distance - 10, share, true)
            intro = [rng.choice(INTRODUCTIONS)] if rng.random() < 0.7 else []
            content = "\n".join([*intro, *head, stated, *tail])
            return Document([{"role": "user", "content": content}], target, true)
        return Document(self._turns(rng, head, stated, distance, share, true), target, true)

    def _turns(
        self,
        rng: Random,
        head: list[str],
        stated: str,
        distance: int,
        share: float,
        true: dict[tuple[str, str], Fact],
    ) -> list[Message]:
        """The same over several turns: the target in the first one, the filler in those after it."""
        messages: list[Message] = []
        content = "\n".join([rng.choice(REMEMBER), *head, stated])
        left = distance - 10
        while True:
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": ACKNOWLEDGEMENT}]
            left -= 8
            if left <= 40:
                break
            piece = left if left < 200 else rng.randrange(min(left, 100), min(left, 1500) + 1)
            content = "\n".join([rng.choice(MORE), *self.filler(rng, piece - 8, share, true)])
            left -= piece
        messages.append({"role": "user", "content": ""})
        return messages
