"""A client for many streams at once: asyncio on bare sockets, quick enough not to be what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

END = b"data: [DONE]"


@dataclass
class Answer:
    """What came of one streamed completion."""

    text: str = ""
    finish: str | None = None
    tokens: int = 0  # as the server counts them
    events: int = 0
    error: str | None = None
    whole: bool = False  # the last event was there


def request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """A request on the wire."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@dataclass
class _Raw(asyncio.Protocol):
    """Keeps what comes; it is looked at when the stream is over."""

    wire: bytes
    over: asyncio.Future[None]
    pieces: list[bytes] = field(default_factory=list)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self.wire)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


async def stream(port: int, body: dict[str, Any]) -> Answer:
    """One streamed completion to its end."""
    raw = await received(port, request({**body, "stream": True, "stream_options": {"include_usage": True}}))
    return parsed(raw)


async def received(port: int, wire: bytes) -> bytes:
    """All that a server answers to a request that closes its connection."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()
    _, protocol = await loop.create_connection(lambda: _Raw(wire, over), "127.0.0.1", port)
    await over
    return b"".join(protocol.pieces)


def parsed(raw: bytes) -> Answer:
    """The events of an answer in chunks."""
    answer = Answer()
    head, _, rest = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        answer.error = raw.decode(errors="replace")[-300:]
        return answer
    content = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size, 16)
        content, rest = content + rest[:count], rest[count + 2 :]
    for line in content.split(b"\n"):
        if not line.startswith(b"data: "):
            continue
        answer.events += 1
        if line == END:
            answer.whole = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            answer.error = event["error"]["message"]
            continue
        if event.get("usage"):
            answer.tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            answer.text += choice["text"]
            answer.finish = choice["finish_reason"] or answer.finish
    return answer


def run_streams(port: int, bodies: list[dict[str, Any]]) -> tuple[float, list[Answer]]:
    """All at once: the seconds until the last byte of the last one, and the answers, which are read afterwards."""

    async def all_at_once() -> tuple[float, list[bytes]]:
        wires = [request({**body, "stream": True, "stream_options": {"include_usage": True}}) for body in bodies]
        begin = time.perf_counter()
        raws = await asyncio.gather(*(received(port, wire) for wire in wires))
        return time.perf_counter() - begin, list(raws)

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seconds, raws = runner.run(all_at_once())
    return seconds, [parsed(raw) for raw in raws]
