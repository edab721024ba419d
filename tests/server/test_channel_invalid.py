"""What the engine's process makes of a message whose fields it refuses: an answer, and it reads on."""

from __future__ import annotations

import socket

import msgspec

from statewise.engine.sampling_params import SamplingParams
from statewise.server import messages
from statewise.server.channel import BlockingReader, Invalid


def frame(message: object) -> bytes:
    content = msgspec.msgpack.encode(message)
    return len(content).to_bytes(4, "little") + content


def test_a_message_that_is_refused_stands_for_itself() -> None:
    good = messages.Generate(7, [1, 2], SamplingParams())
    fields = msgspec.to_builtins(messages.Generate(8, [1, 2], SamplingParams()))
    fields["params"]["repetition_penalty"] = 0.0
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame(good) + frame(fields) + frame(good))
        reader = BlockingReader(ours, messages.ToEngine)
        first, refused, last = (reader.read() for _ in range(3))
    assert first.id == last.id == 7
    assert isinstance(refused, Invalid)
    assert (refused.id, refused.error.field) == (8, "repetition_penalty")
