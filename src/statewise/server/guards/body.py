"""Bounds for a request's body: for its size, and for how long it may take. Nothing here keeps a body."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from statewise.server.errors import ApiError, refuse
from statewise.server.guards.headers import header_values

MAX_DIGITS = 19  # of a Content-Length; more is more than any disk holds
FILE_RATE = 1 << 20  # bytes a second, slower than which no file may come in the long run


class BodyLimit:
    """Refuse bodies of more than `max_bytes` (413), that take more than `seconds` (408), or with lengths that
    contradict each other (400).

    What `Content-Length` admits is refused at once. A body without one is counted as it comes; where it goes over, the
    application's `receive` raises, and nothing more is read. The time is that from the first look at the body to its
    end, however little comes at once. Paths in `files` take that many bytes, and for those `FILE_RATE` a second more.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int = 16 << 20,
        seconds: float = 120.0,
        files: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_file = scope["path"] in self.files
        max_bytes = self.files.get(scope["path"], self.max_bytes)
        error = self._announced(scope, max_bytes)
        if error is not None:
            await refuse(error, scope, receive, send)
            return
        total, more, end = 0, True, 0.0

        async def counted() -> Message:
            nonlocal total, more, end
            if total > max_bytes:
                raise ApiError.too_large(max_bytes)
            if not more:  # all there is to hear is that the client leaves
                return await receive()
            end = end or asyncio.get_running_loop().time() + self.seconds
            try:
                async with asyncio.timeout_at(end + total / FILE_RATE if is_file else end):
                    message = await receive()
            except TimeoutError:
                raise ApiError.too_slow(self.seconds) from None
            more = message["type"] == "http.request" and message.get("more_body", False)
            total += len(message.get("body", b""))
            if total > max_bytes:
                raise ApiError.too_large(max_bytes)
            return message

        await self.app(scope, counted, send)

    def _announced(self, scope: Scope, max_bytes: int) -> ApiError | None:
        lengths = header_values(scope, b"content-length")
        if len(lengths) > 1 or (lengths and header_values(scope, b"transfer-encoding")):
            return ApiError.invalid("The request says in two ways how long its body is", code="invalid_length")
        if lengths and not lengths[0].isdigit():
            return ApiError.invalid("Content-Length must be a number of bytes", code="invalid_length")
        if lengths and (len(lengths[0]) > MAX_DIGITS or int(lengths[0]) > max_bytes):
            return ApiError.too_large(max_bytes)
        encodings = header_values(scope, b"content-encoding")
        if any(encoding.strip().lower() != b"identity" for encoding in encodings):
            # A few compressed bytes can become any number of them.
            return ApiError(415, "Send the request body uncompressed", code="unsupported_encoding")
        return None
