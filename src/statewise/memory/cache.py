"""Frozen points of sequences: taken, shared, found again, and moved down or evicted when their blocks are needed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from torch import Tensor

from statewise.memory.checkpoint import Checkpoint, restore, take
from statewise.memory.depot import Depot
from statewise.memory.disk import DiskTier
from statewise.memory.index import Match, Point, PrefixIndex, Tokens, encoded
from statewise.memory.tiers import OWNER, Frozen, Tier


def tenant_of(salt: str | None) -> str:
    """What the index and the files call the users of a salt; the salt itself is not kept."""
    return blake2b((salt or "").encode(), digest_size=16).hexdigest()


@dataclass
class Counts:
    """What has happened to checkpoints since the start."""

    kept: int = 0
    raised: int = 0  # continued from host memory
    lost: int = 0  # evicted from the last tier that held them


class CheckpointCache:
    """The checkpoints of one engine, found by their tokens: on the device, and in the depot below it.

    A tenant finds its own only. The device's blocks are the sequences' before they are the checkpoints'.
    """

    def __init__(
        self,
        device: Tier,
        host: Tier | None,
        disk: DiskTier | None,
        page_size: int,
        enabled: bool = True,
        lowers: bool = True,
    ) -> None:
        """`disk` needs a `host`. Not enabled, nothing but preempted sequences is kept; unless it `lowers`, nothing but
        these goes to host memory."""
        self.device = device
        self.page_size = page_size
        self.enabled = enabled
        self.lowers = lowers
        self.index: PrefixIndex[Frozen] = PrefixIndex(page_size)
        self.counts = Counts()
        self.depot = Depot(host, disk, self._refresh, self._unless_gone) if host is not None else None
        self._passing: dict[Frozen, None] = {}  # on the device, oldest first
        self.passed = 0  # states left on the way since one was last used, or would have been
        if self.depot is not None:
            self.depot.take_up(self.index, self._register)

    # Finding

    def match(self, tenant: str, tokens: Tokens) -> Match[Frozen]:
        """What is frozen of the beginning of `tokens`; the deepest point counts as used."""
        found = self.index.match(tenant, tokens)
        if found.point is not None:
            self._used(found.point.value)
        return found

    def alive(self, frozen: Frozen) -> bool:
        """Whether any tier still has it."""
        return frozen in self.device.held or (self.depot is not None and frozen in self.depot)

    def ready(self, frozen: Frozen) -> bool:
        """Whether it can be continued now. Otherwise `fetch` it."""
        return frozen in self.device.held or (self.depot is not None and self.depot.ready(frozen))

    def tier_of(self, frozen: Frozen) -> str:
        """The fastest memory that has it: `device`, `host` or `disk`."""
        return "device" if frozen in self.device.held else "host" if self.ready(frozen) else "disk"

    def fetch(self, frozen: Frozen) -> bool:
        """Begin to make it ready, unless that has begun. False: it cannot be had."""
        return self.depot is not None and self.depot.fetch(frozen)

    def ready_before(self, frozen: Frozen) -> Frozen | None:
        """The deepest checkpoint on the way to one that can be continued now."""
        point = frozen.point
        while point is not None and not self.ready(point.value):
            point = self.index.before(point)
        return point.value if point is not None else None

    # Taking

    def freeze(self, tenant: str, tokens: Tokens, record: int, pages: Sequence[int], hidden: Tensor) -> None:
        """Keep a copy of a live sequence's record, and its pages, behind `tokens`. Does nothing without room."""
        tokens = encoded(tokens)
        point = self.index.find(tenant, tokens)
        if self.enabled and not (point and point.value in self.device.held) and self.make_room(1, 0):
            copy = self.device.records.duplicate(OWNER, record)
            self._keep(tenant, tokens, copy, pages, hidden, self.index.find(tenant, tokens))

    def adopt(
        self,
        tenant: str,
        tokens: Tokens,
        record: int,
        pages: Sequence[int],
        hidden: Tensor,
        *,
        passing: bool = False,
    ) -> None:
        """`freeze` for a record that nobody writes any more: it is kept itself, so nothing is copied."""
        if self.enabled:
            self._adopt(tenant, tokens, record, pages, hidden, passing)

    def hold(self, tenant: str, tokens: Tokens, record: int, pages: Sequence[int], hidden: Tensor) -> Frozen:
        """`adopt` for a sequence that is preempted: the checkpoint waits for it in host memory, until `let_go`."""
        frozen = self._adopt(tenant, tokens, record, pages, hidden, False)
        frozen.wanted += 1
        return frozen

    def let_go(self, frozen: Frozen) -> None:
        """A preempted sequence has gone on, or will not."""
        frozen.wanted -= 1
        if not self.enabled and not frozen.wanted and self.alive(frozen):
            self._forget(frozen)

    def _adopt(
        self, tenant: str, tokens: Tokens, record: int, pages: Sequence[int], hidden: Tensor, passing: bool
    ) -> Frozen:
        tokens = encoded(tokens)
        point = self.index.find(tenant, tokens)
        if point is not None and point.value in self.device.held:
            if not passing:
                self._used(point.value)
            return point.value
        self.device.records.retain(record)
        return self._keep(tenant, tokens, record, pages, hidden, point, passing)

    def _keep(
        self,
        tenant: str,
        tokens: Tokens,
        record: int,
        pages: Sequence[int],
        hidden: Tensor,
        point: Point[Frozen] | None,
        passing: bool = False,
    ) -> Frozen:
        """Hold a record, whose reference is the cache's now, and pages, which stay with others too. `point` is what
        the index knows of, in another tier."""
        frozen = point.value if point is not None else self._register(tenant, tokens, hidden, passing)
        for page in pages:
            self.device.pages.retain(page)
        self.device.keep(frozen, record, pages)
        self.counts.kept += 1
        if frozen.passing:
            self._passing[frozen] = None
            self.passed += 1
        self._refresh(frozen)
        self._precede(frozen)
        return frozen

    def _register(self, tenant: str, tokens: Tokens, hidden: Tensor, passing: bool = False) -> Frozen:
        frozen = Frozen(0, hidden, passing)
        frozen.point = self.index.add(tenant, tokens, frozen)
        frozen.num_tokens = frozen.point.num_tokens
        before = self.index.before(frozen.point)
        if before is not None:
            before.value.followers += 1
        return frozen

    def _precede(self, frozen: Frozen) -> None:
        """What a checkpoint was taken behind saves less, or, where a second sequence parts from it, all the more."""
        assert frozen.point is not None
        before = self.index.before(frozen.point)
        if before is None:
            return
        if before.value.followers > 1:
            self._refresh(before.value)
        else:
            for tier in self._tiers():
                if before.value in tier.held:
                    tier.superseded(before.value)

    def bring(self, tenant: str, tokens: Tokens, checkpoint: Checkpoint, hidden: Tensor) -> bool:
        """Keep a checkpoint from elsewhere behind `tokens`. False: there is no room for it."""
        tokens = encoded(tokens)
        point = self.index.find(tenant, tokens)
        if point is not None and point.value in self.device.held:
            return True
        count = len(checkpoint.pages)
        if not self.make_room(1, count):
            return False
        records, pages = self.device.records, self.device.pages
        record, own = records.allocate(OWNER), [pages.allocate(OWNER) for _ in range(count)]
        restore(checkpoint, records, record, pages, own)
        self._keep(tenant, tokens, record, own, hidden, self.index.find(tenant, tokens))
        for page in own:
            pages.release(page)  # the cache holds them now
        return True

    def export(self, frozen: Frozen) -> Checkpoint | None:
        """A copy of a checkpoint in host memory; None if it is not at hand, or damaged."""
        tier = self.device
        if frozen not in tier.held:
            if self.depot is None or not self.depot.ready(frozen) or not self.depot.sound(frozen):
                return None
            tier = self.depot.host
        return take(frozen.num_tokens, tier.records, tier.held[frozen].record, tier.pages, tier.held[frozen].pages)

    # Going on

    def pages_here(self, frozen: Frozen) -> int:
        """Pages that a sequence shares when it goes on from a checkpoint: the full ones of one on the device."""
        full = frozen.num_tokens // self.page_size
        return min(full, len(self.device.held[frozen].pages)) if frozen in self.device.held else 0

    def resume(self, frozen: Frozen, owner: str, record: int) -> list[int] | None:
        """Fill `record` and give the pages to go on from a checkpoint that is `ready`; None: it was damaged, and is
        forgotten. There must be room for all its pages but `pages_here`."""
        records, pages = self.device.records, self.device.pages
        if frozen in self.device.held:
            blocks = self.device.held[frozen]
            records.copy(blocks.record, record)
            own = list(blocks.pages[: self.pages_here(frozen)])
            for page in own:
                pages.retain(page)
            if len(own) < len(blocks.pages):
                own.append(pages.duplicate(owner, blocks.pages[-1]))
            return own
        if self.depot is None or not self.depot.sound(frozen):
            self._forget(frozen)
            return None
        host = self.depot.host
        blocks = host.held[frozen]
        records.copy_from(host.records, blocks.record, record)
        own = self.device.shared(frozen)
        for page in own:
            pages.retain(page)
        for page in blocks.pages[len(own) :]:
            own.append(pages.duplicate(owner, page, host.pages))
        self.counts.raised += 1
        self._raise(frozen, record, own)
        return own

    def _raise(self, frozen: Frozen, record: int, pages: Sequence[int]) -> None:
        """Keep on the device what was just continued there, so that the next one shares it."""
        if self.enabled and not frozen.wanted and self.make_room(1, 0, spare=frozen):
            copy = self.device.records.duplicate(OWNER, record)
            for page in pages:
                self.device.pages.retain(page)
            self.device.keep(frozen, copy, pages)
            self._refresh(frozen)

    # Room

    def make_room(self, records: int, pages: int, spare: Frozen | None = None) -> bool:
        """Free so many blocks of the device. False: it cannot be done without `spare`; then nothing has changed.
        `spare` also stays in host memory."""
        if spare is not None:
            spare.fixed += 1
        try:
            if not self.device.can_free(records, pages):
                return False
            while not self.device.has(records, pages):
                frozen = self.device.lowest()
                assert frozen is not None
                self.evict(frozen)
            return True
        finally:
            if spare is not None:
                spare.fixed -= 1

    def evict(self, frozen: Frozen) -> None:
        """Give up a checkpoint's blocks of the device, for a copy in the depot if it is worth one."""
        self._lower(frozen)
        self._passing.pop(frozen, None)
        self.device.release(frozen)
        self._unless_gone(frozen)

    def _lower(self, frozen: Frozen) -> None:
        useful = not frozen.left_behind or frozen.pinned_until > time.monotonic()
        worth_it = frozen.wanted or (self.lowers and useful)
        if self.depot is not None and worth_it and frozen not in self.depot:
            self.depot.lower(frozen, self.device, store=self.enabled)

    def _forget(self, frozen: Frozen) -> None:
        """Give a checkpoint up in all tiers."""
        if self.depot is not None:
            self.depot.forget(frozen)
        if frozen in self.device.held:
            self.device.release(frozen)
        self._passing.pop(frozen, None)
        self._unless_gone(frozen)

    def _unless_gone(self, frozen: Frozen) -> None:
        """Take what no tier holds any more out of the index."""
        if frozen.point is None or self.alive(frozen):
            return
        before = self.index.before(frozen.point)
        self.index.remove(frozen.point)
        frozen.point = None
        self.counts.lost += 1
        if before is not None:
            before.value.followers = max(0, before.value.followers - 1 + frozen.followers)
            if not before.value.followers:  # the end of its path again
                self._refresh(before.value)

    def room_on_the_way(self) -> int:
        """Records for states on the way through a prompt: free ones, and those of such states that nobody has used."""
        return self.device.records.num_free + len(self._passing)

    def clear(self, tenant: str | None = None) -> None:
        """Forget all checkpoints, or those of a tenant, and their tokens."""
        self.settle(wait=True)
        for point in list(self.index.points()):
            if tenant is None or point.tenant == tenant:
                self._forget(point.value)
        self.index.clear(tenant)

    # What moves beside the step loop

    @property
    def moving(self) -> bool:
        return self.depot is not None and self.depot.moving

    def settle(self, wait: bool = False) -> None:
        """Book the moves that have ended; with `wait`, all."""
        if self.depot is not None:
            self.depot.settle(wait)

    def wait(self) -> None:
        """Wait for the oldest move."""
        if self.depot is not None:
            self.depot.wait()

    def close(self) -> None:
        """Write what is worth it to the disk. The cache cannot be used afterwards."""
        if self.depot is None:
            return
        if self.depot.disk is not None:
            for frozen in sorted(self.device.held, key=self.device.policy.order, reverse=True):
                self._lower(frozen)
        self.depot.close()

    # Bookkeeping

    def _tiers(self) -> list[Tier | DiskTier]:
        below = (self.depot.host, self.depot.disk) if self.depot is not None else ()
        return [tier for tier in (self.device, *below) if tier is not None]

    def _used(self, frozen: Frozen) -> None:
        if frozen.passing:
            self.passed = 0
        frozen.passing, frozen.used = False, True
        self._passing.pop(frozen, None)
        self._refresh(frozen)

    def _refresh(self, frozen: Frozen) -> None:
        assert frozen.point is not None
        before = self.index.before(frozen.point)
        saved = frozen.num_tokens - (before.num_tokens if before else 0)
        for tier in self._tiers():
            if frozen in tier.held:
                tier.used(frozen, saved)

    def check_integrity(self, records: Counter[int], pages: Counter[int]) -> None:
        """Raise `BlockError` unless the device's pools hold exactly the checkpoints' blocks and these, of live
        sequences, and the host's pools the checkpoints'."""
        held_records, held_pages = self.device.references()
        self.device.records.check_integrity(held_records + records)
        self.device.pages.check_integrity(held_pages + pages)
        if self.depot is not None:
            held_records, held_pages = self.depot.host.references()
            self.depot.host.records.check_integrity(held_records)
            self.depot.host.pages.check_integrity(held_pages)
