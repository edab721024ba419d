"""`/metrics`: what Prometheus reads. Everything is taken from plain counters when it is asked for.

The names that begin with `vllm:` are those that dashboards for language-model servers look for; what only Statewise has
begins with `statewise:`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from statewise import __version__
from statewise.server import messages
from statewise.server.metrics_families import counter, gauge, histogram, plain, total
from statewise.server.metrics_tally import MISSES, STEP_S, STEP_TOKENS, Tally, carried
from statewise.server.service import Service

REASONS = ("stop", "length", "abort", "error")
PHASES = ("loading", "ready", "dead", "closed")
TIERS = ("device", "host", "disk")
REJECTIONS = ("queue_full", "draining", "loading", "engine_dead")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # a Statewise engine is always awake


def registry_of(service: Service) -> CollectorRegistry:
    """All metrics of one server, and of its two processes. Nothing is shared with another server in this process."""
    registry = CollectorRegistry()
    registry.register(ServerMetrics(service))
    ProcessCollector(registry=registry)
    # A dead engine has no process to look at, which the collector takes for one that it may not see.
    ProcessCollector("statewise_engine", lambda: service.engine.pid or 0, registry=registry)
    return registry


class ServerMetrics(Collector):
    """The metrics of a service, made anew whenever they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._model = (service.settings.model_name, "0")

    def collect(self) -> Iterable[Metric]:
        engine = self._service.engine
        totals = carried(engine.past, engine.stats) or _NOTHING
        yield from self._expected(engine.stats or _NOTHING, totals)
        yield from self._engine(engine.stats or _NOTHING, totals)
        yield from self._server()

    # What dashboards expect

    def _expected(self, now: messages.Stats, totals: messages.Stats) -> Iterator[Metric]:
        seen, info = self._service.engine.seen, self._service.engine.info
        yield self._gauge("num_requests_running", "Sequences that run", now.running)
        yield self._gauge("num_requests_waiting", "Sequences that wait for their first step", now.waiting)
        usage = _share(now.records_live, info.num_records if info else 0)
        usage = max(usage, _share(now.pages_live, info.num_pages if info and info.page_bytes else 0))
        yield self._gauge("kv_cache_usage_perc", "The fuller pool, checkpoints not counted", usage)
        if info is not None:
            yield gauge(
                "vllm:cache_config_info",
                "Sizes of the pools",
                ("block_size", "cache_dtype", "enable_prefix_caching", "num_gpu_blocks", "num_records", "engine"),
                {
                    (
                        str(info.page_size),
                        str(info.summary.get("dtype", "")),
                        str(info.prefix_cache),
                        str(info.num_pages),
                        str(info.num_records),
                        "0",
                    ): 1
                },
            )
        states = {(*self._model, state): float(state == "awake") for state in SLEEP_STATES}
        yield gauge("vllm:engine_sleep_state", "Whether the engine is awake", (*_LABELS, "sleep_state"), states)
        yield self._counter("prompt_tokens", "Prompt tokens of requests that have begun", totals.prompt_tokens)
        yield self._counter("generation_tokens", "Generated tokens", totals.generated_tokens)
        yield self._counter("prompt_tokens_cached", "Prompt tokens that needed no forward pass", totals.cached_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens that were looked for", totals.prompt_tokens)
        yield self._counter("prefix_cache_hits", "Prompt tokens that were found there", totals.cached_tokens)
        yield self._counter("num_preemptions", "Sequences that had to make room", totals.preemptions)
        ended = {(*self._model, reason): seen.ended[reason] for reason in REASONS}
        name, text = "vllm:request_success", "Continuations that have ended, by why"
        yield counter(name, text, (*_LABELS, "finished_reason"), ended)
        rejected = {(*self._model, reason): seen.rejections[reason] for reason in REJECTIONS}
        name, text = "vllm:admission_rejections", "Requests that were told to come back, by why"
        yield counter(name, text, (*_LABELS, "reason"), rejected)
        yield self._histogram("time_to_first_token_seconds", "Arrival to first token", seen.first_token)
        yield self._histogram("inter_token_latency_seconds", "One token to the next", seen.inter_token)
        yield self._histogram("request_time_per_output_token_seconds", "Mean behind the first", seen.per_token)
        yield self._histogram("e2e_request_latency_seconds", "Arrival to end", seen.whole)
        yield self._histogram("request_queue_time_seconds", "Arrival to first step", seen.queued)
        yield self._histogram("request_prefill_time_seconds", "First step to first token", seen.prefill)
        yield self._histogram("request_decode_time_seconds", "First token to last", seen.decode)
        yield self._histogram("request_inference_time_seconds", "First step to last token", seen.inference)
        yield self._histogram("request_prompt_tokens", "Prompt tokens of a request", seen.prompt_tokens)
        yield self._histogram("request_generation_tokens", "Generated tokens of a request", seen.generated_tokens)
        yield self._histogram("request_params_n", "Continuations that a request asks for", seen.choices)
        yield self._histogram("request_params_max_tokens", "The most tokens that a request asks for", seen.max_tokens)
        sizes = _tally(STEP_TOKENS, totals.step_sizes, totals.computed_tokens)
        yield self._histogram("iteration_tokens_total", "Tokens of a step, of prompts and generated", sizes)

    # What only Statewise has

    def _engine(self, now: messages.Stats, totals: messages.Stats) -> Iterator[Metric]:
        engine, counts = self._service.engine, totals.counts
        info, there = engine.info, engine.stats is not None
        pools = (
            ("record", info and info.num_records, info and info.record_bytes, now.records_used, now.records_live),
            ("page", info and info.num_pages, info and info.page_bytes, now.pages_used, now.pages_live),
        )
        for name, size, block, used, live in pools:
            free = (size or 0) - used if there else 0
            states = {("running",): live, ("checkpoint",): used - live, ("free",): free}
            yield gauge(f"statewise:{name}s", f"Blocks of the {name} pool, by what holds them", ("state",), states)
            yield plain(f"statewise:{name}s_capacity", f"Blocks of the {name} pool", size or 0)
            held = {state: count * (block or 0) for state, count in states.items()}
            yield gauge(f"statewise:{name}_bytes", f"Bytes of the {name} pool, by what holds them", ("state",), held)
        checkpoints = {(tier,): now.checkpoints.get(tier, 0) for tier in TIERS}
        yield gauge("statewise:checkpoints", "Checkpoints, by every tier that holds them", ("tier",), checkpoints)
        yield plain("statewise:disk_cache_bytes", "Bytes of the disk cache that are used", now.disk_bytes)
        yield plain("statewise:disk_cache_limit_bytes", "The most it may hold", info.disk_bytes if info else 0)

        def count(name: str, text: str, key: str) -> Metric:
            return total(f"statewise:{name}", text, counts.get(key, 0))

        hits = {("cached",): totals.cached_tokens, ("computed",): totals.prompt_tokens - totals.cached_tokens}
        text = "Prompt tokens, by whether a checkpoint had them"
        yield counter("statewise:prompt_tokens_by_source", text, ("source",), hits)
        misses = {(label,): engine.seen.misses[label] for label in (*MISSES.values(), "other")}
        text = "Requests that could not reuse all that their prompt shares, by why"
        yield counter("statewise:cache_misses", text, ("reason",), misses)
        yield count("checkpoints_kept", "Checkpoints taken or brought from elsewhere", "kept")
        yield count("checkpoints_lost", "Checkpoints evicted from the last tier that held them", "lost")
        yield count("checkpoints_lowered", "Copies from the device to host memory", "lowered")
        yield count("checkpoints_raised", "Checkpoints continued from host memory", "raised")
        yield count("checkpoints_stored", "Checkpoints written to the disk", "stored")
        yield count("checkpoints_fetched", "Checkpoints read from the disk", "fetched")
        yield count("disk_errors", "Checkpoints that could not be written", "disk_errors")
        evicted = {(tier,): counts.get(f"evicted_{tier}", 0) for tier in TIERS[:2]}
        yield counter("statewise:evictions", "Checkpoints that left a tier", ("tier",), evicted)
        yield total("statewise:preemptions", "Sequences that had to make room", totals.preemptions)
        failures = {("checkpoint",): counts.get("damaged", 0), ("snapshot",): engine.seen.refused_files}
        text = "Checkpoints and session files that were not what they should be"
        yield counter("statewise:verify_failures", text, ("kind",), failures)
        times = _tally(STEP_S, totals.step_times, totals.step_seconds)
        yield histogram("statewise:step_seconds", "Time of a step", (), {(): times})
        yield total("statewise:computed_tokens", "Tokens that passed the model", totals.computed_tokens)

    def _server(self) -> Iterator[Metric]:
        service, engine = self._service, self._service.engine
        yield gauge("statewise:build_info", "What runs", ("version",), {(__version__,): 1})
        phases = {(phase,): float(engine.phase == phase) for phase in PHASES}
        yield gauge("statewise:engine_phase", "What the engine does", ("phase",), phases)
        yield plain("statewise:engine_beating", "Whether the step loop gives signs of life", engine.beating)
        yield plain("statewise:draining", "Whether the server is ending", service.draining)
        yield total("statewise:engine_restarts", "Engines that were started after one that died", engine.restarts)
        yield plain("statewise:sessions", "Sessions", len(service.sessions))
        yield plain("statewise:streams", "Prompts that are in the engine", engine.streams)
        yield total("statewise:pieces", "Pieces of answers that came from the engine", engine.seen.pieces)
        answers = {(*key[:2], str(key[2])): count for key, count in engine.seen.answers.items()}
        yield counter("statewise:http_requests", "Requests that are over", ("method", "route", "status"), answers)
        seconds = {(route,): tally for route, tally in engine.seen.routes.items()}
        yield histogram("statewise:http_request_seconds", "First byte in to last byte out", ("route",), seconds)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return gauge(f"vllm:{name}", text, _LABELS, {self._model: value})

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return counter(f"vllm:{name}", text, _LABELS, {self._model: value})

    def _histogram(self, name: str, text: str, tally: Tally) -> Metric:
        return histogram(f"vllm:{name}", text, _LABELS, {self._model: tally})


_LABELS = ("model_name", "engine")
_NOTHING = messages.Stats(
    running=0,
    waiting=0,
    steps=0,
    step_seconds=0.0,
    prompt_tokens=0,
    cached_tokens=0,
    generated_tokens=0,
    preemptions=0,
    records_used=0,
    pages_used=0,
    checkpoints={},
    disk_bytes=0,
    counts={},
    step_times=[0] * (len(STEP_S) + 1),
    step_sizes=[0] * (len(STEP_TOKENS) + 1),
)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _tally(bounds: Sequence[float], counts: Sequence[int], total: float) -> Tally:
    tally = Tally(bounds)
    tally.counts, tally.total = list(counts) or tally.counts, total
    return tally
