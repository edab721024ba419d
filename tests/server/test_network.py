"""The guards behind a real server on the loopback: what a client sees on its socket."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from statewise.server.guards.connection import BoundedHttp
from statewise.server.guards.stack import GuardSettings, guarded
from tests.server.probes import SECRET, SLOW_S, application

LIMIT = 20_000
HOST = b"Host: localhost\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
CHUNKED = POST + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"3e8\r\n" + b" " * 1_000 + b"\r\n"


class Hasty(BoundedHttp):
    """With little patience, so that a test need not have much."""

    head_timeout_s = stall_timeout_s = 0.3
    body_timeout_s = 1.5 * SLOW_S


@dataclass(frozen=True)
class Endless:
    """Bytes to send that begin in one way and then go on for as long as somebody takes them."""

    begin: bytes
    more: bytes

    def __iter__(self) -> Iterator[bytes]:
        return itertools.chain([self.begin], itertools.repeat(self.more, 20_000))


class Streams:
    """A stream whose every event waits until the test has seen the one before."""

    def __init__(self) -> None:
        self.seen = threading.Semaphore(0)
        self.left = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        gone = asyncio.create_task(self._watch(receive))
        for number in itertools.count():
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            while not self.seen.acquire(blocking=False):
                if gone.done():
                    self.left.set()
                    return
                await asyncio.sleep(0.001)

    async def _watch(self, receive: Receive) -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await receive()


class Flood(Streams):
    """A stream that goes on for as long as somebody takes it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(self._watch(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": b" " * 100_000, "more_body": True})
            await asyncio.sleep(0)
        self.left.set()


STREAMS = Streams()
FLOOD = Flood()
ROUTES = application()


async def both(scope: Scope, receive: Receive, send: Send) -> None:
    apps: dict[str, ASGIApp] = {"/stream": STREAMS, "/flood": FLOOD}
    app = apps.get(scope.get("path", ""), ROUTES)
    await app(scope, receive, send)


@pytest.fixture(scope="module", params=["bounded", "httptools", "h11"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """The name of the HTTP protocol and the port."""
    http = Hasty if request.param == "bounded" else request.param
    app = guarded(both, GuardSettings(max_body_bytes=LIMIT, max_body_seconds=SLOW_S))
    config = uvicorn.Config(app, port=0, http=http, log_config=None, access_log=False, ws="none", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield request.param, running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = running.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


only_bounded = pytest.mark.parametrize("server", ["bounded"], indirect=True)


def raw(port: int, pieces: Iterable[bytes]) -> tuple[int, bytes]:
    """Send until the server has enough, and give the status and the body of what it says."""
    start, got = time.perf_counter(), b""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as connection:
        with suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
                if time.perf_counter() - start > SLOW_S:
                    break
        with suppress(ConnectionError):
            while not _is_whole(got):
                piece = connection.recv(65_536)
                if not piece:
                    break
                got += piece
    assert time.perf_counter() - start < SLOW_S
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def _is_whole(got: bytes) -> bool:
    head, end, body = got.partition(b"\r\n\r\n")
    lengths = [line.split()[1] for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    return bool(end and lengths) and len(body) >= int(lengths[0])


# The second number is for servers whose own parser refuses first, in words of its own.
RAW: list[tuple[str, Iterable[bytes], int, int]] = [
    ("a header of 30 KB", [b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 30_000 + b"\r\n\r\n"], 200, 200),
    ("a header of 200 KB", [b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 200_000 + b"\r\n\r\n"], 431, 400),
    ("5,000 headers", [b"GET /health HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 5_000 + b"\r\n"], 431, 431),
    ("a path of 20 KB", [b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"], 414, 414),
    ("no host", [b"GET /health HTTP/1.0\r\n\r\n"], 400, 400),
    ("two hosts", [b"GET /health HTTP/1.1\r\n" + HOST * 2 + b"\r\n"], 400, 400),
    ("a rebound name", [b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n"], 421, 421),
    ("two lengths", [POST + HOST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n{}  "], 400, 400),
    ("a negative length", [POST + HOST + b"Content-Length: -3\r\n\r\n{}"], 400, 400),
    ("too great a length", [POST + HOST + b"Content-Length: 20001\r\n\r\n"], 413, 413),
    (
        "too great a length, asking first",
        [POST + HOST + b"Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n"],
        413,
        413,
    ),
    ("a length and chunks", [CHUNKED[:-2] + b"Content-Length: 4\r\n\r\n0\r\n\r\n"], 400, 400),
    ("chunks without end", Endless(CHUNKED, CHUNK), 413, 413),
    ("tiny chunks without end", Endless(CHUNKED, b"1\r\n \r\n" * 1_000), 413, 413),
    ("levels without end", Endless(CHUNKED, b"1\r\n[\r\n"), 400, 400),
    ("a chunk of negative size", [CHUNKED + b"-1\r\n\r\n"], 400, 400),
    ("bytes that are no UTF-8", [POST + HOST + b'Content-Length: 4\r\n\r\n"\xff\xfe"'], 400, 400),
    ("a path that is no UTF-8", [b"GET /%ff%fe%00%0a HTTP/1.1\r\n" + HOST + b"\r\n"], 404, 404),
    ("a null in a header", [b"GET /health HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n"], 400, 400),
    ("a name that is none", [b"GET /health HTTP/1.1\r\n" + HOST + b"X y: a\r\n\r\n"], 400, 400),
    ("no HTTP", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"], 400, 400),
    ("a failure", [b"GET /fails HTTP/1.1\r\n" + HOST + b"\r\n"], 500, 500),
]


@pytest.mark.parametrize(("pieces", "status", "parsers"), [pytest.param(*case[1:], id=case[0]) for case in RAW])
def test_on_the_wire(pieces: Iterable[bytes], status: int, parsers: int, server: tuple[str, int]) -> None:
    protocol, port = server
    answered, body = raw(port, pieces)
    assert answered in ((status,) if protocol == "bounded" else (status, parsers))
    assert SECRET.encode() not in body
    if protocol == "bounded" and status != 200:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"http://localhost:{port}/health").status_code == 200


def test_a_client_that_sends_too_much_reads_why(server: tuple[str, int]) -> None:
    for content in (b" " * 20_000_000, itertools.repeat(b" " * 50_000, 400)):
        answer = httpx.post(f"http://localhost:{server[1]}/v1/chat/completions", content=content)
        assert [answer.status_code, answer.headers["connection"]] == [413, "close"]
        assert answer.json()["error"]["code"] == "payload_too_large"


def test_events_arrive_one_by_one_and_a_client_may_leave(server: tuple[str, int]) -> None:
    STREAMS.left.clear()
    with httpx.stream("GET", f"http://localhost:{server[1]}/stream", timeout=5) as answer:
        events = answer.iter_raw()
        for number in range(20):
            assert next(events) == b"data: %d\n\n" % number
            STREAMS.seen.release()
        next(events)
    assert STREAMS.left.wait(5), "the application hears that the client has left"


def test_a_stream_that_breaks_is_seen_to_be_broken(server: tuple[str, int]) -> None:
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream("GET", f"http://localhost:{server[1]}/fails/late") as answer,
    ):
        assert SECRET.encode() not in answer.read()


def test_a_connection_serves_again_after_a_refusal(server: tuple[str, int]) -> None:
    with httpx.Client(base_url=f"http://localhost:{server[1]}") as client:
        for _ in range(3):
            assert client.post("/v1/chat/completions", content=b"[" * 100).status_code == 400
            assert client.get("/no/such/path").status_code == 404
            assert client.get("/health").status_code == 200


@only_bounded
def test_a_head_or_a_trailer_without_end_costs_little(server: tuple[str, int]) -> None:
    for begin, more in (
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: ", b"a" * 10_000),
        (b"GET /health HTTP/1.1\r\n" + HOST, b"X: a\r\n" * 1_000),
        (b"GET /", b"a" * 10_000),
        (CHUNKED + b"1\r\n \r\n0\r\nX: ", b"a" * 10_000),
    ):
        status, _ = raw(server[1], Endless(begin, more))
        assert status == 431 or (begin.startswith(CHUNKED) and status == 0)  # an answer may be on its way already


@only_bounded
def test_a_head_that_does_not_come_is_not_waited_for(server: tuple[str, int]) -> None:
    whole = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
    for begin, statuses in ((b"", [408]), (b"GET /hea", [408]), (whole + b"GET /hea", [200, 408])):
        with closing(socket.create_connection(("127.0.0.1", server[1]), timeout=SLOW_S)) as connection:
            connection.sendall(begin)
            got = b""
            while piece := connection.recv(65_536):
                got += piece
        assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", got)] == statuses


def test_many_requests_at_once_are_no_long_head(server: tuple[str, int]) -> None:
    get = b"GET /health HTTP/1.1\r\nX: " + b"a" * 1_000 + b"\r\n" + HOST
    got = b""
    with closing(socket.create_connection(("127.0.0.1", server[1]), timeout=5)) as connection:
        connection.sendall((get + b"\r\n") * 200 + get + b"Connection: close\r\n\r\n")
        while piece := connection.recv(65_536):
            got += piece
    assert got.count(b"HTTP/1.1 200 OK") == 201


def dribble(port: int, head: bytes) -> bytes:
    """Send a head, then a byte of the body now and then. What comes back until the server has had enough."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=0.05)) as connection:
        connection.sendall(head)
        got, end = b"", time.monotonic() + 30
        with suppress(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(b" ")
                with suppress(TimeoutError):
                    piece = connection.recv(65_536)
                    if not piece:
                        return got
                    got += piece
        assert time.monotonic() < end, "the server waits"
    return got


def test_a_body_that_dribbles_is_not_waited_for(server: tuple[str, int]) -> None:
    heads = [POST + HOST + b"Content-Length: 10000\r\n\r\n", CHUNKED + b"2710\r\n"]
    for head in heads if server[0] == "bounded" else heads[:1]:
        got = dribble(server[1], head)
        assert got.startswith(b"HTTP/1.1 408") and json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"]
    assert httpx.get(f"http://localhost:{server[1]}/health").status_code == 200


@only_bounded
def test_a_body_that_nobody_reads_ends_with_the_connection(server: tuple[str, int]) -> None:
    got = dribble(server[1], b"GET /health HTTP/1.1\r\nContent-Length: 10000\r\n" + HOST + b"\r\n")
    assert got.startswith(b"HTTP/1.1 200")


@only_bounded
def test_a_client_that_takes_nothing_of_its_answer_is_cut(server: tuple[str, int]) -> None:
    FLOOD.left.clear()
    with closing(socket.create_connection(("127.0.0.1", server[1]), timeout=5)) as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\n" + HOST + b"\r\n")
        assert FLOOD.left.wait(30)


@only_bounded
def test_a_client_that_leaves_with_requests_in_line_is_seen_to_leave(server: tuple[str, int]) -> None:
    STREAMS.left.clear()
    with closing(socket.create_connection(("127.0.0.1", server[1]), timeout=5)) as connection:
        connection.sendall((b"GET /stream HTTP/1.1\r\n" + HOST + b"\r\n") * 2)
        connection.recv(65_536)
    STREAMS.seen.release()  # the next write finds nobody there
    assert STREAMS.left.wait(30)
