"""One HTTP/1.1 connection of a load generator: each piece of an answer is handed on, with its time, as it arrives.

A general client wakes a task for every piece, which costs more than many a server's token and dates the piece by when
the task got its turn. Here the time is taken in the event loop's callback.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httptools

Clock = Callable[[], float]
Sink = Callable[[float, bytes], None]
MAX_HEAD = 1 << 16  # bytes of an answer's headers


class ConnectionGone(Exception):
    """The server closed the connection, or what it sent is no HTTP. `unused`: before any byte of an answer."""

    def __init__(self, message: str, unused: bool) -> None:
        super().__init__(message)
        self.unused = unused


class Response:
    """Status and headers of an answer, set as they arrive."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}  # names in lower case


class Connection(asyncio.Protocol):
    """Takes one request after the other."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._response: Response | None = None
        self._sink: Callable[[Response], Sink] | None = None
        self._body: Sink | None = None
        self._done: asyncio.Future[Response] | None = None
        self._head_bytes = 0
        self._now = 0.0
        self.open = False
        self._kept = False  # the connection outlives the answer
        self.used = False  # an earlier request was answered here

    async def ask(self, request: bytes, sink: Callable[[Response], Sink]) -> Response:
        """Send a request; return when its answer is complete. `sink` is asked, once the headers are there, who gets
        the body. What the body's receiver raises is raised here. Raises `ConnectionGone`."""
        if self._transport is None or not self.open:
            raise ConnectionGone("the connection is closed", unused=True)
        self._response, self._sink, self._body, self._head_bytes = Response(), sink, None, 0
        self._kept = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            response = await self._done
        except BaseException:
            self.close()
            raise
        self.used = True
        if not self._kept:
            self.close()
        return response

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.open = transport, True  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        response = self._response
        if error is None and response is not None and self._body is not None and not _framed(response):
            self._end()  # the end of the connection is the end of the answer
            return
        self._fail(
            ConnectionGone(
                f"the server closed the connection{f': {error}' if error else ''}",
                unused=response is not None and not response.status and not self._head_bytes,
            )
        )

    def data_received(self, data: bytes) -> None:
        self._now = self._clock()
        if self._done is None or self._done.done():
            self.close()  # nobody asked
            return
        if self._body is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)
        except httptools.HttpParserError:
            self._fail(ConnectionGone("the answer is no HTTP", unused=False))
        if self._body is None and self._head_bytes > MAX_HEAD:
            self._fail(ConnectionGone(f"the answer's headers have more than {MAX_HEAD} bytes", unused=False))

    def _fail(self, error: BaseException) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def _end(self) -> None:
        if self._done is not None and not self._done.done() and self._response is not None:
            self._done.set_result(self._response)

    # What the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is not None:
            self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._response is not None and self._sink is not None:
            self._response.status = self._parser.get_status_code()
            self._body = self._sink(self._response)

    def on_body(self, body: bytes) -> None:
        if self._body is not None:
            self._body(self._now, body)

    def on_message_complete(self) -> None:
        self._kept = self._parser.should_keep_alive()  # which it knows no more when the next message may begin
        self._end()


def _framed(response: Response) -> bool:
    """Whether an answer says where it ends."""
    return "content-length" in response.headers or "transfer-encoding" in response.headers
