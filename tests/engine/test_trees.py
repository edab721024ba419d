"""Random trees of conversations in pools that are too small for them: every branch answers like a fresh run.

Memory leaves the device for the host and the disk, gets lost and damaged there, sequences are preempted and engines
are replaced; none of it may be seen in a logit.
"""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise import LLM, SamplingParams
from statewise.api.session import Session
from statewise.engine.request import Completion, Request
from statewise.memory.cache import CheckpointCache
from statewise.memory.depot import Depot
from tests.checkpoints import bailing_config, kimi_linear_config, minimax_config, minimax_m2_config, write_checkpoint
from tests.engine.conftest import prompt

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, return_logits=True)
SMALL: dict[str, Any] = {"num_records": 6, "num_pages": 34, "page_size": 16, "max_prefill_tokens": 64}
LONGEST = 180  # tokens of a branch
SESSIONS = 5
HOST_SHARES = [2, 3, 40]
LIMIT = 1e-4  # of the logits, which spread over about ±6
KDA = {"kda_layers": [1, 2, 3], "full_attn_layers": []}
FAMILIES: dict[str, dict[str, Any]] = {
    "kimi-linear": kimi_linear_config(),
    "minimax": minimax_config(),
    "ring-linear": bailing_config(),
    "ling-2.5": bailing_config("v2_5"),
    "minimax-m2": minimax_m2_config(),  # no linear layer: its records are empty
    "kda alone": kimi_linear_config(num_hidden_layers=3, first_k_dense_replace=3, linear_attn_config=KDA),  # no page
}


