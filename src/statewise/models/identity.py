"""Which model a snapshot belongs to, told without reading more than a little of its weights."""

from __future__ import annotations

import json
import os
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

RUN = 64  # bytes that are read together
MAX_RUNS = 16  # of a tensor
MAX_READS = 1 << 16  # of a checkpoint, unless it has more than half as many tensors
_RESULTLESS = {"max_length"}  # a limit: it changes nothing below itself


def model_identity(directory: Path, overrides: Mapping[str, Any] | None = None) -> Identity:
    """The identity of a checkpoint directory with keys of its config.json replaced by `overrides`.

    `config` covers what the model reads from config.json, not its spelling, nor keys that nobody reads. `weights`
    covers names, shapes and dtypes of the tensors, and of each a sample of its bytes: `RUN` at its beginning, at its
    end and at even distances between, 16 times or fewer where there are more than 4,096 tensors. It does not depend
    on the files that hold them. Training, merging and rounding change values everywhere, which shows; a change of
    single values elsewhere does not.

    At most `MAX_READS` short reads are made, or two for each tensor where those are more. So 20,000 tensors of 100 GB
    take a third of a second of processor time, and on a cold disk as long as 60,000 reads here and there take.
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
        index = {name: [checkpoint.dtype(name), list(checkpoint.shape(name))] for name in checkpoint.names}
        places = list(checkpoint.places())
    runs = max(2, min(MAX_RUNS, MAX_READS // max(len(index), 1)))
    for path, tensors in places:
        for name, digest in _samples(path, tensors, runs).items():
            index[name].append(digest)
    return _digest(sorted(index.items()))


def _samples(path: Path, tensors: Mapping[str, tuple[int, int]], runs: int) -> dict[str, str]:
    """The digest of a sample of each tensor's bytes."""
    samples = {}
    try:
        with path.open("rb", buffering=0) as file:
            for name, (begin, end) in tensors.items():
                digest = blake2b(digest_size=16)
                for first, last in sampled_ranges(end - begin, runs):
                    content = os.pread(file.fileno(), last - first, begin + first)
                    if len(content) != last - first:
                        raise CheckpointError(f"{path.name} changed while it was read; try again")
                    digest.update(content)
                samples[name] = digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
    return samples


def sampled_ranges(nbytes: int, runs: int) -> list[tuple[int, int]]:
    """The half-open ranges of a tensor's bytes that are read: all of a short one, else `runs` of `RUN` bytes."""
    if nbytes <= runs * RUN:
        return [(0, nbytes)] if nbytes else []
    starts = (index * (nbytes - RUN) // (runs - 1) for index in range(runs))
    return [(start, start + RUN) for start in starts]


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
