"""Traces for OpenTelemetry: a span for each request that reached the engine, with the attributes of generative AI.

The packages are optional and imported when tracing is asked for. Spans hold counts, times and parameters, no text.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.requests import Request

from statewise import __version__
from statewise.errors import ConfigError
from statewise.server.generation import Generation

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

NANOSECONDS = 1_000_000_000
TRACES = "/v1/traces"
OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat", "/v1/responses": "chat"}
MISSING = "--otlp-endpoint needs the packages of OpenTelemetry: pip install 'statewise[otel]'"


def exporting(endpoint: str, model: str) -> Tracer:
    """A tracer that sends spans to an OTLP collector over HTTP. Without a path, `/v1/traces` is meant.

    Raises `ConfigError` for what is no URL, and where a package is missing.
    """
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError("--otlp-endpoint must be a URL such as http://localhost:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(MISSING) from None
    whole = endpoint if url.path.strip("/") else endpoint.rstrip("/") + TRACES
    return Tracer(model, BatchSpanProcessor(OTLPSpanExporter(whole)))


class Tracer:
    """Makes the spans of one server and hands them to a processor."""

    def __init__(self, model: str, processor: SpanProcessor) -> None:
        """Raises `ConfigError` where a package is missing."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError(MISSING) from None
        self._model = model
        resource = Resource.create({"service.name": "statewise", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # nothing global
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("statewise.server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: Request, generation: Generation) -> None:
        """The span of a request that is over, within the trace that its `traceparent` names."""
        from opentelemetry.trace import SpanKind, StatusCode

        end = time.time_ns()
        finished, state = generation.finished, request.scope.get("state", {})
        longest = max((one.metrics.total_s or 0.0 for one in finished), default=0.0)
        begun = state.get("begun_ns", end - int(longest * NANOSECONDS))
        route = getattr(request.scope.get("route"), "path", "")
        operation = OPERATIONS.get(route, "text_completion")
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._propagator.extract(dict(request.headers)),
            kind=SpanKind.SERVER,
            attributes=self._attributes(operation, generation) | _named(route, state),
            start_time=begun,
        )
        if len(finished) < len(generation.prompts) or any(one.error is not None for one in finished):
            span.set_status(StatusCode.ERROR, "the request was not finished")
            span.set_attribute("error.type", "unfinished" if len(finished) < len(generation.prompts) else "engine")
        span.end(end)

    def _attributes(self, operation: str, generation: Generation) -> dict[str, Any]:
        params, finished = generation.params, generation.finished
        metrics = [one.metrics for one in finished]
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "statewise",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.top_p": float(params.top_p),
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.presence_penalty": float(params.presence_penalty),
            "gen_ai.request.frequency_penalty": float(params.frequency_penalty),
            "gen_ai.request.choice.count": params.n,
            "gen_ai.request.seed": params.seed,
            "gen_ai.response.finish_reasons": [reason for one in finished for reason in one.reasons],
            "gen_ai.usage.input_tokens": sum(map(len, generation.prompts)),
            "gen_ai.usage.output_tokens": sum(one.completion_tokens for one in metrics),
            "gen_ai.usage.cache_read.input_tokens": sum(one.cached_tokens for one in metrics),
            "statewise.preemptions": sum(one.preemptions for one in metrics),
            "gen_ai.latency.time_in_queue": _most([one.queue_s for one in metrics]),
            "gen_ai.latency.time_to_first_token": _most([one.time_to_first_token_s for one in metrics]),
            "gen_ai.latency.e2e": _most([one.total_s for one in metrics]),
            "statewise.cache_miss_reason": next((one.cache_miss_reason for one in metrics), None),
        }
        return {name: value for name, value in attributes.items() if value is not None}

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _named(route: str, state: dict[str, Any]) -> dict[str, Any]:
    found = {"http.route": route or None, "statewise.request_id": state.get("request_id")}
    return {name: value for name, value in found.items() if value is not None}


def _most(seconds: list[float | None]) -> float | None:
    """Of the prompts of one request."""
    return max((one for one in seconds if one is not None), default=None)
