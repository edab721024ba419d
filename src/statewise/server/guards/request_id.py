"""A name for every request, by which the client and the log mean the same one."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAME = b"x-request-id"
ACCEPTED = re.compile(rb"[!-~]{1,128}")  # printable ASCII without spaces


class RequestId:
    """Take the client's `X-Request-Id` if it is short and printable, else make one, and send it back.

    The id is in `scope["state"]["request_id"]`. Two requests may bring the same one, so that it names a request for
    people; it must not be the key under which a server keeps anything.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = [value for name, value in scope["headers"] if name == NAME]
        if len(asked) == 1 and ACCEPTED.fullmatch(asked[0]):
            request_id = asked[0]
        else:
            request_id = b"req-" + secrets.token_hex(16).encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        def named(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = [header for header in message.get("headers", ()) if header[0].lower() != NAME]
                message = {**message, "headers": [*headers, (NAME, request_id)]}
            return send(message)

        await self.app(scope, receive, named)
