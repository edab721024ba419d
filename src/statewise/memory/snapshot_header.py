"""The header of a snapshot file: what it says, how it is written, and everything that can be wrong with it.

A snapshot is a safetensors file. Its metadata are

    format, version   `statewise-state`, 1
    identity          digests of the model's configuration, of its weights, and of its tokenizer
    layout            the fields of each layer: shape, dtype, the named segments of a conv window
    digests           BLAKE2b-256 of the bytes of each tensor
    name, created     free text
    seal              BLAKE2b-256 of all the rest of the header

and its tensors `record.{layer}.{field}`, `pages.{layer}.{field}` (tokens in front), `tokens`, and perhaps `hidden` and
`transcript` (JSON: what a session knows of its tokens).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
from math import prod
from typing import Any

from statewise.errors import SnapshotError
from statewise.memory.snapshot_format import (
    DTYPES,
    Entry,
    Header,
    Identity,
    Layout,
    StoredField,
    check_tensors,
    check_text,
)
from statewise.memory.snapshot_json import json_object, json_text

FORMAT = "statewise-state"
VERSION = 1
MAX_HEADER_BYTES = 1 << 20  # a real one has some ten thousand; as JSON a hostile one may take 50 times its size
MAX_ENTRIES = 1 << 48  # of a shape; torch counts in int64
_METADATA = {"format", "version", "identity", "layout", "digests", "name", "created", "seal"}
_TENSOR = re.compile(r"(record|pages)\.(0|[1-9]\d{0,5})\.([A-Za-z_]\w{0,63})", re.ASCII)
_WORD = re.compile(r"\w{1,64}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")


def encode(header: Header) -> bytes:
    """The header with its length in front, padded so that the tensors behind it are aligned."""
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "identity": json_text(asdict(header.identity)),
        "layout": json_text(_grouped(header.layout)),
        "digests": json_text({name: entry.digest for name, entry in header.entries.items()}),
        "name": header.name,
        "created": header.created,
    }
    values: dict[str, Any] = {"__metadata__": metadata}
    for name, entry in header.entries.items():
        values[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.begin + entry.nbytes],
        }
    metadata["seal"] = _seal(values)
    raw = json_text(values).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def decode(raw: bytes, data_bytes: int) -> Header:
    """The header in `raw` of a file with `data_bytes` bytes behind it.

    Raises `SnapshotError`, as a sentence whose subject is the file, unless the header is sealed, of this version and
    whole, and its tensors are those of its layout and fill the rest of the file exactly.
    """
    values = json_object(raw, "its header")
    metadata = values.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise SnapshotError("is not a snapshot of Statewise")
    version = metadata.get("version")
    if not isinstance(version, str) or not re.fullmatch(r"[1-9]\d{0,8}", version):
        raise SnapshotError("is damaged: it has no format version")
    if int(version) > VERSION:
        raise SnapshotError(
            f"has format version {version}, newer than {VERSION}, the latest that this Statewise reads: update it"
        )
    if metadata.keys() != _METADATA or not all(isinstance(value, str) for value in metadata.values()):
        raise SnapshotError("is damaged: the fields of its header are not those of a snapshot")
    seal = metadata.pop("seal")
    if seal != _seal(values):
        raise SnapshotError("is damaged: its header was altered")
    del values["__metadata__"]
    identity, layout = _identity(metadata["identity"]), _layout(metadata["layout"])
    check_text("name", metadata["name"])
    check_text("time", metadata["created"])
    entries = _entries(values, json_object(metadata["digests"], "its digests"), data_bytes)
    header = Header(identity, layout, entries, metadata["name"], metadata["created"])
    check_tensors(layout, {name: (entry.dtype, entry.shape) for name, entry in entries.items()})
    return header


def _entries(table: dict[str, Any], digests: dict[str, Any], data_bytes: int) -> dict[str, Entry]:
    entries = {}
    for name, row in table.items():
        valid = isinstance(row, dict) and row.keys() == {"dtype", "shape", "data_offsets"}
        if not valid or not isinstance(row["dtype"], str) or row["dtype"] not in DTYPES:
            raise SnapshotError(f"is malformed: the header's row of {name!r:.80} is not that of a tensor")
        begin, *rest = _sizes(row["data_offsets"], 8 * MAX_ENTRIES) or [0]
        digest = digests.get(name)
        if len(rest) != 1 or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise SnapshotError(f"is malformed: {name!r:.80} has no valid place or digest")
        entry = Entry(row["dtype"], _shape(row["shape"]), begin, digest)
        if entry.begin + entry.nbytes != rest[0]:
            raise SnapshotError(f"is malformed: {name!r:.80} does not have the bytes that its shape needs")
        entries[name] = entry
    if len(digests) != len(entries):
        raise SnapshotError("is malformed: its digests are not those of its tensors")
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    end = 0
    for entry in entries.values():
        if entry.begin != end:
            raise SnapshotError("is malformed: its tensors do not lie one after the other")
        end += entry.nbytes
    if end != data_bytes:
        what = "truncated" if data_bytes < end else "too long"
        raise SnapshotError(f"is {what}: {data_bytes} bytes follow its header, its tensors have {end}")
    return entries


def _identity(text: str) -> Identity:
    parts = json_object(text, "its identity")
    if parts.keys() != {"config", "weights", "tokenizer"}:
        raise SnapshotError("is malformed: it does not say of which model it is")
    for part, digest in parts.items():
        if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)) and (digest is not None or part != "tokenizer"):
            raise SnapshotError(f"is malformed: the digest of its {part} is not one")
    return Identity(**parts)


def _grouped(layout: Layout) -> dict[str, Any]:
    """Fields that are alike in several layers stand there once, with the names of their tensors."""
    groups: dict[StoredField, list[str]] = {}
    for name, field in layout.items():
        groups.setdefault(field, []).append(name)
    return {"fields": [{"tensors": names, **asdict(field)} for field, names in groups.items()]}


def _layout(text: str) -> dict[str, StoredField]:
    groups = json_object(text, "its layout").get("fields")
    layout: dict[str, StoredField] = {}
    try:
        for group in groups or ():
            segments = tuple((name, _shape([width])[0]) for name, width in group["segments"])
            field = StoredField(_shape(group["shape"]), group["dtype"], group["axis"], segments)
            if field.dtype not in DTYPES or not all(_WORD.fullmatch(name) for name, _ in segments):
                raise ValueError(field)
            if segments and sum(width for _, width in segments) != field.shape[_sizes([field.axis], 7)[0]]:
                raise ValueError(field)
            for name in group["tensors"]:
                if not _TENSOR.fullmatch(name) or name in layout:
                    raise ValueError(name)
                layout[name] = field
    except (KeyError, IndexError, TypeError, ValueError):
        raise SnapshotError("is malformed: its field layout cannot be read") from None
    return layout


def _sizes(value: Any, most: int) -> list[int]:
    """A short list of whole numbers from 0 to `most`."""
    if not isinstance(value, list) or len(value) > 8 or not all(type(n) is int and 0 <= n <= most for n in value):
        raise SnapshotError("is malformed: a size in its header is not one, or out of bounds")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    """A shape whose tensor could exist, whatever the axes of length 0."""
    sizes = _sizes(value, MAX_ENTRIES)
    if prod(max(size, 1) for size in sizes) > MAX_ENTRIES:
        raise SnapshotError("is malformed: a shape in its header is out of bounds")
    return tuple(sizes)


def _seal(values: Mapping[str, Any]) -> str:
    """The digest of a header (without its seal), whatever the order of its keys."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
