"""What a snapshot file holds: whose it is, the layout of its fields, where its tensors lie; and whether that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

import torch

from statewise.errors import SnapshotError
from statewise.memory.blocks import BlockSpec
from statewise.memory.sharding import whole_fields
from statewise.memory.snapshot_transcript import MAX_TEXT, MAX_TRANSCRIPT

MAX_HIDDEN = 1 << 20
MAX_TOKENS = 1 << 26  # of any file; what an engine takes is far less
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Identity:
    """What the numbers of a snapshot depend on, as BLAKE2b-256 in hexadecimal."""

    config: str  # the values of config.json that the model follows, with overrides
    weights: str  # names, shapes and dtypes of the checkpoint's tensors, and a sample of what they hold
    tokenizer: str | None  # None: the checkpoint has none

    def differences(self, other: Identity) -> list[str]:
        """The names of the parts in which two identities differ."""
        mine, theirs = asdict(self), asdict(other)
        return [part for part in mine if mine[part] != theirs[part]]


@dataclass(frozen=True)
class StoredField:
    """A field as a file describes it. `shape` is not cut by ranks; that of a page field is of one token."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    axis: int | None = None  # which the segments divide
    segments: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        segments = ", ".join(f"{name} {width}" for name, width in self.segments)
        return f"{self.dtype} {list(self.shape)}" + (f" of {segments}" if segments else "")


Layout = Mapping[str, StoredField]
"""The fields of a sequence by the name of their tensor."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. `begin` is in bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    digest: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Header:
    """All that a snapshot file says about itself."""

    identity: Identity
    layout: Layout
    entries: Mapping[str, Entry]  # in the order in which they lie in the file
    name: str
    created: str

    @property
    def num_tokens(self) -> int:
        return self.entries["tokens"].shape[0]


def layout_of(record_spec: BlockSpec, page_spec: BlockSpec) -> dict[str, StoredField]:
    """The layout that files for these specs (of the whole model) have. Raises `SnapshotError` for other dtypes."""
    layout = {}
    for name, field in whole_fields(record_spec, page_spec).items():
        if field.dtype not in _CODES:
            raise SnapshotError(f"{name} is {field.dtype}, which no snapshot can hold")
        segments = field.shard.segments if field.shard else ()
        axis = field.shard.axis if field.shard and segments else None
        layout[name] = StoredField(field.shape, _CODES[field.dtype], axis, segments)
    return layout


def dtype_code(dtype: torch.dtype) -> str:
    """How safetensors spells a dtype. Raises `SnapshotError` for one that no snapshot can hold."""
    if dtype not in _CODES:
        raise SnapshotError(f"is refused: no snapshot can hold {dtype}")
    return _CODES[dtype]


def check_fits(header: Header, expected: Identity | None, layout: Layout | None, max_tokens: int | None) -> None:
    """Raise `SnapshotError` unless a file belongs to this model, has the fields of its layers and is not too long."""
    different = header.identity.differences(expected) if expected else []
    if different:
        raise SnapshotError(f"is of another model, judging by its {' and '.join(different)}")
    if layout is not None and header.layout != layout:
        name = min(n for n in header.layout.keys() | layout.keys() if header.layout.get(n) != layout.get(n))
        there, here = (str(fields.get(name, "absent")) for fields in (header.layout, layout))
        raise SnapshotError(f"has another field layout: {name} is {there}, here it is {here}")
    if max_tokens is not None and header.num_tokens > max_tokens:
        raise SnapshotError(f"holds {header.num_tokens} tokens, at most {max_tokens} are accepted")


def check_tensors(layout: Layout, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise `SnapshotError` unless tensors (dtype and shape by name) are those of a layout, for one token count."""
    dtype, shape = tensors.get("tokens", ("", ()))
    if dtype != "I32" or len(shape) != 1 or shape[0] > MAX_TOKENS:
        raise SnapshotError(f"is malformed: it has no list of at most {MAX_TOKENS} token ids")
    for name, field in layout.items():
        length = shape if name.startswith("pages.") else ()
        found, expected = tensors.get(name), (field.dtype, (*length, *field.shape))
        if found != expected:
            what = f"{found[0]} {list(found[1])}" if found else "missing"
            raise SnapshotError(f"is malformed: {name} is {what}, expected {expected[0]} {list(expected[1])}")
    strange = sorted(tensors.keys() - layout.keys() - {"tokens", "hidden", "transcript"})
    if strange:
        raise SnapshotError(f"is malformed: it holds the tensor {strange[0]!r:.80}, which its layout does not have")
    if "hidden" in tensors:
        dtype, shape = tensors["hidden"]
        if not DTYPES[dtype].is_floating_point or len(shape) != 1 or not 1 <= shape[0] <= MAX_HIDDEN:
            raise SnapshotError(f"is malformed: hidden is {dtype} {list(shape)}, expected one row of floats")
    if "transcript" in tensors:
        dtype, shape = tensors["transcript"]
        if dtype != "U8" or len(shape) != 1 or shape[0] > MAX_TRANSCRIPT:
            what = f"{dtype} {list(shape)}, expected at most {MAX_TRANSCRIPT} bytes"
            raise SnapshotError(f"is malformed: transcript is {what}")


def check_text(what: str, text: str) -> None:
    """Raise `SnapshotError` unless a name or a time is short and safe to print."""
    if len(text) > MAX_TEXT or not text.isprintable():
        raise SnapshotError(f"is malformed: its {what} is not {MAX_TEXT} printable characters or fewer")
