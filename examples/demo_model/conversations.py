"""Training conversations: skills, long documents with many questions, and plain talk, mixed over several turns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from talk import SHAPE, SYSTEM_PROMPTS, TALK, TOPIC_PHRASES, TOPICS

from statewise.evaluation.documents import Message
from statewise.evaluation.filler import CountTokens, approximate_tokens
from statewise.evaluation.skills import SKILLS, document_writer, held_out, make
from statewise.evaluation.words import CITIES, FIRST_NAMES, THINGS

SHORT = tuple(name for name, skill in SKILLS.items() if skill.distances == (0,))
LONG = tuple(name for name in SKILLS if name not in SHORT)


def filler_lines(paragraphs: Sequence[str]) -> list[str]:
    """Paragraphs of ordinary length, the long ones cut between sentences."""
    lines: list[str] = []
    for paragraph in paragraphs:
        line = ""
        for sentence in re.split(r"(?<=[.!?]) ", paragraph):
            if line and len(line) + len(sentence) > 500:
                lines.append(line)
                line = ""
            line = f"{line} {sentence}".strip()
        if 40 <= len(line) <= 1000:
            lines.append(line)
    return lines


@dataclass
class Composer:
    """Draws conversations. `weights` are the relative frequencies of the short skills and of `talk`."""

    prose: Sequence[str]
    weights: dict[str, float]
    layout: str = "kimi"
    count: CountTokens = approximate_tokens

    def short_turns(self, rng: Random) -> list[Message]:
        names = list(self.weights)
        name = rng.choices(names, [self.weights[n] for n in names])[0]
        if name == "talk":
            return self.talk(rng)
        if name == "count" and rng.random() < 0.7:
            return self.occurrences(rng)
        if name in SHORT:
            instance = make(name, 0, rng.getrandbits(60), "train")
            return [*instance.messages, {"role": "assistant", "content": instance.answer}]
        return self.document(rng, rng.randrange(10, 120), name == "update", questions=rng.randrange(1, 4))

    def occurrences(self, rng: Random) -> list[Message]:
        """Counting one word among others: practised, but not learned well enough to be a scored skill."""
        size = rng.randrange(1, 13)
        wanted, *others = rng.sample(THINGS, rng.randrange(2, 5))
        times = rng.randrange(size + 1)
        items = [wanted] * times + rng.choices(others, k=size - times)
        rng.shuffle(items)
        text = rng.choice(('How often does "{w}" appear here: {l}?', 'Count "{w}" in this list: {l}'))
        return [
            {"role": "user", "content": text.format(w=wanted, l=", ".join(items))},
            {"role": "assistant", "content": str(times)},
        ]

    def document(self, rng: Random, distance: int, with_change: bool, questions: int) -> list[Message]:
        """A document, the question for its target, and more questions about other facts stated in it."""
        writer = document_writer("train", self.prose, self.count)
        document = writer.document(rng, distance, with_change)
        asked = [document.target]
        others = [fact for fact in document.true.values() if fact.key != document.target.key]
        asked += rng.sample(others, min(len(others), questions - 1))
        messages = document.ask(asked[0], rng)
        messages.append({"role": "assistant", "content": asked[0].value})
        for fact in asked[1:]:
            messages += [
                {"role": "user", "content": fact.question(rng)},
                {"role": "assistant", "content": fact.value},
            ]
        if rng.random() < 0.3:  # a change after the questions, asked again at once or later
            fact = rng.choice(asked)
            later = writer.changed_fact(rng, fact)
            messages += [
                {"role": "user", "content": f"{later.change(rng)}\n{later.question(rng)}"},
                {"role": "assistant", "content": later.value},
            ]
            if rng.random() < 0.5:
                messages += self.short_turns(rng)
                messages += [
                    {"role": "user", "content": later.question(rng)},
                    {"role": "assistant", "content": later.value},
                ]
        return messages

    def talk(self, rng: Random) -> list[Message]:
        draw = rng.random()
        if draw < 0.6:
            said, reply = rng.choice(TALK)
            question, reply = rng.choice(said), reply.format(**SHAPE[self.layout])
        elif draw < 0.85:
            topic, reply = rng.choice(list(TOPICS.items()))
            question = rng.choice(TOPIC_PHRASES).format(t=topic)
        else:
            return self.acquaintance(rng)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]

    def acquaintance(self, rng: Random) -> list[Message]:
        """A person gives a name or a city and asks for it some turns later."""
        if rng.random() < 0.5:
            value = rng.choice(FIRST_NAMES)
            told = rng.choice(("My name is {v}.", "I am {v}.", "Hello, my name is {v}.", "Hi, I am {v}."))
            reply, question = "Nice to meet you, {v}!", rng.choice(("What is my name?", "Who am I?"))
            recalled = "Your name is {v}."
        else:
            value = rng.choice(CITIES)
            told, reply = rng.choice(("I live in {v}.", "My home is in {v}.")), "I will remember that."
            question, recalled = "Where do I live?", "You live in {v}."
        if held_out("acquaintance", value):
            return self.acquaintance(rng)
        messages = [
            {"role": "user", "content": told.format(v=value)},
            {"role": "assistant", "content": reply.format(v=value)},
        ]
        for _ in range(rng.randrange(3)):
            name = rng.choice(SHORT)
            instance = make(name, 0, rng.getrandbits(60), "train")
            messages += [*instance.messages, {"role": "assistant", "content": instance.answer}]
        return [
            *messages,
            {"role": "user", "content": question},
            {"role": "assistant", "content": recalled.format(v=value)},
        ]

    def conversation(self, rng: Random, tokens: int, document_share: float) -> list[Message]:
        """A conversation of at least `tokens` tokens (the caller cuts it), often begun by a long document."""
        messages: list[Message] = []
        if rng.random() < 0.15:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        used = 0
        if rng.random() < document_share:
            with_change = rng.random() < 0.5
            room = tokens - 60 - (120 if with_change else 0)
            distance = rng.randrange(room // 3, max(room // 3 + 1, int(room * 0.85)))
            messages += self.document(rng, distance, with_change, questions=4 + tokens // 150)
        while True:
            used = sum(self.count(m["content"]) + 4 for m in messages)
            if used >= tokens:
                return messages
            for _ in range(3):
                messages += self.short_turns(rng)
