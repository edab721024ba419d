"""Frames on a stream socket: four bytes of length, then a msgpack message."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from statewise.errors import RequestError

MAX_FRAME = 1 << 30  # bytes; prompts and prompt log-probabilities are the largest
_LENGTH = 4
_READ = 1 << 18  # bytes at a time


class ChannelError(Exception):
    """The other side has gone, or what it sent is no message."""


@dataclass(frozen=True)
class Invalid:
    """Stands for a message whose fields the receiver refuses. It must have an `id`."""

    id: int
    error: RequestError


class Encoder:
    """Messages to frames."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()

    def frame(self, message: msgspec.Struct) -> bytes:
        return self.frames((message,))

    def frames(self, messages: Iterable[msgspec.Struct]) -> bytes:
        """Frames one behind the other, to be written at once."""
        buffer, at = self._buffer, 0
        for message in messages:
            self._encoder.encode_into(message, buffer, at + _LENGTH)
            buffer[at : at + _LENGTH] = (len(buffer) - at - _LENGTH).to_bytes(_LENGTH, "little")
            at = len(buffer)
        content = bytes(buffer)
        if len(buffer) > _READ:
            self._buffer = bytearray()  # one long message shall not hold its memory for good
        return content


class Decoder:
    """Frames to messages of a type, from bytes that come in pieces of any length."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._rest = bytearray()

    def feed(self, content: bytes) -> Iterator[Any]:
        """The messages that are whole now, or `Invalid` in place of one. Raises `ChannelError` for what is none."""
        if self._rest:
            self._rest += content
            if len(self._rest) < self._wanted(self._rest, 0):
                return
            content, self._rest = bytes(self._rest), bytearray()
        view, at = memoryview(content), 0
        while len(content) - at >= (wanted := self._wanted(view, at)):
            try:
                yield self._decoder.decode(view[at + _LENGTH : at + wanted])
            except RequestError as error:
                fields = msgspec.msgpack.decode(view[at + _LENGTH : at + wanted])
                yield Invalid(int(fields["id"]), error)
            except msgspec.MsgspecError as error:
                raise ChannelError(str(error)) from error
            at += wanted
        self._rest += view[at:]

    def _wanted(self, content: bytearray | memoryview, at: int) -> int:
        """Bytes of the frame at a position, or of its head while that is not there."""
        if len(content) - at < _LENGTH:
            return _LENGTH
        length = int.from_bytes(content[at : at + _LENGTH], "little")
        if length > MAX_FRAME:
            raise ChannelError(f"a frame of {length} bytes is more than {MAX_FRAME}")
        return length + _LENGTH


class BlockingReader:
    """Messages of a type from a blocking socket."""

    def __init__(self, connection: socket.socket, kind: Any) -> None:
        self._connection = connection
        self._decoder = Decoder(kind)
        self._ready: deque[Any] = deque()

    def read(self) -> Any:
        """The next message. Raises `ChannelError` when there will be none."""
        while not self._ready:
            try:
                content = self._connection.recv(_READ)
            except OSError as error:
                raise ChannelError(str(error)) from error
            if not content:
                raise ChannelError("the other side has gone")
            self._ready.extend(self._decoder.feed(content))
        return self._ready.popleft()


class Outbox:
    """Sends messages from any thread without waiting for the other side: what the socket does not take at once, a
    thread sends when it does. Handing every message to a thread would cost more than sending it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._encoder = Encoder()
        self._lock = threading.Lock()
        self._late: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._num_late = 0  # that the thread has not sent yet
        self._thread = threading.Thread(target=self._send_late, daemon=True)
        self._thread.start()

    def put(self, *messages: msgspec.Struct) -> None:
        with self._lock:
            content = self._encoder.frames(messages)
            if not self._num_late:
                content = content[self._send(content) :]
            if content:
                self._num_late += 1
                self._late.put(content)

    def close(self, seconds: float = 10.0) -> None:
        """Wait for as long until all has been sent."""
        self._late.put(None)
        self._thread.join(seconds)

    def _send(self, content: bytes) -> int:
        try:
            return self._connection.send(content, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(content)  # the other side has gone, as whoever reads from it notices too

    def _send_late(self) -> None:
        while (content := self._late.get()) is not None:
            with suppress(OSError):
                self._connection.sendall(content)
            with self._lock:
                self._num_late -= 1


class Link(asyncio.Protocol):
    """One end of a connection on the event loop: `take` gets every message as it comes."""

    def __init__(self, kind: Any, take: Callable[[Any], None]) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # done when there is no more
        self._take = take
        self._decoder = Decoder(kind)
        self._encoder = Encoder()
        self._transport: asyncio.Transport | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # not one of its subclasses in every event loop

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._take(message)
        except ChannelError:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def send(self, message: msgspec.Struct) -> None:
        """Raises `ChannelError` when nobody is there."""
        if self._transport is None or self._transport.is_closing():
            raise ChannelError("the other side has gone")
        self._transport.write(self._encoder.frame(message))

    def close(self) -> None:
        """End the connection; what was sent still goes out."""
        if self._transport is not None:
            self._transport.close()
