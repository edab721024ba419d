"""What a session knows of its tokens: its turns, the places that have names, its messages; and their block in a file.

In a snapshot file it is the tensor `transcript`, the bytes of one JSON object. The state does not need it, so files
may come without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from math import isfinite
from typing import Any

from statewise.errors import SnapshotError
from statewise.memory.snapshot_json import json_object, json_text

MAX_TEXT = 256  # characters of a name
MAX_TRANSCRIPT = 1 << 24  # bytes
MAX_TURNS = 1 << 20
MAX_MARKS = MAX_TURNS + (1 << 19)  # commas, strings, openings: read, each may take a hundred bytes
MAX_DEPTH = 32  # of what a message holds
_MARK = re.compile(rb'[,\[{]|"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # possessive and always a match: linear time


@dataclass(frozen=True)
class Transcript:
    """Places in the tokens of a session, and the messages that they spell."""

    turns: tuple[int, ...] = ()  # tokens at the end of each append and each answer
    checkpoints: Mapping[str, int] = field(default_factory=dict)  # names and token positions
    messages: tuple[Mapping[str, Any], ...] = ()
    spoken: tuple[int, ...] = ()  # how many of the messages each turn ends with; empty: nobody has counted

    def differences(self, other: Transcript) -> list[str]:
        """The names of the parts in which two transcripts differ."""
        parts = ("turns", "checkpoints", "messages", "spoken")
        return [part for part in parts if getattr(self, part) != getattr(other, part)]


def encode_transcript(transcript: Transcript, num_tokens: int) -> bytes:
    """The bytes of a block that `decode_transcript` reads. Raises `SnapshotError` for what it would refuse."""
    values: dict[str, Any] = {
        "turns": list(transcript.turns),
        "checkpoints": dict(transcript.checkpoints),
        "messages": [_message(message) for message in transcript.messages],
    }
    if transcript.spoken:
        values["spoken"] = list(transcript.spoken)
    _check_places(values["turns"], values["checkpoints"], num_tokens)
    _check_spoken(transcript.spoken, values["turns"], values["messages"])
    content = json_text(values).encode()
    _check_size(content)
    return content


def decode_transcript(content: bytes, num_tokens: int) -> Transcript:
    """What a block says of a session of so many tokens. Raises `SnapshotError`, whose subject is the file."""
    _check_size(content)
    values = json_object(content, "its transcript", floats=True)
    if values.keys() - {"spoken"} != {"turns", "checkpoints", "messages"}:
        raise SnapshotError("is malformed: its transcript is not one of turns, checkpoints and messages")
    turns, checkpoints, messages = values["turns"], values["checkpoints"], values["messages"]
    _check_places(turns, checkpoints, num_tokens)
    if not isinstance(messages, list):
        raise SnapshotError("is malformed: the messages in its transcript are not a list")
    spoken = values.get("spoken", [])
    _check_spoken(spoken, turns, messages)
    return Transcript(tuple(turns), checkpoints, tuple(_message(message) for message in messages), tuple(spoken))


def message_extent(message: Mapping[str, Any]) -> tuple[int, int]:
    """The bytes and the marks that a message takes in a block. Raises `SnapshotError` for one that cannot be in one."""
    content = json_text(_message(message)).encode() + b","
    return len(content), sum(1 for _ in _MARK.finditer(content))


def _check_size(content: bytes) -> None:
    if len(content) > MAX_TRANSCRIPT:
        raise SnapshotError(f"is too large: its transcript has {len(content)} bytes, at most {MAX_TRANSCRIPT} fit")
    if next(islice(_MARK.finditer(content), MAX_MARKS, None), None) is not None:
        raise SnapshotError(f"is too large: its transcript has more than {MAX_MARKS} texts and separators")


def _check_places(turns: Any, checkpoints: Any, num_tokens: int) -> None:
    if not isinstance(turns, list) or len(turns) > MAX_TURNS:
        raise SnapshotError(f"is malformed: its turns are not a list of at most {MAX_TURNS}")
    if not all(_is_place(end, num_tokens) for end in turns) or any(end < before for before, end in pairwise(turns)):
        raise SnapshotError(f"is malformed: its turns do not rise from 0 to its {num_tokens} tokens")
    if not isinstance(checkpoints, dict) or not all(_is_place(at, num_tokens) for at in checkpoints.values()):
        raise SnapshotError(f"is malformed: a named checkpoint does not lie within its {num_tokens} tokens")
    if not all(is_name(name) for name in checkpoints):
        raise SnapshotError(f"is malformed: the name of a checkpoint is not 1 to {MAX_TEXT} printable characters")


def _check_spoken(spoken: Any, turns: list[int], messages: list[Any]) -> None:
    counts = isinstance(spoken, list | tuple) and all(_is_place(count, len(messages)) for count in spoken)
    if not counts or len(spoken) not in (0, len(turns)):
        raise SnapshotError("is malformed: its turns do not say how many of its messages they end with")


def _is_place(value: Any, num_tokens: int) -> bool:
    return type(value) is int and 0 <= value <= num_tokens


def is_name(value: Any) -> bool:
    """Whether a checkpoint can have this name: short, and safe to print."""
    return isinstance(value, str) and 1 <= len(value) <= MAX_TEXT and value.isprintable()


def _message(message: Any) -> dict[str, Any]:
    plain = _plain(message, MAX_DEPTH)
    if not isinstance(plain, dict):
        raise SnapshotError("is malformed: a message in its transcript is not an object")
    return plain


def _plain(value: Any, depth: int) -> Any:
    """A copy in the types that JSON gives back. Raises `SnapshotError` for what it would lose."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise SnapshotError("is malformed: a message in its transcript is not valid Unicode text") from None
        return str(value)
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return int(value)
    if isinstance(value, float) and isfinite(value):
        return float(value)
    if depth and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_plain(key, 0): _plain(inner, depth - 1) for key, inner in value.items()}
    if depth and isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(inner, depth - 1) for inner in value]
    raise SnapshotError(
        "is malformed: a message in its transcript holds more than text, finite numbers, lists and objects with text "
        f"as keys, {MAX_DEPTH} deep"
    )
