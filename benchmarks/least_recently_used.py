"""The eviction that Statewise's own is compared with: what was not used for the longest time goes first."""

from __future__ import annotations

import itertools
from collections.abc import Hashable


class LeastRecentlyUsed:
    """An eviction policy for the device's pools. It looks neither at sizes nor at what a checkpoint would save."""

    def __init__(self) -> None:
        self._clock = itertools.count()
        self._used: dict[Hashable, int] = {}

    def used(self, checkpoint: Hashable, tokens: int, nbytes: int) -> None:
        self._used[checkpoint] = next(self._clock)

    def superseded(self, checkpoint: Hashable) -> None:
        """A deeper checkpoint goes on from this one, which is no use of it."""

    def evicted(self, checkpoint: Hashable) -> None:
        self._used.pop(checkpoint, None)

    def order(self, checkpoint: Hashable) -> float:
        return self._used[checkpoint]
