"""What leaves the device is continued from host memory and from the disk, and nobody can tell from the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from statewise import LLM, SamplingParams
from statewise.engine.request import Request
from statewise.errors import ConfigError
from statewise.memory.cache import CheckpointCache
from statewise.memory.depot import Depot
from tests.engine.conftest import Engines, prompt
from tests.engine.test_prefix_cache import GREEDY, answer, ask, same

SIZES: dict[str, Any] = {"num_records": 3, "num_pages": 24, "page_size": 16}
ONCE = SamplingParams(temperature=0, max_tokens=1)
LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
TOKENS = prompt(100)
Small = Callable[..., LLM]


@pytest.fixture(scope="module")
def plain(make: Engines) -> LLM:
    return make(prefix_cache=False, num_pages=64)


@pytest.fixture(scope="module")
def whole(make: Engines) -> int:
    """Bytes of the pools of a small engine."""
    runner = make(**SIZES).engine.runner
    return 3 * runner.records.spec.nbytes + 24 * runner.pages.spec.nbytes


@pytest.fixture
def small(make: Engines, whole: int) -> Iterator[Small]:
    """Engines with room for three prompts on the device, and for `host` times as many in host memory."""
    made: list[LLM] = []

    def build(host: float = 1, **options: object) -> LLM:
        made.append(make(**SIZES | {"host_cache": int(host * whole)} | options))
        made[-1].engine.scheduler.interior_states = False  # ends of prompts and turns only
        return made[-1]

    yield build
    for llm in made:
        llm.engine.check_integrity()
        llm.close()


def cache_of(llm: LLM) -> CheckpointCache:
    return llm.engine.scheduler.cache


def depot_of(llm: LLM) -> Depot:
    depot = cache_of(llm).depot
    assert depot is not None
    return depot


def crowd(llm: LLM, count: int) -> None:
    """Other prompts, which take the place of earlier ones."""
    for seed in range(count):
        ask(llm, prompt(90, seed), ONCE)
    cache_of(llm).settle(wait=True)


def place_of(llm: LLM, tokens: list[int] = TOKENS, salt: str | None = None) -> str | None:
    """The fastest memory that has a prompt's end."""
    return dict(llm.engine.frozen(salt, tokens)).get(len(tokens))


def test_what_left_the_device_is_continued_from_host_memory(small: Small, plain: LLM) -> None:
    llm = small(host=3)
    ask(llm, TOKENS, ONCE)
    crowd(llm, 4)
    assert place_of(llm) == "host"
    again = ask(llm, TOKENS)
    assert again.metrics.cached_tokens == len(TOKENS)
    same(again, ask(plain, TOKENS))
    counts = depot_of(llm).counts
    assert cache_of(llm).counts.raised == 1 and counts.lowered >= 2 and counts.fetched == counts.damaged == 0


@pytest.mark.parametrize("restart", [False, True])
def test_what_left_host_memory_or_the_engine_is_continued_from_the_disk(
    small: Small, plain: LLM, tmp_path: Path, restart: bool
) -> None:
    llm = small(disk_cache=tmp_path)
    first = ask(llm, TOKENS)
    turn = TOKENS + answer(first)
    if restart:
        llm.close()
        llm = small(disk_cache=tmp_path)
    else:
        crowd(llm, 8)
    assert llm.engine.frozen(None, turn) == [(len(turn) - 1, "disk")]  # its last token never passed the model
    next_turn = turn + prompt(20, seed=5)
    second = ask(llm, next_turn)
    assert second.metrics.cached_tokens == len(turn) - 1
    same(second, ask(plain, next_turn))
    assert depot_of(llm).counts.fetched == 1


