"""Checkpoints on their way through host memory and the disk: what is continued is what was frozen, or nothing is."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.memory.tiers import Blocks
from tests.memory.world import World

ONE, OTHER, THIRD = [1] * 7, [2] * 7, [3] * 7
ACTS = "run run run run run ask ask preempt go_on tick evict evict evict forget pin flip flip_file fail restart".split()
PROMPTS = [stem[:length] for stem in ([1] * 9, [1, 1, 1, 1, 2, 2, 2, 2, 2], [2] * 9) for length in (2, 3, 5, 7, 9)]
STEPS = st.lists(
    st.tuples(st.sampled_from(ACTS), st.sampled_from(PROMPTS), st.integers(0, 60)), min_size=12, max_size=40
)


def act(world: World, name: str, tokens: list[int], number: int) -> None:
    held = list(world.device.held)
    if name in ("run", "ask", "preempt"):
        world.run(tokens, preempt=name == "preempt", patient=name != "ask")
    elif name == "go_on" and world.sequences:
        world.go_on(number)
    elif name == "tick":
        world.mover.tick()
    elif name == "evict" and held:
        world.cache.evict(held[number % len(held)])
    elif name == "forget" and number % 8 == 0:
        world.cache.clear()
    elif name == "pin" and held:
        held[number % len(held)].pinned_until = time.monotonic() + 1000
    elif name == "flip":
        world.flip(number, number)
    elif name == "flip_file":
        world.flip_file(number, number)
    elif name == "fail":
        world.mover.failing = number % 3 == 0
    elif name == "restart" and number % 3 == 0:
        world.restart()


@settings(max_examples=150)
@given(steps=STEPS, host=st.integers(1, 4), limit=st.sampled_from([0, 600, 2500, 20_000, 20_000]))
def test_nothing_wrong_is_ever_continued_and_nothing_is_left_behind(
    steps: list[tuple[str, list[int], int]], host: int, limit: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name) if limit else None, host=host, limit=limit)
        for step in steps:
            act(world, *step)
            world.check()
        while world.sequences:
            world.go_on(0)
        world.cache.settle(wait=True)
        world.check()
        world.cache.clear()
        world.mover.shutdown()
        world.check()
        assert not list(world.cache.index.points())
        assert world.host.has(host, 2 * host) and world.device.has(3, 6)
        assert (world.depot._digests, world.depot._page_digests) == ({}, {})
        assert world.disk is None or world.disk.used_bytes == 0
        world.cache.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, device=2, host=4)


def lowered(world: World, *prompts: list[int]) -> None:
    """Checkpoints of these, in host memory only."""
    for tokens in prompts:
        world.run(tokens)
        for frozen in list(world.device.held):
            world.cache.evict(frozen)


def test_what_left_the_device_comes_back_from_host_memory_and_what_left_that_from_the_disk(world: World) -> None:
    prompts = [[token] * 7 for token in range(9)]
    lowered(world, *prompts)
    world.cache.settle(wait=True)
    assert len(world.host.held) <= 4
    for tokens in prompts[::-1]:
        assert world.run(tokens) == len(tokens)
    counts = world.depot.counts
    assert (counts.lowered, counts.stored) == (9, 9)
    assert counts.fetched >= 5
    assert (counts.damaged, counts.disk_errors) == (0, 0)
    world.restart()
    for tokens in prompts:
        assert world.run(tokens) == len(tokens)


def test_a_page_that_is_still_being_read_is_shared_with_nobody(world: World) -> None:
    """Its block may turn out to be damaged, and what shares it would have the digest of the damage."""
    world.run(ONE)
    world.restart()
    world.flip_file(0, 0), world.flip_file(1, 0), world.flip_file(2, 0), world.flip_file(3, 0)
    assert world.run(ONE, patient=False) is None  # on its way
    (frozen,) = world.host.held
    assert world.host.shared(frozen) == []
    lowered(world, [*ONE, 2])  # computed meanwhile
    world.cache.settle(wait=True)
    assert world.depot.counts.damaged == 1
    assert world.run([*ONE, 2]) == 8


def test_damage_in_host_memory_does_not_spread_to_what_shares_the_page_later(world: World) -> None:
    world.run(ONE)
    (first,) = world.device.held
    world.run([*ONE, 2])
    world.cache.evict(first)
    world.cache.settle(wait=True)
    world.host.pages.arena[world.host.held[first].pages[0]][0] ^= 1
    for frozen in list(world.device.held):
        world.cache.evict(frozen)
    world.cache.settle(wait=True)
    assert world.run([*ONE, 2]) == 0  # and not with a wrong first page, which `run` would see
    assert world.depot.counts.damaged == 2
    world.check()


def test_a_page_that_was_shared_is_not_hashed_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered(world, ONE)
    world.cache.settle(wait=True)
    hashed, digests = [], world.host.digests

    def watched(blocks: Blocks, known: Sequence[str | None] = ()) -> list[str]:
        hashed.append(len(blocks.pages) + 1 - sum(digest is not None for digest in known))
        return digests(blocks, known)

    lowered(world, OTHER)  # the device has forgotten the first one's pages
    world.cache.settle(wait=True)
    monkeypatch.setattr(world.host, "digests", watched)
    lowered(world, [*ONE, 2, 2, 2])
    world.cache.settle(wait=True)
    assert hashed == [4, 3]  # of what is gone on from, and of what is new behind two pages


@pytest.mark.parametrize("where", ["load", "store"])
def test_a_move_that_fails_costs_a_checkpoint_and_nothing_else(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world.disk is not None

    def fail(*_: object) -> object:
        raise RuntimeError("planted")

    if where == "load":
        world.run(ONE)
        world.restart()
    with monkeypatch.context() as patch:
        patch.setattr(world.disk, where, fail)
        if where == "store":
            lowered(world, ONE)
        assert world.run(ONE) == 0
    assert world.depot.counts.damaged == 1
    world.check()
    lowered(world, ONE)
    assert world.run(ONE) == 7


def test_an_interrupt_while_a_move_is_waited_for_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run(ONE)
    world.restart()
    assert world.run(ONE, patient=False) is None

    def interrupted() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(world.mover, "tick", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.cache.settle(wait=True)
    world.check()
    assert world.run(ONE) == 7


def test_many_that_are_written_at_once_each_find_room_on_a_full_disk(tmp_path: Path) -> None:
    """What goes for one cannot go for the next; all of them were begun before any of them was written."""
    world = World(tmp_path, device=2, host=16, limit=6500)
    prompts = [[token] * 7 for token in range(16)]
    lowered(world, *prompts[:8])
    world.cache.settle(wait=True)
    assert world.disk is not None
    assert len(world.disk.held) == 8
    lowered(world, *prompts[8:])
    world.cache.settle(wait=True)
    assert (world.depot.counts.disk_errors, world.depot.counts.stored) == (0, 16)
    assert len(world.disk.held) < 16
    world.check()


def test_a_page_found_damaged_on_the_disk_is_written_again_for_all_who_have_it(world: World) -> None:
    world.run(ONE)
    world.run([*ONE, 2])
    world.restart()
    assert world.disk is not None
    stored = {frozen.num_tokens: stored for frozen, stored in world.disk.held.items()}
    path = world.disk._blocks / stored[7].digests[1]
    path.write_bytes(bytes(path.stat().st_size))
    assert world.run(ONE) == 0
    for frozen in list(world.device.held):
        world.cache.evict(frozen)
    world.restart()
    assert [world.run(tokens) for tokens in (ONE, [*ONE, 2])] == [7, 8]
    assert world.depot.counts.damaged == 0


def test_what_was_preempted_stays_in_host_memory(world: World) -> None:
    world.run(ONE, preempt=True)
    lowered(world, *([token] * 4 for token in range(2, 12)))
    (_, frozen) = world.sequences[0]
    assert world.depot.ready(frozen)
    assert world.run(ONE, frozen) == 7
    world.go_on(0)


def test_what_is_pinned_stays_for_what_is_on_the_move_and_for_what_is_not_pinned(tmp_path: Path) -> None:
    world = World(tmp_path, device=2, host=2)
    prompts = [[token] * 3 for token in range(6)]
    world.run(prompts[0])
    (pinned,) = world.device.held
    pinned.pinned_until = time.monotonic() + 1000
    world.cache.evict(pinned)
    world.cache.settle(wait=True)
    lowered(world, prompts[1])
    assert world.mover.queue
    lowered(world, prompts[2])
    assert pinned in world.host.held
    for frozen in world.host.held:
        frozen.pinned_until = time.monotonic() + 1000
    kept = set(world.host.held)
    lowered(world, *prompts[3:])
    assert set(world.host.held) == kept


def test_what_has_no_place_in_host_memory_waits_for_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, device=4, host=1)
    lowered(world, [1, 1])

    def refuse() -> None:
        raise AssertionError("it waits")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.mover, "tick", refuse)
        lowered(world, [2] * 9)  # three pages, of two
    assert world.depot.counts.lowered == 1


def test_closing_twice_is_closing(world: World) -> None:
    world.run(ONE)
    for _ in range(2):
        world.cache.close()
    world.start()
    assert world.run(ONE) == 7
