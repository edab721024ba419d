"""`POST /v1/responses`: OpenAI's newer API for conversations, without its memory of earlier responses."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from statewise.errors import StatewiseError
from statewise.server import messages, replies
from statewise.server.answers import Content, Part, Reasoning, message
from statewise.server.asking import ChatAsk, asked
from statewise.server.dialect import as_message, whole_calls
from statewise.server.errors import ApiError, as_api_error
from statewise.server.replies import json_bytes, json_response, new_id
from statewise.server.response_output import Event, Output
from statewise.server.response_request import ResponseRequest
from statewise.server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/responses")
    async def responses(body: ResponseRequest, request: Request) -> Response:
        """Answer a conversation, in items."""
        body.check()
        tools = body.chat_tools()
        structure = body.text.format.structure() or body.structure()
        wish = service.dialect.wish(tools, body.chat_tool_choice(), body.parallel_tool_calls, structure)
        conversation = body.conversation_messages()
        ask = await asked(service, request, body, conversation, wish, body.template_arguments)
        reply = _Reply(service, body, ask)
        if body.stream:
            return service.stream(request, ask.generation, reply.stream(), ask.turn, done=b"")
        return json_response(await service.gather(request, ask.generation, reply.whole(), ask.turn))

    return routes


class _Reply:
    """One response, whole or in events."""

    def __init__(self, service: Service, body: ResponseRequest, ask: ChatAsk) -> None:
        self._body, self._ask = body, ask
        self._spell = service.text.token_text
        self._output = Output()
        self._events = 0
        self._response: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": service.settings.model_name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": ask.generation.params.temperature,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs,
            "top_p": ask.generation.params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    async def whole(self) -> dict[str, Any]:
        """Raises as `Generation.batches`."""
        async for _ in self._told():
            pass
        return self._response

    async def stream(self) -> AsyncIterator[bytes]:
        for name in ("response.created", "response.in_progress"):
            yield self._encoded([(name, {"response": self._response})])
        try:
            async for events in self._told():
                yield self._encoded(events)
        except (StatewiseError, ApiError) as error:
            told = as_api_error(error)
            self._response |= {"status": "failed", "error": {"code": told.code or told.type, "message": told.message}}
            yield self._encoded([("response.failed", {"response": self._response})])

    async def _told(self) -> AsyncIterator[list[Event]]:
        """The events between the first and the last."""
        parser, ending = self._ask.new_parser(), None
        parts: list[Part] = []  # all that was told, for the session
        if self._ask.turn is not None:
            self._ask.turn.message = lambda: as_message(whole_calls(message(parts)))
        async for pieces in self._ask.generation.batches():
            events: list[Event] = []
            for piece in pieces:
                new = parser.push(piece.text) if piece.text else []
                if piece.finish_reason is not None:
                    new, ending = [*new, *parser.finish()], piece.finish_reason
                new = self._kept(new)
                if self._ask.turn is not None:
                    parts += new
                events += self._output.take(new, len(piece.token_ids), self._logprobs(piece))
            if events:
                yield events
        yield self._end(ending)

    def _kept(self, parts: list[Part]) -> list[Part]:
        """The parts without calls beyond those that were asked for."""
        if not self._ask.wish.one_call:
            return parts
        return [part for part in parts if isinstance(part, Content | Reasoning) or part.index == 0]

    def _end(self, ending: str | None) -> list[Event]:
        finished = self._ask.generation.finished
        cut = ending == "length"
        status = "incomplete" if cut else "completed"
        events = self._output.close(status)
        counted = replies.usage(finished)
        self._response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output.items,
            "usage": {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": {**counted["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self._output.reasoning_tokens},
                "total_tokens": counted["total_tokens"],
            },
        }
        return [*events, (f"response.{status}", {"response": self._response})]

    def _logprobs(self, piece: messages.Piece) -> list[Any]:
        found = replies.chat_logprobs(piece.logprobs, self._spell) if piece.logprobs else None
        return found["content"] if found else []

    def _encoded(self, events: Sequence[Event]) -> bytes:
        lines = []
        for name, fields in events:
            told = {"type": name, "sequence_number": self._events, **fields}
            lines.append(b"event: " + name.encode() + b"\ndata: " + json_bytes(told) + b"\n\n")
            self._events += 1
        return b"".join(lines)
