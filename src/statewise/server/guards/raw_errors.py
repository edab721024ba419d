"""The outermost guard: whatever is raised within, the client gets an answer in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from statewise.server.errors import as_api_error

logger = logging.getLogger(__name__)


class RawErrors:
    """Answer for an application that raised before its response began, and log what it raised.

    Once a response has begun there is nothing left to say: the server sees it unfinished and ends the connection, so
    that the client does not take a part for the whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        def watched(message: Message) -> Awaitable[None]:
            nonlocal started
            started = True
            return send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            return
        except Exception as error:
            request_id = scope.get("state", {}).get("request_id")
            answer = as_api_error(error, request_id)
            if answer.status >= 500:
                fields = {"request_id": request_id}
                logger.error("request %s failed", request_id, exc_info=error, extra={"fields": fields})
            if not started:
                response = answer.response(close=True)
                if request_id is not None:
                    response.headers["X-Request-Id"] = request_id
                await response(scope, receive, send)
