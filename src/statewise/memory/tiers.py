"""Checkpoints in the two block pools of one memory: the device's, or the host's."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from heapq import heapify, heappop, heappush
from itertools import zip_longest

from torch import Tensor

from statewise.memory.blocks import BlockPool
from statewise.memory.eviction import Eviction, GreedyDual
from statewise.memory.index import Node, Point

OWNER = "checkpoint"


@dataclass(frozen=True)
class Blocks:
    """Where a checkpoint lies in a tier. Pages are shared with checkpoints, and on the device with sequences, that
    begin alike; whoever goes on from it may fill up the last page behind the checkpoint's tokens."""

    record: int
    pages: tuple[int, ...]


@dataclass(eq=False)
class Frozen:
    """All memory of a sequence after `num_tokens` tokens, never written again. Tiers hold it, in any number of them."""

    num_tokens: int
    hidden: Tensor  # [hidden] the last token's row: the next token needs no forward pass
    passing: bool = False  # left on the way through a prompt and not used since
    # set by the cache
    point: Point[Frozen] | None = None
    wanted: int = 0  # preempted sequences that go on from here
    pinned_until: float = 0.0  # of the monotonic clock; until then all that is not pinned goes first
    fixed: int = 0  # whoever makes room to go on from it: it stays where it is
    moving: int = 0  # moves that read or write its blocks in host memory, or its files
    followers: int = 0  # checkpoints that were taken directly behind it
    used: bool = False  # somebody has gone on from it

    @property
    def left_behind(self) -> bool:
        """Whether its only user has gone on to a deeper checkpoint: hardly anybody will ask for it again."""
        return self.passing or (self.followers == 1 and not self.used)

    @property
    def pinned(self) -> bool:
        return self.pinned_until > time.monotonic()

    @property
    def path(self) -> list[Node]:
        """The nodes of its full pages, first to last."""
        assert self.point is not None
        return self.point.path()


