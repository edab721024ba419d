"""Which checkpoint goes first when a memory is full."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol


class Eviction(Protocol):
    """What a tier tells its policy, and asks it."""

    def used(self, checkpoint: Hashable, tokens: int, nbytes: int) -> None:
        """A checkpoint was kept or found. Without it, so many tokens would have to be computed again; it alone holds
        so many bytes."""

    def superseded(self, checkpoint: Hashable) -> None:
        """One sequence has gone on from it to a deeper checkpoint, and no other has."""

    def evicted(self, checkpoint: Hashable) -> None: ...

    def order(self, checkpoint: Hashable) -> float:
        """The lowest goes first."""


class GreedyDual:
    """GreedyDual-Size (Cao & Irani 1997): a clock plus the tokens that a checkpoint saves per byte that it holds.

    The lowest goes first and the clock moves up to it. So large and cheap checkpoints go before small and expensive
    ones, and those unused for long before those just used. One that was left behind by its only continuation will
    hardly be asked for again: it saves nothing until somebody does.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._priorities: dict[Hashable, float] = {}

    def used(self, checkpoint: Hashable, tokens: int, nbytes: int) -> None:
        self._priorities[checkpoint] = self._clock + tokens / max(nbytes, 1)

    def superseded(self, checkpoint: Hashable) -> None:
        self._priorities[checkpoint] = self._clock

    def evicted(self, checkpoint: Hashable) -> None:
        self._clock = max(self._clock, self._priorities.pop(checkpoint))

    def order(self, checkpoint: Hashable) -> float:
        return self._priorities[checkpoint]
