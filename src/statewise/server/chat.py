"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from statewise.errors import RequestError
from statewise.server import messages, replies
from statewise.server.generation import Generation
from statewise.server.protocol import ChatRequest
from statewise.server.replies import json_response, new_id
from statewise.server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        turn, n = None, body.n or 1
        conversation = [message.model_dump(exclude_none=True) for message in body.messages]
        if body.session_id is not None:
            turn, prompt = await service.turn(request, body.session_id, n, conversation)
        else:
            tools = None if body.tool_choice == "none" else body.tools
            prompt = await service.text.encode_chat(conversation, tools, body.chat_template_kwargs)
        try:
            service.admit(body.model, 1, n)
            most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
            params = body.sampling(
                service.room([prompt]) if most is None else most,
                service.salt(request, body.cache_salt),
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            )
            reply = _Reply(service, body, service.generate([prompt], params))
        except BaseException:
            if turn is not None:
                turn.end()
            raise
        if body.stream:
            return service.stream(request, reply.generation, reply.events(), turn)
        choices = await service.whole(request, reply.generation, turn)
        return json_response(reply.whole(choices))

    return routes


class _Reply:
    """One answer, whole or in events."""

    def __init__(self, service: Service, body: ChatRequest, generation: Generation) -> None:
        self.service, self.body, self.generation = service, body, generation
        self._head = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    def whole(self, choices: Sequence[messages.Choice]) -> dict[str, Any]:
        listed = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": replies.finish(choice.finish_reason),
                "stop_reason": choice.stop_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "choices": listed, "usage": replies.usage(self.generation.finished)}

    async def events(self) -> AsyncIterator[bytes]:
        self._head["object"] = "chat.completion.chunk"
        for index in range(self.generation.params.n):
            yield self._event([self._choice(index, {"role": "assistant", "content": ""})])
        async for pieces in self.generation.pieces():
            yield self._event(
                [
                    self._choice(piece.index, {"content": piece.text} if piece.text else {}, piece)
                    for piece in pieces
                    if piece.text or piece.finish_reason or piece.logprobs
                ]
            )
        for one in self.generation.finished:
            if one.error is not None:
                raise RequestError("messages", one.error)
        if self.body.include_usage:
            yield replies.sse({**self._head, "choices": [], "usage": replies.usage(self.generation.finished)})

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        if not choices:
            return b""
        more = {"usage": None} if self.body.include_usage else {}
        return replies.sse({**self._head, "choices": choices, **more})

    def _choice(self, index: int, delta: dict[str, Any], piece: messages.Piece | None = None) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(piece.logprobs) if piece else None,
            "finish_reason": replies.finish(piece.finish_reason) if piece else None,
        }

    def _logprobs(self, entries: Sequence[Any] | None) -> dict[str, Any] | None:
        return replies.chat_logprobs(entries, self.service.text.token_text) if entries else None