class Tier:
    """The checkpoints of one memory.

    `keeps_wanted`: what preempted sequences wait for is not evicted here, because it would be lost, and what moves to
    the disk or from there not before it has arrived. True for host memory.
    """

    def __init__(self, records: BlockPool, pages: BlockPool, keeps_wanted: bool = False) -> None:
        self.records = records
        self.pages = pages
        self.keeps_wanted = keeps_wanted
        self.held: dict[Frozen, Blocks] = {}
        self.policy: Eviction = GreedyDual()
        self.evictions = 0
        self._holders: Counter[int] = Counter()  # checkpoints per page
        self._whole: dict[Node, dict[int, int]] = {}  # pages with a node's tokens: how many checkpoints cover them
        self._queue: list[tuple[float, int, Frozen]] = []  # by order, with outdated entries
        self._lowest: Frozen | None = None  # what was chosen to go
        self._numbers = itertools.count()  # two of one order need not be compared

    def keep(self, frozen: Frozen, record: int, pages: Sequence[int], *, filled: bool = True) -> None:
        """Hold a checkpoint in these blocks. The caller's references to them are the tier's from now on. Blocks that
        are yet to be filled are shared with nobody before `fill`."""
        self.held[frozen] = Blocks(record, tuple(pages))
        self._holders.update(pages)
        if filled:
            self.fill(frozen)

    def fill(self, frozen: Frozen) -> None:
        """The blocks of a checkpoint have their contents."""
        for node, page in zip(frozen.path, self.held[frozen].pages, strict=False):
            covering = self._whole.setdefault(node, {})
            covering[page] = covering.get(page, 0) + 1

    def release(self, frozen: Frozen) -> None:
        """Give up the blocks of a checkpoint."""
        blocks = self.held.pop(frozen)
        if frozen is not self._lowest:
            self.policy.superseded(frozen)  # it goes for another reason than its rank, which ages nobody
        self._lowest = None
        self.policy.evicted(frozen)
        self.evictions += 1
        self._holders.subtract(blocks.pages)
        for node, page in zip(frozen.path, blocks.pages, strict=False):
            # A shorter checkpoint may still hold the page, but nobody would tell the node when that one goes.
            covering = self._whole.get(node, {})
            if covering.get(page, 0) > 1:
                covering[page] -= 1
            elif covering.pop(page, 0) and not covering:
                del self._whole[node]
        self.records.release(blocks.record)
        for page in blocks.pages:
            if not self._holders[page]:
                del self._holders[page]
            self.pages.release(page)

    def used(self, frozen: Frozen, tokens: int) -> None:
        """Tell the policy that a checkpoint was used, which saved so many tokens."""
        own = sum(self._holders[page] == 1 for page in self.held[frozen].pages)
        self.policy.used(frozen, tokens, self.records.spec.nbytes + own * self.pages.spec.nbytes)
        self._enqueue(frozen)

    def superseded(self, frozen: Frozen) -> None:
        """Tell the policy that one sequence has gone on from a checkpoint to a deeper one."""
        self.policy.superseded(frozen)
        self._enqueue(frozen)

    def shared(self, frozen: Frozen) -> list[int]:
        """The first pages of a checkpoint that lie here already, for others that begin alike."""
        found = []
        for node in frozen.path if self.pages.spec.nbytes else ():
            if node not in self._whole:
                break
            found.append(next(iter(self._whole[node])))
        return found

    # Room

    def has(self, records: int, pages: int) -> bool:
        return self.records.num_free >= records and self.pages.num_free >= pages

    def can_free(self, records: int, pages: int) -> bool:
        """Whether so many blocks would be free without the checkpoints that may go."""
        if self.has(records, pages):
            return True
        staying = [frozen for frozen in self.held if not self._may_go(frozen)]
        alone = sum(self.records.references[blocks.record] == 1 for blocks in self.held.values())
        alone -= sum(self.records.references[self.held[frozen].record] == 1 for frozen in staying)
        if self.records.num_free + alone < records:
            return False
        kept = {page for frozen in staying for page in self.held[frozen].pages}
        return self._idle(pages - self.pages.num_free, kept)

    def _idle(self, count: int, kept: Collection[int]) -> bool:
        """Whether at least `count` pages are held by checkpoints alone, those in `kept` not counted."""
        if count <= 0:
            return True
        for page, holders in self._holders.items():
            if self.pages.references[page] == holders and page not in kept:
                count -= 1
                if not count:
                    return True
        return False

    def lowest(self) -> Frozen | None:
        """What should go next: what nobody waits for or has pinned, by the policy."""
        now = time.monotonic()
        seen, found = [], None
        while self._queue and found is None:
            entry = heappop(self._queue)
            order, _, frozen = entry
            if frozen in self.held and order == self.policy.order(frozen):  # or it has gone, or was used since
                seen.append(entry)
                if self._may_go(frozen) and not frozen.wanted and frozen.pinned_until <= now:
                    found = frozen
        for entry in seen:
            heappush(self._queue, entry)
        if found is None:
            going = (frozen for frozen in self.held if self._may_go(frozen))
            found = min(going, key=lambda f: (f.wanted > 0, f.pinned_until > now, self.policy.order(f)), default=None)
        self._lowest = found
        return found

    def _enqueue(self, frozen: Frozen) -> None:
        heappush(self._queue, (self.policy.order(frozen), next(self._numbers), frozen))
        if len(self._queue) > 4 * len(self.held) + 64:  # mostly outdated
            self._queue = [(self.policy.order(f), next(self._numbers), f) for f in self.held]
            heapify(self._queue)

    def _may_go(self, frozen: Frozen) -> bool:
        return not frozen.fixed and not (self.keeps_wanted and (frozen.wanted or frozen.moving))

    # Contents

    def digests(self, blocks: Blocks, known: Sequence[str | None] = ()) -> list[str]:
        """SHA-256 of the record and of each page, in hexadecimal, where it is not `known`. May run beside the step
        loop: blocks are frozen."""
        pairs = zip_longest(self.contents(blocks), known)
        return [digest or sha256(content).hexdigest() for content, digest in pairs]

    def contents(self, blocks: Blocks) -> Iterable[memoryview]:
        """The bytes of the record and of each page, in place; of a tier in host memory."""
        yield self.records.arena[blocks.record].numpy().data
        for page in blocks.pages:
            yield self.pages.arena[page].numpy().data

    def references(self) -> tuple[Counter[int], Counter[int]]:
        """How often each record and each page is held here, for the pools' integrity check."""
        return Counter(blocks.record for blocks in self.held.values()), +self._holders
