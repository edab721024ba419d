"""Sessions over HTTP: `/v1/sessions` and what hangs below.

A session is a `Conversation` here and checkpoints in the engine, found by its tokens. So it outlives an engine that is
started again, at the price of computing what was not kept.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response

from statewise.api.conversation import Content, Conversation
from statewise.engine.sampling_params import SamplingParams
from statewise.errors import RequestError
from statewise.memory.snapshot_transcript import decode_transcript, encode_transcript
from statewise.server import messages
from statewise.server.errors import ApiError
from statewise.server.protocol import Message, Text, TokenIds
from statewise.server.replies import json_response

if TYPE_CHECKING:
    from statewise.server.service import Service

logger = logging.getLogger(__name__)
IMPORT = "/v1/sessions/import"
IMPORTS = 2  # at once: each is a file on the disk


@dataclass
class ServerSession:
    """One session and who may use it."""

    id: str
    tenant: str | None
    talk: Conversation
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    used: float = field(default_factory=time.monotonic)
    busy: bool = False


class Sessions:
    """All sessions of a server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._sessions: dict[str, ServerSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, tenant: str | None) -> list[ServerSession]:
        return [one for one in self._sessions.values() if one.tenant == tenant]

    def add(self, tenant: str | None, talk: Conversation, parent: str | None = None) -> ServerSession:
        """A new session. Raises where there are too many; those unused for long go first."""
        settings, now = self._service.settings, time.monotonic()
        for one in list(self._sessions.values()):
            if not one.busy and now - one.used > settings.session_ttl_s:
                del self._sessions[one.id]
        if len(self._sessions) >= settings.max_sessions:
            raise ApiError(
                429,
                f"there are {len(self._sessions)} sessions, the most that are kept: delete some",
                code="sessions",
            )
        session = ServerSession(f"session-{secrets.token_hex(16)}", tenant, talk, parent)
        self._sessions[session.id] = session
        return session

    def find(self, request: Request, name: str) -> ServerSession:
        """A session of this key. Another key's is not found."""
        session = self._sessions.get(name)
        if session is None or session.tenant != tenant_of(request):
            raise ApiError.not_found("there is no such session", "session_id", "session_not_found")
        session.used = time.monotonic()
        return session

    def remove(self, session: ServerSession) -> None:
        self._sessions.pop(session.id, None)

    @asynccontextmanager
    async def using(self, session: ServerSession) -> AsyncIterator[Conversation]:
        """One use at a time."""
        self.begin(session)
        try:
            yield session.talk
        finally:
            session.busy = False

    def begin(self, session: ServerSession) -> None:
        if session.busy:
            raise ApiError(409, "the session is in use: wait for its answer, or fork it", code="session_in_use")
        session.busy = True

    async def extended(
        self,
        talk: Conversation,
        content: Content,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], list[Any]]:
        """The tokens and messages of a session with `content` behind them."""
        text = self._service.text
        text.check_size("content", content)
        return await text.bounded(
            "content", lambda: talk.extended(content, text.optional, text.checked, tools, **(arguments or {}))
        )

    async def prefill(self, request: Request, tokens: list[int]) -> None:
        """Compute the memory behind tokens. Raises `RequestError`."""
        params = SamplingParams(temperature=0, max_tokens=0, cache_salt=self._service.salt(request, None))
        generation = self._service.generate([tokens], params)
        await self._service.whole(request, generation)


def tenant_of(request: Request) -> str | None:
    tenant: str | None = request.scope.get("state", {}).get("tenant")
    return tenant


class Begin(BaseModel):
    """What a session begins with, or goes on with."""

    text: Text | None = None
    token_ids: TokenIds | None = None
    messages: list[Message] | None = Field(None, max_length=1 << 14)

    @property
    def content(self) -> Content | None:
        given: list[Content] = [one for one in (self.text, self.token_ids) if one is not None]
        if self.messages is not None:
            given.append([message.model_dump(exclude_none=True) for message in self.messages])
        if len(given) > 1:
            raise RequestError("text", "send one of text, token_ids and messages")
        return given[0] if given else None


class Fork(BaseModel):
    n: int = 1


class Rewind(BaseModel):
    to: int | str | None = None
    turn: int | None = None


class Name(BaseModel):
    name: str = Field(max_length=256)


