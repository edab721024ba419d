"""An engine that computes nothing: it answers every prompt with one word, again and again.

It speaks the protocol of the real one on the real socket, as quickly as the other side reads, or with so many steps a
second as the argument `pace` of the model says. A step gives every running request one token; only `max_tokens` ends a
request.

    python -m benchmarks.serving_parts.fake_engine SOCKET
"""

from __future__ import annotations

import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, get_origin

import msgspec

from statewise.engine.request import FinishReason, RequestMetrics
from statewise.server import messages
from statewise.server.channel import BlockingReader, ChannelError, Decoder, Encoder

WORD, TOKEN = " word", 11
BURST = 64  # steps in one write, at most
BEAT_S = 0.5


class FakeEngine:
    """All requests of one connection."""

    def __init__(self, connection: socket.socket, pace: float) -> None:
        """`pace` in steps a second; 0: no limit."""
        self._connection, self._pace = connection, pace
        self._decoder = Decoder(messages.ToEngine)
        self._encoder = Encoder()
        self._left: dict[int, int] = {}  # tokens that are still to come, of each request
        self._asked: dict[int, RequestMetrics] = {}
        self._step = b""  # the frame in which every running request gets one token; empty: to be made
        self._beat = self._next = time.monotonic()

    def run(self) -> None:
        """Serve until told to close."""
        while self._take():
            if time.monotonic() > self._beat:
                self._beat = time.monotonic() + BEAT_S
                self._send([zeros(messages.Stats, running=len(self._left))])
            if self._left and time.monotonic() >= self._next:
                self._give()
                self._next = max(self._next + 1 / self._pace, time.monotonic() - 0.1) if self._pace else 0.0

    def _take(self) -> bool:
        """Read what is there, or wait for it while there is nothing to do. False: the end."""
        wait = max(0.0, self._next - time.monotonic()) if self._left else BEAT_S
        while select.select([self._connection], [], [], wait)[0]:
            wait = 0.0
            if not (content := self._connection.recv(1 << 18)):
                return False
            for message in self._decoder.feed(content):
                match message:
                    case messages.Close():
                        return False
                    case messages.Generate():
                        prompt, tokens = len(message.token_ids), message.params.max_tokens
                        self._left[message.id] = tokens
                        self._asked[message.id] = RequestMetrics(prompt, tokens)
                    case messages.Abort():
                        for number in message.ids:
                            self._left.pop(number, None)
                            self._asked.pop(number, None)
                self._step = b""
        return True

    def _give(self) -> None:
        """As many steps as go into one write. The last token of a request says that it is the last."""
        plain = min(min(self._left.values()) - 1, 1 if self._pace else BURST)
        if not plain:
            self._end()
            return
        if not self._step:
            self._step = self._encoder.frame(messages.Step([_piece(number) for number in self._left]))
        self._connection.sendall(self._step * plain)
        for number in self._left:
            self._left[number] -= plain

    def _end(self) -> None:
        ending = {number for number, left in self._left.items() if left == 1}
        step = messages.Step([_piece(number, "length" if number in ending else None) for number in self._left])
        self._send(
            [step, *(messages.Finished(number, self._asked.pop(number), None, None, None) for number in sorted(ending))]
        )
        self._left = {number: left - 1 for number, left in self._left.items() if number not in ending}
        self._step = b""

    def _send(self, sent: Sequence[msgspec.Struct]) -> None:
        self._connection.sendall(self._encoder.frames(sent))


def zeros(kind: Any, **known: Any) -> Any:
    """A message with nothing in it but what is known."""
    nothing: dict[Any, Any] = {int: 0, float: 0.0, str: ""}
    for field in msgspec.structs.fields(kind):
        if field.required and field.name not in known:
            made = get_origin(field.type) or field.type
            known[field.name] = nothing[made] if made in nothing else made()
    return kind(**known)


def _piece(number: int, reason: FinishReason | None = None) -> messages.Piece:
    return messages.Piece(number, 0, WORD, [TOKEN], reason, None, None)


def main(path: str) -> None:
    """Connect, say that the model is loaded, serve."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    load = BlockingReader(connection, messages.ToEngine).read()
    engine = FakeEngine(connection, float(load.arguments.get("pace", 0)))
    loaded = zeros(messages.Loaded, max_length=1 << 40, vocab_size=1 << 20, page_size=64)
    connection.sendall(Encoder().frame(loaded))
    with suppress(ChannelError, OSError):  # the other side has gone
        engine.run()


if __name__ == "__main__":
    main(sys.argv[1])
