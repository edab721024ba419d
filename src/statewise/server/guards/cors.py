"""Which web pages of other origins may use the server: none, unless they are listed."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from statewise.errors import ConfigError
from statewise.server.errors import ApiError, refuse
from statewise.server.guards.headers import header_values

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
HEADER_LIST = re.compile(rb"[A-Za-z0-9-]{1,64}(?: *, *[A-Za-z0-9-]{1,64}){0,63}")
METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
EXPOSED = b"X-Request-Id, Retry-After"
MAX_AGE_S = b"600"


class Cors:
    """Answer preflights and mark answers for the listed origins; refuse requests of any other origin (403).

    `origins` are exact, like https://example.com, or `*` for all of them. The server's own pages need not be listed.
    Cookies are never allowed, listed or not: a key travels in a header. A request of an unlisted origin is refused
    rather than answered without a mark, because a browser sends simple requests first and asks afterwards: any page
    could make a server on the user's machine work. Programs that are not browsers send no `Origin`.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str] = ()) -> None:
        self.app = app
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin.lower()):
                raise ConfigError(f"{origin!r} is no origin; write it like https://example.com, without a path")
        self.origins = frozenset(origin.lower().encode() for origin in origins)
        self.all_origins = "*" in origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        asked = header_values(scope, b"origin")
        allowed = self._allowed(asked)
        if asked and allowed is None and not _same_origin(asked, scope):
            error = ApiError.forbidden("Web pages of that origin may not use this server")
            await refuse(error, scope, receive, send)
        elif allowed is None and not self.origins:
            await self.app(scope, receive, send)
        elif allowed is not None and _is_preflight(scope):
            await send({"type": "http.response.start", "status": 204, "headers": self._preflight(scope, allowed)})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, self._marking(allowed, send))

    def _allowed(self, asked: list[bytes]) -> bytes | None:
        """What `Access-Control-Allow-Origin` says to them; None: nothing."""
        if len(asked) != 1:
            return None
        if self.all_origins:
            return b"*"
        return asked[0] if asked[0] in self.origins else None

    def _marking(self, allowed: bytes | None, send: Send) -> Send:
        marks: list[tuple[bytes, bytes]] = []
        if not self.all_origins:  # a shared cache must not give one origin's answer to another
            marks.append((b"vary", b"Origin"))
        if allowed is not None:
            marks += [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", EXPOSED)]

        def marked(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *marks]}
            return send(message)

        return marked

    def _preflight(self, scope: Scope, allowed: bytes) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"access-control-allow-origin", allowed),
            (b"access-control-allow-methods", METHODS),
            (b"access-control-max-age", MAX_AGE_S),
            (b"vary", b"Origin, Access-Control-Request-Headers"),
        ]
        # Clients send headers of their own, and `*` would not cover Authorization: they get the list they asked for.
        for value in header_values(scope, b"access-control-request-headers")[:1]:
            if HEADER_LIST.fullmatch(value):
                headers.append((b"access-control-allow-headers", value))
        return headers


def _is_preflight(scope: Scope) -> bool:
    return scope.get("method") == "OPTIONS" and bool(header_values(scope, b"access-control-request-method"))


def _same_origin(asked: list[bytes], scope: Scope) -> bool:
    """Whether a page of this server asks. Its scheme is not compared: a proxy may speak TLS for the server."""
    hosts = header_values(scope, b"host")
    return len(asked) == len(hosts) == 1 and asked[0].lower().partition(b"://")[2] == hosts[0].lower() != b""