def test_tenants_stay_apart_across_a_restart(small: Small, tmp_path: Path) -> None:
    llm = small(disk_cache=tmp_path)
    mine, other = (SamplingParams(temperature=0, max_tokens=1, cache_salt=salt) for salt in ("mine", "other"))
    first = ask(llm, TOKENS, mine)
    llm.close()
    llm = small(disk_cache=tmp_path)
    refused = ask(llm, TOKENS, other)
    assert (refused.metrics.cached_tokens, refused.metrics.cache_miss_reason) == (0, "other tenant")
    found = ask(llm, TOKENS, mine)
    assert found.metrics.cached_tokens == len(TOKENS)
    assert answer(found) == answer(first) == answer(refused)
    assert not any(b"mine" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@contextmanager
def slow_disk(llm: LLM) -> Iterator[threading.Event]:
    """A disk that gives nothing before the event is set."""
    disk, event = depot_of(llm).disk, threading.Event()
    assert disk is not None
    load = disk.load

    def waiting(*inputs: Any) -> bool:
        assert event.wait(30)
        return load(*inputs)

    disk.load = waiting  # type: ignore[method-assign]
    try:
        yield event
    finally:
        event.set()


@pytest.mark.parametrize("abort", [False, True])
def test_others_go_on_while_one_waits_for_the_disk(small: Small, plain: LLM, tmp_path: Path, abort: bool) -> None:
    llm = small(disk_cache=tmp_path)
    ask(llm, TOKENS, ONCE)
    llm.close()
    llm = small(disk_cache=tmp_path)
    running = llm.engine.add(None, prompt(20), LONG)
    llm.engine.step()
    with slow_disk(llm) as event:
        waiting = llm.engine.add(None, TOKENS, GREEDY)
        for _ in range(15):
            before = len(running.sequences[0].tokens)
            llm.engine.step()
            llm.engine.check_integrity()
            assert len(running.sequences[0].tokens) == before + 1
        assert waiting.sequences[0].tokens == TOKENS
        if abort:
            llm.engine.abort(waiting)
            assert waiting.finished
        event.set()
        finish(llm, running, waiting)
    assert answer(running.output()) == answer(ask(plain, prompt(20), LONG))
    if not abort:
        assert waiting.metrics.cached_tokens == len(TOKENS)
        assert answer(waiting.output()) == answer(ask(plain, TOKENS))
    cache_of(llm).clear()
    assert llm.engine.runner.records.num_free == 3 and llm.engine.runner.pages.num_free == 24
    assert depot_of(llm).host.has(3, 24)


def finish(llm: LLM, *requests: Request) -> None:
    deadline = time.monotonic() + 30
    while not all(request.finished for request in requests):
        llm.engine.step()
        assert time.monotonic() < deadline


def test_one_alone_waits_for_the_disk_too(small: Small, tmp_path: Path) -> None:
    llm = small(disk_cache=tmp_path)
    ask(llm, TOKENS, ONCE)
    llm.close()
    llm = small(disk_cache=tmp_path)
    with slow_disk(llm) as event:
        threading.Timer(0.2, event.set).start()
        assert ask(llm, TOKENS).metrics.cached_tokens == len(TOKENS)


# What is damaged or fails


def flip_host(llm: LLM, part: int) -> None:
    host = depot_of(llm).host
    (blocks,) = (at for frozen, at in host.held.items() if frozen.num_tokens == len(TOKENS))
    block = host.pages.arena[blocks.pages[part - 1]] if part else host.records.arena[blocks.record]
    block[5] ^= 1


def flip_disk(llm: LLM, part: int) -> None:
    disk = depot_of(llm).disk
    assert disk is not None
    (stored,) = (stored for frozen, stored in disk.held.items() if frozen.num_tokens == len(TOKENS))
    path = disk._blocks / stored.digests[part]
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def fail_load(llm: LLM, part: int) -> None:
    def load(*_: object) -> bool:
        raise OSError(5, "planted") if part else MemoryError

    depot_of(llm).disk.load = load  # type: ignore[union-attr, method-assign]


@pytest.mark.parametrize("part", [0, 3])
@pytest.mark.parametrize("harm", [flip_host, flip_disk, fail_load])
def test_what_is_damaged_is_counted_and_computed_again(
    small: Small, plain: LLM, tmp_path: Path, harm: Callable[[LLM, int], None], part: int
) -> None:
    on_disk = harm is not flip_host
    llm = small(host=3, disk_cache=tmp_path if on_disk else None)
    ask(llm, TOKENS, ONCE)
    if on_disk:
        llm.close()
        llm = small(host=3, disk_cache=tmp_path)
    else:
        crowd(llm, 4)
    harm(llm, part)
    beside = llm.engine.add(None, prompt(20), LONG)
    again = ask(llm, TOKENS)
    finish(llm, beside)
    assert again.metrics.cached_tokens == 0
    assert depot_of(llm).counts.damaged == 1
    same(again, ask(plain, TOKENS))
    assert answer(beside.output()) == answer(ask(plain, prompt(20), LONG))
    assert ask(llm, TOKENS).metrics.cached_tokens == len(TOKENS)


def test_a_disk_that_takes_nothing_is_counted_and_costs_no_answer(
    small: Small, plain: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = small(disk_cache=tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(depot_of(llm).disk, "_write", full)
    for seed in range(12):
        same(ask(llm, prompt(90, seed)), ask(plain, prompt(90, seed)))
    cache_of(llm).settle(wait=True)
    counts = depot_of(llm).counts
    assert counts.disk_errors == counts.lowered > 5 and counts.stored == 0
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


# How much there is


@pytest.mark.parametrize("host", [0, 1e-9])
def test_without_room_in_host_memory_all_is_as_before(small: Small, plain: LLM, host: float) -> None:
    llm = small(host=host)
    for seed in range(4):
        same(ask(llm, prompt(90, seed)), ask(plain, prompt(90, seed)))
    assert ask(llm, prompt(90, 0)).metrics.cache_miss_reason == "evicted"
    assert cache_of(llm).depot is None or depot_of(llm).counts.lowered == 0


def test_the_disk_needs_host_memory(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disk_cache needs room in host memory: raise host_cache above 0"):
        small(host=0, disk_cache=tmp_path / "cache")


def test_what_is_pinned_survives_in_host_memory(small: Small) -> None:
    llm = small()
    prompts = [prompt(100, seed) for seed in range(3)]
    for tokens in prompts:  # as many as there are records, and one is needed to compute
        llm.session().append(tokens).pin(600)
    crowd(llm, 10)
    places = [place_of(llm, tokens) for tokens in prompts]
    assert None not in places and "host" in places
    for tokens in prompts:
        assert ask(llm, tokens, ONCE).metrics.cached_tokens == len(tokens)


def test_the_directory_does_not_outgrow_its_limit(small: Small, whole: int, tmp_path: Path) -> None:
    llm = small(disk_cache=tmp_path, disk_cache_bytes=whole)
    for seed in range(12):
        ask(llm, prompt(90, seed), ONCE)
        cache_of(llm).settle(wait=True)
        used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert used <= whole
    assert used > whole / 2
    assert depot_of(llm).counts.disk_errors == 0
