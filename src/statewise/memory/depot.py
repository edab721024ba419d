"""Checkpoints that have left the device: in host memory, and from there on the disk."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from statewise.memory.disk import DiskTier, Outcome
from statewise.memory.index import PrefixIndex
from statewise.memory.tiers import OWNER, Frozen, Tier

logger = logging.getLogger(__name__)
VICTIMS = 64  # checkpoints at most that one more on a full disk replaces


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

    One thread moves: it reads and writes blocks that nobody changes (`Frozen.fixed`), and all files. The rest runs in
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
        self._fetching: set[Frozen] = set()
        self._jobs: deque[_Job] = deque()
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="statewise-checkpoints")

    def take_up(self, index: PrefixIndex[Frozen], register: Callable[..., Frozen]) -> None:
        """Register what an earlier engine has left on the disk. Raises `ConfigError`."""
        disk = self.disk
        if disk is None:
            return
        for listing in self._mover.submit(disk.open).result():
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
        host, blocks = self.host, device.held[frozen]
        pages = host.shared(frozen)
        for page in pages:
            host.pages.retain(page)
        if not self._room(len(blocks.pages) - len(pages)):
            for page in pages:
                host.pages.release(page)
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
        if disk is None:
            self._begin(frozen, lambda: Outcome(host.digests(blocks)), lambda outcome: self._written(frozen, outcome))
            return
        tenant, tokens, contents = point.tenant, point.tokens, list(host.contents(blocks))
        full = disk.used_bytes + sum(map(len, contents)) > disk.limit
        victims = list(disk.candidates(VICTIMS)) if full else []
        self._begin(
            frozen,
            lambda: disk.store(tenant, tokens, frozen.hidden, contents, victims),
            lambda outcome: self._written(frozen, outcome),
        )

    def _written(self, frozen: Frozen, outcome: Outcome | None) -> None:
        if outcome is None:
            return  # without digests it is not continued
        self._digests[frozen] = outcome.digests
        if outcome.error is not None:
            self.counts.disk_errors += 1
            logger.warning("a checkpoint was not written to the disk cache: %s", outcome.error)
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

    # Up

    def fetch(self, frozen: Frozen) -> bool:
        """Begin to read a checkpoint from the disk, unless that has begun. False: it cannot be had."""
        host, disk = self.host, self.disk
        if frozen in self._fetching:
            return True
        if disk is None or frozen not in disk.held:
            return False
        count = len(disk.held[frozen].digests) - 1
        if not self._room(count) or frozen not in disk.held:
            return False
        stored = disk.held[frozen]
        record, *pages = (
            host.records.allocate(OWNER, zeroed=False),
            *(host.pages.allocate(OWNER) for _ in range(count)),
        )
        host.keep(frozen, record, pages)
        self._fetching.add(frozen)
        self._moved(frozen)
        targets = list(host.contents(host.held[frozen]))
        self._begin(frozen, lambda: disk.load(stored, targets), lambda sound: self._fetched(frozen, disk, sound))
        return True

    def _fetched(self, frozen: Frozen, disk: DiskTier, sound: bool | None) -> None:
        self._fetching.discard(frozen)
        if sound and frozen in disk.held:
            self._digests[frozen] = list(disk.held[frozen].digests)
            self.counts.fetched += 1
            return
        if frozen in disk.held:  # not given up while it was asked for
            self._damaged(frozen)
        self.forget(frozen)
        self._gone(frozen)

    def sound(self, frozen: Frozen) -> bool:
        """Whether the blocks in host memory are what was written there."""
        if frozen not in self._digests:
            self.settle(wait=True)
        if self.host.digests(self.host.held[frozen]) == self._digests.get(frozen):
            return True
        self._damaged(frozen)
        return False

    def _damaged(self, frozen: Frozen) -> None:
        self.counts.damaged += 1
        logger.error("a checkpoint of %d tokens was damaged and is computed again", frozen.num_tokens)

    # Out

    def _room(self, pages: int) -> bool:
        """Room for one more checkpoint in host memory, where need be after what is on its way to the disk."""
        return self._evict(pages) or (self.settle(wait=True) and self._evict(pages))

    def _evict(self, pages: int) -> bool:
        if not self.host.can_free(1, pages):
            return False
        while not self.host.has(1, pages):
            frozen = self.host.lowest()
            assert frozen is not None
            self._leave_host(frozen)
            self._gone(frozen)
        return True

    def _leave_host(self, frozen: Frozen) -> None:
        self._digests.pop(frozen, None)
        self.host.release(frozen)

    def forget(self, frozen: Frozen) -> None:
        """Give a checkpoint up, in memory and on the disk."""
        if frozen.fixed:
            self.settle(wait=True)
        if frozen in self.host.held:
            self._leave_host(frozen)
        if self.disk is not None and frozen in self.disk.held:
            self.disk.policy.evicted(frozen)
            self._mover.submit(self.disk.remove, self.disk.held.pop(frozen))

    # Beside the step loop

    @property
    def moving(self) -> bool:
        return bool(self._jobs)

    def _begin(self, frozen: Frozen, move: Callable[[], Any], finish: Callable[[Any], None]) -> None:
        frozen.fixed += 1
        self._jobs.append(_Job(frozen, self._mover.submit(move), finish))

    def settle(self, wait: bool = False) -> bool:
        """Book the moves that have ended; with `wait`, all. True: there were any."""
        ended = False
        while self._jobs and (wait or self._jobs[0].future.done()):
            job = self._jobs.popleft()
            failure = job.future.exception()
            if failure is not None:
                logger.error("a checkpoint was not moved", exc_info=failure)
            job.frozen.fixed -= 1
            job.finish(None if failure is not None else job.future.result())
            ended = True
        return ended

    def wait(self) -> None:
        """Wait for the oldest move."""
        if self._jobs:
            self._jobs[0].future.exception()

    def close(self) -> None:
        """End all moves, and give the directory up."""
        self.settle(wait=True)
        self._mover.shutdown()
        if self.disk is not None:
            self.disk.close()
