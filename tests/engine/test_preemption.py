"""Sequences that are preempted, aborted and served from several threads: every answer is that of a calm engine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statewise import LLM, RequestOutput, SamplingParams
from statewise.engine.request import Request
from tests.engine.conftest import Engines, answers, prompt

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
WANTS: dict[str, dict[str, Any]] = {
    "several": {"n": 3, "temperature": 1.0, "seed": 7},
    "prompt": {"prompt_logprobs": 2},
    "both": {"n": 2, "temperature": 1.0, "seed": 8, "prompt_logprobs": 0, "logprobs": 1},
    "best": {"n": 1, "best_of": 3, "temperature": 1.0, "seed": 9},
    "greedy": {"return_logits": True},
}


@pytest.fixture(scope="module")
def calm(make: Engines) -> LLM:
    return make(prefix_cache=False)


def equal(one: RequestOutput, other: RequestOutput) -> None:
    assert one.error is None and other.error is None
    for first, second in zip(one.outputs, other.outputs, strict=True):
        assert first.token_ids == second.token_ids
        if first.logits is not None and second.logits is not None:
            assert (first.logits - second.logits).abs().max() < 1e-4
        close(first.logprobs, second.logprobs)
    close(one.prompt_logprobs, other.prompt_logprobs)


def close(one: Any, other: Any) -> None:
    assert (one is None) == (other is None)
    for first, second in zip(one or (), other or (), strict=True):
        if first is None:
            assert second is None
        else:
            assert first.token_id == second.token_id
            assert abs(first.logprob - second.logprob) < 1e-4


def keep(llm: LLM, request: Request) -> None:
    """What is preempted waits in host memory."""


def lose(llm: LLM, request: Request) -> None:
    for sequence in request.sequences:
        if sequence.frozen is not None and llm.engine.scheduler.cache.alive(sequence.frozen):
            llm.engine.scheduler.cache._forget(sequence.frozen)


def spoil(llm: LLM, request: Request) -> None:
    depot = llm.engine.scheduler.cache.depot
    assert depot is not None
    depot.settle(wait=True)
    for sequence in request.sequences:
        if sequence.frozen in depot.host.held:
            depot.host.records.arena[depot.host.held[sequence.frozen].record][0] ^= 1


@pytest.mark.parametrize("want", WANTS)
@pytest.mark.parametrize("after", [keep, lose, spoil])
@pytest.mark.parametrize("cached", [True, False])
def test_preempted_every_third_step_it_answers_the_same(
    make: Engines, calm: LLM, want: str, after: Callable[[LLM, Request], None], cached: bool
) -> None:
    tokens, params = prompt(150), SamplingParams(max_tokens=10, ignore_eos=True, **{"temperature": 0} | WANTS[want])
    expected = calm.generate({"prompt_token_ids": tokens}, params)[0]
    llm = make(max_prefill_tokens=64, page_size=16, prefix_cache=cached)
    request = llm.engine.add(None, tokens, params)
    for step in range(400):
        if not llm.engine.step():
            break
        if step % 3 == 1:
            for sequence in list(llm.engine.scheduler.running):
                llm.engine.scheduler.preempt(sequence)
            if step < 12:  # then it shall come to an end
                after(llm, request)
        llm.engine.check_integrity()
    assert request.finished
    equal(request.output(), expected)
    assert request.metrics.preemptions > 2
    depot = llm.engine.scheduler.cache.depot
    assert depot is not None
    assert (depot.counts.damaged > 0) == (after is spoil)
    if not cached:
        assert not list(llm.engine.scheduler.cache.index.points())  # nobody else may find what was preempted
    llm.engine.scheduler.cache.clear()
    assert llm.engine.runner.records.num_free == 8 and depot.host.records.num_free == depot.host.records.num_blocks


@pytest.mark.parametrize("host", [0, 1, None])
def test_without_host_memory_what_is_preempted_is_computed_again(make: Engines, calm: LLM, host: int | None) -> None:
    prompts = [prompt(60, seed) for seed in range(4)]
    expected = answers(calm, prompts, max_tokens=40)
    tight = make(page_size=16, num_pages=18, host_cache=host, prefix_cache=False)  # four of 100 tokens need 28
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    outputs = tight.generate([{"prompt_token_ids": tokens} for tokens in prompts], params)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert sum(output.metrics.preemptions for output in outputs) > 0
    depot = tight.engine.scheduler.cache.depot
    assert (depot is None) == (host == 0)
    assert depot is None or (depot.counts.lowered > 0) == (host is None)
    tight.engine.check_integrity()
    assert tight.engine.runner.pages.num_free == 18


@pytest.mark.parametrize("cached", [True, False])
def test_aborted_while_preempted_it_leaves_nothing(make: Engines, cached: bool) -> None:
    llm = make(prefix_cache=cached)
    scheduler = llm.engine.scheduler
    for steps in (1, 3):
        request = llm.engine.add(None, prompt(60), GREEDY)
        for _ in range(steps):
            llm.engine.step()
        scheduler.preempt(request.sequences[0])
        llm.engine.abort(request)
        llm.engine.check_integrity()
        assert request.sequences[0].frozen is None
    assert all(not point.value.wanted for point in scheduler.cache.index.points())
    scheduler.cache.clear()
    assert scheduler.cache.depot is not None
    host = scheduler.cache.depot.host
    assert (llm.engine.runner.records.num_free, host.records.num_free) == (8, host.records.num_blocks)


def test_a_step_that_fails_while_a_checkpoint_moves_is_repeated(
    make: Engines, calm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow write of one checkpoint keeps nobody from the device's blocks."""
    llm = make(num_records=4, num_pages=12, page_size=16, disk_cache=tmp_path)
    llm.engine.scheduler.interior_states = False
    cache, tokens = llm.engine.scheduler.cache, prompt(100)
    expected = answers(calm, [tokens + prompt(5), prompt(10)], max_tokens=10)
    llm.generate({"prompt_token_ids": tokens}, SamplingParams(max_tokens=0))
    assert cache.depot is not None and cache.depot.disk is not None
    store, event = cache.depot.disk.store, threading.Event()
    monkeypatch.setattr(cache.depot.disk, "store", lambda *inputs: event.wait(30) and store(*inputs))
    for frozen in list(cache.device.held):
        cache.evict(frozen)  # and now it is on its way
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)  # passes the model again, so that the device has it too
    llm.generate({"prompt_token_ids": tokens}, scored)
    assert any(frozen.moving for frozen in cache.device.held)
    requests = [llm.engine.add(None, tokens, GREEDY) for tokens in (tokens + prompt(5), prompt(10))]
    forward = llm.engine.runner.forward

    def fail(_: Any) -> Any:
        monkeypatch.setattr(llm.engine.runner, "forward", forward)
        raise RuntimeError("planted")

    monkeypatch.setattr(llm.engine.runner, "forward", fail)
    threading.Timer(5, event.set).start()
    while not all(request.finished for request in requests):
        llm.engine.step()
    event.set()
    assert [request.sequences[0].completion.token_ids for request in requests] == expected
    llm.close()


