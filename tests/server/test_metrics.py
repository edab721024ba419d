"""`/metrics`: the names that dashboards know, numbers that never go back, and labels that nobody can multiply."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from statewise.engine.request import RequestMetrics
from statewise.engine.sampling_params import SamplingParams
from statewise.server import messages, metrics
from statewise.server.app import create_app
from statewise.server.engine_client import EngineClient
from statewise.server.errors import ApiError
from statewise.server.guards.stack import GuardSettings, guarded
from statewise.server.inbox import Inbox, Stream
from statewise.server.metrics_tally import FIRST_TOKEN_S, REQUEST_S, STEP_S, STEP_TOKENS, TOKEN_S, Tally, carried
from statewise.server.service import Service
from statewise.server.settings import ServerSettings
from tests.server.figures import Figures, figures, value

EXPECTED = {
    "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info engine_sleep_state",
    "counter": (
        "prompt_tokens generation_tokens request_success num_preemptions prefix_cache_queries prefix_cache_hits "
        "prompt_tokens_cached admission_rejections"
    ),
    "histogram": (
        "time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds "
        "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds "
        "request_decode_time_seconds request_inference_time_seconds request_prompt_tokens request_generation_tokens "
        "request_params_n request_params_max_tokens iteration_tokens_total"
    ),
}
INFO = messages.Loaded(
    max_length=100,
    vocab_size=10,
    num_records=8,
    num_pages=100,
    record_bytes=1000,
    page_bytes=10,
    page_size=16,
    summary={"dtype": "float32"},
)


def stats(**changes: Any) -> messages.Stats:
    lists = {"step_times": [0] * (len(STEP_S) + 1), "step_sizes": [0] * (len(STEP_TOKENS) + 1)}
    return msgspec.structs.replace(metrics._NOTHING, **lists, **changes)


def service() -> Service:
    """Of an engine that is not started and seems ready."""
    engine = EngineClient("demo", {})
    engine.info, engine.phase, engine.stats = INFO, "ready", stats()
    found: Service = create_app(engine, None, ServerSettings(model_name="demo")).state.service
    return found


def scraped(of: Service) -> Figures:
    return figures(generate_latest(metrics.registry_of(of)).decode())


def finished(**changes: Any) -> messages.Finished:
    metrics = RequestMetrics(prompt_tokens=20, completion_tokens=5, queue_s=0.5, time_to_first_token_s=2.0)
    metrics.decode_s, metrics.total_s = 1.0, 3.0
    for name in [name for name in changes if hasattr(metrics, name)]:
        setattr(metrics, name, changes.pop(name))
    return messages.Finished(1, metrics, None, None, None, **changes)


def test_all_names_that_dashboards_expect_are_there_with_their_labels() -> None:
    text = generate_latest(metrics.registry_of(service())).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for kind, names in EXPECTED.items():
        for name in names.split():
            family = families[f"vllm:{name}"]
            assert family.type == kind, name
            labels = set(family.samples[0].labels)
            assert "engine" in labels and (name == "cache_config_info" or "model_name" in labels), name
    success = {sample.labels["finished_reason"] for sample in families["vllm:request_success"].samples}
    assert success == {"stop", "length", "abort", "error"}
    assert generate_openmetrics(metrics.registry_of(service())).endswith(b"# EOF\n")


def test_buckets_are_those_that_dashboards_expect_with_shorter_ones_between_tokens() -> None:
    assert FIRST_TOKEN_S[:6] == (0.001, 0.005, 0.01, 0.02, 0.04, 0.06) and FIRST_TOKEN_S[-2:] == (640, 2560)
    assert REQUEST_S[:3] == (0.3, 0.5, 0.8) and REQUEST_S[-1] == 7680
    assert [bound for bound in TOKEN_S if bound >= 0.01][:3] == [0.01, 0.025, 0.05] and min(TOKEN_S) < 0.001
    for bounds in (FIRST_TOKEN_S, REQUEST_S, TOKEN_S, STEP_S, STEP_TOKENS):
        assert list(bounds) == sorted(set(bounds))


def test_a_value_counts_in_the_first_bucket_that_is_not_below_it() -> None:
    tally = Tally((1.0, 2.0))
    for number, count in ((1.0, 2), (1.5, 1), (9.0, 3)):
        tally.add(number, count)
    assert (tally.counts, tally.total) == ([2, 1, 3], 30.5)


def test_two_servers_in_a_process_count_apart() -> None:
    one, other = service(), service()
    one.engine.seen.finished(finished(reasons=["stop"]))
    both = [value(scraped(of), "vllm:request_success_total", finished_reason="stop") for of in (one, other)]
    assert both == [1, 0]


def test_a_finished_request_is_divided_into_its_times() -> None:
    of = service()
    of.engine.seen.finished(finished(reasons=["stop"], cache_miss_reason="evicted"))
    of.engine.seen.finished(finished(reasons=["abort"], queue_s=None, time_to_first_token_s=None, decode_s=None))
    found = scraped(of)
    sums = {
        "time_to_first_token_seconds": 2.0,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 1.5,
        "request_decode_time_seconds": 1.0,
        "request_inference_time_seconds": 2.5,
        "request_time_per_output_token_seconds": 0.25,
    }
    for name, expected in sums.items():
        assert value(found, f"vllm:{name}_sum") == expected, name
        assert value(found, f"vllm:{name}_count") == 1, name
    assert value(found, "vllm:e2e_request_latency_seconds_count") == 2
    assert value(found, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(found, "statewise:cache_misses_total", reason="evicted") == 1


def test_a_reason_that_nobody_foresaw_makes_no_label() -> None:
    of = service()
    before = len(scraped(of))
    for number in range(100):
        of.engine.seen.finished(finished(cache_miss_reason=f"because of {number}"))
    found = scraped(of)
    assert value(found, "statewise:cache_misses_total", reason="other") == 100
    assert len(found) == before


def test_the_time_between_tokens_is_that_of_the_engines_steps() -> None:
    of = service()
    engine = of.engine
    engine._streams = {number: Stream(number, Inbox(), 0, lambda _: None) for number in range(3)}

    def step(at: float, *ids: int) -> None:
        engine._distribute(messages.Step([messages.Piece(i, 0, "a", [1], None, None, None) for i in ids], at=at))

    step(10.0, 0, 1)  # the first tokens have no time
    step(10.25, 0, 1, 2)
    step(11.25, 0, 2)
    step(11.5, 1, 7)  # 7 has left
    found = scraped(of)
    assert value(found, "statewise:pieces_total") == 8
    assert value(found, "vllm:inter_token_latency_seconds_count") == 5
    assert value(found, "vllm:inter_token_latency_seconds_sum") == 0.25 * 2 + 1.0 * 2 + 1.25
    buckets = [v for (name, _), v in found.items() if name == "vllm:inter_token_latency_seconds_bucket"]
    assert buckets == sorted(buckets) and buckets[-1] == 5


def test_counters_go_on_over_the_lives_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    of = service()
    engine = EngineClient("demo", {}, restart=True)
    of.engine = engine
    seen: list[Figures] = []

    async def life() -> bool:
        engine.info, engine.phase = INFO, "ready"
        for steps in (1, 2):
            sizes = [steps] + [0] * len(STEP_TOKENS)
            counts = {"kept": steps, "damaged": 0}
            engine.stats = stats(steps=steps, prompt_tokens=10 * steps, running=1, counts=counts)
            engine.stats.step_sizes = sizes
            seen.append(scraped(of))
        if engine.restarts == 2:
            engine.phase = "closed"
        return True

    monkeypatch.setattr(engine, "_run", life)
    asyncio.run(engine._watch())
    seen.append(scraped(of))
    counted = [value(found, "vllm:prompt_tokens_total") for found in seen]
    assert counted == [10, 20, 30, 40, 50, 60, 60]
    assert [value(found, "vllm:iteration_tokens_total_count") for found in seen] == [1, 2, 3, 4, 5, 6, 6]
    assert [value(found, "statewise:checkpoints_kept_total") for found in seen] == [1, 2, 3, 4, 5, 6, 6]
    assert value(seen[-1], "vllm:num_requests_running") == 0
    assert value(seen[-1], "statewise:engine_restarts_total") == 2
    assert carried(None, None) is None


def test_pools_are_divided_by_what_holds_their_blocks() -> None:
    of = service()
    of.engine.stats = stats(records_used=6, records_live=2, pages_used=90, pages_live=50, checkpoints={"device": 4})
    found = scraped(of)
    assert [value(found, "statewise:records", state=s) for s in ("running", "checkpoint", "free")] == [2, 4, 2]
    assert [value(found, "statewise:page_bytes", state=s) for s in ("running", "checkpoint", "free")] == [500, 400, 100]
    assert value(found, "vllm:kv_cache_usage_perc") == 0.5  # what checkpoints hold is to be had
    assert [value(found, "statewise:checkpoints", tier=t) for t in ("device", "host", "disk")] == [4, 0, 0]


def test_who_is_kept_out_is_counted() -> None:
    of = service()
    for reason in ("loading", "dead", "ready"):
        of.engine.phase = reason  # type: ignore[assignment]
        of.draining = reason == "ready"
        with pytest.raises(ApiError):
            of.admit("demo", 1, 1)
    found = scraped(of)
    counts = [value(found, "vllm:admission_rejections_total", reason=r) for r in metrics.REJECTIONS]
    assert dict(zip(metrics.REJECTIONS, counts)) == {"queue_full": 0, "draining": 1, "loading": 1, "engine_dead": 1}


@pytest.mark.parametrize("phase", ["loading", "dead", "ready"])
def test_metrics_are_answered_whatever_the_engine_does_and_routes_are_templates(phase: Any) -> None:
    of = service()
    of.engine.phase = phase
    if phase == "loading":
        of.engine.info = of.engine.stats = None
    app = create_app(of.engine, None, of.settings)
    client = TestClient(guarded(app, GuardSettings(observe=of.engine.seen.answered)), "http://127.0.0.1")
    assert client.head("/metrics").status_code == 200
    assert client.head("/metrics").content == b""
    for path in ("/v1/sessions/a", "/v1/sessions/b", "/nowhere", "/nowhere/else"):
        assert client.get(path).status_code == 404
    client.request("BREW", "/metrics")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = figures(answer.text)
    counted = {tuple(dict(own).values()): v for (n, own), v in found.items() if n == "statewise:http_requests_total"}
    assert counted.pop(("other", "/metrics", "405"), None) or counted.pop(("other", "unmatched", "405"))
    assert counted == {
        ("HEAD", "/metrics", "200"): 2,
        ("GET", "/v1/sessions/{name}", "404"): 2,
        ("GET", "unmatched", "404"): 2,
    }
    assert value(found, "statewise:engine_phase", phase=phase) == 1
    openmetrics = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")


def test_a_finished_request_and_what_was_asked_for_are_counted_where_it_was_sent() -> None:
    engine = service().engine
    engine._send = lambda _: None  # type: ignore[method-assign]
    engine.generate([1], SamplingParams(n=2, max_tokens=7), Inbox())
    assert (engine.seen.choices.total, engine.seen.max_tokens.total) == (2, 7)
