"""The sessions of a server: who has which, how many there may be, and one use of each at a time."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import Request

from statewise.api.conversation import Content, Conversation
from statewise.engine.sampling_params import SamplingParams
from statewise.server.errors import ApiError

if TYPE_CHECKING:
    from statewise.server.service import Service


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

    def add(self, tenant: str | None, talk: Conversation) -> ServerSession:
        """A new session. Raises as `make_room`."""
        return self._put(tenant, [talk])[0]

    def fork(self, session: ServerSession, n: int) -> list[ServerSession]:
        """`n` sessions that go on from here. Raises as `make_room`, and then there is none."""
        return self._put(session.tenant, [session.talk.copy() for _ in range(n)], session.id)

    def _put(self, tenant: str | None, talks: Sequence[Conversation], parent: str | None = None) -> list[ServerSession]:
        self.make_room(tenant, len(talks))
        made = [ServerSession(f"session-{secrets.token_hex(16)}", tenant, talk, parent) for talk in talks]
        self._sessions.update((one.id, one) for one in made)
        return made

    def make_room(self, tenant: str | None, count: int) -> None:
        """Let so many more sessions of a tenant in. Raises `ApiError` where there is no room, and nothing goes then.

        Those unused for long go first. When the store is full, another tenant that has more than this one will have
        loses the session that it has not used for longest; nobody loses one for a session of its own.
        """
        settings, now = self._service.settings, time.monotonic()
        for one in list(self._sessions.values()):
            if not one.busy and now - one.used > settings.session_ttl_s:
                del self._sessions[one.id]
        lacking = len(self._sessions) + count - settings.max_sessions
        if lacking <= 0:
            return
        owned = Counter(one.tenant for one in self._sessions.values())
        own = owned.pop(tenant, 0)
        idle: dict[str | None, list[ServerSession]] = {other: [] for other in owned}
        for one in sorted(self._sessions.values(), key=lambda one: one.used, reverse=True):
            if one.tenant in idle and not one.busy:
                idle[one.tenant].append(one)
        leaving: list[ServerSession] = []
        for has in range(own + count - lacking + 1, own + count + 1):  # what the tenant has with each that comes in
            able = [other for other, found in idle.items() if found and owned[other] > has]
            if not able:
                raise ApiError(
                    429,
                    f"the server keeps {settings.max_sessions} sessions and has no room for {count} more, "
                    f"{own} of them are yours: delete some",
                    code="sessions",
                )
            greatest = max(able, key=owned.__getitem__)
            owned[greatest] -= 1
            leaving.append(idle[greatest].pop())
        for one in leaving:
            del self._sessions[one.id]

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
