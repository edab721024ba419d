"""An engine without a model, whose records and pages can be checked at any moment."""

from __future__ import annotations

import os
from array import array
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from statewise.memory.blocks import BlockPool, BlockSpec, Field, StateSpec
from statewise.memory.cache import CheckpointCache
from statewise.memory.disk import DiskTier
from statewise.memory.tiers import Frozen, Tier

PAGE = 3  # tokens


class Moment(Future[Any]):
    """The result of a move that is made when somebody waits for it, after those before it."""

    def __init__(self, mover: Mover) -> None:
        super().__init__()
        self.mover = mover

    def exception(self, timeout: float | None = None) -> BaseException | None:
        while not self.done():
            self.mover.tick()
        return super().exception()

    def result(self, timeout: float | None = None) -> Any:
        self.exception()
        return super().result()


class Mover:
    """In place of the thread that moves: it goes on one move at a time, when the test says so."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Moment, Callable[[], Any]]] = deque()
        self.failing = False  # those whose result somebody wants to know

    def submit(self, move: Callable[..., Any], *inputs: Any) -> Moment:
        def made() -> Any:
            if self.failing and not inputs:
                raise RuntimeError("planted")
            return move(*inputs)

        self.queue.append((Moment(self), made))
        return self.queue[-1][0]

    def tick(self) -> None:
        if self.queue:
            moment, move = self.queue.popleft()
            try:
                moment.set_result(move())
            except Exception as error:
                moment.set_exception(error)

    def shutdown(self) -> None:
        while self.queue:
            self.tick()


class World:
    """An engine without a model: a record holds a checksum of the tokens before it, a page the tokens themselves."""

    def __init__(self, path: Path | None = None, device: int = 3, host: int = 4, limit: int = 6000) -> None:
        self.path, self.sizes, self.limit = path, (device, host), limit
        self.sequences: list[tuple[list[int], Frozen]] = []  # that are preempted
        self.start()

    def start(self) -> None:
        record, page = (BlockSpec({0: StateSpec(x=Field((n,), torch.int32))}) for n in (1, PAGE))
        device, host = (
            Tier(BlockPool("record", record, size), BlockPool("page", page, 2 * size), keeps_wanted=lower)
            for size, lower in zip(self.sizes, (False, True), strict=True)
        )
        sizes = (host.records.block_bytes, host.pages.block_bytes)
        disk = None if self.path is None else DiskTier(self.path, self.limit, "model", *sizes)
        self.cache = CheckpointCache(device, host, disk, PAGE)
        assert self.cache.depot is not None
        self.depot, self.device, self.host, self.disk = self.cache.depot, device, host, disk
        self.depot._mover.shutdown()
        self.mover = self.depot._mover = Mover()  # type: ignore[assignment]

    def restart(self) -> None:
        while self.sequences:
            self.cache.let_go(self.sequences.pop()[1])
        self.cache.close()
        self.start()

    # As the scheduler goes on from a checkpoint

    def begin(self, tokens: list[int], frozen: Frozen | None, patient: bool) -> tuple[int, list[int], int] | None:
        """A record and pages with what is frozen of `tokens`, which must be right, and how many tokens that are.
        None: there is no room, or one who is not `patient` would have to wait for the disk."""
        cache, needed = self.cache, -(-len(tokens) // PAGE)
        while frozen is not None and not cache.ready(frozen):
            if not cache.fetch(frozen):
                frozen = cache.ready_before(frozen)
            elif patient:
                cache.wait()
                cache.settle()
                frozen = self.found(tokens)  # it may be lost
            else:
                return None
        here = cache.pages_here(frozen) if frozen else 0
        if not cache.make_room(1, needed - here, spare=frozen):
            if not cache.make_room(1, needed):
                return None
            frozen = frozen if frozen and cache.ready(frozen) else None
        record = self.device.records.allocate("sequence")
        pages = cache.resume(frozen, "sequence", record) if frozen else []
        if pages is None:  # it was damaged
            self.device.records.release(record)
            return self.begin(tokens, self.found(tokens), patient)
        start = frozen.num_tokens if frozen else 0
        if start:
            assert self.device.records.state(0)["x"][record].item() == checksum(tokens[:start])
            assert [token for page in pages for token in self.written[page].tolist()][:start] == tokens[:start]
        pages += [self.device.pages.allocate("sequence") for _ in range(needed - len(pages))]
        return record, pages, start

    @property
    def written(self) -> torch.Tensor:
        return self.device.pages.state(0)["x"]

    def found(self, tokens: list[int]) -> Frozen | None:
        point = self.cache.match("", tokens).point
        return None if point is None else point.value

    def run(
        self, tokens: list[int], frozen: Frozen | None = None, *, preempt: bool = False, patient: bool = True
    ) -> int | None:
        """Compute a sequence to its end, or to where it is preempted. Returns how many tokens it found frozen."""
        self.cache.settle()
        begun = self.begin(tokens, frozen or self.found(tokens), patient)
        if begun is None:
            return None
        record, pages, start = begun
        for number in range(start, len(tokens)):
            self.written[pages[number // PAGE], number % PAGE] = tokens[number]
        self.device.records.state(0)["x"][record] = checksum(tokens)
        if preempt:
            self.sequences.append((tokens, self.cache.hold("", tokens, record, pages, torch.zeros(2))))
        else:
            self.cache.adopt("", tokens, record, pages, torch.zeros(2))
        self.device.records.release(record)
        for page in pages:
            self.device.pages.release(page)
        if preempt:
            self.cache.evict(self.sequences[-1][1])
        return start

    def go_on(self, number: int) -> None:
        """A preempted sequence takes up what it left, or begins again."""
        tokens, frozen = self.sequences.pop(number % len(self.sequences))
        self.run(tokens, frozen if self.cache.alive(frozen) else None)
        self.cache.let_go(frozen)

    # What happens to it

    def flip(self, number: int, byte: int) -> None:
        """A bit of a block that lies in host memory."""
        held = [f for f in self.host.held if f in self.depot._digests]
        if held:
            blocks = self.host.held[held[number % len(held)]]
            page = number % (len(blocks.pages) + 1)
            arena = (
                self.host.records.arena[blocks.record] if not page else self.host.pages.arena[blocks.pages[page - 1]]
            )
            arena[byte] ^= 1

    def flip_file(self, number: int, byte: int) -> None:
        if self.disk is not None and (names := sorted(os.listdir(self.disk._blocks))):
            path = self.disk._blocks / names[number % len(names)]
            content = bytearray(path.read_bytes())
            content[byte] ^= 1
            path.write_bytes(content)

    def check(self) -> None:
        cache, depot = self.cache, self.depot
        cache.check_integrity(Counter(), Counter())
        alive = {point.value for point in cache.index.points()}
        assert alive == {*self.device.held, *self.host.held, *(self.disk.held if self.disk else ())}
        assert depot._digests.keys() | depot._fetching <= self.host.held.keys()
        assert all(self.host.pages.references[page] for page in depot._page_digests)
        assert depot._fetching <= {job.frozen for job in depot._jobs}
        assert cache._passing.keys() <= self.device.held.keys()
        for tier in cache._tiers():
            assert tier.policy._priorities.keys() == tier.held.keys()  # type: ignore[attr-defined]
        for frozen in alive:
            assert frozen.moving == sum(job.frozen is frozen for job in depot._jobs)
            assert frozen.wanted == sum(other is frozen for _, other in self.sequences)
        if self.disk is not None and not self.mover.queue:
            assert sum(path.stat().st_size for path in self.path.rglob("*")) >= self.disk.used_bytes  # type: ignore[union-attr]
            assert self.disk.used_bytes <= self.limit


def checksum(tokens: list[int]) -> int:
    return crc32(array("i", tokens).tobytes()) >> 1
