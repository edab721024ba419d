"""Traces: a span for each request, within its caller's trace, without a word of what was said."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from statewise.engine.request import RequestMetrics
from statewise.engine.sampling_params import SamplingParams
from statewise.errors import ConfigError
from statewise.server import messages, tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def request(**headers: str) -> Request:
    state = {"request_id": "req-1", "begun_ns": 1_000}
    found = [(name.encode(), value.encode()) for name, value in headers.items()]
    route = SimpleNamespace(path="/v1/chat/completions")
    return Request({"type": "http", "headers": found, "state": state, "route": route})


def generation(*finished: messages.Finished, prompts: int = 1) -> Any:
    params = SamplingParams(temperature=0.5, max_tokens=9, stop="a secret stop", seed=4)
    return SimpleNamespace(params=params, prompts=[[1, 2, 3]] * prompts, finished=list(finished))


def ended(error: str | None = None) -> messages.Finished:
    metrics = RequestMetrics(3, 5, 2, "evicted", 0, 0.25, 0.5, 1.0, 1.5)
    return messages.Finished(1, metrics, None, error, None, ["stop"])


@pytest.fixture
def spans() -> Any:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = tracing.Tracer("demo", SimpleSpanProcessor(exporter))

    def record(*arguments: Any) -> Any:
        exporter.clear()
        tracer.record(*arguments)
        (span,) = exporter.get_finished_spans()
        return span

    return record


def test_a_span_has_the_attributes_of_generative_ai_and_the_times_of_the_engine(spans: Any) -> None:
    span = spans(request(), generation(ended()))
    assert (span.name, span.kind.name, span.start_time) == ("chat demo", "SERVER", 1_000)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.seed": 4,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.latency.time_in_queue": 0.25,
        "gen_ai.latency.time_to_first_token": 0.5,
        "statewise.cache_miss_reason": "evicted",
        "statewise.request_id": "req-1",
        "http.route": "/v1/chat/completions",
    }
    assert expected.items() <= dict(span.attributes).items()
    assert span.status.is_ok or span.status.is_unset
    assert "secret" not in span.to_json()


def test_a_span_belongs_to_the_trace_that_its_request_names(spans: Any) -> None:
    span = spans(request(traceparent=f"00-{TRACE}-{PARENT}-01"), generation(ended()))
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    for strange in ("", "00-0-0-01", "x" * 5000):
        assert spans(request(traceparent=strange), generation(ended())).parent is None


def test_a_request_that_was_not_finished_is_an_error(spans: Any) -> None:
    for finished in ((), (ended(),), (ended(), ended("it failed"))):
        assert not spans(request(), generation(*finished, prompts=2)).status.is_ok


def test_a_missing_package_and_a_strange_address_are_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("", "localhost:4318", "file:///etc/passwd", "http://"):
        with pytest.raises(ConfigError, match="must be a URL such as"):
            tracing.exporting(address, "demo")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'statewise\[otel\]'"):
        tracing.exporting("http://localhost:4318", "demo")