class PinFor(BaseModel):
    ttl: float = Field(3600.0, description="seconds")


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/sessions")
    sessions, engine = service.sessions, service.engine
    importing = asyncio.Semaphore(IMPORTS)

    async def described(request: Request, session: ServerSession) -> dict[str, Any]:
        talk, salt = session.talk, service.salt(request, None)
        points = await engine.ask(lambda n: messages.Frozen(n, salt, talk.tokens), messages.Points)
        info = engine.info
        page = info.page_size if info else 64

        def nbytes(tokens: int) -> int:
            return points.record_bytes + -(-tokens // page) * points.page_bytes

        names: dict[int, list[str]] = {}
        for name, at in talk.names.items():
            names.setdefault(at, []).append(name)
        return {
            "id": session.id,
            "object": "session",
            "created": session.created,
            "parent": session.parent,
            "num_tokens": len(talk.tokens),
            "bytes": nbytes(len(talk.tokens)) if talk.tokens else 0,
            "turns": talk.turns,
            "spoken": talk.spoken,
            "checkpoints": talk.names,
            "messages": talk.messages,
            "tree": [
                {"num_tokens": count, "bytes": nbytes(count), "tier": tier, "names": names.get(count, [])}
                for count, tier in points.points
            ],
        }

    async def append(request: Request, session: ServerSession, content: Content) -> None:
        async with sessions.using(session) as talk:
            tokens, conversation = await sessions.extended(talk, content)
            service.admit(None, 1, 1)
            await sessions.prefill(request, tokens)
            talk.become(tokens, conversation)

    @routes.post("")
    async def create(body: Begin, request: Request) -> Response:
        """Begin a session, with text, token ids or messages whose state is computed now, or empty."""
        session = sessions.add(tenant_of(request), Conversation())
        try:
            if body.content is not None:
                await append(request, session, body.content)
        except BaseException:
            sessions.remove(session)
            raise
        return json_response(await described(request, session), 201)

    @routes.get("")
    async def listed(request: Request) -> Response:
        """The sessions of this key."""
        data = [
            {"id": one.id, "object": "session", "num_tokens": len(one.talk.tokens), "parent": one.parent}
            for one in sessions.of(tenant_of(request))
        ]
        return json_response({"object": "list", "data": data})

    @routes.post("/import")
    async def take_in(request: Request) -> Response:
        """Begin a session from an exported file, sent as application/octet-stream. Nothing is computed."""
        if importing.locked():
            raise ApiError.overloaded()
        path = engine.directory / f"import-{secrets.token_hex(16)}.state"
        await importing.acquire()
        try:
            await _receive(request, path)
            salt = service.salt(request, None)
            taken = await engine.ask(lambda n: messages.Import(n, salt, str(path)), messages.Taken)
        except RequestError as error:  # it calls the file by a name that the client has never heard
            raise RequestError(error.field, str(error).replace(repr(path.name), "the file")) from None
        finally:
            importing.release()
            path.unlink(missing_ok=True)
        talk = Conversation.of(taken.token_ids, decode_transcript(taken.transcript, len(taken.token_ids)))
        session = sessions.add(tenant_of(request), talk)
        return json_response(await described(request, session), 201)

    @routes.get("/{name}")
    async def show(name: str, request: Request) -> Response:
        """Tokens, bytes, turns, named places, and the checkpoints that are kept."""
        return json_response(await described(request, sessions.find(request, name)))

    @routes.delete("/{name}")
    async def delete(name: str, request: Request) -> Response:
        """Forget a session. Its memory stays as long as there is room."""
        session = sessions.find(request, name)
        sessions.remove(session)
        return json_response({"id": session.id, "object": "session.deleted", "deleted": True})

    @routes.post("/{name}/append")
    async def add(name: str, body: Begin, request: Request) -> Response:
        """Add text, token ids or messages, and compute their state."""
        session, content = sessions.find(request, name), body.content
        if content is None:
            raise RequestError("text", "send one of text, token_ids and messages")
        await append(request, session, content)
        return json_response(await described(request, session))

    @routes.post("/{name}/fork")
    async def fork(name: str, body: Fork, request: Request) -> Response:
        """`n` sessions that go on from here by themselves. Costs nothing."""
        session = sessions.find(request, name)
        Conversation.check_forks(body.n)
        made: list[ServerSession] = []
        try:
            for _ in range(body.n):
                made.append(sessions.add(session.tenant, session.talk.copy(), session.id))
        except ApiError:
            for one in made:
                sessions.remove(one)
            raise
        return json_response({"object": "list", "data": [await described(request, one) for one in made]}, 201)

    @routes.post("/{name}/rewind")
    async def rewind(name: str, body: Rewind, request: Request) -> Response:
        """Go back to a token position, to a named place, or to the end of a turn."""
        session = sessions.find(request, name)
        async with sessions.using(session) as talk:
            talk.rewind(body.to, body.turn)
        return json_response(await described(request, session))

    @routes.post("/{name}/checkpoint")
    async def checkpoint(name: str, body: Name, request: Request) -> Response:
        """Give the end a name, and keep its state."""
        session = sessions.find(request, name)
        Conversation.check_name(body.name)
        async with sessions.using(session) as talk:
            if talk.tokens:
                await sessions.prefill(request, talk.tokens)
            talk.name(body.name)
        return json_response(await described(request, session))

    @routes.post("/{name}/pin")
    async def pin(name: str, body: PinFor, request: Request) -> Response:
        """Keep the state at the end for so many seconds, before all that is not pinned."""
        session = sessions.find(request, name)
        Conversation.check_ttl(body.ttl)
        salt = service.salt(request, None)
        async with sessions.using(session) as talk:
            if talk.tokens:
                await sessions.prefill(request, talk.tokens)
                await engine.ask(lambda n: messages.Pin(n, salt, talk.tokens, body.ttl), messages.Done)
        return json_response(await described(request, session))

    @routes.get("/{name}/export")
    async def export(name: str, request: Request) -> Response:
        """The session as a file that any engine with this model takes up."""
        session, salt = sessions.find(request, name), service.salt(request, None)
        path = engine.directory / f"export-{secrets.token_hex(16)}.state"
        async with sessions.using(session) as talk:
            if not talk.tokens:
                raise RequestError("session_id", "the session is empty: append something first")
            await sessions.prefill(request, talk.tokens)
            transcript = encode_transcript(talk.transcript, len(talk.tokens))
            try:
                await engine.ask(lambda n: messages.Export(n, salt, talk.tokens, transcript, str(path)), messages.Done)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return FileResponse(
            path,
            media_type="application/octet-stream",
            filename=f"{session.id}.state",
            background=BackgroundTask(path.unlink, missing_ok=True),
        )

    return routes


async def _receive(request: Request, path: Path) -> None:
    """Write the body of a request to a file. Raises `ApiError` where the disk has no room for it."""
    with _storing(), path.open("xb") as file:
        async for chunk in request.stream():
            await asyncio.to_thread(file.write, chunk)


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.error("a session could not be imported: %s", error.strerror)
        raise ApiError.no_storage() from None


class Turn:
    """A request in a session: what is new behind its tokens, then the answer, which becomes part of it."""

    def __init__(self, session: ServerSession) -> None:
        self._session = session
        self._extended: tuple[list[int], list[Any]] | None = None
        self._ids: list[int] = []
        self._text: list[str] = []
        self.as_message: Callable[[str], Mapping[str, Any]] | None = None  # of the answer; None: its text as it is

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The conversation up to the answer."""
        return self._extended[1] if self._extended else self._session.talk.messages

    async def begin(
        self,
        sessions: Sessions,
        content: Content | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The session's tokens with `content` behind them. The session is in use from here to `end`."""
        sessions.begin(self._session)
        talk = self._session.talk
        try:
            if content:
                self._extended = await sessions.extended(talk, content, tools, arguments)
            tokens = self._extended[0] if self._extended else talk.tokens
            if not tokens:
                raise RequestError("session_id", "the session is empty: send something with the request")
            return list(tokens)
        except BaseException:
            self._session.busy = False
            raise

    def take(self, token_ids: Sequence[int], text: str) -> None:
        """What was generated."""
        self._ids += token_ids
        self._text.append(text)

    def end(self) -> None:
        """Make the answer part of the session, as far as it came; a request that gave nothing changes nothing."""
        talk, self._session.used = self._session.talk, time.monotonic()
        if self._session.busy and self._ids:
            if self._extended is not None:
                talk.become(*self._extended)
            text = "".join(self._text)
            talk.answer(self._ids, text if self.as_message is None else self.as_message(text))
        self._session.busy = False
