"""A server from its first request to its last: uvicorn around the application, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

import uvicorn

from statewise.server.engine_client import EngineDead
from statewise.server.service import Service

logger = logging.getLogger(__name__)
POLL_S = 0.05


class Server(uvicorn.Server):
    """SIGTERM and Ctrl-C: no more requests, those that run may end, what is left after a while gets an error event."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None or sig not in (signal.SIGTERM, signal.SIGINT):
            super().handle_exit(sig, frame)  # asked twice: at once
            return
        self._service.draining = True
        self._draining = asyncio.get_event_loop().create_task(self._drain())

    async def _drain(self) -> None:
        engine, left = self._service.engine, self._service.settings.drain_seconds
        logger.info("draining %d requests", engine.streams)
        while engine.streams and left > 0:
            await asyncio.sleep(POLL_S)
            left -= POLL_S
        engine.fail_streams(EngineDead("the server is shutting down"))
        await asyncio.sleep(POLL_S)  # for the error events to go out
        self.should_exit = True
