"""The calls of the MiniMax models, whose three generations write them in three ways.

Text-01:  <function_call>```typescript
          functions.NAME({…})
          ```
M1:       <tool_calls>, then {"name": …, "arguments": …} line by line, then </tool_calls>
M2:       <minimax:tool_call><invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke></minimax:tool_call>
"""

from __future__ import annotations

from statewise.server.answers.feed import Feed, Markers, Steps
from statewise.server.answers.formats import CallFormat
from statewise.server.answers.json_calls import JsonLines
from statewise.server.answers.json_value import JsonScanner
from statewise.server.answers.tagged import Parameters, Tags
from statewise.server.answers.tools import MAX_NAME
from statewise.server.answers.writer import OpenCall, Writer

_SLACK = 16  # characters that may stand around a name: quotes and whitespace


class TypescriptCalls(CallFormat):
    """MiniMax-Text-01: calls of functions in a block of code."""

    openers = ("<function_call>",)
    closers = ()

    def __init__(self, feed: Feed, writer: Writer) -> None:
        super().__init__(feed, writer)
        self._fence = Markers("```")
        self._name_end = Markers("(")

    def read(self, opener: str) -> Steps[None]:
        self.writer.opening(opener)
        self.writer.text((yield from self.feed.spaces()))
        if not (yield from self.feed.skip("```typescript")):
            return
        self.writer.opening("```typescript")
        while True:
            self.writer.text((yield from self.feed.spaces()))
            self.feed.record()
            if not (yield from self.feed.skip("functions.")):
                break
            yield from self._call()
        if (yield from self.feed.skip("```")):
            self.writer.closing("```")

    def _call(self) -> Steps[None]:
        feed = self.feed
        name = yield from feed.short(self._name_end, MAX_NAME)
        if name is None or not self.writer.accepts(name) or not (yield from feed.skip("(")):
            self.writer.text(feed.recorded())
            return
        yield from feed.spaces()
        first = yield from feed.peek()
        if first not in ("{", ")"):
            self.writer.text(feed.recorded())
            return
        call = OpenCall(feed, self.writer, name)
        if first == ")":
            call.add("{}")
        elif not (yield from feed.json(JsonScanner(), call.add)):
            return (yield from call.fail(self._fence))
        call.complete()
        yield from feed.spaces()
        for sign in (")", ";"):
            if (yield from feed.skip(sign)):
                self.writer.closing(sign)


class InvokeCalls(CallFormat):
    """MiniMax-M2: calls in tags, any number of them in one section."""

    openers = ("<minimax:tool_call>",)
    closers = ("</minimax:tool_call>",)

    _BEGIN = "<invoke name="
    _END = "</invoke>"
    _TAGS = Tags(("<parameter name=", ">"), ("", "</parameter>"), (_END, *closers))

    def __init__(self, feed: Feed, writer: Writer) -> None:
        super().__init__(feed, writer)
        self._inside = Markers(self._BEGIN, self._END, *self.openers, *self.closers)
        self._name_end = Markers(">")
        self._parameters = Parameters(feed, writer, self._TAGS, (self._END, *self.closers))

    def read(self, opener: str) -> Steps[None]:
        self.writer.opening(opener)
        while True:
            text, tag = yield from self.feed.piece(self._inside)
            self.writer.text(text)
            if tag == self._BEGIN:
                yield from self._call()
            elif tag in self.openers:
                self.writer.opening(tag)
            elif tag:
                self.writer.closing(tag)
            if tag in self.closers or not (text or tag):
                return

    def _call(self) -> Steps[None]:
        self.writer.opening(self._BEGIN)
        self.feed.record()
        name = (yield from self.feed.short(self._name_end, MAX_NAME + _SLACK)) or ""
        name = name.strip().strip("\"'")
        if self.writer.accepts(name) and (yield from self.feed.skip(">")) and (yield from self._parameters.come()):
            yield from self._parameters.read(name)
        else:
            self.writer.text(self.feed.recorded())


class MiniMaxCalls(CallFormat):
    """All three: their opening tags tell them apart."""

    openers = (*TypescriptCalls.openers, *JsonLines.openers, *InvokeCalls.openers)
    closers = (*JsonLines.closers, *InvokeCalls.closers)
    inner = ("</invoke>", "</parameter>")

    def __init__(self, feed: Feed, writer: Writer) -> None:
        super().__init__(feed, writer)
        formats = (TypescriptCalls(feed, writer), JsonLines(feed, writer), InvokeCalls(feed, writer))
        self._formats = {opener: one for one in formats for opener in one.openers}

    def read(self, opener: str) -> Steps[None]:
        yield from self._formats[opener].read(opener)
