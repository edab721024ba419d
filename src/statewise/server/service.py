"""What all routes share: the engine, the text side, and the rules for letting a request in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from statewise.api.conversation import Content
from statewise.engine.sampling_params import SamplingParams
from statewise.errors import RequestError, StatewiseError
from statewise.server import messages
from statewise.server.dialect import Dialect
from statewise.server.engine_client import EngineClient
from statewise.server.errors import ApiError, sse_error
from statewise.server.event_stream import EventStream
from statewise.server.generation import Generation, unless_gone
from statewise.server.keys import salt_of
from statewise.server.replies import DONE
from statewise.server.session_store import Sessions
from statewise.server.session_turn import Turn
from statewise.server.settings import ServerSettings
from statewise.server.text import TextSide, too_long
from statewise.server.tracing import Tracer

Result = TypeVar("Result")
logger = logging.getLogger(__name__)
LOADING_S = 5.0  # to come back after, while the model is loaded


class Service:
    """One served model."""

    def __init__(self, engine: EngineClient, text: TextSide, dialect: Dialect, settings: ServerSettings) -> None:
        self.engine = engine
        self.text = text
        self.dialect = dialect
        self.settings = settings
        self.sessions = Sessions(self)
        self.tracer: Tracer | None = None
        self.draining = False
        self.started = int(time.time())

    def check_model(self, model: str | None) -> None:
        if model not in (None, "", self.settings.model_name):
            raise ApiError.model_not_found(model or "")

    def admit(self, model: str | None, prompts: int, n: int) -> None:
        """Raise the error that keeps a request out: another model, too much at once, no engine, no room."""
        self.check_model(model)
        if prompts * n > self.settings.max_choices:
            raise RequestError(
                "n", f"the request asks for {prompts * n} choices, at most {self.settings.max_choices} are given"
            )
        self._check_room(prompts)

    def _check_room(self, prompts: int) -> None:
        if self.draining:
            raise self._rejected("draining", ApiError.overloaded(self.settings.drain_seconds))
        if self.engine.phase == "loading":
            raise self._rejected("loading", ApiError.overloaded(LOADING_S))
        if self.engine.phase != "ready":
            raise self._rejected("engine_dead", ApiError.engine_dead())
        if self.engine.streams + prompts > self.settings.max_queued:
            raise self._rejected("queue_full", ApiError.overloaded(self.settings.retry_after_s))

    def _rejected(self, reason: str, error: ApiError) -> ApiError:
        self.engine.seen.rejections[reason] += 1
        return error

    def salt(self, request: Request, asked: str | None) -> str | None:
        """Whose remembered prompts a request shares: a key's own, divided further by the salt that it asks for."""
        return salt_of(request.scope.get("state", {}).get("tenant"), asked)

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> Generation:
        """Queue prompts, or none of them.

        Raises `RequestError` for one that is too long, and `ApiError` where others have taken the room since `admit`.
        """
        self._check_room(len(prompts))
        info = self.engine.info
        limit = info.max_length if info else 0
        for prompt in prompts:
            room = limit - len(prompt)
            if info and room < (1 if params.max_tokens else 0):
                raise too_long(limit, len(prompt))
        return Generation(self.engine, prompts, params)

    async def turn(
        self,
        request: Request,
        name: str,
        n: int,
        content: Content | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> tuple[Turn, list[int]]:
        """A request in a session, and its prompt. `tools` and `arguments` go to the chat template."""
        if n != 1:
            raise RequestError("n", f"a session has one continuation; fork it for {n}")
        turn = Turn(self.sessions.find(request, name))
        return turn, await turn.begin(self.sessions, content, tools, arguments)

    async def whole(self, request: Request, generation: Generation, turn: Turn | None = None) -> list[messages.Choice]:
        """All choices; the prompts end when the client leaves. Raises `ClientGone`."""
        return await self.gather(request, generation, generation.complete(), turn)

    async def gather(
        self, request: Request, generation: Generation, work: Coroutine[Any, Any, Result], turn: Turn | None = None
    ) -> Result:
        """What `work` makes of a generation; both end when the client leaves. Raises `ClientGone`."""
        generation.turn = turn
        try:
            return await unless_gone(request, asyncio.create_task(work))
        finally:
            self._end(request, generation)

    def stream(
        self,
        request: Request,
        generation: Generation,
        events: AsyncIterator[bytes],
        turn: Turn | None = None,
        done: bytes = DONE,
    ) -> EventStream:
        """Server-sent events, and `done` behind them. An error behind the first event becomes an event itself."""
        generation.turn = turn

        async def body() -> AsyncGenerator[bytes, None]:
            try:
                async for event in events:
                    yield event
            except Exception as error:
                if not isinstance(error, StatewiseError | ApiError):
                    logger.exception("a stream failed")
                yield sse_error(error, request.scope.get("state", {}).get("request_id"))
            yield done

        return EventStream(body(), lambda: self._end(request, generation))

    def _end(self, request: Request, generation: Generation) -> None:
        generation.close()
        if generation.turn is not None:
            generation.turn.end()
        self._note(request, generation.finished)
        if self.tracer is not None:
            self.tracer.record(request, generation)

    def _note(self, request: Request, finished: Sequence[messages.Finished]) -> None:
        """Leave the request's token counts for the access log and the metrics."""
        state = request.scope.setdefault("state", {})
        state["prompt_tokens"] = sum(one.metrics.prompt_tokens for one in finished)
        state["completion_tokens"] = sum(one.metrics.completion_tokens for one in finished)
        state["cached_tokens"] = sum(one.metrics.cached_tokens for one in finished)

    def room(self, prompts: Sequence[list[int]]) -> int:
        """The most tokens that an answer to any of the prompts can have."""
        info = self.engine.info
        return max(1, (info.max_length if info else 1) - min(map(len, prompts)))
