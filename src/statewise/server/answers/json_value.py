"""Finds the end of a JSON value in text that arrives in pieces."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
_MAX_WORD = 1000  # characters of a number
_WHITESPACE = " \t\r\n"
_WORD = frozenset("+-.0123456789eE" + "truefalsn")
_LITERALS = frozenset(("true", "false", "null"))

# What may come next.
_VALUE, _FIRST_VALUE, _KEY, _FIRST_KEY, _COLON, _AFTER, _IN_WORD, _IN_KEY, _IN_STRING = range(9)


class JsonScanner:
    """Follows the structure of one value, character by character, with memory for no more than its open brackets.

    Inside strings anything goes: control characters and unknown escapes, which models do write, do not hide where the
    string ends. Everything else must be JSON.
    """

    def __init__(self, inside_object: bool = False) -> None:
        """`inside_object`: the text goes on behind a value of an object, whose end is sought."""
        self.complete = False
        self.broken = False
        self._open = ["}"] if inside_object else []
        self._next = _AFTER if inside_object else _VALUE
        self._word = ""
        self._escaped = False

    def scan(self, text: str, at: int) -> int:
        """How far the value reaches: to its end, to the character that breaks it, or to the end of the text."""
        size = len(text)
        while at < size and not self.complete and not self.broken:
            expected = self._next
            if expected >= _IN_KEY:
                at = self._string(text, at)
                continue
            if expected == _IN_WORD:
                at = self._read_word(text, at)
                continue
            character = text[at]
            if character in _WHITESPACE:
                at += 1
                continue
            self._step(expected, character)
            # The first character of a word belongs to what is read next.
            if not self.broken and self._next != _IN_WORD:
                at += 1
        return at

    def finish(self) -> bool:
        """No more text comes. Whether the value is complete."""
        if self._next == _IN_WORD and not self.broken:
            self._end_word()
        return self.complete

    def _step(self, expected: int, character: str) -> None:
        if expected == _AFTER:
            if character == ",":
                self._next = _KEY if self._open[-1] == "}" else _VALUE
            elif character == self._open[-1]:
                self._close()
            else:
                self.broken = True
        elif expected == _COLON:
            self._next = _VALUE
            self.broken = character != ":"
        elif expected in (_KEY, _FIRST_KEY):
            if character == '"':
                self._next = _IN_KEY
            elif character == "}" and expected == _FIRST_KEY:
                self._close()
            else:
                self.broken = True
        elif character == '"':
            self._next = _IN_STRING
        elif character == "{":
            self._descend("}", _FIRST_KEY)
        elif character == "[":
            self._descend("]", _FIRST_VALUE)
        elif character == "]" and expected == _FIRST_VALUE:
            self._close()
        elif character in _WORD:
            self._next = _IN_WORD
        else:
            self.broken = True

    def _descend(self, closer: str, expected: int) -> None:
        self._open.append(closer)
        self._next = expected
        self.broken = len(self._open) > MAX_DEPTH

    def _close(self) -> None:
        self._open.pop()
        self._end_value()

    def _end_value(self) -> None:
        self._next = _AFTER
        self.complete = not self._open

    def _string(self, text: str, at: int) -> int:
        size = len(text)
        if self._escaped:
            self._escaped = False
            at += 1
        quote = _find(text, '"', at)
        slash = text.find("\\", at, quote)
        while slash >= 0:
            at = slash + 2
            if at > size:
                self._escaped = True
                return size
            if at > quote:
                quote = _find(text, '"', at)
            slash = text.find("\\", at, quote)
        if quote == size:
            return size
        if self._next == _IN_KEY:
            self._next = _COLON
        else:
            self._end_value()
        return quote + 1

    def _read_word(self, text: str, at: int) -> int:
        end, size = at, len(text)
        while end < size and text[end] in _WORD:
            end += 1
        self._word += text[at:end]
        if len(self._word) > _MAX_WORD:
            self.broken = True
        elif end < size:
            self._end_word()
        return end

    def _end_word(self) -> None:
        word, self._word = self._word, ""
        if word in _LITERALS or _is_number(word):
            self._end_value()
        else:
            self.broken = True


def _find(text: str, character: str, at: int) -> int:
    found = text.find(character, at)
    return len(text) if found < 0 else found


def _is_number(word: str) -> bool:
    if word.isdecimal() and word[0] != "0":
        return True
    return not isinstance(read_json(word), str | bool | None)


def read_json(text: str) -> Any:
    """The value that a JSON text holds; None also where it holds none, or one beyond JSON such as NaN."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
