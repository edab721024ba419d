"""Bounds for the first lines of a request, before anything reads them."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from statewise.server.errors import ApiError, refuse

LINE_BYTES = 4  # the colon, the space and the end of a header's line


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header, whose name is in lower case as ASGI has it. None, one or several: the caller decides."""
    return [value for key, value in scope["headers"] if key == name]


class HeaderLimit:
    """Refuse more than `max_bytes` or `max_count` of headers (431), and a longer target than `max_target` (414).

    The server has read them by then: a guard can keep them from everything behind it, not from the server's own parser.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = 32_768, max_count: int = 100, max_target: int = 8_192) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_count = max_count
        self.max_target = max_target

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] in ("http", "websocket") else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await refuse(error, scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers = scope["headers"]
        if len(headers) > self.max_count:
            return ApiError.headers_too_large(f"The request has more than {self.max_count} headers")
        if sum(len(name) + len(value) + LINE_BYTES for name, value in headers) > self.max_bytes:
            return ApiError.headers_too_large(f"The request's headers have more than {self.max_bytes} bytes")
        # A server may leave out the raw path; the decoded one is never longer in characters.
        target = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
        if target > self.max_target:
            message = f"The request's path and query have more than {self.max_target} bytes"
            return ApiError(414, message, code="uri_too_long", headers={"Connection": "close"})
        return None
