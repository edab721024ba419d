"""Answers in which nothing but thoughts at their beginning can be told apart."""

from __future__ import annotations

from statewise.server.answers.feed import WHITESPACE
from statewise.server.answers.parts import AnswerParser, Content, Part
from statewise.server.answers.reader import THINK_BEGIN


class PlainAnswer:
    """An `AnswerParser` without calls. As soon as the answer has begun with anything but a thought, text is content."""

    def __init__(self, reader: AnswerParser) -> None:
        """`reader` reads no calls and does not begin inside of thoughts."""
        self._reader = reader
        self._begun = ""  # what was read as long as the answer could begin with a thought
        self._thinks = False
        self.plain = False  # whether all that follows is content

    def push(self, text: str) -> list[Part]:
        if self.plain:
            return [Content(text)] if text else []
        if not self._thinks:
            self._begun += text
            start = self._begun.lstrip(WHITESPACE)
            if start.startswith(THINK_BEGIN):
                self._thinks = True
            elif start and not THINK_BEGIN.startswith(start):
                self.plain = True
                parts = [*self._reader.push(text), *self._reader.finish()]
                self._begun = ""
                return parts
        return self._reader.push(text)

    def finish(self) -> list[Part]:
        return [] if self.plain else self._reader.finish()
