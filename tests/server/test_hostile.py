"""Requests that no honest client sends: each gets the answer it deserves, at once, and in OpenAI's shape."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable

import pytest

from statewise.server.guards.headers import HeaderLimit
from statewise.server.guards.request_id import RequestId
from statewise.server.guards.stack import GuardSettings, guarded
from statewise.server.keys import load_keys
from tests.server.probes import BEARER, JSON, KEY, LOCAL, SECRET, Answer, application, asked

CHAT = "/v1/chat/completions"
LIMIT = 100_000
GOOD = b'{"messages": [{"role": "user", "content": "hi"}]}'
APP = guarded(
    application(),
    GuardSettings(origins=("https://good.example",), keys=load_keys([f"alice: {KEY}"]), max_body_bytes=LIMIT),
)

Headers = Iterable[tuple[bytes, bytes]]


def host(value: bytes) -> Headers:
    return [(b"host", value), BEARER]


def origin(*values: bytes) -> Headers:
    return [LOCAL, BEARER, *((b"origin", value) for value in values)]


def key(*headers: tuple[bytes, bytes]) -> Headers:
    return [LOCAL, *headers]


def length(*values: bytes) -> Headers:
    return [LOCAL, BEARER, JSON, *((b"content-length", value) for value in values)]


READS: list[tuple[str, Headers, int]] = [
    ("one header of 200 KB", [LOCAL, BEARER, (b"x", b"a" * 200_000)], 431),
    ("a header's name of 200 KB", [LOCAL, BEARER, (b"x" * 200_000, b"a")], 431),
    ("101 headers", [LOCAL, BEARER, *[(b"x", b"a")] * 99], 431),
    ("50,000 empty headers", [LOCAL, BEARER, *[(b"x", b"")] * 50_000], 431),
    ("100 headers of 400 bytes", [LOCAL, BEARER, *[(b"x", b"a" * 400)] * 98], 431),
    ("no host", [BEARER], 400),
    ("two hosts", [LOCAL, LOCAL, BEARER], 400),
    ("an empty host", host(b""), 400),
    ("a rebound name", host(b"evil.example:8000"), 421),
    ("a name that begins like ours", host(b"localhost.evil.example"), 421),
    ("a name that begins like our address", host(b"127.0.0.1.evil.example"), 421),
    ("a name that ends like ours", host(b"evil-localhost"), 421),
    ("the address as a number", host(b"2130706433"), 421),
    ("the unspecified address", host(b"0.0.0.0:8000"), 421),
    ("another address of the loopback", host(b"127.1"), 421),
    ("an impossible port", host(b"localhost:99999999"), 400),
    ("a user before the host", host(b"localhost@evil.example"), 400),
    ("a path behind the host", host(b"localhost/evil"), 400),
    ("a list of hosts", host(b"localhost, evil.example"), 400),
    ("an open bracket", host(b"[::1"), 400),
    ("bytes in the host", host(b"local\xff\x00host"), 400),
    ("100,000 dots", host(b"a." * 10_000 + b"!"), 400),
    ("a page of another origin", origin(b"https://evil.example"), 403),
    ("a page without an origin", origin(b"null"), 403),
    ("an empty origin", origin(b""), 403),
    ("a listed origin and another", origin(b"https://good.example", b"https://evil.example"), 403),
    ("an origin that begins like a listed one", origin(b"https://good.example.evil.example"), 403),
    ("an origin that ends like a listed one", origin(b"https://evilgood.example"), 403),
    ("another scheme than the listed one", origin(b"http://good.example"), 403),
    ("another port than the listed one", origin(b"https://good.example:444"), 403),
    ("another port of this machine", origin(b"http://localhost:3000"), 403),
    ("bytes in the origin", origin(b"https://\xff\r\nx: y"), 403),
    ("no key", key(), 401),
    ("an empty key", key((b"authorization", b"Bearer ")), 401),
    ("a scheme without a key", key((b"authorization", b"Bearer")), 401),
    ("another scheme", key((b"authorization", b"Basic " + KEY.encode())), 401),
    ("a key without a scheme", key((b"authorization", KEY.encode())), 401),
    ("the beginning of the key", key((b"authorization", b"Bearer " + KEY.encode()[:-1])), 401),
    ("the key and more", key((b"authorization", b"Bearer " + KEY.encode() + b"x")), 401),
    ("the key in capitals", key((b"authorization", b"Bearer " + KEY.upper().encode())), 401),
    ("the key and a null", key((b"authorization", b"Bearer " + KEY.encode() + b"\0")), 401),
    ("the key and another word", key((b"authorization", b"Bearer " + KEY.encode() + b" x")), 401),
    ("the key's name", key((b"x-api-key", b"alice")), 401),
    ("the key's digest", key((b"x-api-key", hashlib.sha256(KEY.encode()).hexdigest().encode())), 401),
    ("the key's raw digest", key((b"x-api-key", hashlib.sha256(KEY.encode()).digest())), 401),
    *[(f"the right key and wrong one {n}", key(BEARER, (b"x-api-key", b"%d" % n)), 401) for n in range(16)],
    ("a wrong key and the right one", key((b"authorization", b"Bearer other"), BEARER), 401),
    ("the key as a cookie", key((b"cookie", b"authorization=" + KEY.encode())), 401),
    ("30,000 bytes of key", key((b"authorization", b"Bearer " + b"k" * 30_000)), 401),
]

PATHS: list[tuple[str, str, int]] = [
    ("GET", "/v1/models", 401),
    ("GET", "/metrics", 401),
    ("GET", "/docs", 401),
    ("GET", "/openapi.json", 401),
    ("GET", "/no/such/path", 401),
    ("GET", "/health/", 401),
    ("GET", "//health", 401),
    ("GET", "/./health", 401),
    ("GET", "/health/../v1/models", 401),
    ("GET", "/health;x", 401),
    ("GET", "/HEALTH", 401),
    ("GET", "/health\x00", 401),
    ("GET", "/health\n", 401),
    ("GET", "", 401),
    ("POST", "/health", 401),
    ("OPTIONS", "/v1/models", 401),
    ("TRACE", "/", 401),
    ("GET", "/" + "a" * 9_000, 414),
]

BODIES: list[tuple[str, Headers, Iterable[bytes], int]] = [
    ("more bytes than allowed, said so", length(b"100001"), [GOOD], 413),
    ("a length of 5,000 digits", length(b"9" * 5_000), [GOOD], 413),
    ("a negative length", length(b"-1"), [GOOD], 400),
    ("a length with a sign", length(b"+49"), [GOOD], 400),
    ("a length as Python writes it", length(b"4_9"), [GOOD], 400),
    ("a length in hexadecimal", length(b"0x31"), [GOOD], 400),
    ("an empty length", length(b""), [GOOD], 400),
    ("two lengths", length(b"49", b"50"), [GOOD], 400),
    ("the same length twice", length(b"49", b"49"), [GOOD], 400),
    ("a length and chunks", [*length(b"49"), (b"transfer-encoding", b"chunked")], [GOOD], 400),
    ("a body that never ends", length(), itertools.repeat(b" " * 1_000), 413),
    ("a body that never ends, byte by byte", length(), itertools.chain([b" " * LIMIT], itertools.repeat(b" ")), 413),
    ("more bytes than said", length(b"49"), itertools.repeat(b" " * 1_000), 413),
    ("a compressed body", [*length(), (b"content-encoding", b"gzip")], [b"\x1f\x8b"], 415),
    ("65 levels", length(), [b"[" * 65 + b"]" * 65], 400),
    ("50,000 levels", length(), [b"[" * 50_000], 400),
    ("50,000 levels, byte by byte", length(), itertools.repeat(b"["), 400),
    ("50,000 levels of objects", length(), [b'{"":' * 20_000], 400),
    ("levels behind an escaped quote", length(), [b'["\\"", ' + b"[" * 65], 400),
    ("levels behind a quote cut in two", length(), [b'["\\', b'"", ' + b"[" * 65], 400),
    ("levels without a content type", [LOCAL, BEARER], [b"[" * 65], 400),
    ("levels in another JSON type", [LOCAL, BEARER, (b"content-type", b"Application/X+JSON; a=b")], [b"[" * 65], 400),
    ("levels and two content types", [LOCAL, BEARER, (b"content-type", b"text/plain"), JSON], [b"[" * 65], 400),
    ("bytes that are no UTF-8", length(), [b'{"messages": "\xff\xfe"}'], 400),
    ("half a character", length(), [b'{"messages": "\xe2\x82'], 400),
    ("a character longer than it need be", length(), [b'{"messages": "\xc0\xaf"}'], 400),
    ("UTF-16", length(), [GOOD.decode().encode("utf-16")], 400),
    ("UTF-32", length(), [GOOD.decode().encode("utf-32")], 400),
    ("a null", length(), [b'{"messages": "\0"}'], 400),
    ("half an object", length(), [GOOD[:-1]], 400),
    ("two objects", length(), [GOOD + GOOD], 400),
    ("nothing", length(), [b""], 400),
    ("nothing in many pieces", length(), [b""] * 1_000, 400),
    ("no object", length(), [b"17"], 400),
    ("a number of 10,000 digits", length(), [b'{"messages": [], "extra": ' + b"9" * 10_000 + b"}"], 400),
    ("half a surrogate pair", length(), [b'{"messages": [{"role": "\\ud800", "content": ""}]}'], 400),
    ("half a surrogate pair, cut", length(), [b'{"messages": "\\u', b"d", b'800"}'], 400),
    ("half a surrogate pair behind a pair", length(), [b'{"extra": "\\uD83D\\uDE00\\uDE00"}'], 400),
    ("half a surrogate pair and a backslash", length(), [b'{"extra": "\\ud83d\\\\\\ude00"}'], 400),
    ("a field of the wrong kind", length(), [b'{"messages": [{"role": "user", "content": 3}]}'], 400),
    ("a field out of range", length(), [b'{"messages": [], "temperature": 1e999}'], 400),
    ("JSON that says it is text", [LOCAL, BEARER, (b"content-type", b"text/plain")], [GOOD], 400),
]


def check(answer: Answer, status: int) -> None:
    assert answer.status == status
    assert answer.complete
    assert isinstance(answer.error["message"], str)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert "access-control-allow-origin" not in answer.headers
    assert SECRET not in str(answer)


@pytest.mark.parametrize(("headers", "status"), [pytest.param(*case[1:], id=case[0]) for case in READS])
def test_headers(headers: Headers, status: int) -> None:
    check(asked(APP, "GET", "/v1/models", headers), status)


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_only_the_open_paths_need_no_key(method: str, path: str, status: int) -> None:
    check(asked(APP, method, path), status)


@pytest.mark.parametrize(("headers", "pieces", "status"), [pytest.param(*case[1:], id=case[0]) for case in BODIES])
def test_bodies(headers: Headers, pieces: Iterable[bytes], status: int) -> None:
    answer = asked(APP, "POST", CHAT, headers, pieces=pieces)
    check(answer, status)
    assert answer.taken <= LIMIT + 1_000, "nothing is read beyond the limit"


def test_a_refusal_ends_the_connection_when_much_of_the_body_is_left() -> None:
    """Otherwise the server reads the rest only to throw it away, for as long as it comes."""
    chunked, small, large, bad = (
        asked(APP, "POST", CHAT, [LOCAL, header]).headers.get("connection")
        for header in (
            (b"transfer-encoding", b"chunked"),
            (b"content-length", b"50000"),
            (b"content-length", b"90000"),
            (b"content-length", b"-1"),
        )
    )
    assert [chunked, small, large, bad] == ["close", None, "close", "close"]


def test_empty_headers_count_as_well() -> None:
    app = HeaderLimit(application(), max_bytes=100)
    check(asked(RequestId(app), "GET", "/v1/models", [(b"x", b"")] * 21), 431)


def test_a_key_in_the_query_is_no_key() -> None:
    check(asked(APP, "GET", "/v1/models", query=b"api_key=" + KEY.encode()), 401)
    check(asked(APP, "GET", "/v1/models", query=b"x" * 9_000), 414)


def test_honest_requests_come_through() -> None:
    for value in (b"localhost", b"LOCALHOST:1", b"localhost.:80", b"127.0.0.1:65535", b"[::1]:8000", b"[::1]"):
        assert asked(APP, "GET", "/v1/models", host(value)).status == 200
    for credential in (BEARER, (b"authorization", b"bearer  " + KEY.encode()), (b"x-api-key", KEY.encode())):
        assert asked(APP, "GET", "/v1/models", key(credential)).status == 200
    assert asked(APP, "GET", "/v1/models", key(BEARER, (b"x-api-key", KEY.encode()))).status == 200
    assert asked(APP, "GET", "/v1/models", origin(b"http://localhost:8000")).status == 200
    for path in ("/", "/health"):
        assert asked(APP, "GET", path).status == 200
    for extra in ("[" * 63 + "]" * 63, json.dumps("[" * 500), '"\\\\\\" [[ "', json.dumps(["]"] * 300)):
        body = GOOD[:-1] + b', "extra": ' + extra.encode() + b"}"
        assert asked(APP, "POST", CHAT, length(str(len(body)).encode()), pieces=[body]).status == 200
        assert asked(APP, "POST", CHAT, length(), pieces=[bytes([byte]) for byte in body]).status == 200
    assert asked(APP, "POST", "/v1/sessions/a", key(BEARER), pieces=[b" " * LIMIT]).status == 200
    upload = key(BEARER, (b"content-type", b"application/octet-stream"))
    assert asked(APP, "POST", "/v1/sessions/a", upload, pieces=[b"[" * 900 + b"\xff\0"]).status == 200


def test_a_socket_needs_a_key_too() -> None:
    import asyncio

    from tests.server.probes import scope_of

    async def connect(headers: Headers) -> list[str]:
        sent = []

        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, object]) -> None:
            sent.append(str(message["type"]))

        scope = scope_of("GET", "/v1/models", headers) | {"type": "websocket"}
        del scope["method"]
        await APP(scope, receive, send)  # type: ignore[arg-type]
        return sent

    for headers in (key(), key((b"x-api-key", b"no")), host(b"evil.example"), origin(b"https://evil.example")):
        assert asyncio.run(connect(headers)) == ["websocket.close"]