def test_requests_come_and_go_from_other_threads(make: Engines, calm: LLM, tmp_path: Path) -> None:
    """With pools, host memory and disk so small that checkpoints move all the time."""
    whole = make(num_records=3, num_pages=24, page_size=16).engine.runner
    size = 3 * whole.records.spec.nbytes + 24 * whole.pages.spec.nbytes
    prompts = [prompt(40)[:length] + prompt(length, length) for length in (10, 15, 20, 25, 30, 40)]
    expected = {tuple(tokens): answers(calm, [tokens], max_tokens=10)[0] for tokens in prompts}
    llm = make(
        num_records=3, num_pages=24, page_size=16, host_cache=size, disk_cache=tmp_path, disk_cache_bytes=2 * size
    )
    llm.engine.scheduler.interior_states = False
    stop, errors = threading.Event(), list[BaseException]()
    asked: list[tuple[Request, bool]] = []

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
                stop.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def serve() -> None:
        while not stop.is_set() or llm.engine.has_work:
            if not llm.engine.step():
                time.sleep(0.001)

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            request = llm.engine.add(None, list(chance.choice(prompts)), GREEDY)
            aborted = chance.random() < 0.3
            time.sleep(chance.uniform(0, 0.05))
            if aborted:
                llm.engine.abort(request)
            asked.append((request, aborted))
            llm.engine.check_integrity()
            while len(llm.engine.requests) > 6 and not stop.is_set():
                time.sleep(0.005)

    threads = [guarded(serve), *(guarded(lambda seed=seed: ask(seed)) for seed in range(2))]  # type: ignore[misc]
    stop.wait(3)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not errors
    while llm.engine.step():  # what was asked for after the serving thread had seen nothing left
        pass
    for request, aborted in asked:
        assert request.finished and request.error is None
        given = request.sequences[0].completion.token_ids
        wanted = expected[tuple(request.prompt_token_ids)]
        assert given == wanted[: len(given)] if aborted else given == wanted
    llm.engine.check_integrity()
    depot = llm.engine.scheduler.cache.depot
    assert depot is not None and depot.counts.lowered > 5 and depot.counts.stored > 5
    assert (depot.counts.damaged, depot.counts.disk_errors) == (0, 0)
    llm.engine.scheduler.cache.clear()
    llm.engine.check_integrity()
    assert llm.engine.runner.records.num_free == 3 and depot.host.has(3, 24)
    llm.close()


def test_a_program_that_closes_nothing_ends(checkpoint: Path, tmp_path: Path) -> None:
    program = f"""
from statewise import LLM, SamplingParams
llm = LLM({str(checkpoint)!r}, dtype="float32", num_records=2, num_pages=8, disk_cache={str(tmp_path)!r})
for start in range(4):
    llm.generate({{"prompt_token_ids": [start, 5, 6] * 9}}, SamplingParams(max_tokens=1))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=environment)
