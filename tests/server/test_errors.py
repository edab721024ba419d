"""What a client reads when something is wrong: OpenAI's shape, one sentence, and nothing that is not its business."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient

from statewise.errors import (
    BlockError,
    CheckpointError,
    ConfigError,
    OutOfBlocks,
    RequestError,
    SnapshotError,
    StatewiseError,
)
from statewise.server import errors
from statewise.server.errors import ApiError, as_api_error, from_statewise, sse_error
from tests.server.probes import SECRET, application


class EngineDead(StatewiseError):
    """As a server may define it."""


CONSTRUCTED = [
    (ApiError.invalid("no", "top_p"), 400, "invalid_request_error", None),
    (
        ApiError.invalid("This model's maximum context length is 8"),
        400,
        "invalid_request_error",
        "context_length_exceeded",
    ),
    (ApiError.unauthorized(), 401, "authentication_error", "invalid_api_key"),
    (ApiError.forbidden("no"), 403, "permission_error", "forbidden"),
    (ApiError.not_found("no"), 404, "not_found_error", "not_found"),
    (ApiError.model_not_found("gpt"), 404, "not_found_error", "model_not_found"),
    (ApiError.method_not_allowed("GET"), 405, "invalid_request_error", "method_not_allowed"),
    (ApiError.too_large(9), 413, "invalid_request_error", "payload_too_large"),
    (ApiError.headers_too_large("no"), 431, "invalid_request_error", "headers_too_large"),
    (ApiError.unsupported("no", "tools"), 501, "not_supported_error", "unsupported"),
    (ApiError.overloaded(0.2), 503, "unavailable_error", "overloaded"),
    (ApiError.engine_dead(), 503, "unavailable_error", "engine_dead"),
    (ApiError.shutting_down(), 503, "unavailable_error", "shutting_down"),
    (ApiError.internal("req-1"), 500, "server_error", "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), CONSTRUCTED)
def test_the_shape(error: ApiError, status: int, kind: str, code: str | None) -> None:
    assert [error.status, error.status_code, error.type, error.code] == [status, status, kind, code]
    body = json.loads(error.body())
    assert list(body) == ["error"]
    assert body["error"] == {"message": error.message, "type": kind, "param": error.param, "code": code}
    response = error.response()
    assert [response.status_code, response.media_type] == [status, "application/json"]
    event = sse_error(error)
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event[6:]) == body


def test_headers() -> None:
    assert ApiError.overloaded(0.2).response().headers["retry-after"] == "1"
    assert ApiError.overloaded(2.5).response().headers["retry-after"] == "3"
    assert ApiError.unauthorized().response().headers["www-authenticate"] == "Bearer"
    assert ApiError.method_not_allowed("GET, POST").response().headers["allow"] == "GET, POST"
    assert ApiError.internal().response(close=True).headers["connection"] == "close"


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (RequestError("messages.0", "is wrong"), 400, True),
        (OutOfBlocks(SECRET), 503, False),
        (EngineDead(SECRET), 503, False),
        (BlockError(SECRET), 503, False),
        (StatewiseError(SECRET), 500, False),
        (SnapshotError(SECRET), 500, False),
        (CheckpointError(SECRET), 500, False),
        (ConfigError(SECRET), 500, False),
    ],
)
def test_statewise_errors(error: StatewiseError, status: int, told: bool) -> None:
    answer = from_statewise(error, "req-1")
    assert answer.status == status
    assert (answer.message == str(error)) == told
    assert answer.param == ("messages.0" if told else None)
    assert SECRET not in answer.body().decode()
    assert as_api_error(error, "req-1").body() == answer.body()


def test_a_message_that_json_cannot_carry() -> None:
    for text in ("\ud800", "a\n\ndata: [DONE]", "x" * 100_000, "\0\x1b", "\u2028"):
        error = RequestError(text, text)
        assert len(as_api_error(error).body()) < 10_000
        assert sse_error(error).count(b"\n") == 2, "it stays one event"


@pytest.mark.parametrize("error", [RuntimeError(SECRET), ValueError(SECRET), KeyError(SECRET), MemoryError(SECRET)])
def test_what_nobody_foresaw_is_not_told(error: Exception) -> None:
    answer = as_api_error(error, "req-1")
    assert [answer.status, SECRET in answer.body().decode(), "req-1" in answer.message] == [500, False, True]


@pytest.mark.parametrize(
    ("status", "detail", "expected"),
    [
        (401, "Not authenticated", 401),
        (400, "There was an error parsing the body", 400),
        (400, {"path": SECRET}, 400),
        (418, "short", 418),
        (500, SECRET, 500),
        (502, SECRET, 502),
        (599, SECRET, 599),
    ],
)
def test_what_the_framework_raises(status: int, detail: Any, expected: int) -> None:
    answer = as_api_error(HTTPException(status, detail), "req-1")
    assert answer.status == expected
    assert answer.message
    assert SECRET not in answer.body().decode()


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "param", "words"),
    [
        ("POST", "/v1/chat/completions", '{"messages": [{"role": "user"}]}', 400, "messages.0.content", "required"),
        (
            "POST",
            "/v1/chat/completions",
            '{"messages": [], "temperature": 3}',
            400,
            "temperature",
            "less than or equal",
        ),
        ("POST", "/v1/chat/completions", '{"messages": "sk-mine"}', 400, "messages", "list"),
        ("POST", "/v1/chat/completions", "{]", 400, None, "not valid JSON"),
        ("POST", "/v1/chat/completions", "", 400, None, "required"),
        ("GET", "/v1/chat/completions", "", 405, None, "method"),
        ("GET", "/v1/chat", "", 404, None, "nothing at this path"),
        ("GET", "/fails", "", 500, None, "failed"),
        ("GET", "/refuses", "", 400, "prompt", "maximum context length"),
    ],
)
def test_an_application(method: str, path: str, content: str, status: int, param: str | None, words: str) -> None:
    client = TestClient(application(), raise_server_exceptions=False)
    answer = client.request(method, path, content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert [answer.status_code, error["param"]] == [status, param]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert "sk-mine" not in answer.text
    assert SECRET not in answer.text
    if path == "/refuses":
        assert error["code"] == "context_length_exceeded"
    if status == 405:
        assert answer.headers["allow"] == "POST"


def test_a_file_error_while_serving_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = application()

    @app.get("/snapshot")
    async def snapshot() -> None:
        raise SnapshotError(SECRET)

    @app.get("/gone", status_code=204)
    async def gone() -> None:
        raise HTTPException(304, headers={"ETag": "x"})

    client = TestClient(app)
    assert client.get("/snapshot").status_code == 500
    assert SECRET in caplog.text
    assert [client.get("/gone").status_code, client.get("/gone").content] == [304, b""]


def test_no_torch_for_an_error() -> None:
    import subprocess
    import sys

    modules = ["errors", "keys", "access_log", "guards.stack", "guards.connection"]
    code = (
        "".join(f"import statewise.server.{name}\n" for name in modules)
        + "import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert errors.logger.name == "statewise.server.errors"
