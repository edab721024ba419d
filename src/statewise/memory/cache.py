"""Frozen points of sequences in the pools: taken, shared, found again, and evicted when their blocks are needed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from statewise.memory.blocks import BlockPool
from statewise.memory.checkpoint import Checkpoint, restore, take
from statewise.memory.index import Match, Point, PrefixIndex

OWNER = "checkpoint"


@dataclass(eq=False)
class Frozen:
    """All memory of a sequence after `num_tokens` tokens, in blocks that are never written again.

    The record is its own. Pages are shared with other frozen points and with the sequence that went on from here,
    which may fill up the last page behind `num_tokens`.
    """

    num_tokens: int
    record: int
    pages: tuple[int, ...]
    hidden: Tensor  # [hidden] the last token's row: the next token needs no forward pass
    # set by the cache
    priority: float = 0.0
    pinned_until: float = 0.0  # of the monotonic clock; until then all that is not pinned goes first
    point: Point[Frozen] | None = None


class CheckpointCache:
    """The frozen points of one engine, found by their tokens.

    Eviction is GreedyDual-Size (Cao & Irani 1997): a point's priority is a clock plus the tokens that would have to
    be computed again per byte that its eviction frees; the lowest goes first, and the clock moves up to it. So large
    and cheap points go before small and expensive ones, and those unused for long before those just used.
    """

    def __init__(self, records: BlockPool, pages: BlockPool, page_size: int, enabled: bool = True) -> None:
        self.records = records
        self.pages = pages
        self.page_size = page_size
        self.enabled = enabled
        self.index: PrefixIndex[Frozen] = PrefixIndex(page_size)
        self.held: dict[Frozen, None] = {}
        self.evictions = 0
        self._clock = 0.0

    def match(self, tenant: str, tokens: Sequence[int]) -> Match[Frozen]:
        """What is frozen of the beginning of `tokens`; the deepest point counts as used."""
        found = self.index.match(tenant, tokens)
        if found.point is not None:
            self._refresh(found.point.value)
        return found

    def freeze(self, tenant: str, tokens: Sequence[int], record: int, pages: Sequence[int], hidden: Tensor) -> None:
        """Keep a copy of a live sequence's record, and its pages, behind `tokens`. Does nothing without room."""
        if self.enabled and self.index.find(tenant, tokens) is None and self.make_room(1, 0):
            copy = self.records.allocate(OWNER)
            self.records.copy(record, copy)
            self._keep(tenant, tokens, copy, pages, hidden)

    def adopt(self, tenant: str, tokens: Sequence[int], record: int, pages: Sequence[int], hidden: Tensor) -> None:
        """`freeze` for a sequence that ends here: its record itself is kept, so nothing is copied."""
        if self.enabled and self.index.find(tenant, tokens) is None:
            self.records.retain(record)
            self._keep(tenant, tokens, record, pages, hidden)

    def _keep(self, tenant: str, tokens: Sequence[int], record: int, pages: Sequence[int], hidden: Tensor) -> None:
        for page in pages:
            self.pages.retain(page)
        frozen = Frozen(len(tokens), record, tuple(pages), hidden)
        frozen.point = self.index.add(tenant, tokens, frozen)
        self.held[frozen] = None
        self._refresh(frozen)

    def export(self, frozen: Frozen) -> Checkpoint:
        """A copy of a frozen point in host memory."""
        return take(frozen.num_tokens, self.records, frozen.record, self.pages, frozen.pages)

    def bring(self, tenant: str, tokens: Sequence[int], checkpoint: Checkpoint, hidden: Tensor) -> bool:
        """Keep a checkpoint from elsewhere behind `tokens`. False: there is no room for it."""
        if self.index.find(tenant, tokens) is not None:
            return True
        count = len(checkpoint.pages)
        if not self.make_room(1, count):
            return False
        record, pages = self.records.allocate(OWNER), [self.pages.allocate(OWNER) for _ in range(count)]
        restore(checkpoint, self.records, record, self.pages, pages)
        self._keep(tenant, tokens, record, pages, hidden)
        for page in pages:
            self.pages.release(page)  # the cache holds them now
        return True

    def resume(self, frozen: Frozen, owner: str, record: int) -> list[int]:
        """Fill `record` and give the pages to go on from a frozen point: full ones shared, a last part one copied."""
        self.records.copy(frozen.record, record)
        if not frozen.pages:
            return []
        full = frozen.num_tokens // self.page_size
        pages = list(frozen.pages[:full])
        for page in pages:
            self.pages.retain(page)
        if full < len(frozen.pages):
            pages.append(self.pages.allocate(owner))
            self.pages.copy(frozen.pages[full], pages[-1])
        return pages

    def make_room(self, records: int, pages: int, spare: Frozen | None = None) -> bool:
        """Evict until so many blocks are free. False: it cannot be done without `spare`, and nothing was evicted."""
        if self.records.num_free >= records and self.pages.num_free >= pages:
            return True
        others = [frozen for frozen in self.held if frozen is not spare]
        free = Counter(page for frozen in others for page in frozen.pages)
        gain = sum(self.pages.references[page] == count for page, count in free.items())
        if self.records.num_free + len(others) < records or self.pages.num_free + gain < pages:
            return False
        while self.records.num_free < records or self.pages.num_free < pages:
            now = time.monotonic()
            self.evict(min((f for f in self.held if f is not spare), key=lambda f: (f.pinned_until > now, f.priority)))
        return True

    def evict(self, frozen: Frozen) -> None:
        """Forget a point and release its blocks."""
        assert frozen.point is not None
        self._clock = max(self._clock, frozen.priority)
        self.index.remove(frozen.point)
        del self.held[frozen]
        self.records.release(frozen.record)
        for page in frozen.pages:
            self.pages.release(page)
        self.evictions += 1

    def clear(self) -> None:
        """Evict everything."""
        for frozen in list(self.held):
            self.evict(frozen)
        self.index = PrefixIndex(self.page_size)

    def _refresh(self, frozen: Frozen) -> None:
        assert frozen.point is not None
        own = sum(self.pages.references[page] == 1 for page in frozen.pages)
        size = self.records.spec.nbytes + own * self.pages.spec.nbytes
        again = frozen.num_tokens - self.index.before(frozen.point)
        frozen.priority = self._clock + again / max(size, 1)

    def references(self) -> tuple[Counter[int], Counter[int]]:
        """How often each record and each page is held here, for the pools' integrity check."""
        return (
            Counter(frozen.record for frozen in self.held),
            Counter(page for frozen in self.held for page in frozen.pages),
        )
