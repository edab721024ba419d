"""One line for every request: what was asked, what became of it and what it cost. Never a header, a key or a text."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from statewise.server.logs import serving

logger = logging.getLogger(__name__)

MAX_PATH = 256  # characters
CLIENT_LEFT = 499  # logged where a client went away before its answer began; it is never sent
PATH_CHARACTERS = "/:{}@!$&'()*+,;=~"  # besides letters, digits and _ . -
TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens")

Observer = Callable[[str, str | None, int, float], None]
"""Told of each request when it is over: method, template of the route that it met, status, seconds."""


class AccessLog:
    """Log each request when it is over, at the level INFO.

    The path is the route's template (`/v1/sessions/{name}`), else what was asked for, never with its query. Handlers
    put `prompt_tokens`, `completion_tokens` and `cached_tokens` into `scope["state"]`; guards put `request_id` and
    `key_name` there. Requests for `quiet` paths, such as those that a probe sends all day, are logged at DEBUG. The
    parts of a line are the record's `fields`, too. Whatever else is logged meanwhile has the request's id.
    """

    def __init__(self, app: ASGIApp, quiet: Collection[str] = (), observe: Observer | None = None) -> None:
        self.app = app
        self.quiet = frozenset(quiet)
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        scope.setdefault("state", {})["begun_ns"] = time.time_ns()
        status: int | None = None
        size = 0
        complete = left = False

        async def watched() -> Message:
            nonlocal left
            message = await receive()
            # A server says so after the end of every answer, too.
            left |= message["type"] == "http.disconnect" and not complete
            return message

        def counted(message: Message) -> Awaitable[None]:
            nonlocal status, size, complete
            if message["type"] == "http.response.body":
                size += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            elif message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            with serving(_bare(scope["state"].get("request_id"))):
                await self.app(scope, watched, counted)
        finally:
            seconds = time.perf_counter() - start
            status = status or (CLIENT_LEFT if left else 500)
            if self.observe is not None:
                self.observe(scope["method"], _template(scope), status, seconds)
            level = logging.DEBUG if scope["path"] in self.quiet else logging.INFO
            if logger.isEnabledFor(level):
                fields = _fields(scope, status, seconds, size)
                if left or not complete:
                    fields["incomplete"] = True  # the client left, or the server failed in the middle
                logger.log(level, "%s", _text(fields), extra={"fields": fields})


def _fields(scope: Scope, status: int, seconds: float, size: int) -> dict[str, Any]:
    state = scope.get("state", {})
    fields: dict[str, Any] = {
        "method": _bare(scope["method"]),
        "path": _path(scope),
        "status": status,
        "seconds": round(seconds, 6),
        "bytes": size,
        "request_id": _bare(state.get("request_id")),
        "key": _bare(state.get("key_name")),
    }
    counts = {name: state.get(name) for name in TOKENS}
    fields.update({name: count for name, count in counts.items() if type(count) is int})
    return fields


def _path(scope: Scope) -> str:
    """Percent-encoded: a path is decoded by the server, and may hold line ends, spaces and terminal commands then."""
    path = _template(scope) or scope["path"]
    return quote(path[:MAX_PATH], safe=PATH_CHARACTERS, errors="replace")


def _template(scope: Scope) -> str | None:
    template = getattr(scope.get("route"), "path", None)
    return template if isinstance(template, str) else None


def _bare(value: object) -> str | None:
    """A value that is one word of a line, whatever is in it."""
    return quote(str(value)[:MAX_PATH], safe=PATH_CHARACTERS, errors="replace") if value is not None else None


def _text(fields: dict[str, Any]) -> str:
    words = [fields["method"], fields["path"], fields["status"], f"{fields['seconds']:.4f}s", f"{fields['bytes']}B"]
    words += [f"id={fields['request_id'] or '-'}", f"key={fields['key'] or '-'}"]
    words += [f"{name.removesuffix('_tokens')}={fields[name]}" for name in TOKENS if name in fields]
    return " ".join(str(word) for word in [*words, *(["incomplete"] if "incomplete" in fields else [])])
