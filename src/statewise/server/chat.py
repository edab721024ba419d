"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from statewise.engine.request import TokenLogprob
from statewise.server import messages, replies
from statewise.server.answers import AnswerParser, Content, Part, Reasoning, ToolCallBegin, message, parse
from statewise.server.asking import ChatAsk, asked
from statewise.server.dialect import as_message, is_whole, whole_calls
from statewise.server.protocol import ChatRequest, as_spoken
from statewise.server.replies import ChunkEncoder, json_response, new_id
from statewise.server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        wish = service.dialect.wish(body.tools, body.tool_choice, body.parallel_tool_calls, body.structure())
        conversation = as_spoken(body.messages)
        ask = await asked(service, request, body, conversation, wish, body.template_arguments)
        reply = _Reply(service, body, ask)
        if body.stream:
            return service.stream(request, ask.generation, reply.events(), ask.turn)
        return json_response(await service.gather(request, ask.generation, reply.whole(), ask.turn))

    return routes


class _Reply:
    """One answer, whole or in events."""

    def __init__(self, service: Service, body: ChatRequest, ask: ChatAsk) -> None:
        self.body, self.generation, self._ask = body, ask.generation, ask
        self._spell = service.text.token_text
        self._head = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """Raises as `Generation.batches`."""
        listed = []
        for index, choice in enumerate(await self.generation.complete()):
            answer = self._ask.one_call(parse(self._ask.new_parser(), choice.text))
            if self._ask.turn is not None:
                self._ask.turn.message = partial(as_message, answer)
            listed.append(
                {
                    "index": index,
                    "message": as_message(answer),
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": replies.finish(choice.finish_reason, bool(answer.tool_calls)),
                    "stop_reason": choice.stop_reason,
                }
            )
        return {**self._head, "choices": listed, "usage": replies.usage(self.generation.finished)}

    async def events(self) -> AsyncIterator[bytes]:
        self._head["object"] = "chat.completion.chunk"
        encoder = ChunkEncoder(self._head, _plain, include_usage=self.body.include_usage)
        streams = [_ChoiceStream(index, self._ask, self._logprobs) for index in range(self.generation.params.n)]
        if self._ask.turn is not None:
            self._ask.turn.message = streams[0].message
        yield encoder.event(*(one.choice({"role": "assistant", "content": ""}) for one in streams))
        async for pieces in self.generation.batches():
            events = []
            for piece in pieces:
                stream = streams[piece.index]
                if stream.plain and piece.finish_reason is None and piece.logprobs is None:
                    if piece.text:
                        events.append(encoder.text(piece.index, piece.text))
                elif choice := stream.take(piece):
                    events.append(encoder.event(choice))
            yield b"".join(events)
        if self.body.include_usage:
            yield encoder.usage(self.generation.finished)

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        return replies.chat_logprobs(entries, self._spell) if entries else None


class _ChoiceStream:
    """One choice on its way out: pieces of text in, the choices of events out."""

    def __init__(
        self, index: int, ask: ChatAsk, logprobs: Callable[[Sequence[TokenLogprob] | None], dict[str, Any] | None]
    ) -> None:
        self._index, self._one_call = index, ask.wish.one_call
        self._parser: AnswerParser = ask.new_parser()
        self._logprobs = logprobs
        self._parts: list[Part] | None = None if ask.turn is None else []  # all that was told, for the session
        self._arguments: list[str] | None = None  # of the last call

    @property
    def plain(self) -> bool:
        """Whether all that follows is content, of which nobody keeps an account."""
        return self._parts is None and bool(getattr(self._parser, "plain", False))

    def message(self) -> dict[str, Any]:
        """What was told so far."""
        return as_message(whole_calls(message(self._parts or ())))

    def take(self, piece: messages.Piece) -> dict[str, Any] | None:
        """What a piece tells the client, if anything."""
        parts = self._parser.push(piece.text) if piece.text else []
        if piece.finish_reason is not None:
            parts += self._parser.finish()
        delta = self._delta(parts)
        if not delta and piece.finish_reason is None and piece.logprobs is None:
            return None
        finish = replies.finish(piece.finish_reason, self._ends_with_call())
        return self.choice(delta, finish, self._logprobs(piece.logprobs), piece.stop_reason)

    def choice(
        self,
        delta: Mapping[str, Any],
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
        stop_reason: int | str | None = None,
    ) -> dict[str, Any]:
        told: dict[str, Any] = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if stop_reason is not None:
            told["stop_reason"] = stop_reason
        return told

    def _ends_with_call(self) -> bool:
        return self._arguments is not None and is_whole("".join(self._arguments))

    def _delta(self, parts: Sequence[Part]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, Content | Reasoning) and part.index and self._one_call:
                continue
            if self._parts is not None:
                self._parts.append(part)
            if isinstance(part, Content):
                delta["content"] = delta.get("content", "") + part.text
            elif isinstance(part, Reasoning):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + part.text
            else:
                calls = delta.setdefault("tool_calls", [])
                if isinstance(part, ToolCallBegin):
                    self._arguments = []
                    function = {"name": part.name, "arguments": ""}
                    calls.append({"index": part.index, "id": part.id, "type": "function", "function": function})
                    continue
                if self._arguments is not None:
                    self._arguments.append(part.text)
                if calls and calls[-1]["index"] == part.index:
                    calls[-1]["function"]["arguments"] += part.text
                else:
                    calls.append({"index": part.index, "function": {"arguments": part.text}})
        return delta


def _plain(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
