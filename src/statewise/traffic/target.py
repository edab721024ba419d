"""A server by its URL: connections to it, kept for the next request, and plain questions that are no measurement."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from statewise import __version__
from statewise.traffic.connection import Clock, Connection, ConnectionGone, Response, Sink
from statewise.traffic.errors import ServerError

CONNECT_S = 10.0
MAX_ANSWER = 1 << 26  # bytes of an answer that is no stream


@dataclass
class Target:
    """Where requests go, and with which key."""

    url: str  # of the server, with or without /v1 at its end
    api_key: str | None = None
    clock: Clock = time.perf_counter
    host: str = field(init=False)
    port: int = field(init=False)
    connections: int = field(init=False, default=0)  # that were opened

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url if "://" in self.url else f"http://{self.url}")
            port, host = parts.port, parts.hostname
        except ValueError:
            port, host, parts = None, None, urlsplit("")
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username:
            raise ServerError(f"{self.url[:200]!r} is no server's URL; write it like http://127.0.0.1:8000")
        if not (host.isascii() and parts.path.isascii()) or any(ord(letter) <= 32 for letter in host + parts.path):
            raise ServerError(f"{self.url[:200]!r} is no server's URL; write it like http://127.0.0.1:8000")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ServerError("the API key has letters that no header can carry")
        self.host, self.port = host, port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._base}"
        head = [f"Host: {parts.netloc}", f"User-Agent: statewise-bench/{__version__}", "Content-Type: application/json"]
        if self.api_key is not None:
            head.append(f"Authorization: Bearer {self.api_key}")
        self._head = "\r\n".join(head)
        self._idle: list[Connection] = []

    async def send(self, method: str, path: str, body: bytes | None, sink: Callable[[Response], Sink]) -> Response:
        """One request and its whole answer. Raises `OSError`, `ConnectionGone`, and what the sink raises."""
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        request = f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}\r\n{length}\r\n".encode() + (body or b"")
        while True:
            connection = await self._connection()
            used = connection.used
            try:
                response = await connection.ask(request, sink)
            except ConnectionGone as error:
                if used and error.unused:
                    continue  # the server had closed a kept connection just then, which says nothing about the request
                raise
            if connection.open:
                self._idle.append(connection)
            return response

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of a plain answer. Raises as `send` does, and ConnectionGone for one that is too long."""
        pieces: list[bytes] = []
        left = MAX_ANSWER

        def take(_: float, piece: bytes) -> None:
            nonlocal left
            left -= len(piece)
            if left < 0:
                raise ConnectionGone(f"the answer has more than {MAX_ANSWER} bytes", unused=False)
            pieces.append(piece)

        encoded = None if body is None else msgspec.json.encode(body)
        response = await self.send(method, path, encoded, lambda _: take)
        return response.status, b"".join(pieces)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        self.connections += 1
        connecting = asyncio.get_running_loop().create_connection(
            lambda: Connection(self.clock), self.host, self.port, ssl=self._tls
        )
        try:
            _, connection = await asyncio.wait_for(connecting, CONNECT_S)
        except TimeoutError:
            raise ConnectionError(f"none within {CONNECT_S:g} seconds") from None
        return connection
