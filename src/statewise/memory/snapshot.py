"""Snapshot files (`*.state`): a checkpoint of a sequence on disk, independent of the number of ranks that wrote it.

Nothing of a file is believed before it is checked: sizes before anything is allocated, what it belongs to before its
tensors are read, digests before they are handed out. Tensors are read with plain reads, not mapped: what was checked
cannot change afterwards, and a file that another process cuts short is an error, not a crash.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from statewise.errors import SnapshotError
from statewise.memory.blocks import BlockSpec
from statewise.memory.durable import replacing
from statewise.memory.snapshot_format import (
    DTYPES,
    Entry,
    Header,
    Identity,
    Layout,
    check_fits,
    check_tensors,
    check_text,
    dtype_code,
    layout_of,
)
from statewise.memory.snapshot_header import MAX_HEADER_BYTES, decode, encode
from statewise.memory.snapshot_transcript import Transcript, decode_transcript, encode_transcript

SUFFIX = ".state"
_DAMAGED = "is damaged: the bytes of {} do not have the digest that its header gives"


@dataclass(frozen=True)
class Snapshot:
    """A frozen point of a sequence, with all that is needed to know whether it can be taken up elsewhere.

    `tensors` are what `sharding.gather` gives, `layout` is `layout_of` the same specs.
    """

    identity: Identity
    layout: Layout
    tokens: tuple[int, ...]  # all that the state has seen
    tensors: Mapping[str, Tensor]
    hidden: Tensor | None = None  # [hidden], the last row that the model put out
    name: str = ""
    created: str = ""
    transcript: Transcript | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def write_snapshot(path: Path, snapshot: Snapshot) -> int:
    """Write a file, or replace one: a reader sees the old contents or the new ones, never a part. Returns its bytes.

    Raises `SnapshotError` where the file cannot be written or its tensors are not those of its layout.
    """
    with _about(path):
        tensors = dict(snapshot.tensors)
        if not all(0 <= token < 1 << 31 for token in snapshot.tokens):
            raise SnapshotError("cannot be written: a token id is out of range")
        tensors["tokens"] = torch.tensor(snapshot.tokens, dtype=torch.int32)
        if snapshot.hidden is not None:
            tensors["hidden"] = snapshot.hidden
        if snapshot.transcript is not None:
            tensors["transcript"] = _block(snapshot.transcript, snapshot.num_tokens)
        check_tensors(snapshot.layout, {name: (dtype_code(t.dtype), tuple(t.shape)) for name, t in tensors.items()})
        check_text("name", snapshot.name)
        check_text("time", snapshot.created)
        # The widest elements first, so that all are aligned.
        ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        contents = {name: _bytes(tensors[name]) for name in ordered}
        entries, end = {}, 0
        for name, content in contents.items():
            code, shape = dtype_code(tensors[name].dtype), tuple(tensors[name].shape)
            entries[name] = Entry(code, shape, end, _digest(content))
            end += len(content)
        head = encode(Header(snapshot.identity, snapshot.layout, entries, snapshot.name, snapshot.created))
        if len(head) > MAX_HEADER_BYTES:
            raise SnapshotError(f"cannot be written: its header has more than {MAX_HEADER_BYTES} bytes")
        try:
            with replacing(path) as file:
                file.write(head)
                for content in contents.values():
                    file.write(content)
        except OSError as error:
            raise SnapshotError(f"cannot be written: {error.strerror or error}") from None
        return len(head) + end


def read_header(path: Path) -> Header:
    """What a file says about itself. Its tensors are not read. Raises `SnapshotError`."""
    with _about(path), _opened(path) as (_, header):
        return header


def read_snapshot(
    path: Path,
    expected: Identity | None = None,
    record_spec: BlockSpec | None = None,
    page_spec: BlockSpec | None = None,
    max_tokens: int | None = None,
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
) -> Snapshot:
    """A file whose every byte was checked. What is None is not compared.

    The specs are those of the whole model; with them and `max_tokens` the memory that a file can ask for is bounded
    by them, without by the length of the file. Raises `SnapshotError` with a sentence that says what is wrong: the
    file is altered, truncated, newer, of another model or layout, or too long.
    """
    with _checked(path, expected, record_spec, page_spec, max_tokens) as (file, header):
        hidden = header.entries.get("hidden")
        if hidden is not None and hidden_size is not None and hidden.shape != (hidden_size,):
            raise SnapshotError(f"has a hidden row of {hidden.shape[0]}, here it has {hidden_size}")
        tensors = {name: _read(file, name, entry) for name, entry in header.entries.items()}
        tokens = _tokens(tensors.pop("tokens"), vocab_size)
        row, block = tensors.pop("hidden", None), tensors.pop("transcript", None)
        transcript = None if block is None else _transcript(block, len(tokens))
        return Snapshot(header.identity, header.layout, tokens, tensors, row, header.name, header.created, transcript)


def verify_snapshot(
    path: Path,
    expected: Identity | None = None,
    record_spec: BlockSpec | None = None,
    page_spec: BlockSpec | None = None,
    max_tokens: int | None = None,
) -> Header:
    """All checks of `read_snapshot`, of a file of any length in little memory. Raises `SnapshotError`."""
    with _checked(path, expected, record_spec, page_spec, max_tokens) as (file, header):
        for name, entry in header.entries.items():
            if name == "tokens":
                _tokens(_read(file, name, entry), None)
            elif name == "transcript":
                _transcript(_read(file, name, entry), header.num_tokens)
            else:
                _skim(file, name, entry)
        return header


@contextmanager
def _checked(
    path: Path,
    expected: Identity | None,
    record_spec: BlockSpec | None,
    page_spec: BlockSpec | None,
    max_tokens: int | None,
) -> Iterator[tuple[FileIO, Header]]:
    layout = layout_of(record_spec, page_spec) if record_spec is not None and page_spec is not None else None
    with _about(path), _opened(path) as (file, header):
        check_fits(header, expected, layout, max_tokens)
        yield file, header


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Put the file's name, without its directory, before what is wrong with it."""
    try:
        yield
    except SnapshotError as error:
        raise SnapshotError(f"{path.name[:255]!r} {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[FileIO, Header]]:
    """A file positioned at its first tensor, with its checked header."""
    try:
        # A pipe must not make us wait, and what is not a plain file has no length.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SnapshotError("is not a plain file")
        with FileIO(descriptor, closefd=False) as file:
            yield file, _header(file, status.st_size)
    except OSError as error:
        raise SnapshotError(f"cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _header(file: FileIO, size: int) -> Header:
    prefix = bytearray(8)
    _fill(file, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise SnapshotError(
            f"is no snapshot: its header would have {length} bytes, at most {MAX_HEADER_BYTES} are read"
        )
    if length > size - len(prefix):
        raise SnapshotError(f"is truncated: it has {size} bytes, its header alone {length}")
    raw = bytearray(length)
    _fill(file, memoryview(raw))
    return decode(bytes(raw), size - len(prefix) - length)


def _read(file: FileIO, name: str, entry: Entry) -> Tensor:
    """The next tensor of a file, by its checked entry."""
    try:
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    except RuntimeError:
        raise SnapshotError(f"is too large: {name} has {entry.nbytes} bytes, which there is no memory for") from None
    content = _bytes(tensor)
    _fill(file, content)
    if _digest(content) != entry.digest:
        raise SnapshotError(_DAMAGED.format(name))
    return tensor


def _skim(file: FileIO, name: str, entry: Entry) -> None:
    """Check the next tensor of a file without keeping it."""
    digest, left, buffer = blake2b(digest_size=32), entry.nbytes, memoryview(bytearray(1 << 20))
    while left:
        chunk = buffer[: min(left, len(buffer))]
        _fill(file, chunk)
        digest.update(chunk)
        left -= len(chunk)
    if digest.hexdigest() != entry.digest:
        raise SnapshotError(_DAMAGED.format(name))


def _tokens(ids: Tensor, vocab_size: int | None) -> tuple[int, ...]:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < (vocab_size or 1 << 31):
        raise SnapshotError("is malformed: it holds token ids outside of the vocabulary")
    return tuple(ids.tolist())


def _block(transcript: Transcript, num_tokens: int) -> Tensor:
    return torch.frombuffer(bytearray(encode_transcript(transcript, num_tokens)), dtype=torch.uint8)


def _transcript(block: Tensor, num_tokens: int) -> Transcript:
    return decode_transcript(bytes(_bytes(block)), num_tokens)


def _fill(file: FileIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise SnapshotError("is truncated: it ends before its last byte")
        done += count


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in its logical order; those of a contiguous one are shared, not copied."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _digest(content: memoryview) -> str:
    return blake2b(content, digest_size=32).hexdigest()
