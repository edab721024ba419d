"""Checkpoints in the pools of one memory: who holds which block, who may go, and what is shared."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.memory.blocks import BlockPool, BlockSpec, Field, StateSpec
from statewise.memory.index import PrefixIndex
from statewise.memory.tiers import Frozen, Tier

PAGE = 3  # tokens
RECORDS, PAGES = 6, 9


@dataclass(eq=False)
class Live:
    """A sequence that writes its tokens into its pages, as a model would."""

    tokens: list[int]
    record: int
    pages: list[int] = field(default_factory=list)


class Memory:
    """A tier in small pools, with the sequences that its checkpoints are taken of."""

    def __init__(self, records: int = RECORDS, pages: int = PAGES, keeps_wanted: bool = False) -> None:
        spec = BlockSpec({0: StateSpec(tokens=Field((PAGE,), torch.int32))})
        self.tier = Tier(BlockPool("record", spec, records), BlockPool("page", spec, pages), keeps_wanted)
        self.index: PrefixIndex[Frozen] = PrefixIndex(PAGE)
        self.live: list[Live] = []
        self.written = self.tier.pages.state(0)["tokens"]

    def begin(self, tokens: list[int]) -> Live | None:
        """A sequence of these tokens; the full pages that are here of them are shared. None: there is no room."""
        frozen = self.frozen(tokens)
        shared = self.tier.shared(frozen)
        if not self.tier.has(1, -(-len(tokens) // PAGE) - len(shared)):
            return None
        for page in shared:
            self.tier.pages.retain(page)
        sequence = Live(tokens[: len(shared) * PAGE], self.tier.records.allocate("sequence"), shared)
        self.live.append(sequence)
        return sequence if self.extend(sequence, tokens[len(sequence.tokens) :]) else None

    def extend(self, sequence: Live, tokens: list[int]) -> bool:
        for token in tokens:
            if len(sequence.tokens) == len(sequence.pages) * PAGE:
                if not self.tier.pages.num_free:
                    return False
                sequence.pages.append(self.tier.pages.allocate("sequence"))
            self.written[sequence.pages[-1], len(sequence.tokens) % PAGE] = token
            sequence.tokens.append(token)
        return True

    def end(self, sequence: Live) -> None:
        self.live.remove(sequence)
        self.tier.records.release(sequence.record)
        for page in sequence.pages:
            self.tier.pages.release(page)

    def frozen(self, tokens: list[int]) -> Frozen:
        """What stands for these tokens, whether the tier holds it or not."""
        point = self.index.find("", tokens)
        if point is None:
            frozen = Frozen(len(tokens), torch.zeros(1))
            frozen.point = point = self.index.add("", tokens, frozen)
        return point.value

    def keep(self, sequence: Live, tokens: int = 100) -> Frozen | None:
        """A checkpoint of what a sequence has written. None: it is here, or there is no record for it."""
        frozen = self.frozen(sequence.tokens)
        if frozen in self.tier.held or not self.tier.records.num_free:
            return None
        for page in sequence.pages:
            self.tier.pages.retain(page)
        self.tier.keep(frozen, self.tier.records.duplicate("checkpoint", sequence.record), sequence.pages)
        self.tier.used(frozen, tokens)
        return frozen

    def kept(self, tokens: list[int], saved: int = 100) -> Frozen:
        """A checkpoint whose sequence has ended."""
        sequence = self.begin(tokens)
        assert sequence is not None
        frozen = self.keep(sequence, saved)
        assert frozen is not None
        self.end(sequence)
        return frozen

    def check(self) -> None:
        """The pools hold what sequences and checkpoints hold, and a page is shared for the tokens that it has."""
        records, pages = self.tier.references()
        self.tier.records.check_integrity(records + Counter(s.record for s in self.live))
        self.tier.pages.check_integrity(pages + Counter(page for s in self.live for page in s.pages))
        for point in self.index.points():
            tokens = self.index.along("", point.tokens)[-1].tokens
            for number, page in enumerate(self.tier.shared(point.value)):
                assert self.tier.pages.references[page]
                assert self.written[page].tolist() == tokens[number * PAGE : (number + 1) * PAGE]
        for frozen, blocks in self.tier.held.items():
            content = [token for page in blocks.pages for token in self.written[page].tolist()]
            assert frozen.point is not None
            assert content[: frozen.num_tokens] == frozen.point.tokens


TOKENS = st.lists(st.integers(1, 2), min_size=1, max_size=11)
STEPS = st.lists(
    st.tuples(st.sampled_from("begin extend keep keep end release use flag".split()), st.integers(0, 9), TOKENS),
    max_size=40,
)


@settings(max_examples=150)
@given(steps=STEPS, keeps_wanted=st.booleans())
def test_any_order_of_keeping_and_releasing_keeps_the_pools_whole(
    steps: list[tuple[str, int, list[int]]], keeps_wanted: bool
) -> None:
    memory = Memory(keeps_wanted=keeps_wanted)
    tier = memory.tier
    for act, number, tokens in steps:
        if act == "begin":
            memory.begin(tokens)
        elif act == "release" and tier.held:
            tier.release(list(tier.held)[number % len(tier.held)])
        elif act == "use" and tier.held:
            tier.used(list(tier.held)[number % len(tier.held)], 100 * number)
        elif act == "flag" and tier.held:
            frozen = list(tier.held)[number % len(tier.held)]
            frozen.fixed, frozen.wanted, frozen.moving = number % 3 == 0, number % 2, number % 7 == 0
            frozen.pinned_until = time.monotonic() + 1000 * (number % 5 == 0)
        elif act == "extend" and memory.live:
            memory.extend(memory.live[number % len(memory.live)], tokens[:4])
        elif act == "keep" and memory.live:
            memory.keep(memory.live[number % len(memory.live)])
        elif act == "end" and memory.live:
            memory.end(memory.live[number % len(memory.live)])
        memory.check()
    foretold = {(r, p): tier.can_free(r, p) for r in range(RECORDS + 2) for p in range(PAGES + 2)}
    order = []
    while (frozen := tier.lowest()) is not None:
        assert not frozen.fixed
        assert not (keeps_wanted and (frozen.wanted or frozen.moving))
        order.append((frozen.wanted > 0, frozen.pinned_until > 0, tier.policy.order(frozen)))
        tier.release(frozen)
        memory.check()
    assert order == sorted(order)
    assert foretold == {(r, p): tier.has(r, p) for r, p in foretold}
    for sequence in list(memory.live):
        memory.end(sequence)
    for frozen in list(tier.held):
        tier.release(frozen)
    assert tier.has(RECORDS, PAGES)
    assert (tier._whole, +tier._holders) == ({}, {})
    assert len(tier._queue) <= 4 * RECORDS + 65  # of what has gone, too


def test_a_page_of_several_checkpoints_counts_once_and_goes_with_the_last() -> None:
    memory = Memory()
    tier = memory.tier
    long = memory.kept([1, 1, 1, 2, 2, 2, 1])
    short = memory.kept([1, 1, 1, 2, 2, 2])
    assert (tier.records.num_free, tier.pages.num_free) == (RECORDS - 2, PAGES - 3)
    assert tier.held[short].pages == tier.held[long].pages[:2]
    assert tier.can_free(RECORDS, PAGES)
    short.fixed = 1
    assert tier.can_free(RECORDS - 1, PAGES - 2)
    assert not tier.can_free(RECORDS, 0) and not tier.can_free(0, PAGES - 1)
    tier.release(long)
    assert tier.pages.num_free == PAGES - 2
    tier.release(short)
    assert tier.has(RECORDS, PAGES)


def test_the_pages_of_a_sequence_are_not_free_when_its_checkpoints_have_gone() -> None:
    memory = Memory()
    sequence = memory.begin([1] * 7)
    assert sequence is not None and memory.keep(sequence) is not None
    assert not memory.tier.can_free(1, PAGES - 2)
    assert memory.tier.can_free(RECORDS - 1, PAGES - 3)
    memory.tier.records.retain(sequence.record)  # as while a sequence's own record becomes a checkpoint
    memory.tier.keep(memory.frozen([2]), sequence.record, [])
    assert not memory.tier.can_free(RECORDS, 0)


def test_a_page_that_a_shorter_checkpoint_still_holds_is_not_found_by_the_longer_ones_tokens() -> None:
    """What was filled up behind a checkpoint goes when that goes, and then the block may hold anything."""
    memory = Memory()
    first = memory.kept([1, 1, 1])
    sequence = memory.begin([1, 1, 1, 2])
    assert sequence is not None
    short = memory.keep(sequence)
    memory.extend(sequence, [2, 2])
    long = memory.keep(sequence)
    assert short is not None and long is not None
    memory.end(sequence)
    memory.tier.release(long)
    memory.tier.release(short)
    memory.begin([2, 1, 2, 2, 1, 2, 2])
    assert memory.tier.shared(long) == list(memory.tier.held[first].pages)


def test_shared_pages_are_those_from_the_beginning_on() -> None:
    memory = Memory()
    first = memory.kept([1, 1, 1, 2, 2, 2, 1, 1, 1, 1])
    pages = list(memory.tier.held[first].pages)
    for tokens, count in (([1, 1, 1], 1), ([1, 1], 0), ([2], 0), ([1, 1, 1, 2, 2, 1], 1), ([1, 1, 1, 2, 2, 2, 2], 2)):
        assert memory.tier.shared(memory.frozen(tokens)) == pages[:count]
    memory.tier.release(first)
    assert memory.tier.shared(first) == []


def test_blocks_that_are_yet_to_be_filled_are_shared_with_nobody() -> None:
    memory = Memory()
    tier, frozen = memory.tier, memory.frozen([1] * 6)
    tier.keep(frozen, tier.records.allocate("c"), [tier.pages.allocate("c") for _ in range(2)], filled=False)
    tier.used(frozen, 6)
    assert tier.shared(frozen) == []
    tier.fill(frozen)
    assert tier.shared(frozen) == list(tier.held[frozen].pages)
    other = memory.frozen([1] * 5)
    tier.keep(other, tier.records.allocate("c"), [tier.pages.allocate("c") for _ in range(2)], filled=False)
    tier.used(other, 5)
    tier.release(other)  # it could not be filled
    assert tier.shared(frozen) == list(tier.held[frozen].pages)
    memory.tier.release(frozen)
    assert tier.has(RECORDS, PAGES)


@pytest.mark.parametrize("keeps_wanted", [False, True])
def test_the_last_to_go_are_pinned_then_awaited_and_what_is_fixed_stays(keeps_wanted: bool) -> None:
    memory = Memory(keeps_wanted=keeps_wanted)
    tier = memory.tier
    cheap, dear, pinned, wanted, fixed = (memory.kept([token], saved) for token, saved in enumerate([9, 99, 5, 4, 3]))
    pinned.pinned_until, wanted.wanted, fixed.fixed = time.monotonic() + 1000, 1, 1
    gone = []
    while (frozen := tier.lowest()) is not None:
        gone.append(frozen)
        tier.release(frozen)
    assert gone == [cheap, dear, pinned] + [wanted] * (not keeps_wanted)
    fixed.fixed = wanted.wanted = 0
    assert tier.lowest() in (fixed, wanted)


def test_a_pin_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    pinned, other = memory.kept([1], 1), memory.kept([2], 99)
    pinned.pinned_until = time.monotonic() + 10
    assert memory.tier.lowest() is other
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 11)
    assert memory.tier.lowest() is pinned


def test_what_goes_for_another_reason_than_its_rank_ages_nobody() -> None:
    memory = Memory()
    old, dear, left = memory.kept([1], 50), memory.kept([2], 5000), memory.kept([1, 1], 60)
    memory.tier.release(dear)  # as when a sequence is preempted
    memory.tier.superseded(left)
    assert memory.tier.lowest() is left
    memory.tier.release(left)
    assert memory.tier.policy.order(memory.kept([2, 2], 60)) > memory.tier.policy.order(old)


def test_what_holds_no_pages_of_its_own_is_cheap_to_keep() -> None:
    memory = Memory()
    memory.kept([1] * 9)
    follower, alone = memory.kept([1] * 9 + [2]), memory.kept([2] * 10)
    order = memory.tier.policy.order
    assert order(follower) > order(alone)  # the same tokens saved, with one page instead of four
