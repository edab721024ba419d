"""Puts the parts of an answer in order: what is told at once, what waits, and what vanishes beside a call."""

from __future__ import annotations

import json
from collections.abc import Callable

from statewise.server.answers.feed import WHITESPACE, Feed, Markers, Steps
from statewise.server.answers.json_value import read_json
from statewise.server.answers.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin
from statewise.server.answers.tools import Tools

MAX_CALLS = 128
MAX_ARGUMENTS = 1_000_000  # characters of one call's arguments


class Writer:
    """Takes what the readers find, gives parts.

    Whitespace and a family's tags around calls belong to the calls: they vanish beside one, and are text everywhere
    else. So they wait until it is known what follows; an answer without a call comes out as it was generated.
    """

    def __init__(self, tools: Tools | None, new_id: Callable[[str, int], str], stream_arguments: bool) -> None:
        self.calls = 0
        self.streams = stream_arguments
        self.thinking = False
        self._tools = tools
        self._new_id = new_id
        self._parts: list[Part] = []
        self._held: list[str] = []  # whitespace and opening tags that a call would swallow
        self._beside = False  # nothing but whitespace since a call or the reasoning
        self._behind_call = False  # the same, and it was a call
        self._told = False  # whether there is content
        self._gaps = ["", ""]  # whitespace that vanished before and behind calls, for content that goes on behind them
        self._ids: set[str] = set()
        self._written = 0  # characters of the current call's arguments

    def take(self) -> list[Part]:
        """The parts since the last time."""
        parts, self._parts = self._parts, []
        return parts

    def accepts(self, name: str) -> bool:
        """Whether a call of this name may begin."""
        return self._tools is not None and name in self._tools and self.calls < MAX_CALLS

    @property
    def tools(self) -> Tools:
        assert self._tools is not None
        return self._tools

    def text(self, text: str) -> None:
        """Text that is no part of a call."""
        if self._beside and not self._held:
            stripped = text.lstrip(WHITESPACE)
            self._gaps[1] += text[: len(text) - len(stripped)]
            text = stripped
        if not text:
            return
        body = text.rstrip(WHITESPACE)
        if body:
            gap = (self._gaps[0] or self._gaps[1]) if self._behind_call and self._told else ""
            self._tell(gap + "".join(self._held) + body)
            self._held = []
            self._beside = self._behind_call = False
        if len(body) < len(text):
            self._held.append(text[len(body) :])

    def opening(self, tag: str) -> None:
        """A tag that vanishes if a call follows."""
        self._held.append(tag)

    def closing(self, tag: str) -> None:
        """A tag that vanishes if a call went before."""
        if not self._behind_call or self._held:
            self.text(tag)

    def begin(self, name: str, call_id: str | None = None) -> None:
        """A call begins, which ends the reasoning too."""
        if not self._behind_call:
            self._gaps[0] = "" if self.thinking else _leading_whitespace("".join(self._held))
        self._gaps[1] = ""
        self._held = []
        self.thinking = False
        self._beside = self._behind_call = True
        self._written = 0
        self._parts.append(ToolCallBegin(self.calls, self._unused_id(name, call_id), name))
        self.calls += 1

    def _unused_id(self, name: str, call_id: str | None) -> str:
        number = self.calls
        while call_id is None or (call_id in self._ids and number <= 2 * MAX_CALLS):
            call_id = self._new_id(name, number)
            number += 1
        self._ids.add(call_id)
        return call_id

    def arguments(self, text: str) -> None:
        """More arguments of the call that began last. What exceeds the limit is text."""
        room = max(MAX_ARGUMENTS - self._written, 0)
        if text[:room]:
            self._parts.append(ToolCallArguments(self.calls - 1, text[:room]))
        self._written += len(text)
        self.text(text[room:])

    def begin_reasoning(self) -> None:
        self._held = []
        self.thinking = self._beside = True

    def end_reasoning(self) -> None:
        if rest := "".join(self._held).rstrip(WHITESPACE):
            self._tell(rest)
        self._held = []
        self.thinking = False
        self._beside = True

    def finish(self) -> None:
        """The text has ended: what waited is text, for no call followed."""
        if self.thinking:
            self.end_reasoning()
        elif self._held:
            self._tell("".join(self._held))

    def _tell(self, text: str) -> None:
        self._told = self._told or not self.thinking
        self._parts.append(Reasoning(text) if self.thinking else Content(text))


def _leading_whitespace(text: str) -> str:
    return text[: len(text) - len(text.lstrip(WHITESPACE))]


class OpenCall:
    """A call whose arguments are being read.

    While arguments stream, it is a call from now on, whatever follows. Otherwise it becomes one when it is complete and
    its arguments are a JSON object, and is text until then.
    """

    def __init__(self, feed: Feed, writer: Writer, name: str, call_id: str | None = None) -> None:
        """`feed` has recorded the call from behind its opening tag."""
        self.name = name
        self._feed, self._writer = feed, writer
        self._id = call_id
        self._kept: list[str] = []
        if writer.streams:
            feed.recorded()
            writer.begin(name, call_id)

    def add(self, arguments: str) -> None:
        if self._writer.streams:
            self._writer.arguments(arguments)
        else:
            self._kept.append(arguments)

    def add_escaped(self, text: str) -> None:
        """Add text as the inside of a JSON string."""
        self.add(json.dumps(text, ensure_ascii=False)[1:-1])

    def mark(self) -> None:
        """What is read from here on has not been added: if the call fails, it will be as it stands."""
        if self._writer.streams:
            self._feed.record()

    def unmark(self) -> None:
        if self._writer.streams:
            self._feed.recorded()

    def complete(self) -> bool:
        """The arguments have ended as they should. False where it is no call all the same, but text."""
        recorded = self._feed.recorded()
        if self._writer.streams:
            return True
        arguments = "".join(self._kept)
        if len(arguments) <= MAX_ARGUMENTS and isinstance(read_json(arguments), dict):
            self._writer.begin(self.name, self._id)
            self._writer.arguments(arguments)
            return True
        self._writer.text(recorded)
        return False

    def fail(self, ends: Markers) -> Steps[None]:
        """The arguments broke off. What has been told cannot be taken back: the rest up to one of `ends` joins it."""
        recorded = self._feed.recorded()
        if not self._writer.streams:
            self._writer.text(recorded)
            return
        self.add(recorded)
        while text := (yield from self._feed.before(ends)):
            self.add(text)
