"""The events of a streamed answer, taken apart as the bytes arrive."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

MAX_EVENT = 1 << 24  # bytes
MAX_REFUSAL = 1 << 16  # bytes of an error's body that are read
_NOTHING = msgspec.Raw(b"null")


class StreamError(Exception):
    """A stream that is not what it should be. `kind` is for counting, the message for reading."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts of a request, as the server gives them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int | None:
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = _NOTHING


class Stream:
    """One answer to a request with `stream`: when its tokens came, and what was counted at its end."""

    def __init__(self, keep_text: bool = False) -> None:
        self.times = array("d")  # of the events with tokens
        self.ended: float | None = None  # when the last event came
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.complete = False  # [DONE] was there
        self.text: list[str] | None = [] if keep_text else None
        self._rest = b""
        self._decode = msgspec.json.Decoder(_Event).decode

    def take(self, now: float, data: bytes) -> None:
        """Bytes that came at `now`. Raises `StreamError`."""
        if self._rest:
            data = self._rest + data
        *lines, self._rest = data.split(b"\n")
        if len(self._rest) > MAX_EVENT:
            raise StreamError("bad stream", f"the stream has an event of more than {MAX_EVENT} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(now, line[5:].strip())

    def _event(self, now: float, data: bytes) -> None:
        self.ended = now
        if data == b"[DONE]":
            self.complete = True
            return
        try:
            event = self._decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise StreamError("bad stream", f"the stream has an event that is none: {_brief(data)}") from None
        if bytes(event.error) != b"null":
            code, message = explain(b'{"error":' + bytes(event.error) + b"}")
            raise StreamError(f"error event{f' {code}' if code else ''}", message)
        if event.usage is not None:
            self.usage = event.usage
        for choice in event.choices:
            self._choice(now, choice)

    def _choice(self, now: float, choice: _Choice) -> None:
        delta = choice.delta
        if delta is None:
            text = choice.text
            # Tokens without a text of their own, such as special ones, are tokens; the end of a text is none.
            spoke = bool(text) or (text is not None and choice.finish_reason is None)
        else:
            text = delta.content
            spoke = bool(text or delta.reasoning_content or delta.reasoning or delta.tool_calls)
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
            spoke = spoke or not self.times
        if spoke:
            self.times.append(now)
        if self.text is not None and text:
            self.text.append(text)


def explain(body: bytes) -> tuple[str | None, str]:
    """Code and message of an error in any of the shapes that servers send."""
    try:
        found: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None, _brief(body) or "no reason given"
    if isinstance(found, dict):
        found = found.get("error") or found
    if not isinstance(found, dict):
        return None, _one_line(str(found))
    code = found.get("code") if isinstance(found.get("code"), str) else None
    return code, _one_line(str(found.get("message") or found.get("detail") or found))


def _brief(data: bytes) -> str:
    return _one_line(data[:300].decode("utf-8", "replace"))


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:299] + "…"
