"""Calls whose parameters stand one by one between tags, each as plain text or as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

from statewise.server.answers.feed import Feed, Markers, Steps
from statewise.server.answers.writer import OpenCall, Writer

_MAX_KEY = 1000


@dataclass(frozen=True)
class Tags:
    """How a family writes a parameter, and what may stand behind the last one."""

    key: tuple[str, str]  # before and behind a parameter's name
    value: tuple[str, str]  # before and behind its value
    ends: tuple[str, ...]  # of the call


class Parameters:
    """Reads the parameters of a call, up to the tag that ends it."""

    def __init__(self, feed: Feed, writer: Writer, tags: Tags, breaks: tuple[str, ...]) -> None:
        """`breaks` are the markers at which a call that broke off is given up."""
        self._feed, self._writer, self._tags = feed, writer, tags
        self._key_end = Markers(tags.key[1])
        self._value_end = Markers(tags.value[1])
        self._ends = Markers(*tags.ends)
        self._behind = Markers(tags.key[0], *tags.ends)
        self._breaks = Markers(*breaks)

    def come(self) -> Steps[bool]:
        """Whether what follows a name is what should: a parameter, or the end of the call."""
        yield from self._feed.spaces()
        return bool((yield from self._feed.sees(self._behind)))

    def read(self, name: str) -> Steps[None]:
        """The call of the tool `name`, from behind its name up to the tag that ends it, which stays unread."""
        feed = self._feed
        call = OpenCall(feed, self._writer, name)
        call.add("{")
        separator = ""
        while not (yield from feed.sees(self._ends)):
            call.mark()
            key = yield from self._key()
            if key is None:
                return (yield from call.fail(self._breaks))
            call.unmark()
            call.add(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            separator = ", "
            if not (yield from self._value(call, key)):
                return (yield from call.fail(self._breaks))
        call.add("}")
        call.complete()

    def _key(self) -> Steps[str | None]:
        feed, tags = self._feed, self._tags
        if not (yield from feed.skip(tags.key[0])):
            return None
        key = yield from feed.short(self._key_end, _MAX_KEY)
        if key is None or not (yield from feed.skip(tags.key[1])):
            return None
        if tags.value[0]:
            yield from feed.spaces()
            if not (yield from feed.skip(tags.value[0])):
                return None
        return key.strip().strip("\"'")

    def _value(self, call: OpenCall, key: str) -> Steps[bool]:
        """A value and the tag behind it. False where the text ends first. What can only be a string streams."""
        feed, tools = self._feed, self._writer.tools
        streams = tools.types(call.name, key) == {"string"}
        pieces: list[str] = []
        add = call.add_escaped if streams else pieces.append
        if streams:
            call.add('"')
        while True:
            piece, tag = yield from feed.piece(self._value_end)
            add(piece)
            if tag:
                # A value may hold this very tag. It ends the value only where the call goes on behind it.
                gap = yield from feed.spaces()
                if feed.exhausted or (yield from feed.sees(self._behind)):
                    break
                add(tag + gap)
            elif not piece:
                call.add("".join(pieces))
                return False
        call.add('"' if streams else tools.value(call.name, key, "".join(pieces)))
        return True
