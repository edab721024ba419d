"""Errors as OpenAI's API words them: the exception that carries one, its body, and the handlers that make them.

Whatever a client reads here is a sentence that somebody wrote for it. An exception that nobody foresaw is answered with
its request's id alone: its text may hold paths, addresses or other people's prompts, and goes to the server's log.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from statewise.errors import (
    CheckpointError,
    ConfigError,
    OutOfBlocks,
    PluginError,
    RequestError,
    SnapshotError,
    StatewiseError,
)
from statewise.server.access_log import CLIENT_LEFT

logger = logging.getLogger(__name__)

CONTEXT_LENGTH = "maximum context length"  # clients look for these words, and for the code that goes with them
MAX_MESSAGE = 1000  # characters; a message may quote what the client sent
MAX_PARAM = 200
ALTERNATIVE = re.compile(r"(constrained-)?(str|int|float|bool)|(list|dict)\[.*\]|<.*>")  # of a field with several types
SMALL_BODY = 1 << 16  # bytes that a server may read and throw away to keep a connection


class ApiError(HTTPException):
    """What a client is told instead of an answer.

    It is an `HTTPException` because FastAPI lets those, and no others, through while it reads a request's body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code

    @classmethod
    def invalid(cls, message: str, param: str | None = None, code: str | None = None) -> ApiError:
        """400: something in the request is wrong; `param` is the dotted name of the field."""
        if code is None and CONTEXT_LENGTH in message:
            code = "context_length_exceeded"
        return cls(400, message, param=param, code=code)

    @classmethod
    def unauthorized(cls) -> ApiError:
        """401: no key, or none that is known. Which of the two is not told."""
        headers = {"WWW-Authenticate": "Bearer"}
        return cls(401, "Invalid API Key", type="authentication_error", code="invalid_api_key", headers=headers)

    @classmethod
    def forbidden(cls, message: str) -> ApiError:
        """403: the client is known and may not do this."""
        return cls(403, message, type="permission_error", code="forbidden")

    @classmethod
    def not_found(cls, message: str, param: str | None = None, code: str = "not_found") -> ApiError:
        """404: a model, a session or a path that is not there."""
        return cls(404, message, type="not_found_error", param=param, code=code)

    @classmethod
    def model_not_found(cls, model: str) -> ApiError:
        """404: another model is served here."""
        return cls.not_found(f"The model {model!r} does not exist", "model", "model_not_found")

    @classmethod
    def method_not_allowed(cls, allowed: str | None = None) -> ApiError:
        """405: `allowed` lists the methods of the path, separated by commas."""
        headers = {"Allow": allowed} if allowed else None
        return cls(405, "This path does not take that method", code="method_not_allowed", headers=headers)

    @classmethod
    def too_large(cls, limit: int) -> ApiError:
        """413: the body has more than `limit` bytes. The connection ends, since the rest of it will not be read."""
        message = f"The request body is larger than {limit} bytes, the most that this server reads"
        return cls(413, message, code="payload_too_large", headers={"Connection": "close"})

    @classmethod
    def too_slow(cls, seconds: float) -> ApiError:
        """408: the body has not come in so many seconds. The connection ends, since the rest of it will not be read."""
        message = f"The request's body took more than {seconds:g} s to come"
        return cls(408, message, code="body_too_slow", headers={"Connection": "close"})

    @classmethod
    def headers_too_large(cls, message: str) -> ApiError:
        """431: too many headers, or too many bytes in them."""
        return cls(431, message, code="headers_too_large", headers={"Connection": "close"})

    @classmethod
    def unsupported(cls, message: str, param: str | None = None) -> ApiError:
        """501: a part of the API that this server does not have."""
        return cls(501, message, type="not_supported_error", param=param, code="unsupported")

    @classmethod
    def overloaded(cls, retry_after: float = 1.0) -> ApiError:
        """503: more requests are waiting than the server takes; `retry_after` is in seconds."""
        headers = {"Retry-After": str(max(1, math.ceil(retry_after)))}
        message = "The server is busy; try again later"
        return cls(503, message, type="unavailable_error", code="overloaded", headers=headers)

    @classmethod
    def engine_dead(cls) -> ApiError:
        """503: the engine has stopped, and no request can be served until the server is started again."""
        return cls(503, "The engine has stopped", type="unavailable_error", code="engine_dead")

    @classmethod
    def no_storage(cls) -> ApiError:
        """507: a file that the request needs cannot be written."""
        message = "The server has no room to write the session's file"
        return cls(507, message, type="unavailable_error", code="insufficient_storage")

    @classmethod
    def shutting_down(cls) -> ApiError:
        """503: the server ends before the answer does."""
        return cls(503, "The server is shutting down", type="unavailable_error", code="shutting_down")

    @classmethod
    def internal(cls, request_id: str | None = None) -> ApiError:
        """500: the fault is the server's. The id is what its log calls this request."""
        where = f"; its log says more about request {request_id}" if request_id else ""
        return cls(500, f"The server failed on this request{where}", type="server_error", code="internal_error")

    def body(self) -> bytes:
        """The JSON that OpenAI's clients expect."""
        error = {
            "message": _clean(self.message, MAX_MESSAGE),
            "type": self.type,
            "param": None if self.param is None else _clean(self.param, MAX_PARAM),
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def response(self, close: bool = False) -> Response:
        """The answer; `close` ends the connection with it."""
        headers = dict(self.headers or {})
        if close:
            headers["Connection"] = "close"
        return Response(self.body(), self.status, headers, "application/json")


def from_statewise(error: StatewiseError, request_id: str | None = None) -> ApiError:
    """A bad input is named; a full pool asks for patience; an engine that has ended is unavailable.

    What belongs to starting a server or to its files is its own affair, and so is a request that failed inside the
    engine, which has no class of its own: 500, and nothing of their text.
    """
    if isinstance(error, RequestError):
        return ApiError.invalid(str(error), error.field)
    if isinstance(error, OutOfBlocks):
        return ApiError.overloaded()
    if type(error) is StatewiseError or isinstance(error, CheckpointError | ConfigError | PluginError | SnapshotError):
        return ApiError.internal(request_id)
    return ApiError.engine_dead()


def from_validation(problems: Sequence[Any]) -> ApiError:
    """400 with the first of the problems that FastAPI found, in one sentence. What the client sent is not repeated."""
    problem = problems[0] if problems else {}
    if problem.get("type") == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "it cannot be parsed")
        place = problem.get("loc", ("body", 0))[-1]
        return ApiError.invalid(
            f"The request body is not valid JSON: {reason} at character {place}", code="invalid_json"
        )
    # The first name says where the field was: body, query or path.
    names = [str(name) for name in problem.get("loc", ())[1:]]
    param = ".".join(name for name in names if not ALTERNATIVE.fullmatch(name)) or None
    message = str(problem.get("msg", "it is invalid")).removeprefix("Value error, ")
    return ApiError.invalid(f"{param or 'The request body'}: {message[:1].lower()}{message[1:]}", param)


