"""What each guard does to requests that are in order: next to nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message

from statewise.errors import ConfigError
from statewise.server.access_log import AccessLog
from statewise.server.errors import ApiError
from statewise.server.guards.body import BodyLimit
from statewise.server.guards.cors import Cors
from statewise.server.guards.headers import HeaderLimit
from statewise.server.guards.host import HostCheck, allowed_hosts
from statewise.server.guards.json_body import JsonLimit
from statewise.server.guards.raw_errors import RawErrors
from statewise.server.guards.request_id import RequestId
from statewise.server.guards.stack import GuardSettings, guarded
from statewise.server.keys import KeyGuard, load_keys
from tests.server.probes import JSON, LOCAL, SECRET, application, asked, scope_of

GOOD = "https://good.example"
GUARDS: dict[str, Callable[[ASGIApp], ASGIApp]] = {
    "RawErrors": RawErrors,
    "RequestId": RequestId,
    "AccessLog": AccessLog,
    "HeaderLimit": HeaderLimit,
    "HostCheck": lambda app: HostCheck(app, allowed_hosts("127.0.0.1")),
    "Cors": lambda app: Cors(app, [GOOD]),
    "KeyGuard": lambda app: KeyGuard(app, load_keys([])),
    "BodyLimit": BodyLimit,
    "JsonLimit": JsonLimit,
    "all": lambda app: guarded(app, GuardSettings(origins=(GOOD,))),
}
each_guard = pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)


@each_guard
def test_a_guard_passes_on_all_that_it_receives(guard: Callable[[ASGIApp], ASGIApp]) -> None:
    """The end of the connection above all: an answer that nobody waits for must be ended."""
    incoming: list[Message] = [
        {"type": "http.request", "body": b"[1, ", "more_body": True},
        {"type": "http.request", "body": b"2]", "more_body": False},
        {"type": "http.disconnect"},
    ]
    for received in (incoming, incoming[:1] + incoming[2:], incoming[2:]):
        left, seen = list(received), []

        async def app(scope: Any, receive: Any, send: Any, seen: list[Message] = seen) -> None:
            while not seen or seen[-1]["type"] != "http.disconnect":
                seen.append(await receive())

        async def receive(left: list[Message] = left) -> Message:
            return left.pop(0)

        async def send(message: Message) -> None:
            raise AssertionError("nobody is there to be sent anything")

        asyncio.run(guard(app)(scope_of("POST", headers=[LOCAL, JSON]), receive, send))
        assert seen == received


@pytest.mark.parametrize("guard", [lambda app: BodyLimit(app, 100), JsonLimit], ids=["BodyLimit", "JsonLimit"])
def test_a_refused_body_is_not_read_on(guard: Callable[[ASGIApp], ASGIApp]) -> None:
    """Not even by an application that tries to: it hears of the same error again."""
    errors = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(10):
            try:
                await receive()
            except ApiError as error:
                errors.append(error.status)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    answer = asked(guard(app), "POST", headers=[], pieces=[b"[" * 60, b"[" * 60, b"[" * 60, b"[" * 60])
    assert answer.taken == 120
    assert len(errors) == 9
    assert len(set(errors)) == 1


@each_guard
def test_a_stream_goes_through_piece_by_piece(guard: Callable[[ASGIApp], ASGIApp]) -> None:
    """The next piece is made when the client has the one before, and each is the object that was made."""
    made, got = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(50):
            made.append(b"data: %d\n\n" % number)
            await send({"type": "http.response.body", "body": made[-1], "more_body": True})
            assert len(got) == len(made)
        await send({"type": "http.response.body"})

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        if message.get("body"):
            got.append(message["body"])

    asyncio.run(guard(app)(scope_of("POST", headers=[LOCAL, JSON, (b"origin", GOOD.encode())]), receive, send))
    assert len(got) == 50
    assert all(one is other for one, other in zip(made, got))


@each_guard
def test_a_guard_does_not_hold_back_a_cancellation(guard: Callable[[ASGIApp], ASGIApp]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(10)

    async def run() -> None:
        task = asyncio.create_task(guard(app)(scope_of(), None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())


@each_guard
def test_the_start_and_the_end_of_an_application_pass(guard: Callable[[ASGIApp], ASGIApp]) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(guard(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


@pytest.mark.parametrize("name", ["a", "trace-1:2/3", "x" * 128, '"quoted"'])
def test_a_clients_request_id_is_kept(name: str) -> None:
    app = guarded(application(), GuardSettings())
    answer = asked(app, headers=[LOCAL, (b"x-request-id", name.encode())])
    assert answer.headers["x-request-id"] == name


@pytest.mark.parametrize("names", [[], [b""], [b"x" * 129], [b"a b"], [b"a\nb"], [b"\xff"], [b"\x1b[2J"], [b"a", b"a"]])
def test_any_other_request_id_is_replaced(names: list[bytes]) -> None:
    app = guarded(application(), GuardSettings())
    headers = [LOCAL, *((b"x-request-id", name) for name in names)]
    first, second = (asked(app, path="/no/such/path", headers=headers) for _ in range(2))
    assert first.headers["x-request-id"].startswith("req-")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_failures_are_told_in_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    app = guarded(application(), GuardSettings())
    answer = asked(app, path="/fails", headers=[LOCAL, (b"x-request-id", b"mine")])
    assert answer.status == 500
    assert "mine" in answer.error["message"]
    assert SECRET not in str(answer)
    logged = [record for record in caplog.records if record.exc_info]
    assert [SECRET in caplog.text, len(logged), logged[0].getMessage()] == [True, 1, "request mine failed"]
    late = asked(app, path="/fails/late")
    assert [late.status, late.body, late.complete] == [200, b"data: 1\n\n", False]


def test_a_guard_that_fails_is_answered_for_as_well(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError(SECRET)

    answer = asked(RawErrors(RequestId(broken)))
    assert [answer.status, answer.error["type"], answer.error["code"]] == [500, "server_error", "internal_error"]
    assert answer.headers["x-request-id"] in answer.error["message"]
    assert SECRET in caplog.text


def test_a_client_that_left_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ClientDisconnect

    assert asked(RawErrors(app)).status == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_listed_page_may_use_the_server() -> None:
    app = guarded(application(), GuardSettings(origins=(GOOD,)))
    headers = [LOCAL, (b"origin", GOOD.encode())]
    for path, status in (("/v1/models", 200), ("/no/such/path", 404), ("/fails", 500)):
        answer = asked(app, path=path, headers=headers)
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == GOOD
        assert "Origin" in answer.headers["vary"]
        assert "access-control-allow-credentials" not in answer.headers
    assert asked(app).headers["vary"] == "Origin"


def test_a_preflight_needs_no_key_and_is_answered_for_listed_pages() -> None:
    app = guarded(application(), GuardSettings(origins=(GOOD,), keys=load_keys(["sk-0123456789abcdef"])))
    names = b"authorization, content-type, x-stainless-lang"
    ask = [(b"access-control-request-method", b"POST"), (b"access-control-request-headers", names)]
    answer = asked(app, "OPTIONS", "/v1/chat/completions", [LOCAL, (b"origin", GOOD.encode()), *ask])
    assert [answer.status, answer.body] == [204, b""]
    assert answer.headers["access-control-allow-origin"] == GOOD
    assert answer.headers["access-control-allow-headers"] == names.decode()
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert asked(app, "OPTIONS", "/v1/models", [LOCAL, (b"origin", b"https://evil.example"), *ask]).status == 403
    split = [ask[0], (b"access-control-request-headers", b"a\r\nset-cookie: b")]
    answer = asked(app, "OPTIONS", "/v1/models", [LOCAL, (b"origin", GOOD.encode()), *split])
    assert "access-control-allow-headers" not in answer.headers


def test_every_page_may_use_the_server_only_when_that_is_asked_for() -> None:
    app = guarded(application(), GuardSettings(origins=("*",)))
    for origin in (b"https://evil.example", b"null"):
        answer = asked(app, headers=[LOCAL, (b"origin", origin)])
        assert [answer.status, answer.headers["access-control-allow-origin"]] == [200, "*"]
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    "origin", ["good.example", "https://good.example/", "https://*.example", "null", "", "https://"]
)
def test_what_is_no_origin_is_not_listed(origin: str) -> None:
    with pytest.raises(ConfigError, match="origin"):
        Cors(application(), [origin])


def test_which_names_a_server_answers_to() -> None:
    local = {"localhost", "127.0.0.1", "[::1]"}
    assert allowed_hosts("127.0.0.1") == allowed_hosts("::1") == allowed_hosts("localhost") == local
    assert allowed_hosts("127.0.0.5") == local | {"127.0.0.5"}
    assert allowed_hosts("127.0.0.1", ["My.Example", "[2001:DB8::1]"]) == local | {"my.example", "[2001:db8::1]"}
    assert allowed_hosts("0.0.0.0") is allowed_hosts("::") is allowed_hosts("") is None
    assert allowed_hosts("0.0.0.0", ["my.example"]) == local | {"my.example"}
    assert allowed_hosts("127.0.0.1", ["*"]) is None
    for name in ("", "my example", "http://my.example", "*.example", "[::1"):
        with pytest.raises(ConfigError, match="host name"):
            allowed_hosts("127.0.0.1", [name])


def test_an_ordinary_client() -> None:
    async def run() -> None:
        app = guarded(application(), GuardSettings())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000") as client:
            answer = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hé"}]})
            assert answer.json() == {"count": 1, "tenant": None}
            assert (await client.get("/v1/models", headers={"host": "evil.example"})).status_code == 421
            assert (await client.post("/v1/chat/completions", content=b"[" * 100)).status_code == 400

    asyncio.run(run())


def test_a_path_that_takes_files_has_a_limit_of_its_own() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        total, more = 0, True
        while more:
            message = await receive()
            total, more = total + len(message.get("body", b"")), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(total).encode()})

    async def go() -> list[int]:
        guard = RawErrors(BodyLimit(app, 10, files={"/file": 100}))
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

            async def chunks(size: int) -> Any:
                for _ in range(size):
                    yield b"x"

            sizes = [("/file", 100), ("/file", 101), ("/other", 10), ("/other", 11)]
            said = [(await client.post(path, content=b"x" * size)).status_code for path, size in sizes]
            streamed = [(await client.post(path, content=chunks(size))).status_code for path, size in sizes]
            assert said == streamed
            return said

    assert asyncio.run(go()) == [200, 413, 200, 413]
