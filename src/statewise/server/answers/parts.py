"""What an answer consists of: content, reasoning and tool calls, in the pieces in which they are told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """What the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class ToolCallBegin:
    """A call begins. `index` counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the JSON text that a call's arguments are."""

    index: int
    text: str


Part = Content | Reasoning | ToolCallBegin | ToolCallArguments


class AnswerParser(Protocol):
    """Turns generated text into parts. What the parts say does not depend on how the text was cut into pieces."""

    def push(self, text: str) -> list[Part]:
        """The parts that became certain with `text`; the work is linear in all text so far, whatever the pieces."""
        ...

    def finish(self) -> list[Part]:
        """What was held back as long as more text could come. Nothing may be pushed afterwards."""
        ...


@dataclass(frozen=True)
class ToolCall:
    """A whole call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """A whole answer. A field is None where the answer has nothing of its kind; `content` only beside calls."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


def message(parts: Iterable[Part]) -> Message:
    """The message that all parts of an answer make together."""
    content: list[str] = []
    reasoning: list[str] = []
    begun: list[ToolCallBegin] = []
    arguments: list[list[str]] = []
    for part in parts:
        if isinstance(part, Content):
            content.append(part.text)
        elif isinstance(part, Reasoning):
            reasoning.append(part.text)
        elif isinstance(part, ToolCallBegin):
            begun.append(part)
            arguments.append([])
        else:
            arguments[part.index].append(part.text)
    calls = tuple(ToolCall(one.id, one.name, "".join(text)) for one, text in zip(begun, arguments))
    text = "".join(content)
    return Message(text if text or not calls else None, "".join(reasoning) or None, calls)


def parse(parser: AnswerParser, text: str) -> Message:
    """The message that a whole text makes. `parser` is used up."""
    return message([*parser.push(text), *parser.finish()])
