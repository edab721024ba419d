"""Sessions as files: in from a request's body, out to a client that may leave."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastapi import Request

from statewise.server.errors import ApiError
from statewise.server.event_stream import EventStream

logger = logging.getLogger(__name__)
CHUNK = 1 << 18  # bytes


class SessionFile(EventStream):
    """The whole of an open file, whatever range was asked for. However the answer ends, the file is closed.

    Its path is gone by then: nothing is left behind.
    """

    media_type = "application/octet-stream"

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(_chunks(file), file.close)
        self.headers["cache-control"] = "no-store"
        self.headers["content-length"] = str(os.fstat(file.fileno()).st_size)
        self.headers["content-disposition"] = f'attachment; filename="{name}"'


async def _chunks(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    while chunk := await asyncio.to_thread(file.read, CHUNK):
        yield chunk


async def receive(request: Request, path: Path) -> None:
    """Write the body of a request to a file. Raises `ApiError` where the disk has no room for it."""
    with _storing(), path.open("xb") as file:
        async for chunk in request.stream():
            await asyncio.to_thread(file.write, chunk)


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.error("a session could not be imported: %s", error.strerror)
        raise ApiError.no_storage() from None
