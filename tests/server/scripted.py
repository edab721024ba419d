"""The real application over an engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from statewise.engine.request import RequestMetrics, TokenLogprob
from statewise.engine.tokenizer import Tokenizer
from statewise.models.directory import model_directory
from statewise.server import messages
from statewise.server.app import create_app
from statewise.server.channel import BlockingReader, ChannelError, Encoder, Link
from statewise.server.dialect import Dialect
from statewise.server.engine_client import EngineClient
from statewise.server.settings import ServerSettings

Question = messages.Frozen | messages.Pin | messages.Export | messages.Import
Script = Callable[[messages.Generate, int], Sequence[str]]
"""What the engine says to a request as choice so and so: its pieces, or one string to cut into pieces of 3."""


class ScriptedEngine(EngineClient):
    """An `EngineClient` whose other side is a thread with a script."""

    def __init__(
        self, script: Script, finish: str | None = "stop", error: str | None = None, error_field: str | None = None
    ) -> None:
        super().__init__("demo", {})
        self.asked: list[messages.Generate] = []
        self.questions: list[Question] = []
        self.padding = 0  # bytes behind what an exported file holds
        self._script, self._finish = script, finish
        self._error, self._error_field = error, error_field

    async def _run(self) -> None:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, self._link = await loop.create_unix_connection(lambda: Link(messages.FromEngine, self._take), sock=ours)
        threading.Thread(target=self._act, args=(theirs,), daemon=True).start()
        await self._link.lost

    def _act(self, connection: socket.socket) -> None:
        reader, encoder = BlockingReader(connection, messages.ToEngine), Encoder()

        def say(message: Any) -> None:
            connection.sendall(encoder.frame(message))

        say(messages.Loaded(4096, 4096, 8, 8, 1, 1, 64, {}))
        with connection:
            try:
                while not isinstance(message := reader.read(), messages.Close):
                    if isinstance(message, messages.Generate):
                        self.asked.append(message)
                        self._answer(message, say)
                    elif isinstance(message, Question):
                        self.questions.append(message)
                        say(self._told(message))
            except ChannelError:
                pass

    def _told(self, question: Question) -> Any:
        """Every state is kept where its tokens end; a file holds tokens and transcript."""
        match question:
            case messages.Frozen():
                return messages.Points(question.id, [(len(question.token_ids), "device")], 8, 8)
            case messages.Export():
                content = msgspec.msgpack.encode((question.token_ids, question.transcript, bytes(self.padding)))
                Path(question.path).write_bytes(content)
            case messages.Import():
                token_ids, transcript, _ = msgspec.msgpack.decode(Path(question.path).read_bytes())
                return messages.Taken(question.id, token_ids, transcript)
        return messages.Done(question.id)

    def _answer(self, asked: messages.Generate, say: Callable[[Any], None]) -> None:
        made = 0
        for index in range(asked.params.n if asked.params.max_tokens else 0):
            script = self._script(asked, index)
            pieces = [script[at : at + 3] for at in range(0, len(script), 3)] if isinstance(script, str) else script
            for number, text in enumerate(pieces):
                last = number == len(pieces) - 1
                logprobs = [TokenLogprob(5, -0.5, 1, {5: -0.5})] if asked.params.logprobs is not None else None
                piece = messages.Piece(asked.id, index, text, [5], self._finish if last else None, None, logprobs)
                say(messages.Step([piece]))
                made += 1
        metrics = RequestMetrics(prompt_tokens=len(asked.token_ids), completion_tokens=made)
        say(messages.Finished(asked.id, metrics, None, self._error, None, [], self._error_field))


def tokenizer_with(template: str | None = None) -> Tokenizer:
    """The demo model's tokenizer, with another chat template."""
    found = Tokenizer.from_directory(model_directory("demo"))
    assert found is not None
    if template is None:
        return found
    return Tokenizer(found._backend, {"chat_template": template}, found.eos_ids)


@asynccontextmanager
async def scripted(
    script: Script,
    *,
    template: str | None = None,
    family: str | None = None,
    settings: ServerSettings | None = None,
    **ending: str | None,
) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedEngine]]:
    """A client of the application, without its guards. A request's header `x-tenant` says whose it is."""
    engine, tokenizer = ScriptedEngine(script, **ending), tokenizer_with(template)
    app = create_app(engine, tokenizer, settings or ServerSettings("demo"), Dialect(tokenizer, family))
    async with app.router.lifespan_context(app):
        await engine.wait_until_ready()
        transport = httpx.ASGITransport(_with_tenant(app), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client, engine


def _with_tenant(app: ASGIApp) -> ASGIApp:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        tenant = dict(scope["headers"]).get(b"x-tenant")
        scope.setdefault("state", {})["tenant"] = tenant.decode() if tenant else None
        await app(scope, receive, send)

    return call


def data_of(text: str) -> list[Any]:
    """The events of a stream."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
