"""Kimi-Linear's calls: control tokens around a name with a number and the arguments.

<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{…}<|tool_call_end|>…
<|tool_calls_section_end|>

All five are special tokens: they are lost where skip_special_tokens does not keep them (see `needed_tags`).
"""

from __future__ import annotations

from statewise.server.answers.feed import Feed, Markers, Steps
from statewise.server.answers.formats import CallFormat, reject
from statewise.server.answers.json_value import JsonScanner
from statewise.server.answers.tools import MAX_NAME
from statewise.server.answers.writer import OpenCall, Writer

CALL_BEGIN = "<|tool_call_begin|>"
CALL_END = "<|tool_call_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"
# The models write the singular too.
SECTION_BEGIN = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
SECTION_END = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")

_MAX_HEADER = MAX_NAME + 64


class KimiCalls(CallFormat):
    """A call needs no section around it: models forget its begin and are cut off before its end."""

    openers = (CALL_BEGIN, *SECTION_BEGIN)
    closers = (CALL_END, *SECTION_END)
    inner = (ARGUMENTS,)

    def __init__(self, feed: Feed, writer: Writer) -> None:
        super().__init__(feed, writer)
        self._header_end = Markers(ARGUMENTS, *self.openers, *self.closers)
        self._call_end = Markers(CALL_END)

    def read(self, opener: str) -> Steps[None]:
        self.writer.opening(opener)
        if opener != CALL_BEGIN:
            return
        feed = self.feed
        feed.record()
        header = ((yield from feed.short(self._header_end, _MAX_HEADER)) or "").strip()
        name = self._name(header)
        if not (yield from feed.skip(ARGUMENTS)):
            self.writer.text(feed.recorded())
            return
        yield from feed.spaces()
        empty = yield from feed.sees(self._call_end)
        if name is None or not (empty or (yield from feed.peek()) == "{"):
            return (yield from reject(feed, self.writer, inside_object=False))
        # The chat template wants the id back as the model wrote it.
        is_id = header == f"functions.{name}:{header.rpartition(':')[2]}"
        call = OpenCall(feed, self.writer, name, header if is_id else None)
        if empty:
            call.add("{}")
        elif not (yield from feed.json(JsonScanner(), call.add)):
            return (yield from call.fail(self.ends))
        call.complete()

    def _name(self, header: str) -> str | None:
        """The tool that a header such as functions.NAME:INDEX names, or None.

        Clients hand ids back with other signs in place of . and :, and the model then writes what it saw.
        """
        for prefix in ("functions.", "functions_", ""):
            if header.startswith(prefix):
                rest = header[len(prefix) :]
                for name in (_without_number(rest, ":"), _without_number(rest, "_"), rest):
                    if self.writer.accepts(name):
                        return name
        return None


def _without_number(text: str, separator: str) -> str:
    name, _, number = text.rpartition(separator)
    return name if number.isdecimal() else text
