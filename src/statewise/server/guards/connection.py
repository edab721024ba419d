"""Bounds for a connection: for what the server's HTTP parser takes, and for how long a client takes over it."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from statewise.server.errors import ApiError


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with an end to the head of a request; give it to `uvicorn.Config(http=BoundedHttp)`.

    The parser joins a header piece by piece for as long as pieces come: 50 MB of one header stop the event loop, and so
    every other client, for seconds. Nor does it ever give up on a head that does not come, on a body that nobody reads
    to its end, or on a client that takes nothing of its answer. All of that costs a client nothing, not even a key.
    """

    max_head_bytes = 65_536  # of headers or trailers; above HeaderLimit's bound, exceeded by at most one piece
    head_timeout_s = 30.0  # from the connection, or from the first byte of a later request, to the end of its headers
    body_timeout_s = 300.0  # from the end of the headers to that of the body; what is read has BodyLimit's bound before
    stall_timeout_s = 60.0  # without room for more of the answer on its way to the client

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._moved = False  # the piece that is being parsed held more than headers
        self._head_bytes = 0  # in pieces of nothing but headers, one behind the other
        self._incoming: asyncio.TimerHandle | None = None  # for the head of a request, then for its body
        self._stalled: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None  # the request that is served; others may wait behind it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect(self.head_timeout_s, "headers")

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        self._resumed()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:  # uvicorn tells the newest request only
            self._running.disconnected = True
            self._running.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._resumed()
        self._stalled = self.loop.call_later(self.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._resumed()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        self._moved = False
        super().data_received(data)
        self._head_bytes = 0 if self._moved else self._head_bytes + len(data)
        if self._head_bytes > self.max_head_bytes:
            self._refuse(
                ApiError.headers_too_large(f"The request's headers have more than {self.max_head_bytes} bytes")
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._moved = True
        if self._incoming is None:
            self._expect(self.head_timeout_s, "headers")

    def on_headers_complete(self) -> None:
        self._moved = True
        self._expect(self.body_timeout_s, "body")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = True
        self._expect_nothing()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP."""
        self._refuse(ApiError.invalid(msg, code="invalid_http"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _expect(self, seconds: float, part: str) -> None:
        self._expect_nothing()
        self._incoming = self.loop.call_later(seconds, self._is_late, part)

    def _expect_nothing(self) -> None:
        if self._incoming is not None:
            self._incoming.cancel()
            self._incoming = None

    def _is_late(self, part: str) -> None:
        self._incoming = None
        if self.flow.read_paused:  # the server itself does not take it, while there is something before it
            self._expect(self.body_timeout_s, part)
            return
        self._refuse(ApiError(408, f"The request's {part} took too long to come", code=f"{part}_too_slow"))

    def _resumed(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        # While an answer of this connection is on its way, another one would end up in its middle.
        cycle = self.cycle
        if not self.pipeline and (cycle is None or cycle.response_complete or not cycle.response_started):
            response = error.response(close=True)
            lines = [b"HTTP/1.1 %d %s" % (error.status, HTTPStatus(error.status).phrase.encode())]
            lines += [name + b": " + value for name, value in response.raw_headers]
            self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body))
        self.transport.close()
