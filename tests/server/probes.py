"""An application to guard, and a client that can say what no honest client does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message

from statewise.errors import RequestError
from statewise.server import errors

SECRET = "/srv/models/secret.bin at 0x7f3a5c"  # what a traceback may hold and an answer must not
KEY = "sk-correct-horse-battery"
SLOW_S = 1.0  # no request of a test may take longer
JSON = (b"content-type", b"application/json")
LOCAL = (b"host", b"localhost:8000")
BEARER = (b"authorization", b"Bearer " + KEY.encode())


class ChatMessage(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    messages: list[ChatMessage]
    temperature: float = Field(1.0, ge=0, le=2)
    extra: Any = None


def application() -> FastAPI:
    """Routes of each kind that a guard has to do with."""
    app = FastAPI()
    errors.install(app)

    @app.get("/health")
    @app.get("/")
    @app.get("/v1/models")
    @app.get("/metrics")
    async def nothing() -> dict[str, str]:
        return {}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> dict[str, Any]:
        request.state.prompt_tokens, request.state.completion_tokens, request.state.cached_tokens = 12, 5, 3
        return {"count": len(body.messages), "tenant": request.state.tenant}

    @app.post("/v1/sessions/{name}")
    async def raw(name: str, request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.get("/fails")
    async def fails() -> None:
        raise RuntimeError(SECRET)

    @app.get("/fails/late")
    async def fails_late() -> StreamingResponse:
        async def events() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            raise RuntimeError(SECRET)

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/refuses")
    async def refuses() -> None:
        raise RequestError("prompt", "This model's maximum context length is 8 tokens. However, \ud800 is too long.")

    return app


@dataclass
class Answer:
    """What came back. `status` is 0 where nothing did."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    taken: int = 0  # bytes of the body that were asked for

    @property
    def error(self) -> dict[str, Any]:
        """The error of the body, which must have OpenAI's shape."""
        error: dict[str, Any] = msgspec.json.decode(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def scope_of(
    method: str = "GET",
    path: str = "/v1/models",
    headers: Iterable[tuple[bytes, bytes]] = (LOCAL,),
    query: bytes = b"",
    **more: Any,
) -> dict[str, Any]:
    """A request as an ASGI server describes it."""
    raw_path = path.encode("utf-8", "surrogateescape")
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    return scope | {
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": raw_path,
        "root_path": "",
        "query_string": query,
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "state": {},
        **more,
    }


async def ask(app: ASGIApp, scope: dict[str, Any], pieces: Iterable[bytes] = (b"",)) -> Answer:
    """Send a request whose body comes in pieces, and disconnect behind it, as a client that has its answer does."""
    answer = Answer()
    body: Iterator[tuple[bytes, bool]] = _with_last(pieces)
    done = asyncio.Event()

    async def receive() -> Message:
        await asyncio.sleep(0)
        for piece, last in body:
            answer.taken += len(piece)
            return {"type": "http.request", "body": piece, "more_body": not last}
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert answer.status == 0, "a response begins once"
            answer.status = message["status"]
            answer.headers = {name.decode().lower(): value.decode("latin-1") for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            assert answer.status and not answer.complete
            answer.body += message.get("body", b"")
            answer.complete = not message.get("more_body", False)
            if answer.complete:
                done.set()

    start = time.perf_counter()
    await asyncio.wait_for(app(scope, receive, send), 10)
    assert time.perf_counter() - start < SLOW_S
    return answer


def asked(app: ASGIApp, *args: Any, pieces: Iterable[bytes] = (b"",), **scope: Any) -> Answer:
    """`ask` from outside of an event loop."""
    return asyncio.run(ask(app, scope_of(*args, **scope), pieces))


def _with_last(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    waiting = None
    for piece in pieces:
        if waiting is not None:
            yield waiting, False
        waiting = piece
    if waiting is not None:
        yield waiting, True