class SlowMover(ThreadPoolExecutor):
    """Moves that overlap with several steps."""

    def submit(self, move: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        super().submit(time.sleep, 0.003)
        return super().submit(move, *args, **options)


class Grove:
    """The engines of one family, and what has happened to checkpoints in those that are closed."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.directory = directory
        self.model = write_checkpoint(directory / "model", config, seed=3)
        self.plain = self.open(prefix_cache=False, num_records=4, num_pages=64, max_prefill_tokens=2048)
        self.other = self.open(page_size=24, num_pages=24)  # where sessions go in files
        self.happened: Counter[str] = Counter()
        self._answers: dict[tuple[int, ...], Completion] = {}
        self._numbers = itertools.count()

    def open(self, **options: Any) -> LLM:
        return LLM(self.model, dtype="float32", **SMALL | options)

    def fresh(self, tokens: Sequence[int]) -> Completion:
        """What an engine without any memory of earlier prompts answers."""
        if (key := tuple(tokens)) not in self._answers:
            (output,) = self.plain.generate({"prompt_token_ids": list(tokens)}, GREEDY)
            self._answers[key] = output.outputs[0]
        return self._answers[key]

    def path(self) -> Path:
        return self.directory / f"{next(self._numbers)}"

    def close(self, llm: LLM) -> None:
        llm.close()
        cache = llm.engine.scheduler.cache
        self.happened["evicted"] += cache.device.evictions
        self.happened.update(vars(cache.counts))
        assert cache.depot is not None
        self.happened.update(vars(cache.depot.counts))


class Tree:
    """Sessions on an engine that keeps two or three checkpoints on the host, and as many or all on the disk.

    Each public method is an operation; the two numbers are for it to choose by.
    """

    def __init__(self, grove: Grove, host_share: int, crowded_disk: bool, slow: bool) -> None:
        self.grove = grove
        self.disk = grove.path()
        self.slow = slow
        record, page = grove.plain.engine.runner.records.spec.nbytes, grove.plain.engine.runner.pages.spec.nbytes
        self._pools = SMALL["num_records"] * record + SMALL["num_pages"] * page  # bytes
        self._disk_bytes = 4 * (record + 8 * page) + 20_000 if crowded_disk else 1 << 30
        self.llm = self._open(host_share)
        self.sessions = [self.llm.session().append(prompt(70, seed=9)), self.llm.session().append(prompt(33, seed=8))]

    def _open(self, host_share: int) -> LLM:
        """An engine with one in `host_share` of its records and pages in host memory, on the disk of the last one."""
        host = max(1, self._pools // host_share)
        llm = self.grove.open(host_cache=host, disk_cache=self.disk, disk_cache_bytes=self._disk_bytes)
        depot = llm.engine.scheduler.cache.depot
        if self.slow and depot is not None:
            depot._mover.shutdown()
            depot._mover = SlowMover(1)
        return llm

    @property
    def cache(self) -> CheckpointCache:
        return self.llm.engine.scheduler.cache

    @property
    def depot(self) -> Depot:
        assert self.cache.depot is not None
        return self.cache.depot

    def act(self, operation: str, first: int, second: int) -> None:
        getattr(self, operation)(self.sessions[first % len(self.sessions)], second)
        self.llm.engine.check_integrity()
        self.grove.happened[operation] += 1

    def finish(self) -> None:
        """All branches once more, and then nothing is left of them."""
        for session in self.sessions:
            self.generate(session, 0)
        self._files_at_rest()
        assert sum(path.stat().st_size for path in self.disk.glob("*/*/*")) <= self._disk_bytes
        self.cache.clear()
        self.llm.engine.check_integrity()
        for tier in (self.cache.device, self.depot.host):
            for pool in (tier.records, tier.pages):
                assert pool.num_free == pool.num_blocks
        self.grove.close(self.llm)
        assert not list(self.disk.glob("*/*/*"))
        shutil.rmtree(self.disk)

    # The conversation

    def append(self, session: Session, number: int) -> None:
        tokens = prompt((1, 15, 16, 31, 40, 64)[number % 6], seed=number % 7)
        if len(session.token_ids) + len(tokens) <= LONGEST:
            session.append(tokens)

    def generate(self, session: Session, _: int) -> None:
        tokens = session.token_ids
        self._compare(tokens, session.generate(GREEDY))
        if len(session.token_ids) > LONGEST:
            session.rewind(to=LONGEST - 40)

    def fork(self, session: Session, number: int) -> None:
        self._add(session.fork(1 + number % 2))

    def rewind_to_a_position(self, session: Session, number: int) -> None:
        session.rewind(to=max(1, len(session.token_ids) * (number % 8) // 8))

    def rewind_to_a_turn(self, session: Session, number: int) -> None:
        if turns := session.info.turns:
            session.rewind(turn=number % len(turns))

    def rewind_to_a_name(self, session: Session, number: int) -> None:
        names = [*session.info.checkpoints] or ["here"]
        session.checkpoint("here").rewind(to=names[number % len(names)])

    def checkpoint(self, session: Session, number: int) -> None:
        session.checkpoint(f"place {number % 3}")

    def pin(self, session: Session, _: int) -> None:
        session.pin(600)

    def through_a_file(self, session: Session, _: int) -> None:
        session.save(path := self.grove.path())
        self._add([self.llm.load_session(path)])

    def through_another_engine(self, session: Session, _: int) -> None:
        session.save(path := self.grove.path())
        there = self.grove.other.load_session(path)
        self._compare(session.token_ids, there.generate(GREEDY))
        self.grove.other.engine.check_integrity()
        there.save(path)
        self._add([self.llm.load_session(path)])

    def _add(self, sessions: list[Session]) -> None:
        self.sessions = (sessions + self.sessions)[:SESSIONS]

    # What the engine does to it

    def lower(self, _: Session, number: int) -> None:
        for frozen in list(self.cache.device.held)[:: 1 + number % 3]:
            self.cache.evict(frozen)

    def leave_host(self, _: Session, number: int) -> None:
        """Host memory was needed for something else; on the disk they stay."""
        self.cache.settle(wait=True)
        for frozen in list(self.depot.host.held)[:: 1 + number % 2]:
            self.depot._leave_host(frozen)
            self.cache._unless_gone(frozen)

    def forget(self, _: Session, number: int) -> None:
        """Some are lost in all tiers."""
        self.cache.settle(wait=True)
        for point in list(self.cache.index.points())[number % 2 :: 2]:
            self.cache._forget(point.value)

    def clear(self, _: Session, number: int) -> None:
        self.cache.clear()

    def damage(self, session: Session, number: int) -> None:
        """All has left the device, and records in host memory and half the files of blocks are not what they were."""
        self.lower(session, 0)
        self._files_at_rest()
        for blocks in self.depot.host.held.values():
            self.depot.host.records.arena[blocks.record] ^= 255
        for path in sorted(self.disk.glob("*/blocks/*"))[number % 2 :: 2]:
            path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))

    def restart(self, _: Session, number: int) -> None:
        """Another engine on the same directory, maybe with less host memory, and every session from its tokens."""
        self.grove.close(self.llm)
        self.llm = self._open(HOST_SHARES[number % len(HOST_SHARES)])
        self.sessions = [self.llm.session().append(session.token_ids) for session in self.sessions]
        self.grove.happened["taken up"] += self.depot.counts.fetched

    def preempt(self, session: Session, number: int) -> None:
        """Three requests at once, one of them for every row of its prompt, displaced at odd moments."""
        engine = self.llm.engine
        tokens, other, new = session.token_ids, self.sessions[-1].token_ids, prompt(40, number)
        prompts = [tokens, other[: 1 + 2 * len(other) // 3] + new, (tokens + new)[:LONGEST]]
        scored = engine.add(None, prompts[2], SamplingParams(temperature=0, max_tokens=0), keep_prompt_logits=True)
        requests = [engine.add(None, tokens, GREEDY) for tokens in prompts]
        self._run([scored, *requests], number)
        for tokens, request in zip(prompts, requests, strict=True):
            self._compare(tokens, request.sequences[0].completion)
        assert scored.prompt_logits is not None
        assert (scored.prompt_logits - self.grove.plain.logits(prompts[2])).abs().max() <= LIMIT

    def abort(self, session: Session, number: int) -> None:
        """A request that its user gives up, in the middle of its prompt or of its answer."""
        request = self.llm.engine.add(None, (session.token_ids + prompt(50, number))[:LONGEST], GREEDY)
        for _ in range(number % 8):
            self.llm.engine.step()
        self.llm.engine.abort(request)

    def _files_at_rest(self) -> None:
        self.cache.settle(wait=True)
        self.depot._mover.submit(lambda: None).result()  # what is to be deleted has been

    def _run(self, requests: list[Request], number: int) -> None:
        scheduler, chosen, left = self.llm.engine.scheduler, random.Random(number), 10
        while not all(request.finished for request in requests):
            assert self.llm.engine.step()
            if scheduler.running and left and chosen.random() < 0.7:
                scheduler.preempt(chosen.choice(scheduler.running))
                left -= 1
            self.llm.engine.check_integrity()
        self.grove.happened["preemptions"] += sum(request.metrics.preemptions for request in requests)

    def _compare(self, tokens: list[int], completion: Completion) -> None:
        fresh = self.grove.fresh(tokens)
        assert completion.token_ids == fresh.token_ids
        assert completion.logits is not None and fresh.logits is not None
        assert (completion.logits - fresh.logits).abs().max() <= LIMIT


OPERATIONS = [
    name for name in vars(Tree) if not name.startswith("_") and name not in ("act", "cache", "depot", "finish")
]
EVENTS = ["evicted", "lowered", "stored", "fetched", "taken up", "raised", "lost", "damaged", "preemptions"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_branch_of_any_tree_answers_like_a_fresh_run(family: str, tmp_path: Path) -> None:
    grove = Grove(tmp_path, FAMILIES[family])

    @settings(max_examples=24)
    @given(
        host_share=st.sampled_from(HOST_SHARES),
        crowded_disk=st.booleans(),
        slow=st.booleans(),
        steps=st.lists(
            st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 4), st.integers(0, 99)), min_size=10, max_size=20
        ),
    )
    def grow(host_share: int, crowded_disk: bool, slow: bool, steps: list[tuple[str, int, int]]) -> None:
        tree = Tree(grove, host_share, crowded_disk, slow)
        for operation, first, second in steps:
            tree.act(operation, first, second)
        tree.finish()

    grow()
    missing = [name for name in OPERATIONS + EVENTS if not grove.happened[name]]
    assert not missing, f"never happened: {missing}"
