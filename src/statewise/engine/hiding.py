"""Keeps the text of a chat from becoming control tokens, whatever its template does with it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from statewise.errors import RequestError

MAX_DEPTH = 200
THOUGHT_TAGS = ("<think>", "</think>")
# Cuneiform and hieroglyphs: neither filters for letters and spaces nor Python's repr change them.
STAND_INS = "\U00012000-\U00012399\U00013000-\U0001342e"
_IS_STAND_IN = re.compile(f"[{STAND_INS}]")
_CODES = (*range(0x12000, 0x1239A), *range(0x13000, 0x1342F))


class Hiding:
    """Stand-ins for the characters that control tokens begin with, in what one request hands to a template.

    Text without these characters spells no control token, however a template cuts it, joins it or takes parts out. So
    any control token in the rendered text is the template's own. A stand-in is one character, which the request does
    not use: places in the rendered text stay what they are when it is taken back.

    Words that the template looks for, such as "<tool_response>", are left as they are, or it would not find them. But
    not where a control token could begin in them. The exception is thoughts: an assistant's message may hold <think>
    and </think> although they are control tokens, because templates split it there, and an answer that came with its
    thoughts in it really had these tokens.
    """

    def __init__(self, spellings: tuple[str, ...], words: frozenset[str], template: str, given: Any) -> None:
        """`words` are those in the template's source `template`; every string in the nested `given` will be hidden.

        Raises `RequestError` for data that is nested too deeply, or uses every stand-in.
        """
        firsts = {spelling[0] for spelling in spellings}
        found: set[str] = set()
        used = set(_IS_STAND_IN.findall(template))
        for text in _strings(given):
            found.update(firsts.intersection(text))
            used.update(_IS_STAND_IN.findall(text))
        free = (chr(code) for code in _CODES if chr(code) not in used)
        self._hidden = dict(zip(sorted(found), free, strict=False))
        if len(self._hidden) < len(found):
            raise RequestError("messages", "messages must not use all hieroglyphs and cuneiform signs at once")
        self._restored = str.maketrans({stand_in: character for character, stand_in in self._hidden.items()})
        plain, tags = _left(words, frozenset(found), spellings)
        self._text = self._pattern(plain)
        self._answer = self._pattern((*plain, *tags))

    def value(self, value: Any) -> Any:
        """A copy of nested data in which nothing spells a control token."""
        return _replace(value, self._change(self._text))

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same for messages that `check_messages` has normalised."""
        return [self._message(message) for message in messages]

    def restore(self, text: str) -> str:
        """What a rendered text says, of the same length."""
        return text.translate(self._restored) if self._restored else text

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        hide = self._change(self._text)
        content = self._change(self._answer) if message["role"] == "assistant" else hide
        return {
            **{_replace(key, hide): _replace(value, hide) for key, value in message.items() if key != "content"},
            "content": _replace(message["content"], content),
        }

    def _change(self, pattern: re.Pattern[str]) -> Callable[[str], str]:
        if not self._hidden:
            return lambda text: text
        hidden = self._hidden
        return lambda text: pattern.sub(lambda match: hidden.get(match[0], match[0]), text)

    def _pattern(self, words: Iterable[str]) -> re.Pattern[str]:
        """What stays, the longest first, and what is hidden."""
        wanted = (*sorted(words, key=len, reverse=True), *self._hidden)
        return re.compile("|".join(map(re.escape, wanted)))


@lru_cache(maxsize=256)
def _left(words: frozenset[str], firsts: frozenset[str], spellings: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The words to leave as they are, and the tags of thoughts to leave in answers."""

    def is_plain(word: str) -> bool:
        ends = [word[at:] for at, character in enumerate(word) if character in firsts]
        return not any(end.startswith(one) or one.startswith(end) for end in ends for one in spellings)

    sought = [word for word in words if not firsts.isdisjoint(word)]
    tags = [tag for tag in THOUGHT_TAGS if tag in spellings and any(tag in word for word in sought)]
    return [word for word in sought if is_plain(word)], tags


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise RequestError("messages", f"messages and tools must be nested at most {MAX_DEPTH} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key, depth + 1)
            yield from _strings(inner, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner, depth + 1)


def _replace(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested data with `change` applied to every string."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_replace(key, change): _replace(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(inner, change) for inner in value]
    return value
