"""Sessions over HTTP: `/v1/sessions` and what hangs below.

A session is a `Conversation` here and checkpoints in the engine, found by its tokens. So it outlives an engine that is
started again, at the price of computing what was not kept.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from statewise.api.conversation import Content, Conversation
from statewise.errors import RequestError, SnapshotError
from statewise.memory.snapshot_transcript import decode_transcript, encode_transcript
from statewise.server import messages
from statewise.server.errors import ApiError
from statewise.server.protocol import Message, Text, TokenIds
from statewise.server.replies import json_bytes, json_response
from statewise.server.session_file import SessionFile, receive
from statewise.server.session_store import ServerSession, tenant_of

if TYPE_CHECKING:
    from statewise.server.service import Service

IMPORT = "/v1/sessions/import"
IMPORTS = 2  # at once: each is a file on the disk
FORKS = 64  # of one request
FORKS_BYTES = 1 << 20  # of the answer to it, in which all forks are told in full


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
    n: int = Field(1, description=f"1 to {FORKS}")


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

    async def points_of(request: Request, session: ServerSession) -> messages.Points:
        tokens, salt = session.talk.tokens, service.salt(request, None)
        return await engine.ask(lambda n: messages.Frozen(n, salt, tokens), messages.Points)

    async def described(request: Request, session: ServerSession) -> dict[str, Any]:
        return told(session, await points_of(request, session))

    def told(session: ServerSession, points: messages.Points) -> dict[str, Any]:
        talk = session.talk
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
        return json_response({"object": "list", "data": _listed(sessions.of(tenant_of(request)))})

    @routes.post("/import")
    async def take_in(request: Request) -> Response:
        """Begin a session from an exported file, sent as application/octet-stream. Nothing is computed."""
        if importing.locked():
            raise ApiError.overloaded()
        path = engine.directory / f"import-{secrets.token_hex(16)}.state"
        await importing.acquire()
        try:
            await receive(request, path)
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
        """`n` sessions that go on from here by themselves. Costs nothing.

        Where the answer would be long, all but the first are told as in the list of sessions.
        """
        session = sessions.find(request, name)
        Conversation.check_forks(body.n, FORKS)
        points = await points_of(request, session)
        made = sessions.fork(session, body.n)
        data = [told(made[0], points)]
        brief = len(json_bytes(data)) * body.n > FORKS_BYTES
        data += _listed(made[1:]) if brief else [told(one, points) for one in made[1:]]
        return json_response({"object": "list", "data": data}, 201)

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
            try:
                transcript = await asyncio.to_thread(encode_transcript, talk.transcript, len(talk.tokens))
            except SnapshotError as error:  # an answer may go beyond what the messages before it were checked for
                raise RequestError("session_id", f"the session {error}: rewind it by a turn") from None
            try:
                await engine.ask(lambda n: messages.Export(n, salt, talk.tokens, transcript, str(path)), messages.Done)
                return SessionFile(path.open("rb"), f"{session.id}.state")
            finally:
                path.unlink(missing_ok=True)

    return routes


def _listed(sessions: Sequence[ServerSession]) -> list[dict[str, Any]]:
    """Sessions in short."""
    return [
        {"id": one.id, "object": "session", "num_tokens": len(one.talk.tokens), "parent": one.parent}
        for one in sessions
    ]
