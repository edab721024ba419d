"""Server-sent events on their way to a client that may leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class EventStream(Response):
    """Send what `events` yields, as it comes. When it ends, the client leaves or the server stops, `end` is called.

    A framework's own streaming response would leave `events` to the garbage collector when the client goes away while
    something is being sent, and so what the engine computes for it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = asyncio.current_task()
        assert own is not None
        over = False

        def leave(_: asyncio.Task[None]) -> None:
            if not over:
                own.cancel()

        leaving = asyncio.create_task(_until_gone(receive))
        leaving.add_done_callback(leave)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not leaving.done():
                raise
            own.uncancel()
        finally:
            over = True
            leaving.cancel()
            try:
                await self._events.aclose()
            finally:
                self._end()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