def from_http(error: HTTPException, request_id: str | None = None) -> ApiError:
    """What the framework raised: a path that is not there, a method that is not taken, a body that it cannot read."""
    status, headers = error.status_code, error.headers
    if isinstance(error, ApiError):
        return error
    if status == 401:
        return ApiError.unauthorized()
    if status == 404 and error.detail == HTTPStatus.NOT_FOUND.phrase:
        return ApiError.not_found("There is nothing at this path", code="unknown_url")
    if status == 405:
        return ApiError.method_not_allowed((headers or {}).get("Allow"))
    if status == 500:
        return ApiError.internal(request_id)
    if status > 500 or not isinstance(error.detail, str):
        phrases = {known.value: known.phrase for known in HTTPStatus}
        kind = "server_error" if status > 500 else "invalid_request_error"
        return ApiError(status, phrases.get(status, "Error"), type=kind, headers=headers)
    kind = {403: "permission_error", 404: "not_found_error"}.get(status, "invalid_request_error")
    return ApiError(status, error.detail, type=kind, headers=headers)


def as_api_error(error: BaseException, request_id: str | None = None) -> ApiError:
    """What a client is told about any exception."""
    if isinstance(error, HTTPException):
        return from_http(error, request_id)
    if isinstance(error, RequestValidationError):
        return from_validation(error.errors())
    if isinstance(error, StatewiseError):
        return from_statewise(error, request_id)
    return ApiError.internal(request_id)


def sse_error(error: BaseException, request_id: str | None = None) -> bytes:
    """The event that tells of an error in a stream whose answer has begun. `data: [DONE]` goes behind it."""
    return b"data: " + as_api_error(error, request_id).body() + b"\n\n"


def install(app: FastAPI) -> None:
    """Let every exception of an application be answered in this shape."""
    for kind in (HTTPException, RequestValidationError, StatewiseError, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, _nobody)


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer for an application that shall not see this request. Its body is not read."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await error.response(close=_has_much_body(scope))(scope, receive, send)


async def _nobody(request: Request, error: Exception) -> Response:
    """For the log alone: the client has left, which is no failure of the server."""
    return Response(status_code=CLIENT_LEFT)


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code in (204, 304):  # these have no body
        return Response(status_code=error.status_code, headers=error.headers)
    request_id = request.scope.get("state", {}).get("request_id")
    answer = as_api_error(error, request_id)
    if answer.status == 500 and isinstance(error, StatewiseError):  # the framework passes other exceptions on
        logger.error("request %s failed", request_id, exc_info=error)
    return answer.response()


def _has_much_body(scope: Scope) -> bool:
    """Whether a body may follow that is not worth reading only to keep the connection."""
    headers = dict(scope["headers"])
    length: bytes = headers.get(b"content-length", b"0")
    return b"transfer-encoding" in headers or not length.isdigit() or len(length) > 6 or int(length) > SMALL_BODY


def _clean(text: str, limit: int) -> str:
    """At most `limit` characters that JSON can carry: half a surrogate pair has no UTF-8."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"
