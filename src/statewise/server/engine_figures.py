"""What an engine tells of itself: when it is ready, and with every heartbeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import msgspec

from statewise.api.llm import LLM
from statewise.api.softmax_cost import softmax_cost
from statewise.engine.engine import Engine
from statewise.engine.request import Request
from statewise.server import messages
from statewise.server.metrics_tally import STEP_S, STEP_TOKENS, Tally


class EngineFigures:
    """What an engine holds now, and what it has done since it was ready."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps = 0
        self._step_times, self._step_sizes = Tally(STEP_S), Tally(STEP_TOKENS)
        self._totals: Counter[str] = Counter()  # of requests that have ended
        self._before = self._counts()  # what has happened before the first request

    def stepped(self, seconds: float, tokens: int) -> None:
        """A step took so long, and so many tokens passed the model in it."""
        self._steps += 1
        self._step_times.add(seconds)
        self._step_sizes.add(tokens)

    def ended(self, request: Request) -> None:
        self._totals += _tokens(request)

    def stats(self, live: Collection[Request], preparing: int) -> messages.Stats:
        """`live` are the requests in the engine, and so many more wait for their structure to be compiled."""
        scheduler, cache = self._engine.scheduler, self._engine.scheduler.cache
        checkpoints, disk_bytes = {"device": len(cache.device.held)}, 0
        if cache.depot is not None:
            checkpoints["host"] = len(cache.depot.host.held)
            if cache.depot.disk is not None:
                checkpoints["disk"] = len(cache.depot.disk.held)
                disk_bytes = cache.depot.disk.used_bytes
        records, pages = self._engine.runner.records, self._engine.runner.pages
        totals = sum((_tokens(request) for request in live), self._totals)
        pages_used = pages.num_blocks - pages.num_free
        return messages.Stats(
            running=len(scheduler.running),
            waiting=preparing + len(scheduler.waiting) + len(scheduler.suspects),
            steps=self._steps,
            step_seconds=self._step_times.total,
            prompt_tokens=totals["prompt"],
            cached_tokens=totals["cached"],
            generated_tokens=totals["generated"],
            preemptions=totals["preempted"],
            records_used=records.num_blocks - records.num_free,
            pages_used=pages_used,
            checkpoints=checkpoints,
            disk_bytes=disk_bytes,
            counts={event: count - self._before[event] for event, count in self._counts().items()},
            records_live=len(scheduler.running),
            # One that several share counts for each: finding those would take a look at every page.
            pages_live=min(pages_used, sum(len(sequence.pages) for sequence in scheduler.running)),
            computed_tokens=int(self._step_sizes.total),
            step_times=list(self._step_times.counts),
            step_sizes=list(self._step_sizes.counts),
        )

    def _counts(self) -> dict[str, int]:
        cache = self._engine.scheduler.cache
        counts = vars(cache.counts) | {"evicted_device": cache.device.evictions}
        if cache.depot is not None:
            counts |= vars(cache.depot.counts) | {"evicted_host": cache.depot.host.evictions}
        return counts


def _tokens(request: Request) -> Counter[str]:
    """What a request has cost so far. Of one that has not begun, nothing."""
    metrics = request.metrics
    if metrics.queue_s is None:
        return Counter()
    return Counter(
        prompt=metrics.prompt_tokens,
        cached=metrics.cached_tokens,
        generated=metrics.completion_tokens,
        preempted=metrics.preemptions,
    )


def loaded(llm: LLM) -> messages.Loaded:
    config, runner, summary = llm.engine.config, llm.engine.runner, llm.summary()
    softmax = softmax_cost(runner.model.mixers, summary, config)
    return messages.Loaded(
        max_length=config.max_length,
        vocab_size=llm.engine.vocab_size,
        num_records=config.num_records,
        num_pages=config.num_pages,
        record_bytes=runner.records.spec.nbytes,
        page_bytes=runner.pages.spec.nbytes,
        page_size=config.page_size,
        summary=msgspec.to_builtins(summary, enc_hook=str),
        max_running=config.max_running,
        device=str(config.device),
        host_bytes=config.host_records * runner.records.spec.nbytes + config.host_pages * runner.pages.spec.nbytes,
        disk_bytes=config.disk_cache_bytes if config.disk_cache is not None else 0,
        prefix_cache=config.prefix_cache,
        softmax=messages.SoftmaxCost(softmax.kv_bytes, softmax.own_bytes, softmax.own_description),
    )
