"""A client that only counts: streams on raw sockets, in a process of its own so that it takes nothing from the others.

    python -m benchmarks.serving_parts.counting_client PORT PATH STREAMS WARM_UP_S SECONDS

Opens the streams, lets them warm up, and prints how many events came in so many seconds. The streams are cut then.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time

EVENT = b"data: "
LARGE = 1 << 20


def request(path: str, max_tokens: int) -> bytes:
    """A streamed request on the wire."""
    body: dict[str, object] = {"model": "demo", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    if path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": "Go on."}]
    else:
        body["prompt"] = [11, 12, 13]
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def count(port: int, path: str, streams: int, warm_up_s: float, seconds: float) -> dict[str, float]:
    """Events and reads in the time, and the time itself."""
    selector, buffer = selectors.DefaultSelector(), bytearray(LARGE)
    view = memoryview(buffer)
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request(path, 1 << 30))
        selector.register(connection, selectors.EVENT_READ)
    begin = time.perf_counter() + warm_up_s
    now, end, events, reads = 0.0, begin + seconds, 0, 0
    while now < end:
        for key, _ in selector.select(1.0):
            got = key.fileobj.recv_into(view)  # type: ignore[union-attr]
            if not got:
                raise RuntimeError("a stream has ended")
            # An event on the edge of two reads is missed: less than one in a read.
            if now >= begin:
                events += buffer.count(EVENT, 0, got)
                reads += 1
        now = time.perf_counter()
    return {"events": events, "reads": reads, "seconds": now - begin}


if __name__ == "__main__":
    port, path, *rest = sys.argv[1:]
    print(json.dumps(count(int(port), path, int(rest[0]), float(rest[1]), float(rest[2]))))
