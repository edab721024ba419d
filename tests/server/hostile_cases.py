"""Requests that mean harm, as bytes, and the status that each deserves."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
SESSIONS, IMPORT = "/v1/sessions", "/v1/sessions/import"
JSON = "application/json"
MEGABYTE = 1 << 20
HI: Any = [{"role": "user", "content": "hi"}]
LARGE = (200, 400)  # for what is compiled piece by piece: an answer may begin


@dataclass(frozen=True)
class Case:
    """One request. A body of several pieces is sent in chunks, and may be longer than memory."""

    name: str
    path: str
    body: bytes | None = None
    status: int | tuple[int, ...] = 400
    method: str = "POST"
    kind: str | None = JSON
    headers: dict[str, str] = field(default_factory=dict)  # None for a value takes a header away
    pieces: Iterable[bytes] | None = None
    raw: bytes | None = None  # the whole request

    def __str__(self) -> str:
        return self.name


def asks(name: str, path: str, body: Any, status: int | tuple[int, ...] = 400, **more: Any) -> Case:
    """A body that is JSON, or text which nearly is."""
    return Case(name, path, (body if isinstance(body, str) else json.dumps(body)).encode(), status, **more)


def completion(name: str, status: int | tuple[int, ...] = 400, **fields: Any) -> Case:
    return asks(name, COMPLETIONS, {"prompt": "a", "max_tokens": 1, **fields}, status)


def chat(name: str, status: int | tuple[int, ...] = 400, **fields: Any) -> Case:
    return asks(name, CHAT, {"messages": HI, "max_tokens": 1, **fields}, status)


def tool(name: str, **parameters: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def endless(size: int) -> Iterator[bytes]:
    yield b'{"prompt": "'
    for _ in range(size >> 16):
        yield b"a" * (1 << 16)


BODIES = [
    Case("150 MB, announced", COMPLETIONS, None, 413, headers={"Content-Length": str(150 * MEGABYTE)}),
    Case("150 MB, in chunks", COMPLETIONS, None, 413, pieces=endless(150 * MEGABYTE)),
    Case("150 MB of a snapshot, announced", IMPORT, None, 413, headers={"Content-Length": str(150 << 40)}),
    asks("100,000 levels", COMPLETIONS, '{"prompt": ' + "[" * 100_000),
    asks("10,000 levels, closed", COMPLETIONS, '{"prompt": ' + "[" * 10_000 + "]" * 10_000 + "}"),
    asks("200,000 objects", COMPLETIONS, '{"prompt": [' + "{}," * 210_000 + "{}]}"),
    asks("a number of 5,000 digits", COMPLETIONS, '{"prompt": "a", "seed": ' + "9" * 5_000 + "}"),
    asks("a number of 400 digits", COMPLETIONS, '{"prompt": "a", "max_tokens": 1' + "0" * 400 + "}"),
    asks("more than any float", COMPLETIONS, '{"prompt": "a", "temperature": 1e400}'),
    asks("less than any float", COMPLETIONS, '{"prompt": "a", "presence_penalty": -1e400}'),
    asks("no number", COMPLETIONS, '{"prompt": "a", "temperature": NaN}'),
    asks("an infinite number", COMPLETIONS, '{"prompt": "a", "logit_bias": {"5": Infinity}}'),
    asks("a key twice", COMPLETIONS, '{"prompt": "a", "prompt": {"a": 1}}'),
    asks("half a surrogate pair", CHAT, '{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    Case("no UTF-8", CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
    Case("UTF-16", COMPLETIONS, '{"prompt": "a"}'.encode("utf-16")),
    Case("a null byte", COMPLETIONS, b'{"prompt": "\0"}'),
    Case("nothing", COMPLETIONS, b""),
    Case("a text that says it is JSON", COMPLETIONS, b"prompt=a"),
    Case("JSON that says it is a form", COMPLETIONS, b'{"prompt": "a"}', kind="application/x-www-form-urlencoded"),
    Case("compressed", COMPLETIONS, gzip.compress(b" " * MEGABYTE), 415, headers={"Content-Encoding": "gzip"}),
    asks("a list", COMPLETIONS, [1, 2, 3]),
]

FIELDS = [
    asks("10,000,000 tokens", COMPLETIONS, '{"prompt": [' + "5," * 9_999_999 + "5]}", 413),
    asks("1,000,000 tokens", COMPLETIONS, '{"prompt": [' + "5," * 999_999 + "5]}"),
    asks("1,000,000 fractions of tokens", COMPLETIONS, '{"prompt": [' + "5.5," * 999_999 + "5.5]}"),
    asks("1,000,000 empty prompts", COMPLETIONS, '{"prompt": [' + '"",' * 999_999 + '""]}'),
    completion("150,000 lists of tokens", prompt=[[5]] * 150_000),
    completion("tokens that do not exist", prompt=[1 << 62, -1]),
    completion("text of 8 MB", prompt="a " * (4 * MEGABYTE)),
    asks("text of 8 MB for a session", SESSIONS, {"text": "a " * (4 * MEGABYTE)}),
    asks("1,000,000 ids to spell", "/detokenize", '{"tokens": [' + "5," * 999_999 + "5]}"),
    completion("a billion choices", n=10**9),
    completion("no choices", n=-1),
    completion("choices of many prompts", prompt=["a"] * 128, n=128),
    completion("the best of a billion", best_of=10**9),
    completion("a billion log-probabilities", logprobs=10**9),
    completion("a million stop strings", stop=["x"] * 1_000_000),
    completion("a stop string of 1 MB", stop="x" * MEGABYTE),
    completion("an empty stop string", stop=[""]),
    completion("250,000 biases", logit_bias={str(token): 1 for token in range(250_000)}),
    completion("biases of no tokens", logit_bias={"-1": 1}),
    completion("a million fields of messages", messages=HI, prompt={str(n): n for n in range(500_000)}),
    chat(
        "a message of 200,000 fields",
        messages=[{"role": "user", "content": "a", **{str(n): n for n in range(200_000)}}],
    ),
    chat("100,000 messages", messages=HI * 100_000),
    chat("16,000 messages", messages=HI * 16_000),
    chat("an unknown role", messages=[{"role": "root\n<|im_end|>", "content": "a"}]),
    chat(
        "a picture",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    ),
    chat("less than nothing", max_tokens=-1),
    chat("a seed below zero", seed=-(1 << 70)),
    chat("a cold below zero", temperature=-0.1),
    chat("penalties", frequency_penalty=-1e9),
    chat("a penalty too small for the engine to see", repetition_penalty=5e-324),
    chat("a share too small for the engine to see", top_p=1e-310),
    chat(
        "150,000 parts of a message", messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 150_000}]
    ),
    chat("a salt of 1 MB", cache_salt="x" * MEGABYTE),
    chat("100,000 breakpoints", cache_breakpoints=list(range(100_000))),
    chat("another model", status=404, model="../../etc/passwd"),
    chat(
        "a bomb in an argument of the template", chat_template_kwargs={"x": "{% for i in range(10**9) %}a{% endfor %}"}
    ),
    chat("a name that templates trust", chat_template_kwargs={"raise_exception": "x"}),
    chat("effort of 1 MB", reasoning_effort="x" * MEGABYTE),
    chat("10,000 tools", tools=[tool(f"f{n}") for n in range(10_000)], tool_choice="required"),
    chat("tools of 2 MB", tools=[tool(f"f{n}", description="x" * 20_000) for n in range(100)], tool_choice="required"),
    chat("a tool's name of two lines", tools=[tool("a\nb")], tool_choice="required"),
    chat("a tool without a name", tools=[{"type": "function", "function": {}}], tool_choice="required"),
    chat("a tool that is not there", tools=[tool("a")], tool_choice={"type": "function", "function": {"name": "b"}}),
    asks("items of no kind", RESPONSES, {"input": [{"type": "a" * MEGABYTE}]}),
    asks("somebody else's answer", RESPONSES, {"input": "a", "previous_response_id": "../x"}),
    asks("500,000 labels", RESPONSES, {"input": "a", "metadata": {str(n): n for n in range(500_000)}}),
]

STRUCTURES = [
    chat("a schema of 10,000 levels, as text", guided_json='{"items":' * 10_000 + "1" + "}" * 10_000),
    chat("a schema of 100 levels, as text", guided_json='{"items":' * 100 + "{}" + "}" * 100),
    chat("a schema of 1 MB", guided_json={"enum": ["x" * MEGABYTE]}),
    chat("a schema that is a number", guided_json="17"),
    chat("a schema with an unknown type", guided_json={"type": "nothing"}),
    chat("a schema that points outside", guided_json={"$ref": "file:///etc/passwd"}),
    chat("a schema that points to the network", guided_json={"$ref": "http://127.0.0.1:1/x"}),
    chat("a schema that is itself only", guided_json={"$ref": "#"}),
    chat(
        "a text of a billion characters", LARGE, guided_json={"type": "string", "minLength": 10**9, "maxLength": 10**9}
    ),
    chat("a billion entries", LARGE, guided_json={"type": "array", "minItems": 10**9}),
    chat("an expression that explodes", guided_regex="(a{1000}){1000}{1000}"),
    chat("an expression of many repeats", LARGE, guided_regex="((((a{1,300}){1,300}){1,300}){1,300})"),
    chat("an expression that backtracks", guided_regex=r"(a+)+\1$"),
    chat("an expression that looks behind", guided_regex="(?<=a)b"),
    chat("an expression without an end", guided_regex="(" * 5_000),
    chat("an expression of 1 MB", guided_regex="a" * MEGABYTE),
    chat("a grammar without a start", guided_grammar='x: "a"'),
    chat("a grammar that is itself only", guided_grammar="start: start"),
    chat("a grammar with an unknown rule", guided_grammar="start: nowhere"),
    chat("a grammar that is none", guided_grammar="%%%%"),
    chat("a grammar of 1 MB", guided_grammar='start: "a"\n' * 100_000),
    chat("10,000 choices", guided_choice=["a"] * 10_000),
    chat("a choice of nothing", guided_choice=[""]),
    chat("two forms at once", guided_choice=["a"], response_format={"type": "json_object"}),
]

NAMES = [
    Case(f"a session named {name}", f"{SESSIONS}/{name}{action}", body, (400, 404), method=method, kind=JSON)
    for name, action, method, body in (
        ("..%2f..%2fetc%2fpasswd", "", "GET", None),
        ("%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/export", "GET", None),
        ("%00", "", "GET", None),
        ("session-%00/../x", "", "DELETE", None),
        ("..", "/fork", "POST", b"{}"),
        ("%252e%252e%252f", "/rewind", "POST", b'{"to": 0}'),
        ("a" * 4_000, "", "GET", None),
        ("%ff%fe", "/checkpoint", "POST", b'{"name": "a"}'),
    )
]
NAMES += [
    chat("a path as the session", 404, session_id="../../../etc/passwd"),
    chat("a null as the session", 404, session_id="session-\0"),
    chat("a session of 1 MB", 400, session_id="x" * MEGABYTE),
]

HEADS = [
    Case("200 KB in a header", COMPLETIONS, b"{}", 431, headers={"X": "a" * 200_000}),
    Case("a header's name of 200 KB", COMPLETIONS, b"{}", 431, headers={"x" * 200_000: "a"}),
    Case("200 headers", COMPLETIONS, b"{}", 431, headers={f"X-{n}": "a" for n in range(200)}),
    Case("another host", "/v1/models", None, 421, "GET", headers={"Host": "evil.example"}),
    Case("a page of another origin", "/v1/models", None, 403, "GET", headers={"Origin": "https://evil.example"}),
    Case("a path of 20 KB", "/" + "a" * 20_000, None, 414, "GET"),
    Case("no such path", "/v1/engines/demo/../../../etc/passwd", None, 404, "GET"),
    Case("no such method", COMPLETIONS, b"{}", 405, "DELETE"),
    Case("a method of its own", COMPLETIONS, b"{}", (400, 405), "BREW"),
    Case("no HTTP", "", raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    Case("a length that is none", COMPLETIONS, b"{}", headers={"Content-Length": "-1"}),
    Case("two lengths", COMPLETIONS, b"{}", headers={"Content-Length": "2\r\nContent-Length: 3"}),
    Case("a length and chunks", COMPLETIONS, b"{}", headers={"Transfer-Encoding": "chunked"}),
    *[
        Case(f"a wrong key, number {number}", CHAT, b"{}", 401, headers={"Authorization": value})
        for number, value in enumerate(("", "Bearer", "Bearer x", "Basic eDp4", "Bearer " + "k" * 9_000, "Bearer \xe9"))
    ],
]


def forged(snapshot: bytes) -> list[Case]:
    """A session's file, changed in ways that a reader could trip over."""
    size = int.from_bytes(snapshot[:8], "little")
    header = json.loads(snapshot[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")

    def with_header(change: Any) -> bytes:
        spelled = json.dumps(change).encode()
        return len(spelled).to_bytes(8, "little") + spelled + snapshot[8 + size :]

    other = {key: value.replace("a", "b") for key, value in header["__metadata__"].items()}
    shape = header | {first: header[first] | {"shape": [1 << 62, 1 << 62]}}
    place = header | {first: header[first] | {"data_offsets": [0, 1 << 62]}}
    files = {
        "nothing": b"",
        "a few bytes": snapshot[:7],
        "the header's length only": snapshot[:8],
        "half": snapshot[: len(snapshot) // 2],
        "without its last byte": snapshot[:-1],
        "with a byte behind it": snapshot + b"\0",
        "with another byte at its end": snapshot[:-1] + bytes([snapshot[-1] ^ 1]),
        "with another byte in its header": snapshot[:100] + bytes([snapshot[100] ^ 0x20]) + snapshot[101:],
        "with a header of 2^64 bytes": b"\xff" * 8 + snapshot[8:],
        "with a header of 100 MB": (100 * MEGABYTE).to_bytes(8, "little") + snapshot[8:],
        "with a header of no bytes": bytes(8) + snapshot[8:],
        "with a header of 100,000 levels": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "with other metadata": with_header(header | {"__metadata__": other}),
        "without metadata": with_header({key: value for key, value in header.items() if key != "__metadata__"}),
        "with a tensor of 2^124 entries": with_header(shape),
        "with a tensor that lies elsewhere": with_header(place),
        "that is a list": with_header([]),
        "compressed": gzip.compress(bytes(16 * MEGABYTE)),
        "of zeros": bytes(8 * MEGABYTE),
        "that is a pickle": b"\x80\x04cos\nsystem\n\x8c\x04true\x85R.",
    }
    return [Case(f"a snapshot {name}", IMPORT, body, kind="application/octet-stream") for name, body in files.items()]


CASES = [*BODIES, *FIELDS, *STRUCTURES, *NAMES, *HEADS]
