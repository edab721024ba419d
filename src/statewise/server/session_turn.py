"""One answer of a session: from what is new in the request to what the session has then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from statewise.api.conversation import Content
from statewise.errors import RequestError

if TYPE_CHECKING:
    from statewise.server.session_store import ServerSession, Sessions


class Turn:
    """A request in a session: what is new behind its tokens, then the answer, which becomes part of it."""

    def __init__(self, session: ServerSession) -> None:
        self._session = session
        self._extended: tuple[list[int], list[Any]] | None = None
        self._ids: list[int] = []
        self._text: list[str] = []
        self.message: Callable[[], Mapping[str, Any]] | None = None  # as told to the client so far; None: its text

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
        try:
            if self._session.busy and self._ids:
                answer = "".join(self._text) if self.message is None else self.message()
                if self._extended is not None:
                    talk.become(*self._extended)
                talk.answer(self._ids, answer)
        finally:
            self._session.busy = False
