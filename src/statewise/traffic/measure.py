"""A measurement from its plan to its report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from statewise.traffic.arrivals import Pattern
from statewise.traffic.connection import ConnectionGone
from statewise.traffic.drive import Run, drive
from statewise.traffic.errors import ServerError
from statewise.traffic.probe import model_of, version_of, vocabulary_of
from statewise.traffic.sender import Sender
from statewise.traffic.statistics import Report, summarize
from statewise.traffic.target import Target
from statewise.traffic.workload import Endpoint, Listed, Span, Synthetic, Vocabulary, Workload

Progress = Callable[[float, float | None, str | None], None]


@dataclass(frozen=True)
class Plan:
    """What to send, and how."""

    pattern: Pattern
    prompt_tokens: Span
    output_tokens: Span
    endpoint: Endpoint = "completions"
    model: str | None = None  # None: the first that the server lists
    shared_prefix_tokens: int = 0
    turns: int = 1
    sessions: bool = False
    listed: Listed | None = None  # instead of random prompts
    fields: dict[str, Any] = field(default_factory=dict)  # of every request
    warm_up: int = 1  # requests that do not count
    timeout_s: float = 600.0
    seed: int = 0

    def workload(self, vocabulary: Vocabulary, seed: int) -> Workload:
        return self.listed or Synthetic(
            vocabulary, self.prompt_tokens, self.output_tokens, self.shared_prefix_tokens, self.turns, seed
        )


@dataclass(frozen=True)
class Measurement:
    """A plan carried out."""

    plan: Plan
    url: str
    model: str
    server_version: str | None
    prompts: str  # what they were made of
    began: datetime
    run: Run
    report: Report


def measure(url: str, api_key: str | None, plan: Plan, progress: Progress | None = None) -> Measurement:
    """Measure a server. Raises `ServerError` where that cannot begin; requests that fail later are counted."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_measure(Target(url, api_key), plan, progress))


async def _measure(target: Target, plan: Plan, progress: Progress | None) -> Measurement:
    try:
        model = await model_of(target, plan.model)
        version = await version_of(target)
        # A chat is text, and so is a conversation whose earlier answers are repeated.
        wants_ids = plan.endpoint == "completions" and (plan.turns == 1 or plan.sessions)
        vocabulary = Vocabulary() if plan.listed else await vocabulary_of(target, model, wants_ids)
        if plan.sessions:
            await _check_sessions(target)
        speaker = Sender(target, model, plan.endpoint, plan.fields, plan.sessions, plan.timeout_s)
        if plan.warm_up:
            # Of another seed, so that nothing which counts is remembered from here.
            few = Pattern(concurrency=min(plan.warm_up, plan.pattern.concurrency or 1), requests=plan.warm_up)
            warm = await drive(few, plan.workload(vocabulary, plan.seed + 1), speaker, target.clock)
            for record in warm.records:
                if record.failure is not None:
                    raise ServerError(f"a warm-up request failed ({record.failure.kind}): {record.failure.message}")
        began = datetime.now(UTC)

        def show(done: int, total: int | None) -> None:
            if progress is not None:
                progress(done, total, None)

        workload = plan.workload(vocabulary, plan.seed)
        run = await drive(plan.pattern, workload, speaker, target.clock, plan.seed, show)
    finally:
        target.close()
    if plan.listed:
        prompts = "file"
    else:
        prompts = "words" if vocabulary.ids is None else "token ids"
    return Measurement(plan, target.url, model, version, prompts, began, run, summarize(run))


async def _check_sessions(target: Target) -> None:
    try:
        status, _ = await target.ask("GET", "/v1/sessions/session-none")
        # Statewise tells that this one is missing; another server, that the path is.
        status, body = await target.ask("POST", "/v1/sessions", {}) if status == 404 else (status, b"")
    except (OSError, ConnectionGone) as error:
        raise ServerError(f"the server closed the connection when asked for a session: {error}") from None
    if status not in (200, 201):
        raise ServerError(f"the server has no sessions ({status} from /v1/sessions): leave --sessions out")
    try:
        await target.ask("DELETE", f"/v1/sessions/{msgspec.json.decode(body)['id']}")
    except (msgspec.DecodeError, KeyError, TypeError):
        raise ServerError("the answer of /v1/sessions has no id: leave --sessions out") from None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
