"""Answers in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec
from starlette.responses import Response

from statewise.engine.request import TokenLogprob
from statewise.server import messages
from statewise.server.spelling import TokenSpelling

TokenText = Callable[[int], str]
DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()
_HOLE = uuid4().hex  # stands for the text of an event; no name of a model can be it


def json_bytes(value: Any) -> bytes:
    return _encoder.encode(value)


def sse(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


class ChunkEncoder:
    """The events of one streamed answer. What they have in common is encoded once.

    `plain(index, text)` makes the choice that an event has most of the time: one with text and nothing else to say.
    """

    def __init__(
        self, head: Mapping[str, Any], plain: Callable[[int, str], dict[str, Any]], *, include_usage: bool = False
    ) -> None:
        """`head` has the fields of every event; with `include_usage`, all but the last say that `usage` is null."""
        self._head, self._plain = head, plain
        self._more: dict[str, Any] = {"usage": None} if include_usage else {}
        self._around: dict[int, tuple[bytes, bytes]] = {}  # what is before and behind the text, by index

    def text(self, index: int, text: str) -> bytes:
        """`plain(index, text)` as an event."""
        around = self._around.get(index)
        if around is None:
            before, _, after = self.event(self._plain(index, _HOLE)).partition(json_bytes(_HOLE))
            around = self._around[index] = before, after
        return around[0] + _encoder.encode(text) + around[1]

    def event(self, *choices: dict[str, Any]) -> bytes:
        """An event with any choices."""
        return sse({**self._head, "choices": choices, **self._more})

    def usage(self, finished: Sequence[messages.Finished]) -> bytes:
        """The last event, which has no choice."""
        return sse({**self._head, "choices": [], "usage": usage(finished)})


def usage(finished: Sequence[messages.Finished]) -> dict[str, Any]:
    """Token counts of all prompts of a request."""
    prompt = sum(one.metrics.prompt_tokens for one in finished)
    completion = sum(one.metrics.completion_tokens for one in finished)
    cached = sum(one.metrics.cached_tokens for one in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def completion_logprobs(
    entries: Sequence[TokenLogprob | None], ids: Sequence[int], text: TokenText, offset: int, top: int
) -> dict[str, Any]:
    """The form of `/v1/completions`. `entries` may begin with None, the first token of a prompt."""
    spelled = [text(token) for token in ids]
    offsets = []
    for one in spelled:
        offsets.append(offset)
        offset += len(one)
    return {
        "tokens": spelled,
        "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
        "top_logprobs": [
            None if entry is None or not top else {text(token): logprob for token, logprob in _ranked(entry)}
            for entry in entries
        ],
        "text_offset": offsets,
    }


def chat_logprobs(entries: Sequence[TokenLogprob], text: TokenSpelling) -> dict[str, Any]:
    """The form of `/v1/chat/completions`."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": text(token), "logprob": logprob, "bytes": list(text.bytes(token))}

    return {
        "content": [
            one(entry.token_id, entry.logprob)
            | {"top_logprobs": [one(token, logprob) for token, logprob in entry.top.items()]}
            for entry in entries
        ]
    }


def _ranked(entry: TokenLogprob) -> list[tuple[int, float]]:
    """The alternatives and the chosen token."""
    return list(({entry.token_id: entry.logprob} | entry.top).items())


def finish(reason: str | None, calls: bool = False) -> str | None:
    """OpenAI knows no error and no abort as the end of a text. `calls`: the text ends with a whole tool call."""
    if calls and reason == "stop":
        return "tool_calls"
    return reason if reason in (None, "stop", "length", "tool_calls") else "stop"


def json_response(value: object, status: int = 200) -> Response:
    return Response(json_bytes(value), status, media_type="application/json")


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex}"
