"""One line for each request, which nothing that a client sends can forge or fill."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from statewise.server.access_log import AccessLog
from statewise.server.guards.stack import GuardSettings, guarded
from statewise.server.keys import load_keys
from statewise.server.logs import JsonLines
from tests.server.probes import BEARER, JSON, KEY, LOCAL, application, asked, scope_of

LOGGER = "statewise.server.access_log"
CHAT = b'{"messages": [{"role": "user", "content": "a private thing"}]}'
LINE = re.compile(r"[!-~]+ [!-~]* \d{3} \d+\.\d{4}s \d+B id=[!-~]+ key=[!-~]+( [a-z]+=\d+)*( incomplete)?")


def app() -> ASGIApp:
    settings = GuardSettings(keys=load_keys([f"alice: {KEY}"]), quiet_paths=("/health",))
    return guarded(application(), settings)


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, LOGGER)
    return lambda: [record.getMessage() for record in caplog.records if record.name == LOGGER]


@pytest.fixture
def objects(caplog: pytest.LogCaptureFixture) -> Any:
    """The same lines as JSON."""
    write = JsonLines("server").format
    return lambda: [write(record) for record in caplog.records if record.name == LOGGER]


def test_a_line(lines: Any) -> None:
    headers = [LOCAL, JSON, BEARER, (b"x-request-id", b"mine"), (b"cookie", b"secret")]
    answer = asked(app(), "POST", "/v1/chat/completions", headers, pieces=[CHAT], query=b"q=private")
    asked(app(), "POST", "/v1/sessions/private-name", headers, pieces=[b"abc"])
    asked(app(), "GET", "/v1/models", [LOCAL])
    asked(app(), "GET", "/health", [LOCAL])
    first, second, third = lines()
    assert re.fullmatch(
        rf"POST /v1/chat/completions 200 [\d.]+s {len(answer.body)}B id=mine key=alice prompt=12 completion=5 cached=3",
        first,
    )
    assert second.startswith("POST /v1/sessions/{name} 200 ")
    assert re.fullmatch(r"GET /v1/models 401 [\d.]+s \d+B id=req-\w+ key=-", third)
    assert not any(word in line for line in lines() for word in ("private", "secret", KEY))


def test_a_line_as_json(objects: Any) -> None:
    asked(app(), "POST", "/v1/chat/completions", [LOCAL, JSON, BEARER], pieces=[CHAT])
    asked(app(), "GET", "/fails", [LOCAL, BEARER])
    first, second = (json.loads(line) for line in objects())
    assert first["path"] == "/v1/chat/completions"
    assert [first[name] for name in ("method", "status", "key", "prompt_tokens")] == ["POST", 200, "alice", 12]
    assert {"time", "seconds", "bytes", "request_id", "completion_tokens", "cached_tokens"} < set(first)
    assert [second["status"], "prompt_tokens" in second, "incomplete" in second] == [500, False, False]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/a\nGET /forged 200 0.0001s 1B id=x key=alice"),
        ("GET", "/a\r\n\x1b[2J\x07\x00\x7f\x9b"),
        ("GET", "/a 200 0.0001s 1B id=x key=alice"),
        ("GET", "/\u202e\u2028\ud800界"),
        ("GET", '/"},{"'),
        ("GET", "/%0a%25"),
        ("GET", "/" + "a" * 8_000),
        ("GET", ""),
        ("G\nET", "/a"),
    ],
)
def test_a_request_makes_one_line_whatever_its_path(method: str, path: str, lines: Any, objects: Any) -> None:
    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["key_name"] = "a\nb c"
        scope["state"]["prompt_tokens"] = "12 \n"
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body"})

    scope = scope_of() | {"method": method, "path": path}
    del scope["raw_path"]

    async def run() -> None:
        async def drop(message: Message) -> None:
            pass

        await AccessLog(nothing)(scope, drop, drop)  # type: ignore[arg-type]

    asyncio.run(run())
    (line,), (written,) = lines(), objects()
    for one in (line, written):
        assert one.isascii()
        assert one.isprintable()
        assert len(one) < 2_500
    assert LINE.fullmatch(line)
    assert line.count(" ") == 6
    assert json.loads(written)["status"] == 404
    assert json.loads(written)["path"].isprintable()


def test_how_a_request_ended(lines: Any) -> None:
    def run(messages: list[Message], leaves: bool, fails: bool) -> None:
        async def application(scope: Any, receive: Any, send: Any) -> None:
            for message in messages:
                await send(message)
            await receive()
            if fails:
                raise RuntimeError

        async def receive() -> Message:
            return {"type": "http.disconnect"} if leaves else {"type": "http.request", "body": b""}

        async def send(message: Message) -> None:
            pass

        try:
            asyncio.run(AccessLog(application)(scope_of(), receive, send))
        except RuntimeError:
            assert fails

    start: Message = {"type": "http.response.start", "status": 200, "headers": []}
    piece: Message = {"type": "http.response.body", "body": b"123", "more_body": True}
    end: Message = {"type": "http.response.body", "body": b"4567"}
    run([], leaves=True, fails=False)
    run([], leaves=False, fails=True)
    run([start, piece], leaves=True, fails=False)
    run([start, piece], leaves=False, fails=True)
    run([start, piece, end], leaves=True, fails=False)
    words = [line.split() for line in lines()]
    assert [[word[2], word[4], word[-1] == "incomplete"] for word in words] == [
        ["499", "0B", True],
        ["500", "0B", True],
        ["200", "3B", True],
        ["200", "3B", True],
        ["200", "7B", False],
    ]
