"""What the engine has given for one HTTP request and nobody has fetched yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from statewise.errors import RequestError
from statewise.server import messages

MAX_UNREAD = 4096  # pieces, one with log-probabilities counting for each of them: a few megabytes


class Inbox:
    """Pieces of all prompts of a request, in the order in which they came.

    It fills as quickly as the engine works, and is emptied as quickly as the client reads. A client that falls too far
    behind loses its request rather than fill the server's memory.
    """

    __slots__ = ("_error", "_open", "_pieces", "_unread", "_waiting")

    def __init__(self) -> None:
        self._pieces: list[messages.Piece] = []
        self._unread = 0  # as MAX_UNREAD counts
        self._open = 0  # prompts that have not ended
        self._error: BaseException | None = None
        self._waiting: asyncio.Future[None] | None = None

    async def fetch(self) -> list[messages.Piece]:
        """All pieces that are there, at least one; none when all prompts have ended. Raises what the request failed
        with, behind the pieces that came before."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if not self._open:
                return []
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        pieces, self._pieces, self._unread = self._pieces, [], 0
        return pieces

    def begin(self) -> None:
        """One more prompt is on its way."""
        self._open += 1

    def put(self, piece: messages.Piece) -> bool:
        """False: the request has failed, and takes no more."""
        if self._error is not None:
            return False
        if piece.finish_reason == "error":  # what went wrong is told when the prompt has ended
            return True
        self._pieces.append(piece)
        self._unread += 1 if piece.logprobs is None else 1 + sum(1 + len(one.top) for one in piece.logprobs)
        if self._unread > MAX_UNREAD:
            self._pieces = []
            self.fail(RequestError("stream", f"the answer was not read: {MAX_UNREAD} tokens of it were waiting"))
            return False
        if self._waiting is not None:
            self._wake()
        return True

    def end(self) -> None:
        """A prompt has ended."""
        self._open -= 1
        self._wake()

    def fail(self, error: BaseException) -> None:
        """The request has ended, with an error. The first one counts."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class Stream:
    """One prompt in the engine."""

    __slots__ = ("_abort", "before", "finished", "first_choice", "inbox", "last_piece", "number")

    def __init__(self, number: int, inbox: Inbox, first_choice: int, abort: Callable[[int], None]) -> None:
        """`first_choice` is the number of its first continuation in the request."""
        self.number, self.inbox, self.first_choice = number, inbox, first_choice
        self.finished: messages.Finished | None = None
        self.last_piece = 0.0  # when it was made
        self.before = 0.0  # when those of the step before were
        self._abort = abort

    def finish(self, message: messages.Finished) -> None:
        self.finished = message
        self.inbox.end()

    def close(self) -> None:
        """End it, wherever it is."""
        if self.finished is None:
            self._abort(self.number)
