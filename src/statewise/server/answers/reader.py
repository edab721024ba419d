"""Reads a whole answer: the thoughts before it, its text, and the calls in it."""

from __future__ import annotations

from statewise.server.answers.feed import Feed, Markers, Steps
from statewise.server.answers.formats import NewFormat
from statewise.server.answers.parts import Part
from statewise.server.answers.writer import Writer

THINK_BEGIN = "<think>"
THINK_END = "</think>"


class AnswerReader:
    """The `AnswerParser` of every family.

    Thoughts stand before the answer and nowhere else: between <think> and </think>, or from the first character on
    where the prompt opened them. A call inside them is a thought, except in families that call without closing them.
    """

    def __init__(self, new_format: NewFormat, writer: Writer, *, reasoning: bool, thinking: bool) -> None:
        """`reasoning`: thoughts are told apart, else they are content. `thinking`: the text begins inside of them."""
        self._feed = Feed()
        self._writer = writer
        self._format = new_format(self._feed, writer)
        self._reasoning, self._thinking = reasoning, thinking
        self._steps = self._answer()
        self._finished = False

    def push(self, text: str) -> list[Part]:
        if self._finished:
            raise ValueError("the answer is finished")
        self._feed.push(text)
        return self._go_on()

    def finish(self) -> list[Part]:
        if self._finished:
            return []
        self._feed.end()
        self._finished = True
        return self._go_on()

    def _go_on(self) -> list[Part]:
        if next(self._steps, self) is self:  # the generator has ended, and with it the answer
            self._writer.finish()
        return self._writer.take()

    def _answer(self) -> Steps[None]:
        if (yield from self._opens_thoughts()):
            yield from self._thoughts()
        yield from self._format.start()
        markers = Markers(*self._format.openers, *self._format.closers, THINK_END)
        while not self._feed.exhausted:
            text, marker = yield from self._feed.piece(markers)
            self._writer.text(text)
            if marker in self._format.openers:
                yield from self._format.read(marker)
            elif marker:
                self._writer.closing(marker)

    def _opens_thoughts(self) -> Steps[bool]:
        spaces = yield from self._feed.spaces()
        opened = yield from self._feed.skip(THINK_BEGIN)  # models may open what the prompt has opened
        if not self._reasoning or not (opened or self._thinking):
            self._writer.text(spaces + THINK_BEGIN if opened else spaces)
        return opened or self._thinking

    def _thoughts(self) -> Steps[None]:
        openers = self._format.openers if self._format.ends_reasoning else ()
        markers = Markers(THINK_END, *openers)
        if self._reasoning:
            self._writer.begin_reasoning()
        calls = self._writer.calls
        while not self._feed.exhausted:
            text, marker = yield from self._feed.piece(markers)
            self._writer.text(text)
            if marker in openers:
                yield from self._format.read(marker)
                if self._writer.calls > calls:
                    return
            elif marker:
                if self._reasoning:
                    self._writer.end_reasoning()
                else:
                    self._writer.text(marker)
                return
