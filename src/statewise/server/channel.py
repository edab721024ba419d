"""Frames on a stream socket: four bytes of length, then a msgpack message."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec

MAX_FRAME = 1 << 30  # bytes; prompts and prompt log-probabilities are the largest
_LENGTH = 4


class ChannelError(Exception):
    """The other side has gone, or what it sent is no message."""


class Encoder:
    """Messages to frames."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()

    def frame(self, message: msgspec.Struct) -> bytes:
        buffer = bytearray(_LENGTH)
        self._encoder.encode_into(message, buffer, _LENGTH)
        buffer[:_LENGTH] = (len(buffer) - _LENGTH).to_bytes(_LENGTH, "little")
        return bytes(buffer)


class BlockingReader:
    """Messages of a type from a blocking socket."""

    def __init__(self, connection: socket.socket, kind: Any) -> None:
        self._file = connection.makefile("rb")
        self._decoder = msgspec.msgpack.Decoder(kind)

    def read(self) -> Any:
        """The next message. Raises `ChannelError` when there will be none."""
        try:
            return self._decoder.decode(self._exactly(_length(self._exactly(_LENGTH))))
        except (OSError, msgspec.MsgspecError) as error:
            raise ChannelError(str(error)) from error

    def _exactly(self, count: int) -> bytes:
        content = self._file.read(count)
        if len(content) < count:
            raise ChannelError("the other side has gone")
        return content


class AsyncReader:
    """Messages of a type from an asyncio stream."""

    def __init__(self, stream: asyncio.StreamReader, kind: Any) -> None:
        self._stream = stream
        self._decoder = msgspec.msgpack.Decoder(kind)

    async def read(self) -> Any:
        """The next message. Raises `ChannelError` when there will be none."""
        try:
            length = _length(await self._stream.readexactly(_LENGTH))
            return self._decoder.decode(await self._stream.readexactly(length))
        except (OSError, asyncio.IncompleteReadError, msgspec.MsgspecError) as error:
            raise ChannelError(str(error)) from error


def _length(head: bytes) -> int:
    length = int.from_bytes(head, "little")
    if length > MAX_FRAME:
        raise ChannelError(f"a frame of {length} bytes is more than {MAX_FRAME}")
    return length
