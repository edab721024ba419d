"""JSON out of a file that anybody may have written: every key once, no number that JSON does not have."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from statewise.errors import SnapshotError

_DIGITS = 100  # of an integer; the time to read one grows with their square


def json_object(content: str | bytes, what: str, *, floats: bool = False) -> dict[str, Any]:
    """The object that `content` spells. Raises `SnapshotError`, in which `what` cannot be read, for anything else."""
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=float if floats else _refuse,
            parse_int=_integer,
        )
    except (ValueError, RecursionError):
        raise SnapshotError(f"is damaged: {what} cannot be read") from None
    if not isinstance(value, dict):
        raise SnapshotError(f"is damaged: {what} cannot be read")
    return value


def json_text(value: Any) -> str:
    """Plain data as JSON without blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands there twice")
    return values


def _integer(text: str) -> int:
    return int(text) if len(text) <= _DIGITS else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:_DIGITS]} has no place here")
