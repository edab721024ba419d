"""Conversations sent by a pattern, all in one event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from statewise.traffic.arrivals import Pattern
from statewise.traffic.connection import Clock
from statewise.traffic.record import Record
from statewise.traffic.sender import Talk
from statewise.traffic.workload import Turn, Workload

Progress = Callable[[int, int | None], None]


class Speaker(Protocol):
    """Who carries out what the driver decides: `Sender`, or a test's."""

    def converse(self, turns: Sequence[Turn], record: Record, talk: Talk) -> Awaitable[None]: ...

    def end(self, talk: Talk) -> Awaitable[None]: ...


@dataclass
class Run:
    """A measurement. Times are of the driver's clock."""

    began: float
    ended: float = 0.0
    records: list[Record] = field(default_factory=list)  # in the order of their beginning

    @property
    def seconds(self) -> float:
        return self.ended - self.began


async def drive(
    pattern: Pattern,
    workload: Workload,
    speaker: Speaker,
    clock: Clock,
    seed: int = 0,
    progress: Progress | None = None,
) -> Run:
    """Send until the pattern is through and everything sent has ended. Requests that fail are records too.

    A conversation whose turn failed goes no further. What it leaves unsent of `pattern.requests` is sent in others.
    """
    return await _Driver(pattern, workload, speaker, clock, seed, progress).run()


class _Driver:
    def __init__(
        self, pattern: Pattern, workload: Workload, speaker: Speaker, clock: Clock, seed: int, progress: Progress | None
    ) -> None:
        self._pattern, self._speaker, self._clock, self._progress = pattern, speaker, clock, progress
        self._conversations: Iterator[list[Turn]] = workload.conversations()
        self._offsets = pattern.offsets(random.Random(f"arrivals {seed}"))
        self._left = pattern.requests  # that no conversation has claimed
        self._number = 0
        self._done = 0
        self._run = Run(clock())

    async def run(self) -> Run:
        async with asyncio.TaskGroup() as group:
            if self._pattern.rate is None:
                for _ in range(self._pattern.concurrency or 1):
                    group.create_task(self._worker())
            else:
                await self._by_the_clock(group)
        self._run.ended = max((record.ended for record in self._run.records), default=self._clock())
        return self._run

    async def _worker(self) -> None:
        while not self._over() and (turns := self._next()) is not None:
            await self._converse(turns, self._clock())

    async def _by_the_clock(self, group: asyncio.TaskGroup) -> None:
        pattern = self._pattern
        places = asyncio.Semaphore(pattern.concurrency) if pattern.concurrency else None
        running: set[asyncio.Task[None]] = set()
        for offset in self._offsets:
            if pattern.duration is not None and offset >= pattern.duration:
                return
            while (turns := self._next()) is None:
                if not running:
                    return
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)  # a failed one may leave turns unsent
            intended = self._run.began + offset
            if (wait := intended - self._clock()) > 0:
                await asyncio.sleep(wait)
            task = group.create_task(self._in_place(places, turns, intended))
            running.add(task)
            task.add_done_callback(running.discard)

    async def _in_place(self, places: asyncio.Semaphore | None, turns: list[Turn], intended: float) -> None:
        if places is None:
            await self._converse(turns, intended)
        else:
            async with places:
                await self._converse(turns, intended)

    async def _converse(self, turns: list[Turn], intended: float) -> None:
        self._number += 1
        number, talk, sent = self._number, Talk(), 0
        try:
            for turn in range(len(turns)):
                record = Record(number, turn, intended)
                self._run.records.append(record)
                sent += 1
                await self._speaker.converse(turns, record, talk)
                self._done += 1
                if self._progress is not None:
                    self._progress(self._done, self._pattern.requests)
                if record.failure is not None or self._over():
                    break
                intended = self._clock()
        finally:
            if self._left is not None:
                self._left += len(turns) - sent
            await self._speaker.end(talk)

    def _next(self) -> list[Turn] | None:
        """The next conversation, cut where the requests end."""
        turns = next(self._conversations)
        if self._left is None:
            return turns
        turns = list(islice(turns, self._left))
        self._left -= len(turns)
        return turns or None

    def _over(self) -> bool:
        duration = self._pattern.duration
        return duration is not None and self._clock() - self._run.began >= duration
