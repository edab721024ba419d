"""Bounds for what the server's HTTP parser takes before any guard is asked."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from statewise.server.errors import ApiError


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with an end to the head of a request; give it to `uvicorn.Config(http=BoundedHttp)`.

    The parser joins a header piece by piece for as long as pieces come: 50 MB of one header stop the event loop, and so
    every other client, for seconds. Nor does it ever give up on a head that does not come. Both cost a client nothing,
    not even a key.
    """

    max_head_bytes = 65_536  # of headers or trailers; above HeaderLimit's bound, exceeded by at most one piece
    head_timeout_s = 30.0  # from the connection, or from the first byte of a later request, to the end of its headers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._moved = False  # the piece that is being parsed held more than headers
        self._head_bytes = 0  # in pieces of nothing but headers, one behind the other
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

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
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def on_headers_complete(self) -> None:
        self._moved = True
        self._stop_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP."""
        self._refuse(ApiError.invalid(msg, code="invalid_http"))

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._refuse(ApiError(408, "The request's headers took too long to come", code="headers_too_slow"))

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

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
