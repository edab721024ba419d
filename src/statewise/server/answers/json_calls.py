"""Calls that are JSON objects: {"name": …, "arguments": {…}}, between tags, line by line, or alone.

`<tool_call>{…}</tool_call>` is how Ling and Ring 2.x, Qwen3-Next and models of the Hermes tradition write a call;
MiniMax-M1 writes one per line between `<tool_calls>` and `</tool_calls>`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from statewise.server.answers.feed import Markers, Steps
from statewise.server.answers.formats import CallFormat, reject
from statewise.server.answers.json_value import JsonScanner, read_json
from statewise.server.answers.writer import OpenCall

_ARGUMENTS = ("arguments", "parameters")  # the latter from models that have seen other formats too
_MAX_REFUSED = 128  # lines of a section that look like calls and are none


class JsonCalls(CallFormat):
    """One object behind another between two tags."""

    openers: ClassVar[tuple[str, ...]] = ("<tool_call>",)
    closers: ClassVar[tuple[str, ...]] = ("</tool_call>",)

    def read(self, opener: str) -> Steps[None]:
        self.writer.opening(opener)
        yield from self.objects()

    def objects(self) -> Steps[None]:
        """Calls, as long as they follow one another."""
        calls = -1
        while calls < self.writer.calls:
            calls = self.writer.calls
            self.writer.text((yield from self.feed.spaces()))
            if (yield from self.feed.peek()) == "{":
                yield from self.object()

    def object(self) -> Steps[None]:
        """A call, or text where the object is none: not JSON, without a known name, or with other arguments.

        It is a call as soon as its name is known and its arguments begin. Other keys of such an object say nothing.
        """
        feed = self.feed
        feed.record()
        yield from feed.skip("{")
        name: str | None = None
        arguments: str | None = None  # where they come before the name
        others = False
        while not (yield from self._skip("}")):
            key = yield from self._value()
            if not isinstance(key, str) or not (yield from self._skip(":")):
                return (yield from reject(feed, self.writer, inside_object=False))
            yield from feed.spaces()
            if key == "name":
                name = yield from self._value()
                if not isinstance(name, str) or not self.writer.accepts(name):
                    return (yield from reject(feed, self.writer, inside_object=True))
            elif key in _ARGUMENTS:
                if name is not None and (yield from feed.peek()) == "{":
                    return (yield from self._stream(name))
                arguments = _object_text((yield from self._text()))
                if arguments is None:
                    return (yield from reject(feed, self.writer, inside_object=True))
            else:
                others = True
                if not (yield from self._text()):
                    return (yield from reject(feed, self.writer, inside_object=False))
            if name is not None and arguments is not None:
                call = OpenCall(feed, self.writer, name)
                call.add(arguments)
                return (yield from self._end(call))
            if not (yield from self._skip(",")) and (yield from feed.peek()) != "}":
                return (yield from reject(feed, self.writer, inside_object=False))
        if name is None or others:
            self.writer.text(feed.recorded())
        else:  # models leave out the arguments of a tool that takes none
            call = OpenCall(feed, self.writer, name)
            call.add("{}")
            call.complete()

    def _stream(self, name: str) -> Steps[None]:
        call = OpenCall(self.feed, self.writer, name)
        if (yield from self.feed.json(JsonScanner(), call.add)):
            yield from self._end(call)
        else:
            yield from call.fail(self.ends)

    def _end(self, call: OpenCall) -> Steps[None]:
        """The rest of the object behind a call's arguments. Where it breaks off, it is text."""
        if not call.complete():
            return (yield from reject(self.feed, self.writer, inside_object=True))
        self.feed.record()
        whole = yield from self.feed.json(JsonScanner(inside_object=True), _ignore)
        rest = self.feed.recorded()
        if not whole:
            self.writer.text(rest)

    def _skip(self, character: str) -> Steps[bool]:
        yield from self.feed.spaces()
        return (yield from self.feed.skip(character))

    def _text(self) -> Steps[str]:
        """The text of a value; "" where there is none."""
        pieces: list[str] = []
        whole = yield from self.feed.json(JsonScanner(), pieces.append)
        return "".join(pieces) if whole else ""

    def _value(self) -> Steps[Any]:
        return read_json((yield from self._text()))


class JsonLines(JsonCalls):
    """One object per line between two tags. A line that is no call does not keep the next from being one."""

    openers = ("<tool_calls>",)
    closers = ("</tool_calls>",)

    def objects(self) -> Steps[None]:
        next_line = Markers("\n{", *self.openers, *self.closers)
        for _ in range(_MAX_REFUSED):
            yield from super().objects()
            while text := (yield from self.feed.before(next_line)):
                self.writer.text(text)
            if self.feed.exhausted or (yield from self.feed.sees(self.ends)):
                return


class BareJson(JsonCalls):
    """An answer that is nothing but a call or a list of calls, as `structure_for` makes a model write them."""

    openers = ()
    closers = ("]",)

    def start(self) -> Steps[None]:
        self.writer.text((yield from self.feed.spaces()))
        if (yield from self.feed.skip("[")):
            self.writer.opening("[")
        yield from self.objects()
        calls = 0
        while calls < self.writer.calls and (yield from self.feed.skip(",")):
            calls = self.writer.calls
            self.writer.opening(",")
            yield from self.objects()


def _ignore(text: str) -> None:
    pass


def _object_text(text: str) -> str | None:
    """The arguments that a value stands for: an object, an object's JSON text in a string, or null for none."""
    if text.strip() == "null":
        return "{}"
    value = read_json(text)
    if isinstance(value, str):  # some models escape the arguments, as OpenAI's API does
        text, value = value, read_json(value)
    return text.strip() if isinstance(value, dict) else None
