"""What every family's way to write calls has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from statewise.server.answers.feed import Feed, Markers, Steps
from statewise.server.answers.json_value import JsonScanner
from statewise.server.answers.writer import Writer


class CallFormat(ABC):
    """Reads the calls of one family."""

    openers: ClassVar[tuple[str, ...]]  # what `read` is called for
    closers: ClassVar[tuple[str, ...]]  # what vanishes behind a call
    inner: ClassVar[tuple[str, ...]] = ()  # what else the reader looks for that may be a special token
    ends_reasoning: ClassVar[bool] = False  # whether a call may begin before </think>

    def __init__(self, feed: Feed, writer: Writer) -> None:
        self.feed, self.writer = feed, writer
        self.ends = Markers(*self.openers, *self.closers)

    def start(self) -> Steps[None]:
        """Read what only the beginning of an answer may hold."""
        yield from ()

    @abstractmethod
    def read(self, opener: str) -> Steps[None]:
        """Read on behind `opener`, which is read already."""


NewFormat = Callable[[Feed, Writer], CallFormat]


class NoCalls(CallFormat):
    """Everything is text."""

    openers = ()
    closers = ()

    def read(self, opener: str) -> Steps[None]:
        raise NotImplementedError


def reject(feed: Feed, writer: Writer, inside_object: bool) -> Steps[None]:
    """What was recorded is no call, but text: with the rest of its JSON, in whose strings no marker counts."""
    writer.text(feed.recorded())
    if inside_object or (yield from feed.peek()) == "{":
        yield from feed.json(JsonScanner(inside_object), writer.text)
