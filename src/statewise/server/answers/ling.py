"""The calls of Ling and Ring, in the two ways that their generations write between <tool_call> and </tool_call>.

2.x:  {"name": "NAME", "arguments": {…}}
3:    NAME
      <arg_key>KEY</arg_key>
      <arg_value>VALUE</arg_value>…
"""

from __future__ import annotations

from statewise.server.answers.feed import Feed, Markers, Steps
from statewise.server.answers.json_calls import JsonCalls
from statewise.server.answers.tagged import Parameters, Tags
from statewise.server.answers.tools import MAX_NAME
from statewise.server.answers.writer import Writer


class LingCalls(JsonCalls):
    """The first character tells which it is: 2.5 is published with either."""

    inner = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    ends_reasoning = True  # Ling 3 calls without closing its thoughts

    _TAGS = Tags(("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>"), JsonCalls.closers)

    def __init__(self, feed: Feed, writer: Writer) -> None:
        super().__init__(feed, writer)
        self._name_end = Markers("<", "\n")
        self._parameters = Parameters(feed, writer, self._TAGS, (*self.openers, *self.closers))

    def read(self, opener: str) -> Steps[None]:
        self.writer.opening(opener)
        self.writer.text((yield from self.feed.spaces()))
        if (yield from self.feed.peek()) == "{":
            yield from self.objects()
            return
        self.feed.record()
        name = ((yield from self.feed.short(self._name_end, MAX_NAME)) or "").strip()
        if self.writer.accepts(name) and (yield from self._parameters.come()):
            yield from self._parameters.read(name)
        else:
            self.writer.text(self.feed.recorded())
