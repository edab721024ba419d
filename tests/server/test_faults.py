"""What is left when something dies, leaves or fills up in the middle of the work: nothing, and a server that serves."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.served import Served

ADD = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "What is 27 + 45?"}]}
ENDLESS = {"model": "demo", "prompt": "The", "temperature": 0, "max_tokens": 8000, "ignore_eos": True}
LONG = " ".join(f"word {number}" for number in range(400))  # a prompt of many prefill steps
WAIT_S = 60.0
IMPATIENT = "from statewise.server import engine_client; engine_client.STALE_S = 2.0"
TIGHT = ("--max-running", "4", "--max-prefill-tokens", "128", "--num-records", "16", "--num-pages", "2048")


def answers(server: Served) -> bool:
    """Whether a new request is served, rightly."""
    answer = server.client.post("/v1/chat/completions", json=ADD)
    return answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "27 + 45 = 72"


def eventually(look: Any) -> Any:
    end = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended. One that nobody has waited for yet has ended, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def idle(server: Served) -> bool:
    """Whether nothing runs or waits, and every block that is used is one of a checkpoint."""
    stats = server.client.get("/v1/statewise/stats").json()
    streams = "statewise:streams 0.0\n" in server.client.get("/metrics").text
    return (
        streams
        and "running" in stats
        and (stats["running"], stats["waiting"]) == (0, 0)
        and stats["records"]["used"] == stats["checkpoints"]["device"]
    )


class Streams:
    """Requests without end in threads, and what became of each: its events, or its status."""

    def __init__(self, server: Served, count: int, **body: Any) -> None:
        self._url = str(server.client.base_url).rstrip("/")
        self._begun = threading.Semaphore(0)
        self.results: list[Any] = [None] * count
        self._threads = [threading.Thread(target=self._run, args=(number, body)) for number in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in range(count):
            assert self._begun.acquire(timeout=WAIT_S)

    def _run(self, number: int, body: dict[str, Any]) -> None:
        body = {**ENDLESS, "prompt": f"The {number}", "stream": True, **body}
        events: list[Any] = []
        with (
            suppress(httpx.HTTPError),
            httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=WAIT_S) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
                    if len(events) == 1:
                        self._begun.release()
        self.results[number] = events

    def ended(self) -> list[Any]:
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        return self.results


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """One that starts its engine again, has room for few requests at once, and soon misses a heartbeat."""
    served = Served("--restart-engine", *TIGHT, before=IMPATIENT)
    try:
        yield served.ready()
    finally:
        served.stop()


def test_an_engine_killed_under_load_ends_every_stream_and_comes_back(server: Served) -> None:
    engine = server.engine_pid()
    streams = Streams(server, 4)
    waiting: list[int] = []

    def wait(stream: bool) -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=WAIT_S) as client:
            waiting.append(client.post("/v1/completions", json={**ENDLESS, "stream": stream}).status_code)

    queued = [threading.Thread(target=wait, args=(number == 3,)) for number in range(4)]  # four run already
    for thread in queued:
        thread.start()
    eventually(lambda: server.client.get("/v1/statewise/stats").json().get("waiting") == 4)
    os.kill(engine, signal.SIGKILL)
    for events in streams.ended():
        *pieces, error, done = events
        assert (error["error"]["code"], error["error"]["type"], done) == ("engine_dead", "unavailable_error", "[DONE]")
        assert pieces and all(piece["choices"][0]["text"] is not None for piece in pieces)
    for thread in queued:
        thread.join(WAIT_S)
    assert sorted(waiting) == [200, 503, 503, 503]  # the answer to the one that streams has begun
    assert gone(engine)
    server.ready()
    assert answers(server) and server.engine_pid() != engine
    eventually(lambda: idle(server))


# Where the client is when it is cut: what it asks for, and how many events it waits for first.
CUTS: dict[str, tuple[dict[str, Any], int]] = {
    "queue": ({**ENDLESS, "stream": True}, 0),
    "prefill": ({**ENDLESS, "prompt": LONG, "stream": True}, 0),
    "decode": ({**ENDLESS, "stream": True}, 3),
    "whole": ({**ENDLESS, "stream": False}, 0),
}


async def cut(port: int, number: int) -> None:
    """Ask, and leave without a word: with a reset in every other case."""
    kind = list(CUTS)[number % len(CUTS)]
    chosen = random.Random(number)
    body, count = CUTS[kind]
    content = json.dumps({**body, "prompt": f"{number} {body['prompt']}"}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    got = b""
    while got.count(b"data: ") < count:
        got += await asyncio.wait_for(reader.read(65_536), WAIT_S)
    await asyncio.sleep(chosen.uniform(0, 0.5))
    if number % 2:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def test_clients_that_are_cut_anywhere_leave_nothing(server: Served) -> None:
    async def all_at_once() -> None:
        room = asyncio.Semaphore(25)

        async def one(number: int) -> None:
            async with room:
                await cut(server.client.base_url.port or 0, number)

        await asyncio.gather(*(one(number) for number in range(100)))

    asyncio.run(all_at_once())
    eventually(lambda: idle(server))
    assert answers(server)
    assert "Traceback" not in "".join(server.log)


def test_an_engine_that_hangs_is_not_ready_until_it_goes_on(server: Served) -> None:
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    try:
        eventually(lambda: server.client.get("/ready").status_code == 503)
        assert server.client.get("/health").status_code == 200
    finally:
        os.kill(engine, signal.SIGCONT)
    server.ready()
    assert answers(server) and server.engine_pid() == engine


def test_a_server_that_is_killed_leaves_no_engine_and_the_next_one_no_files() -> None:
    with tempfile.TemporaryDirectory(prefix="sw-", dir="/tmp") as directory:  # short enough for a socket
        killed_and_followed(Path(directory))


def killed_and_followed(tmp_path: Path) -> None:
    environment = {"TMPDIR": str(tmp_path)}
    for loaded in (False, True):
        server = Served(environment=environment)
        try:
            engine = eventually(server.engine_pid)
            if loaded:
                server.ready()
                (left,) = tmp_path.glob("statewise-serve-*")  # the one before this one has been removed
                streams = Streams(server, 3)
            server.process.kill()
            server.process.wait(WAIT_S)
            eventually(lambda pid=engine: gone(pid))
            if loaded:
                assert all(events[-1] != "[DONE]" for events in streams.ended())
                assert left.is_dir()
        finally:
            server.stop()
    server = Served(environment=environment)
    try:
        assert not left.exists()
        # While it loads, it is told to end.
        engine = eventually(server.engine_pid)
        assert server.client.get("/ready").status_code == 503
        refused = server.client.post("/v1/chat/completions", json=ADD)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert server.stop() == 0
        assert gone(engine)
        assert not list(tmp_path.glob("statewise-serve-*"))
    finally:
        server.stop()


def test_a_full_disk_stops_nothing_and_is_said_once(tmp_path: Path) -> None:
    limit, few = 8 << 20, ("--num-records", "8", "--host-cache", "4MiB", "--drain", "60")
    server = Served("--disk-cache", str(tmp_path / "cache"), "--disk-cache-size", f"{limit}B", *TIGHT, *few)
    try:
        server.ready()
        engine = server.engine_pid()
        session = server.client.post("/v1/sessions", json={"text": "The people of the"}).json()

        def ask(number: int) -> None:
            body = {**ENDLESS, "prompt": f"{number} {LONG[:1000]}", "max_tokens": 4}
            assert server.client.post("/v1/completions", json=body).status_code == 200

        for number in range(24):  # more than the directory may hold
            ask(number)
        eventually(lambda: limit // 2 < server.client.get("/v1/statewise/stats").json()["disk_bytes"] <= limit)
        assert "disk cache:" not in "".join(server.log)
        for pid in (engine, server.process.pid):  # now the disk has no room at all
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        for number in range(24, 40):
            ask(number)
        assert "".join(server.log).count("not written to the disk cache") == 1
        exported = server.client.get(f"/v1/sessions/{session['id']}/export")
        assert (exported.status_code, exported.json()["error"]["code"]) == (507, "insufficient_storage")
        sent = server.client.post(
            "/v1/sessions/import", content=b"a" * 100_000, headers={"Content-Type": "application/octet-stream"}
        )
        assert (sent.status_code, sent.json()["error"]["code"]) == (507, "insufficient_storage")
        assert answers(server) and server.engine_pid() == engine
        eventually(lambda: idle(server))

        # Told to end with a long time to drain, then told again.
        streams = Streams(server, 3)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.client.get("/ready").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert all(events[-2]["error"]["code"] == "shutting_down" for events in streams.ended())
        assert gone(engine)
    finally:
        server.stop()


def test_a_server_told_to_end_under_load_ends_in_order() -> None:
    server = Served("--drain", "4").ready()
    try:
        engine = server.engine_pid()
        short, long = Streams(server, 1, max_tokens=40), Streams(server, 3)
        with closing(socket.create_connection(("127.0.0.1", server.client.base_url.port or 0))) as stalled:
            content = json.dumps({**ENDLESS, "stream": True, "n": 8}).encode()  # and reads none of it
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
            stalled.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: server.client.get("/ready").status_code == 503)
            refused = server.client.post("/v1/chat/completions", json=ADD)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "4")
            assert server.process.wait(WAIT_S) == 0
        (events,) = short.ended()
        assert (events[-2]["choices"][0]["finish_reason"], events[-1]) == ("length", "[DONE]")
        for events in long.ended():
            assert (events[-2]["error"]["code"], events[-1]) == ("shutting_down", "[DONE]")
        assert gone(engine)
    finally:
        server.stop()
