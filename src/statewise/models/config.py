"""Reading a checkpoint's config.json as data, with one clear sentence for each thing that is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from statewise.errors import CheckpointError

Number = TypeVar("Number", int, float)
MAX_JSON_BYTES = 64 << 20
_MISSING = object()


class Settings:
    """Typed, bounds-checked access to a mapping that came from outside."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def integer(self, *keys: str, default: Any = _MISSING, low: int = 1, high: int = 1 << 31) -> int:
        """The first of `keys` that is present; `low` and `high` are inclusive."""
        value = self._get(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CheckpointError(f"{self.where}: '{keys[0]}' must be an integer from {low} to {high}, found {value!r}")
        return value

    def number(self, *keys: str, default: Any = _MISSING, low: float = 0.0, high: float = 1e12) -> float:
        value = self._get(keys, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise CheckpointError(f"{self.where}: '{keys[0]}' must be a number from {low} to {high}, found {value!r}")
        return float(value)

    def flag(self, *keys: str, default: Any = _MISSING) -> bool:
        value = self._get(keys, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: '{keys[0]}' must be true or false, found {value!r}")
        return value

    def integers(self, key: str) -> list[int]:
        value = self._get((key,), _MISSING)
        if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise CheckpointError(f"{self.where}: '{key}' must be a list of integers, found {value!r}")
        return value

    def section(self, key: str) -> Settings:
        value = self._get((key,), _MISSING)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: '{key}' must be an object, found {value!r}")
        return Settings(value, f"{self.where}: '{key}'")

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Refuse a setting whose value this implementation does not follow."""
        value = self.values.get(key, default)
        if value not in allowed:
            choices = " or ".join(repr(v) for v in allowed)
            raise CheckpointError(f"{self.where}: '{key}' = {value!r} is not supported, only {choices}")

    def _get(self, keys: tuple[str, ...], default: Any) -> Any:
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        if default is _MISSING:
            raise CheckpointError(f"{self.where}: '{keys[0]}' is missing")
        return default


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises `CheckpointError`."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is larger than {MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing in the model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object")
    return value
