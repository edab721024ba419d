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
        self.read: set[str] = set()  # keys that someone asked for

    def integer(self, *keys: str, default: Any = _MISSING, low: int = 1, high: int = 1 << 31) -> int:
        """The first of `keys` that is present; `low` and `high` are inclusive."""
        key, value = self._get(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CheckpointError(f"{self.where}: '{key}' must be an integer from {low} to {high}, found {value!r}")
        return value

    def number(self, *keys: str, default: Any = _MISSING, low: float = 0.0, high: float = 1e12) -> float:
        key, value = self._get(keys, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise CheckpointError(f"{self.where}: '{key}' must be a number from {low} to {high}, found {value!r}")
        return float(value)

    def flag(self, *keys: str, default: Any = _MISSING) -> bool:
        key, value = self._get(keys, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: '{key}' must be true or false, found {value!r}")
        return value

    def integers(self, *keys: str) -> list[int]:
        key, value = self._get(keys, _MISSING)
        if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise CheckpointError(f"{self.where}: '{key}' must be a list of integers, found {value!r}")
        return value

    def words(self, *keys: str) -> list[str]:
        key, value = self._get(keys, _MISSING)
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise CheckpointError(f"{self.where}: '{key}' must be a list of words, found {value!r}")
        return value

    def section(self, key: str) -> Settings:
        _, value = self._get((key,), _MISSING)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: '{key}' must be an object, found {value!r}")
        return Settings(value, f"{self.where}: '{key}'")

    def names(self, key: str) -> dict[str, str]:
        """An optional mapping of names to names."""
        _, value = self._get((key,), {})
        if not isinstance(value, dict) or not all(isinstance(name, str) for pair in value.items() for name in pair):
            raise CheckpointError(f"{self.where}: '{key}' must map names to names, found {value!r}")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of some words."""
        _, value = self._get((key,), default)
        if value not in allowed:
            choices = " or ".join(repr(word) for word in allowed)
            raise CheckpointError(f"{self.where}: '{key}' must be {choices}, found {value!r}")
        return str(value)

    def present(self, key: str) -> bool:
        """Whether a key is there and not null."""
        self.read.add(key)
        return self.values.get(key) is not None

    def rope_theta(self, default: float) -> float:
        """The base of the rotary angles, as published (`rope_theta`) or as transformers 5 saves it (`rope_parameters`).

        Scaled rotations (yarn and the like) are refused.
        """
        if self.present("rope_scaling"):
            scaling = self.section("rope_scaling")
            for key in ("type", "rope_type"):
                scaling.require(key, ("default",), "default")
        holder = self._rope()
        holder.require("rope_type", ("default",), "default")
        return (holder if holder.present("rope_theta") else self).number("rope_theta", default=default, low=1.0)

    def rotary_dim(self, head_dim: int) -> int:
        """How many dims of a head are rotated: a share of it (`partial_rotary_factor`) or a number (`rotary_dim`)."""
        holder = self if self.present("partial_rotary_factor") else self._rope()
        width: float = self.integer("rotary_dim", default=head_dim)
        if holder.present("partial_rotary_factor"):
            share = head_dim * holder.number("partial_rotary_factor", high=1.0)
            if self.present("rotary_dim") and share != width:
                raise CheckpointError(
                    f"{self.where}: 'partial_rotary_factor' gives {share:g} rotated dims and 'rotary_dim' {width:g}; "
                    "they must agree"
                )
            width = share
        if width != int(width) or int(width) % 2 or not 2 <= width <= head_dim:
            raise CheckpointError(
                f"{self.where}: 'partial_rotary_factor' or 'rotary_dim' must give an even number of at most {head_dim} "
                f"rotated dims, found {width:g}"
            )
        return int(width)

    def _rope(self) -> Settings:
        """The section that transformers 5 saves, or these settings where there is none."""
        if not self.present("rope_parameters"):
            return self
        section = self.section("rope_parameters")
        if any(isinstance(value, dict) for value in section.values.values()):
            raise CheckpointError(f"{section.where}: parameters per kind of layer are not supported")
        return section

    def head_counts(self) -> tuple[int, int]:
        """Query heads and key-value heads, the former a multiple of the latter."""
        heads = self.integer("num_attention_heads", high=4096)
        kv_heads = self.integer("num_key_value_heads", default=heads, high=heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"{self.where}: 'num_key_value_heads' must divide the {heads} heads of 'num_attention_heads', "
                f"found {kv_heads}"
            )
        return heads, kv_heads

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Refuse a setting whose value this implementation does not follow."""
        _, value = self._get((key,), default)
        if value not in allowed:
            choices = " or ".join(repr(v) for v in allowed)
            raise CheckpointError(f"{self.where}: '{key}' = {value!r} is not supported, only {choices}")

    def _get(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        """The first key that is present, and its value. A key that is null is not there."""
        for key in keys:
            self.read.add(key)
            if self.values.get(key) is not None:
                return key, self.values[key]
        if default is _MISSING:
            raise CheckpointError(f"{self.where}: {' or '.join(repr(key) for key in keys)} is missing")
        return keys[0], default


def check_groups(settings: Settings, experts: int, top_k: int, groups: int, top_groups: int) -> None:
    """Raise `CheckpointError` unless `top_k` experts can be chosen from `top_groups` of `groups` equal groups."""
    if experts % groups or top_k > experts // groups * top_groups:
        raise CheckpointError(
            f"{settings.where}: {experts} experts cannot give {top_k} per token, {top_groups} of {groups} equal groups"
        )


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
