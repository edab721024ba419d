"""Requests of a conversation, one after the other, and the record of each."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from statewise.traffic.connection import ConnectionGone, Response, Sink
from statewise.traffic.errors import ServerError
from statewise.traffic.record import Failure, Record
from statewise.traffic.stream import MAX_REFUSAL, Stream, StreamError, explain
from statewise.traffic.target import Target
from statewise.traffic.workload import Endpoint, Turn

PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class Refused(Exception):
    """An answer whose status is not 200."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Sender:
    """Sends a conversation's turns to a server."""

    target: Target
    model: str
    endpoint: Endpoint = "completions"
    fields: dict[str, Any] = field(default_factory=dict)  # of every request: sampling and the like
    sessions: bool = False  # the server remembers a conversation; else each turn repeats it
    timeout_s: float = 600.0

    async def converse(self, turns: Sequence[Turn], record: Record, talk: Talk) -> None:
        """Send the turn that `record` is of and fill the record. Never raises but for cancellation."""
        turn = turns[record.turn]
        more = record.turn + 1 < len(turns) and not self.sessions
        stream = Stream(keep_text=more)
        try:
            async with asyncio.timeout(self.timeout_s):
                if self.sessions and talk.session is None:
                    talk.session = await self._begin()
                body = msgspec.json.encode(self._body(turn, talk))
                record.started = self.target.clock()
                await self._send(body, stream)
            if not stream.complete and stream.finish_reason is None:
                raise StreamError("cut short", "the stream ended without a finish reason")
        except Exception as error:
            record.failure = failure(error, self.timeout_s)
        record.started = record.started or self.target.clock()
        record.ended = self.target.clock() if stream.ended is None else stream.ended
        record.times, record.finish_reason = stream.times, stream.finish_reason
        if stream.usage is not None:
            record.counted = True
            record.prompt_tokens = stream.usage.prompt_tokens
            record.completion_tokens = stream.usage.completion_tokens
            record.cached_tokens = stream.usage.cached_tokens
        else:
            record.completion_tokens = len(stream.times)
        if more:
            talk.add(turn, "".join(stream.text or ()))

    async def end(self, talk: Talk) -> None:
        """Have the server forget a conversation, as far as that works."""
        if talk.session is not None:
            try:
                async with asyncio.timeout(self.timeout_s):
                    await self.target.ask("DELETE", f"/v1/sessions/{talk.session}")
            except (OSError, ConnectionGone, TimeoutError):
                pass

    async def _begin(self) -> str:
        status, body = await self.target.ask("POST", "/v1/sessions", {})
        if status not in (200, 201):
            raise Refused(status, *explain(body))
        try:
            return str(msgspec.json.decode(body)["id"])
        except (msgspec.DecodeError, KeyError, TypeError):
            raise StreamError("bad answer", "the answer of /v1/sessions has no id") from None

    def _body(self, turn: Turn, talk: Talk) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }
        if turn.max_tokens is not None:
            body["max_tokens"] = turn.max_tokens
        if talk.session is not None:
            body["session_id"] = talk.session
        if self.endpoint == "chat":
            body["messages"] = talk.messages + _messages(turn)
        elif talk.text:
            body["prompt"] = f"{talk.text} {turn.content}"
        else:
            body["prompt"] = turn.content
        return body

    async def _send(self, body: bytes, stream: Stream) -> None:
        refusal: list[bytes] = []

        def sink(response: Response) -> Sink:
            if response.status == 200 and "event-stream" in response.headers.get("content-type", ""):
                return stream.take
            return lambda _, piece: refusal.append(piece) if sum(map(len, refusal)) < MAX_REFUSAL else None

        response = await self.target.send("POST", PATHS[self.endpoint], body, sink)
        if response.status != 200:
            raise Refused(response.status, *explain(b"".join(refusal)))
        if refusal or "event-stream" not in response.headers.get("content-type", ""):
            raise StreamError("no stream", "the answer is no stream of events, although one was asked for")


@dataclass
class Talk:
    """What a conversation's next turn stands on."""

    session: str | None = None  # the server's name for it
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""

    def add(self, turn: Turn, answer: str) -> None:
        self.messages += [*_messages(turn), {"role": "assistant", "content": answer}]
        self.text = f"{self.text} {turn.content}{answer}" if self.text else f"{turn.content}{answer}"


def _messages(turn: Turn) -> list[dict[str, Any]]:
    if isinstance(turn.content, list):
        return [one for one in turn.content if isinstance(one, dict)]
    return [{"role": "user", "content": turn.content}]


def failure(error: Exception, timeout_s: float) -> Failure:
    """Why a request failed, for counting and for reading."""
    match error:
        case Refused():
            return Failure(f"status {error.status}{f' {error.code}' if error.code else ''}", str(error))
        case StreamError():
            return Failure(error.kind, str(error))
        case ConnectionGone():
            return Failure("connection lost", str(error))
        case TimeoutError():
            return Failure("timeout", f"no complete answer within {timeout_s:g} seconds")
        case ssl.SSLError():
            return Failure("TLS", f"the TLS connection failed: {getattr(error, 'reason', None) or error}")
        case OSError():
            return Failure("no connection", f"no connection: {error.strerror or error}")
        case ServerError():
            return Failure("server", str(error))
    return Failure(type(error).__name__, str(error) or "no reason given")
