"""Which model a snapshot belongs to, told without reading weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import MISSING, Field, fields, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from statewise.errors import CheckpointError
from statewise.memory.snapshot_format import Identity
from statewise.models.registry import read_model_config
from statewise.models.weights import Checkpoint

_RESULTLESS = {"max_length"}  # a limit: it changes nothing below itself


def model_identity(directory: Path, overrides: Mapping[str, Any] | None = None) -> Identity:
    """The identity of a checkpoint directory with keys of its config.json replaced by `overrides`.

    `config` covers what the model reads from config.json, not its spelling, nor keys that nobody reads; `weights` the
    names, shapes and dtypes in the headers of the files. Two sets of weights with one index are not told apart.
    Raises `CheckpointError`, and `ConfigError` for an override that the architecture does not read.
    """
    model_class, config, _ = read_model_config(directory, overrides)
    architecture = f"{model_class.__module__}.{model_class.__qualname__}"
    return Identity(
        config=_digest([architecture, _effective(config)]),
        weights=_weights(directory),
        tokenizer=_tokenizer(directory),
    )


def _effective(value: Any) -> Any:
    """A parsed configuration as JSON. A field at its default is left out: one that is added later, with the default
    that keeps to what was, must not disown the files that are there."""
    if is_dataclass(value) and not isinstance(value, type):
        given = {field.name: getattr(value, field.name) for field in fields(value) if field.name not in _RESULTLESS}
        defaults = {field.name: _default(field) for field in fields(value)}
        return {name: _effective(inner) for name, inner in given.items() if inner != defaults[name]}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_effective(inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): _effective(inner) for key, inner in value.items()}
    return value


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _weights(directory: Path) -> str:
    with ExitStack() as stack:
        checkpoint = Checkpoint(directory, stack)
        index = [[name, checkpoint.dtype(name), list(checkpoint.shape(name))] for name in sorted(checkpoint.names)]
    return _digest(index)


def _tokenizer(directory: Path) -> str | None:
    digest = blake2b(digest_size=32)
    try:
        with (directory / "tokenizer.json").open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"tokenizer.json cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
