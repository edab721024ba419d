"""The OpenAPI document: what FastAPI knows of the routes, completed by what they answer.

The handlers encode their answers themselves and the guards refuse before any of them, so neither shows in FastAPI's
own document; its status 422 is never sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from statewise.engine import sampling_params as limits
from statewise.server import reply_models as replies

REF = "#/components/schemas/{model}"
WORDS = {
    400: "Something in the request is wrong: `error.param` names the field, `error.message` says what to change.",
    401: "There is no API key, or none that is known.",
    404: "There is no such model or session.",
    405: "The path does not take this method.",
    409: "The session is in use by another request.",
    413: "The body is too large.",
    415: "The body is compressed.",
    421: "The name of the host is not one that this server answers to.",
    429: "There are as many sessions as are kept.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "The model is loaded, too much waits, or the engine has stopped. `Retry-After` says when to come back.",
}
ALWAYS = (400, 401, 405, 421, 431, 500)
WITH_BODY = (413, 415)
WORK = (404, 503)
USE = (*WORK, 409)
MESSAGES = [{"role": "user", "content": "What is 27 + 45?"}]
STREAM = "JSON; that of the last event is [DONE]. An error behind the first event is one too, an object with `error`."
EVENTS = {
    "/v1/responses": "JSON: an event of OpenAI's API, whose name is its `type`. The last holds the whole response."
}
BOUNDS: Mapping[str, Mapping[str, float]] = {
    "temperature": {"minimum": 0, "maximum": 100},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": 1 << 31},
    "min_p": {"minimum": 0, "maximum": 1},
    "n": {"minimum": 1, "maximum": limits.MAX_COPIES},
    "best_of": {"minimum": 1, "maximum": limits.MAX_COPIES},
    "seed": {"minimum": 0, "maximum": (1 << 63) - 1},
    "min_tokens": {"minimum": 0, "maximum": limits.MAX_TOKENS},
    "max_tokens": {"minimum": 0, "maximum": limits.MAX_TOKENS},
    "max_completion_tokens": {"minimum": 0, "maximum": limits.MAX_TOKENS},
    "max_output_tokens": {"minimum": 0, "maximum": limits.MAX_TOKENS},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 100},
    "top_logprobs": {"minimum": 0, "maximum": limits.MAX_LOGPROBS},
}


@dataclass(frozen=True)
class Told:
    """What one operation answers."""

    answer: type[BaseModel] | str  # a media type: no JSON
    errors: tuple[int, ...] = ()
    status: int = 200
    example: Any = None  # of the request's body
    tag: str = "Server"
    also: Mapping[int, type[BaseModel]] = field(default_factory=dict)  # other answers that are no errors


def _session(
    answer: type[BaseModel] | str = replies.Session, *errors: int, status: int = 200, example: Any = None
) -> Told:
    return Told(answer, errors, status, example, "Sessions")


ROUTES: Mapping[tuple[str, str], Told] = {
    ("post", "/v1/completions"): Told(
        replies.Completion, USE, example={"model": "demo", "prompt": "The people of the", "max_tokens": 8}, tag="OpenAI"
    ),
    ("post", "/v1/chat/completions"): Told(
        replies.ChatCompletion, USE, example={"model": "demo", "messages": MESSAGES, "max_tokens": 16}, tag="OpenAI"
    ),
    ("post", "/v1/responses"): Told(
        replies.ResponseObject, USE, example={"model": "demo", "input": "What is 27 + 45?"}, tag="OpenAI"
    ),
    ("get", "/v1/models"): Told(replies.ModelList, tag="OpenAI"),
    ("get", "/v1/models/{name}"): Told(replies.ModelCard, (404,), tag="OpenAI"),
    ("get", "/health"): Told(replies.Health, also={503: replies.Health}),
    ("get", "/ready"): Told(replies.Ready, also={503: replies.Ready}),
    ("get", "/version"): Told(replies.Version),
    ("get", "/metrics"): Told("text/plain"),
    ("post", "/tokenize"): Told(replies.Tokens, example={"messages": MESSAGES}),
    ("post", "/detokenize"): Told(replies.Detokenized, example={"tokens": [312, 658, 280]}),
    ("get", "/tokenizer_info"): Told(replies.TokenizerInfo),
    ("get", "/v1/statewise/info"): Told(replies.Free, (503,)),
    ("get", "/v1/statewise/stats"): Told(replies.Free),
    ("post", "/v1/sessions"): _session(replies.Session, 429, 503, status=201, example={"messages": MESSAGES}),
    ("get", "/v1/sessions"): _session(replies.SessionList),
    ("post", "/v1/sessions/import"): _session(replies.Session, 429, 503, status=201),
    ("get", "/v1/sessions/{name}"): _session(replies.Session, *WORK),
    ("delete", "/v1/sessions/{name}"): _session(replies.SessionDeleted, 404),
    ("post", "/v1/sessions/{name}/append"): _session(replies.Session, *USE, example={"messages": MESSAGES}),
    ("post", "/v1/sessions/{name}/fork"): _session(replies.Forks, *WORK, 429, status=201, example={"n": 2}),
    ("post", "/v1/sessions/{name}/rewind"): _session(replies.Session, *USE, example={"turn": -1}),
    ("post", "/v1/sessions/{name}/checkpoint"): _session(replies.Session, *USE, example={"name": "question"}),
    ("post", "/v1/sessions/{name}/pin"): _session(replies.Session, *USE, example={"ttl": 600}),
    ("get", "/v1/sessions/{name}/export"): _session("application/octet-stream", *USE),
}


def describe(app: FastAPI) -> None:
    """Let `/openapi.json` be the completed document, which is made once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _completed(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(
        title=app.title,
        version=app.version,
        description="OpenAI's API, and sessions whose memory can be forked, rewound, kept and carried away.",
        routes=app.routes,
    )
    schemas: dict[str, Any] = made["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for schema in schemas.values():
        _bound(schema.get("properties", {}))
    _add(schemas, replies.Error)
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            told = ROUTES.get((method, path))
            if told is not None:
                _tell(schemas, path, operation, told)
    made["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    # An empty requirement: a server that was started without keys asks for none.
    made["security"] = [{"bearer": []}, {"header": []}, {}]
    made["paths"]["/health"]["get"]["security"] = []
    return made


def _tell(schemas: dict[str, Any], path: str, operation: dict[str, Any], told: Told) -> None:
    body = operation.get("requestBody")
    if path == "/v1/sessions/import":
        body = {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
        operation["requestBody"] = body
    elif body is not None and told.example is not None:
        body["content"]["application/json"]["examples"] = {"plain": {"value": told.example}}
    statuses = sorted({*ALWAYS, *told.errors, *(WITH_BODY if body else ())} - {401 if path == "/health" else 0})
    operation["tags"] = [told.tag]
    operation["responses"] = {
        str(told.status): {"description": "Done.", "content": dict(_content(schemas, path, told))},
        **{str(status): _response(schemas, answer, "As above.") for status, answer in told.also.items()},
        **{str(status): _response(schemas, replies.Error, WORDS[status]) for status in statuses},
    }


def _content(schemas: dict[str, Any], path: str, told: Told) -> Iterator[tuple[str, Any]]:
    if isinstance(told.answer, str):
        binary = {"format": "binary"} if told.answer.endswith("octet-stream") else {}
        yield told.answer, {"schema": {"type": "string", **binary}}
        return
    yield "application/json", {"schema": _add(schemas, told.answer)}
    if told.tag == "OpenAI" and told.example is not None:
        described = {"type": "string", "description": EVENTS.get(path, STREAM)}
        event = {"type": "object", "properties": {"event": {"type": "string"}, "data": described}}
        yield "text/event-stream", {"schema": event}


def _response(schemas: dict[str, Any], answer: type[BaseModel], words: str) -> dict[str, Any]:
    return {"description": words, "content": {"application/json": {"schema": _add(schemas, answer)}}}


def _add(schemas: dict[str, Any], model: type[BaseModel]) -> dict[str, str]:
    """Put a model among the schemas, and give the reference to it."""
    if model.__name__ not in schemas:
        schema = model.model_json_schema(ref_template=REF, mode="serialization")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return {"$ref": REF.format(model=model.__name__)}


def _bound(properties: dict[str, Any]) -> None:
    """Say what the engine allows, where the request's model leaves that to it."""
    for name, bounds in BOUNDS.items():
        for kind in properties.get(name, {}).get("anyOf", ()):
            if kind.get("type") in ("integer", "number"):
                kind |= bounds
