"""A server from its first request to its last: uvicorn around the application, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from types import FrameType

import uvicorn

from statewise.server.engine_client import EngineDead
from statewise.server.errors import ApiError
from statewise.server.service import Service

logger = logging.getLogger(__name__)
POLL_S = 0.05
GRACE_S = 5  # for the last answers to reach clients that read them slowly, or not at all
GARBAGE = (20_000, 20, 50)  # objects between two looks for garbage; tokens make many, and none of them in circles


class Server(uvicorn.Server):
    """SIGTERM and Ctrl-C: no more requests, those that run may end, what is left after a while gets an error event.

    Asked a second time, it does not wait: for the requests, or for the engine.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        config.timeout_graceful_shutdown = GRACE_S
        self._service = service
        self._starting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # modules, routes and schemas stay: looking through them again and again would stop every stream
        gc.set_threshold(*GARBAGE)
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        """A server whose model cannot be loaded ends: whoever started it shall hear of it."""
        with contextlib.suppress(EngineDead):
            await self._service.engine.wait_until_ready()
        if self._service.engine.phase == "dead":
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig not in (signal.SIGTERM, signal.SIGINT):
            super().handle_exit(sig, frame)
        elif self._draining is None:
            self._service.draining = True
            self._draining = asyncio.get_event_loop().create_task(self._drain())
        else:
            self._hurry()

    async def _drain(self) -> None:
        engine, end = self._service.engine, time.monotonic() + self._service.settings.drain_seconds
        logger.info("draining %d requests", engine.streams)
        while engine.streams and time.monotonic() < end and not self.should_exit:
            await asyncio.sleep(POLL_S)
        engine.fail_streams(ApiError.shutting_down())
        await asyncio.sleep(POLL_S)  # for the error events to go out
        self.should_exit = True

    def _hurry(self) -> None:
        engine = self._service.engine
        engine.fail_streams(ApiError.shutting_down())
        engine.kill()
        self.config.timeout_graceful_shutdown = 1
        self.should_exit = True
