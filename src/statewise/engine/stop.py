"""Finds stop strings in text that arrives in pieces, and withholds what may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence

from statewise.errors import RequestError


class StopMatcher:
    """Feed it text with push; what it returns may be shown, whatever text comes next.

    The text is cut at the match that is complete first; of those that end together, at the one that began first. So
    the result does not depend on how the text was divided into pieces. The work is linear in the text.
    """

    def __init__(self, stop_strings: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stop_strings):
            raise RequestError("stop", "stop must be a list of non-empty strings")
        # The longest first: it is the earliest to begin among those that end together.
        self._stops = sorted(set(stop_strings), key=lambda stop: (-len(stop), stop))
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched_lengths = [0] * len(self._stops)  # of each stop: how much of it the text ends with
        self._include = include_stop_str_in_output
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was found or None); after a match ("", the match)."""
        if self.matched is not None:
            return "", self.matched
        if not self._stops:
            return text, None
        pending = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            stop = self._step(character)
            if stop is not None:
                self._held = ""
                self.matched = stop
                return pending[: position if self._include else position - len(stop)], stop
        certain = len(pending) - max(self._matched_lengths)
        self._held = pending[certain:]
        return pending[:certain], None

    def finish(self) -> str:
        """The text still withheld, when no more will come."""
        held, self._held = self._held, ""
        self._matched_lengths = [0] * len(self._stops)
        return held

    def _step(self, character: str) -> str | None:
        """Advance all automata by one character; the stop string that is now complete, if any."""
        complete = None
        for index, stop in enumerate(self._stops):
            length = self._matched_lengths[index]
            while length and stop[length] != character:
                length = self._failures[index][length - 1]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                if complete is None:
                    complete = stop
                length = self._failures[index][-1]
            self._matched_lengths[index] = length
        return complete


def _failure_table(stop: str) -> list[int]:
    """Knuth-Morris-Pratt: entry i is how much of the beginning of stop[: i + 1] it also ends with, short of all."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
