"""Text that arrives in pieces, and the questions that a parser asks of it. All scanning is by hand and linear.

The readers are generators: they `yield` where the text so far does not decide what comes next, and go on when more
has come or the text has ended. None leaves more unread than a marker is long, so that a push costs what it brings.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from statewise.server.answers.json_value import JsonScanner

WHITESPACE = " \t\r\n"
_WINDOW = 256

Result = TypeVar("Result")
Steps = Generator[None, None, Result]


class Markers:
    """A set of strings to look for: the first in the text counts, and of those that begin together the longest."""

    def __init__(self, *markers: str) -> None:
        wanted = sorted({marker for marker in markers if marker}, key=lambda marker: (-len(marker), marker))
        self.longest = len(wanted[0]) if wanted else 0
        self._beginnings = frozenset(marker[:end] for marker in wanted for end in range(1, len(marker)))
        by_letter: dict[str, list[str]] = {}
        for marker in wanted:
            by_letter.setdefault(marker[0], []).append(marker)
        # What markers of the same first letter share is found fastest: an answer is full of "<", not of "<|tool_call".
        self._groups = [(_shared(group), tuple(group)) for group in by_letter.values()]

    def find(self, text: str, start: int, ended: bool) -> tuple[int, str]:
        """Where the text without markers ends, and the marker that begins there: "" for none.

        Unless the text has `ended`, what may be the beginning of a marker counts as no longer free of markers.
        """
        found, marker = self._first(text, start)
        if not ended and found > len(text) - self.longest:
            held = self._hold(text, start)
            if held <= found:
                return held, ""
        return found, marker

    def begins(self, text: str, at: int) -> str:
        """The marker that begins at this very place, or ""."""
        for _, group in self._groups:
            if text.startswith(group, at):
                return next(marker for marker in group if text.startswith(marker, at))
        return ""

    def may_begin(self, text: str, at: int) -> bool:
        """Whether the text from here on is too short to tell which marker it begins."""
        return len(text) - at < self.longest and (at >= len(text) or text[at:] in self._beginnings)

    def _first(self, text: str, start: int) -> tuple[int, str]:
        size = len(text)
        # Several groups are sought in growing windows: else each would search all the text behind another's matches.
        window = size if len(self._groups) == 1 else _WINDOW
        begin = start
        while begin < size and self._groups:
            end = min(begin + window, size)
            best, marker = end, ""
            for prefix, group in self._groups:
                at = text.find(prefix, begin, best + len(prefix) - 1)
                while at >= 0:
                    if text.startswith(group, at):
                        best = at
                        marker = next(one for one in group if text.startswith(one, at))
                        break
                    at = text.find(prefix, at + 1, best + len(prefix) - 1)
            if marker:
                return best, marker
            begin, window = end, 2 * window
        return size, ""

    def _hold(self, text: str, start: int) -> int:
        """Where the text begins to be what a marker begins with."""
        size = len(text)
        for at in range(max(start, size - self.longest + 1), size):
            if text[at:] in self._beginnings:
                return at
        return size


def _shared(markers: list[str]) -> str:
    """What all markers begin with."""
    first, last = min(markers), max(markers)
    return next((first[:end] for end in range(len(first), 0, -1) if last.startswith(first[:end])), "")


class Feed:
    """The text that has come and is not yet read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._tape: list[str] | None = None  # what was read since `record`

    def push(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._ended = True

    @property
    def exhausted(self) -> bool:
        """Whether the text has ended and all of it is read."""
        return self._ended and self._at == len(self._text)

    def record(self) -> None:
        """Remember what is read from now on: it may turn out not to be what it seemed."""
        self._tape = []

    def recorded(self) -> str:
        """What was read since `record`, which ends."""
        tape, self._tape = self._tape, None
        return "".join(tape or ())

    def piece(self, markers: Markers) -> Steps[tuple[str, str]]:
        """Some text and the marker behind it, which is read too; "" while none has come. Nothing at the end."""
        while True:
            found, marker = markers.find(self._text, self._at, self._ended)
            if found > self._at or marker:
                piece = self._take(found)
                self._take(found + len(marker))
                return piece, marker
            if self._ended:
                return "", ""
            yield

    def before(self, markers: Markers) -> Steps[str]:
        """Some text before the next marker; "" where a marker or the end comes next."""
        while True:
            found, marker = markers.find(self._text, self._at, self._ended)
            if found > self._at or marker or self._ended:
                return self._take(found)
            yield

    def short(self, markers: Markers, limit: int) -> Steps[str | None]:
        """The text before a marker, or before the end; None where it has more than `limit` characters."""
        text = ""
        while piece := (yield from self.before(markers)):
            if len(text) + len(piece) > limit:
                return None
            text += piece
        return text

    def spaces(self) -> Steps[str]:
        """Whitespace, all of it."""
        parts = []
        while True:
            end, size = self._at, len(self._text)
            while end < size and self._text[end] in WHITESPACE:
                end += 1
            parts.append(self._take(end))
            if end < size or self._ended:
                return "".join(parts)
            yield

    def peek(self) -> Steps[str]:
        """The next character, unread; "" at the end."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def sees(self, markers: Markers) -> Steps[str]:
        """The marker that comes next, unread; "" for none."""
        while not self._ended and markers.may_begin(self._text, self._at):
            yield
        return markers.begins(self._text, self._at)

    def skip(self, literal: str) -> Steps[bool]:
        """Read `literal` if it comes next."""
        while True:
            left = len(self._text) - self._at
            if self._text.startswith(literal, self._at):
                self._take(self._at + len(literal))
                return True
            if self._ended or left >= len(literal) or not literal.startswith(self._text[self._at :]):
                return False
            yield

    def json(self, scanner: JsonScanner, use: Callable[[str], object]) -> Steps[bool]:
        """Read on to the end of the scanner's value. False where the value breaks off: there the text goes on."""
        while True:
            end = scanner.scan(self._text, self._at)
            if end > self._at:
                use(self._take(end))
            if scanner.complete or scanner.broken:
                return scanner.complete
            if self._ended:
                return scanner.finish()
            yield

    def _take(self, end: int) -> str:
        taken = self._text[self._at : end]
        self._at = end
        if self._tape is not None and taken:
            self._tape.append(taken)
        return taken
