"""Checkpoints that have left the device: in host memory, and from there on the disk."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from statewise.memory.disk import DiskTier, Outcome
from statewise.memory.index import PrefixIndex
from statewise.memory.tiers import OWNER, Frozen, Tier

logger = logging.getLogger(__name__)
WARN_AGAIN_S = 600.0  # between two words about a disk that takes no checkpoints
VICTIMS = 256  # checkpoints at most that one more on a full disk replaces


@dataclass
class DepotCounts:
    """What has happened to checkpoints below the device since the start."""

    lowered: int = 0  # copied from the device to host memory
    stored: int = 0  # written to the disk
    fetched: int = 0  # read from the disk
    damaged: int = 0  # did not have their digest on the way back
    disk_errors: int = 0


@dataclass
class _Job:
    """A move beside the step loop, and what is to be done with its result when it has ended. None: it failed."""

    frozen: Frozen
    future: Future[Any]
    finish: Callable[[Any], None]


class Depot:
    """Host memory, where what leaves the device is copied to, and the disk, where it is written in the background, so
    that host memory can be given up at once. On the way back every block must have the digest that it had.

    One thread moves: it reads and writes blocks that nobody changes (`Frozen.moving`), and all files. The rest runs in
    the step loop, which books what has ended by `settle`.
    """

    def __init__(
        self, host: Tier, disk: DiskTier | None, moved: Callable[[Frozen], None], gone: Callable[[Frozen], None]
    ) -> None:
        """`moved` is told of a checkpoint that has arrived in a tier, `gone` of one that has left one."""
        self.host = host
        self.disk = disk
        self.counts = DepotCounts()
        self._moved, self._gone = moved, gone
        self._digests: dict[Frozen, list[str]] = {}  # of what lies in host memory
        self._page_digests: dict[int, str] = {}  # of its pages: what shares one expects of it what the first did
        self._fetching: set[Frozen] = set()
        self._jobs: deque[_Job] = deque()
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="statewise-checkpoints")
        self._closed = False
        self._warned: dict[str, float] = {}  # when it was said why a checkpoint was not written

    def take_up(self, index: PrefixIndex[Frozen], register: Callable[..., Frozen]) -> None:
        """Register what an earlier engine has left on the disk. Raises `ConfigError`."""
        disk = self.disk
        if disk is None:
            return
        page_size = index.page_size if self.host.pages.spec.nbytes else 0
        for listing in self._mover.submit(disk.open, page_size).result():
            if index.find(listing.tenant, listing.tokens) is None:
                frozen = register(listing.tenant, listing.tokens, listing.hidden)
                disk.held[frozen] = listing.stored
                self._moved(frozen)
            else:
                self._mover.submit(disk.remove, listing.stored)

    def __contains__(self, frozen: Frozen) -> bool:
        return frozen in self.host.held or (self.disk is not None and frozen in self.disk.held)

    def ready(self, frozen: Frozen) -> bool:
        """Whether it lies in host memory."""
        return frozen in self.host.held and frozen not in self._fetching

    # Down

    def lower(self, frozen: Frozen, device: Tier, *, store: bool = True) -> None:
        """Copy a checkpoint of the device to host memory, if there is room, and on to the disk if it is to `store`."""
        if self._closed:
            return
        host, blocks = self.host, device.held[frozen]
        pages = host.shared(frozen)
        for page in pages:
            host.pages.retain(page)
        if not self._room(frozen, len(blocks.pages) - len(pages)):
            for page in pages:
                host.pages.release(page)
            self._unknow(pages)
            return
        record = host.records.duplicate(OWNER, blocks.record, device.records)
        for page in blocks.pages[len(pages) :]:
            pages.append(host.pages.duplicate(OWNER, page, device.pages))
        host.keep(frozen, record, pages)
        self.counts.lowered += 1
        self._moved(frozen)
        self._write(frozen, self.disk if store else None)

    def _write(self, frozen: Frozen, disk: DiskTier | None) -> None:
        """Take the digests of what has arrived in host memory, and write it to the disk."""
        host, blocks, point = self.host, self.host.held[frozen], frozen.point
        assert point is not None
        known = [None, *map(self._page_digests.get, blocks.pages)]
        tenant, tokens, hidden = point.tenant, point.tokens, frozen.hidden
        victims = disk.candidates(VICTIMS) if disk is not None else []

        def move() -> Outcome:
            digests = host.digests(blocks, known)
            if disk is None:
                return Outcome(digests)
            return disk.store(tenant, tokens, hidden, list(host.contents(blocks)), digests, victims)

        self._begin(frozen, move, lambda outcome: self._written(frozen, outcome))

    def _warn(self, reason: str) -> None:
        """Say that the disk does not take checkpoints, but not for every one: a full disk stays full."""
        if time.monotonic() - self._warned.get(reason, -math.inf) > WARN_AGAIN_S:
            self._warned[reason] = time.monotonic()
            logger.warning("checkpoints are not written to the disk cache: %s", reason)

    def _written(self, frozen: Frozen, outcome: Outcome | None) -> None:
        if outcome is None:
            return  # without digests it is not continued
        self._arrived(frozen, outcome.digests)
        if outcome.error is not None:
            self.counts.disk_errors += 1
            self._warn(outcome.error)
        if self.disk is None:
            return
        if outcome.stored is not None:
            self.disk.held[frozen] = outcome.stored
            self.counts.stored += 1
            self._moved(frozen)
        for victim in outcome.removed:
            if self.disk.held.pop(victim, None):
                self.disk.policy.evicted(victim)
                self._gone(victim)

    def _arrived(self, frozen: Frozen, digests: Sequence[str]) -> None:
        self._digests[frozen] = list(digests)
        self._page_digests.update(zip(self.host.held[frozen].pages, digests[1:], strict=True))

    # Up

    def fetch(self, frozen: Frozen) -> bool:
        """Begin to read a checkpoint from the disk, unless that has begun. False: it cannot be had."""
        host, disk = self.host, self.disk
        if frozen in self._fetching:
            return True
        if disk is None or frozen not in disk.held:
            return False
        count = len(disk.held[frozen].digests) - 1
        if not self._room(frozen, count) or frozen not in disk.held:
            return False
        stored = disk.held[frozen]
        record, *pages = (
            host.records.allocate(OWNER, zeroed=False),
            *(host.pages.allocate(OWNER) for _ in range(count)),
        )
        host.keep(frozen, record, pages, filled=False)
        self._fetching.add(frozen)
        self._moved(frozen)
        targets = list(host.contents(host.held[frozen]))
        self._begin(frozen, lambda: disk.load(stored, targets), lambda sound: self._fetched(frozen, disk, sound))
        return True

    def _fetched(self, frozen: Frozen, disk: DiskTier, sound: bool | None) -> None:
        self._fetching.discard(frozen)
        if sound and frozen in disk.held:
            self._arrived(frozen, disk.held[frozen].digests)
            self.host.fill(frozen)
            self.counts.fetched += 1
            return
        if frozen in disk.held:  # not given up while it was asked for
            self._damaged(frozen)
        self.forget(frozen)
        self._gone(frozen)

    def sound(self, frozen: Frozen) -> bool:
        """Whether the blocks in host memory are what was written there."""
        self._wait_until(lambda: frozen in self._digests)
        if self.host.digests(self.host.held[frozen]) == self._digests.get(frozen):
            return True
        self._damaged(frozen)
        return False

    def _damaged(self, frozen: Frozen) -> None:
        self.counts.damaged += 1
        logger.error("a checkpoint of %d tokens was damaged and is computed again", frozen.num_tokens)

    # Out

    def _room(self, newcomer: Frozen, pages: int) -> bool:
        """Room for one more checkpoint in host memory, where need be after what is on its way to the disk."""
        return pages <= self.host.pages.num_blocks and self._wait_until(lambda: self._evict(newcomer, pages))

    def _evict(self, newcomer: Frozen, pages: int) -> bool:
        if not self.host.can_free(1, pages):
            return False
        while not self.host.has(1, pages):
            frozen = self.host.lowest()
            assert frozen is not None
            if frozen.pinned and (self._jobs or not (newcomer.wanted or newcomer.pinned)):
                return False  # what is not pinned may still be on the move, and goes first
            self._leave_host(frozen)
            self._gone(frozen)
        return True

    def _leave_host(self, frozen: Frozen) -> None:
        pages = self.host.held[frozen].pages
        self._digests.pop(frozen, None)
        self.host.release(frozen)
        self._unknow(pages)

    def _unknow(self, pages: Sequence[int]) -> None:
        """Forget the digests of those pages that nobody holds any more."""
        for page in pages:
            if not self.host.pages.references[page]:
                self._page_digests.pop(page, None)

    def forget(self, frozen: Frozen) -> None:
        """Give a checkpoint up, in memory and on the disk."""
        self._wait_until(lambda: not frozen.moving)
        if frozen in self.host.held:
            self._leave_host(frozen)
        if self.disk is not None and frozen in self.disk.held:
            self.disk.policy.superseded(frozen)  # it goes for another reason than its rank, which ages nobody
            self.disk.policy.evicted(frozen)
            self._mover.submit(self.disk.remove, self.disk.held.pop(frozen))

    # Beside the step loop

    @property
    def moving(self) -> bool:
        return bool(self._jobs)

    def _begin(self, frozen: Frozen, move: Callable[[], Any], finish: Callable[[Any], None]) -> None:
        frozen.moving += 1
        self._jobs.append(_Job(frozen, self._mover.submit(move), finish))

    def settle(self, wait: bool = False) -> None:
        """Book the moves that have ended; with `wait`, all."""
        while self._jobs and (wait or self._jobs[0].future.done()):
            failure = self._jobs[0].future.exception()  # where it waits, an interrupt may come: nothing is lost yet
            job = self._jobs.popleft()
            if failure is not None:
                logger.error("a checkpoint was not moved", exc_info=failure)
            job.frozen.moving -= 1
            job.finish(None if failure is not None else job.future.result())

    def _wait_until(self, done: Callable[[], bool]) -> bool:
        """Book moves, the oldest first, until `done`. False: it is not, and none is left."""
        while not done():
            if not self._jobs:
                return False
            self.wait()
            self.settle()
        return True

    def wait(self) -> None:
        """Wait for the oldest move. Another thread may book it meanwhile."""
        for job in list(self._jobs)[:1]:
            job.future.exception()

    def close(self) -> None:
        """End all moves, and give the directory up. Nothing moves afterwards."""
        self._closed = True
        self.settle(wait=True)
        self._mover.shutdown()
        if self.disk is not None:
            self.disk.close()
