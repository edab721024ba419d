"""The load generator's connections, against bytes that a test writes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable

import pytest

from statewise.traffic.connection import MAX_HEAD, Connection, ConnectionGone, Response
from statewise.traffic.errors import ServerError
from statewise.traffic.record import Record
from statewise.traffic.sender import Sender, Talk, failure
from statewise.traffic.target import Target
from statewise.traffic.workload import Turn
from tests.traffic import virtual_time

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n5\r\ndefgh\r\n0\r\n\r\n"


class Wire(asyncio.Transport):
    """Keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def abort(self) -> None:
        self.closed = True


def connected() -> tuple[Connection, Wire]:
    connection, wire = Connection(virtual_time.clock), Wire()
    connection.connection_made(wire)
    return connection, wire


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(CHUNKED)])
def test_an_answer_is_handed_on_with_the_time_of_its_pieces(size: int) -> None:
    async def main() -> None:
        connection, wire = connected()
        begin, got = virtual_time.clock(), []
        asking = asyncio.create_task(
            connection.ask(b"GET", lambda _: lambda at, piece: got.append((at - begin, piece)))
        )
        for at in range(0, len(CHUNKED), size):
            await asyncio.sleep(1)
            connection.data_received(CHUNKED[at : at + size])
        response = await asking
        assert (response.status, b"".join(piece for _, piece in got), wire.written) == (200, b"abcdefgh", b"GET")
        for when, piece in got:
            # The last byte of a piece came in the cut that ends at or behind it.
            end = CHUNKED.index(piece) + len(piece) if len(piece) > 1 else 0
            assert when * size >= end
        assert [when for when, _ in got] == sorted(when for when, _ in got)
        assert connection.open
        assert connection.used

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * (MAX_HEAD + 1), "headers"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "no HTTP"),
    ],
)
def test_what_is_no_answer_fails_the_request(content: bytes, message: str) -> None:
    async def main() -> None:
        connection, wire = connected()
        asking = asyncio.create_task(connection.ask(b"GET", lambda _: lambda at, piece: None))
        await asyncio.sleep(0)
        connection.data_received(content)
        with pytest.raises(ConnectionGone, match=message):
            await asking
        assert wire.closed

    virtual_time.run(main())


def test_an_error_of_the_receiver_ends_the_request() -> None:
    async def main() -> None:
        connection, wire = connected()

        def sink(_: Response) -> Callable[[float, bytes], None]:
            def take(at: float, piece: bytes) -> None:
                raise ValueError("not this")

            return take

        asking = asyncio.create_task(connection.ask(b"GET", sink))
        await asyncio.sleep(0)
        connection.data_received(CHUNKED)
        with pytest.raises(ValueError, match="not this"):
            await asking
        assert wire.closed

    virtual_time.run(main())


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def against(handler: Handler, ask: Callable[[Target], Awaitable[None]]) -> None:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    target = Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        async with asyncio.timeout(30):
            await ask(target)
    finally:
        target.close()
        server.close()


def test_a_connection_is_kept_and_one_that_closes_meanwhile_is_no_failure() -> None:
    seen = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for left in (1, 0):
            seen.append((await reader.readuntil(b"\r\n\r\n")).split()[1])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            if not left:
                writer.close()  # without a word, as a server does with a connection that was quiet for long

    async def ask(target: Target) -> None:
        for at in range(5):
            assert await target.ask("GET", f"/{at}") == (200, b"{}")
        assert target.connections == 3

    asyncio.run(against(handler, ask))
    assert seen == [b"/0", b"/1", b"/2", b"/3", b"/4"]


def test_an_answer_that_is_cut_short_is_a_failure() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        event = b'data: {"choices": [{"index": 0, "text": "a"}]}\n'
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        writer.close()

    async def ask(target: Target) -> None:
        record, turn = Record(1, 0, 0.0), Turn("a", 5)
        await Sender(target, "demo").converse([turn], record, Talk())
        assert record.failure is not None
        assert record.failure.kind == "connection lost"
        assert len(record.times) == 1
        assert not record.counted

    asyncio.run(against(handler, ask))


def test_a_request_that_takes_too_long_is_a_failure() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def ask(target: Target) -> None:
        record = Record(1, 0, 0.0)
        await Sender(target, "demo", timeout_s=0.05).converse([Turn("a", 5)], record, Talk())
        assert record.failure is not None
        assert (record.failure.kind, record.failure.message) == ("timeout", "no complete answer within 0.05 seconds")
        assert record.ended >= record.started > 0

    asyncio.run(against(handler, ask))


def test_failures_have_few_kinds() -> None:
    kinds = {
        failure(error, 1).kind
        for error in (ConnectionRefusedError(111, "refused"), OSError("x"), ssl.SSLError(1, "bad"), TimeoutError())
    }
    assert kinds == {"no connection", "TLS", "timeout"}


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://a.example/proxy/v1", "https://a.example/proxy"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_url_is_taken_with_and_without_its_version(url: str, found: str) -> None:
    assert Target(url).url == found


@pytest.mark.parametrize(
    "url",
    ["", "ftp://a", "http://", "http://a:99999", "http://a b", "http://a/\r\nX: y", "http://u:p@a", "http://a?b", "ä"],
)
def test_what_is_no_url_is_told(url: str) -> None:
    with pytest.raises(ServerError, match=r"write it like http://127.0.0.1:8000"):
        Target(url)
