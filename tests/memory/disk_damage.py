"""What can have happened to a directory of checkpoints: the same damages on every run."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]


def content_damages(length: int, header: int = 0) -> Iterator[tuple[str, Damage]]:
    """Changes of a file of so many bytes, more of them in its header."""
    chance = random.Random(length)
    places = [0, length - 1, *(chance.randrange(length) for _ in range(4))]
    places += [chance.randrange(header) for _ in range(8 if header else 0)]
    for place in places:
        yield f"bit of byte {place}", partial(_flip, place, chance.randrange(8))
    for cut in (0, 1, length // 2, length - 1):
        yield f"cut to {cut}", lambda path, cut=cut: os.truncate(path, cut)
    for more in (1, 4096):
        yield f"{more} bytes more", lambda path, more=more: os.truncate(path, length + more)
    yield "zeros", lambda path: path.write_bytes(bytes(length))


def kind_damages() -> Iterator[tuple[str, Damage]]:
    """Things in a file's place that are no plain files."""
    yield "missing", os.unlink
    yield "symbolic link to a sound copy", _link_to_copy
    for target in ("/dev/zero", "/dev/tty", "nowhere", ".", ".."):
        yield f"symbolic link to {target}", lambda path, target=target: (os.unlink(path), path.symlink_to(target))
    yield "symbolic link to itself", lambda path: (os.unlink(path), path.symlink_to(path.name))
    yield "directory", lambda path: (os.unlink(path), path.mkdir())
    yield "full directory", lambda path: (os.unlink(path), path.mkdir(), (path / "file").write_bytes(b"x"))
    yield "pipe", lambda path: (os.unlink(path), os.mkfifo(path))


def _flip(place: int, bit: int, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


def _link_to_copy(path: Path) -> None:
    copy = path.parents[2] / f"copy of {path.name}"  # outside of the engine's part
    os.rename(path, copy)
    path.symlink_to(copy)


def name_damages() -> Iterator[tuple[str, Damage]]:
    for name in ("0" * 64, "x", "A" * 64, "...", "a\nb"):
        yield f"renamed to {name!r}", lambda path, name=name: path.rename(path.parent / name)


Table = dict[str, Any]


def forged_listings(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Listings that have the digest of their name, whatever they say, from a sound one."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    version, tenant, record, *pages = header["__metadata__"]["checkpoint"].split("\n")

    def told(*lines: str) -> bytes:
        return sealed(header | {"__metadata__": {"checkpoint": "\n".join(lines)}}, data)

    def tensor(name: str, raw: bytes | None, dtype: str = "I32", shape: tuple[int, ...] = ()) -> bytes:
        """The listing with another tensor in place of one, or with none."""
        rows, kept = {"__metadata__": header["__metadata__"]}, b""
        for other in ("tokens", "hidden"):
            begin, end = header[other]["data_offsets"]
            own = (header[other]["dtype"], header[other]["shape"], data[begin:end])
            kind, size, part = (dtype, list(shape), raw) if other == name else own
            if part is not None:
                rows[other] = {"dtype": kind, "shape": size, "data_offsets": [len(kept), len(kept) + len(part)]}
                kept += part
        return sealed(rows, kept)

    yield "another version", told("2", tenant, record, *pages)
    yield "no version", told(tenant, record, *pages)
    yield "nothing told", told()
    yield "only a version", told(version)
    yield "no block", told(version, tenant)
    yield "a page less", told(version, tenant, record, *pages[:-1])
    yield "a page more", told(version, tenant, record, *pages, pages[0])
    yield "pages that are records", told(version, tenant, record, *[record] * len(pages))
    yield "a record that is a page", told(version, tenant, pages[0], *pages)
    yield "an unknown page", told(version, tenant, record, *pages[:-1], "0" * 64)
    for name in ("../../../x", "/dev/zero", record.upper(), record[:63], record + "0", "", " ", "\0" * 64, "é" * 64):
        yield f"a block named {name!r}", told(version, tenant, name, *pages)
    for value in (None, 5, [], ["a"], {"checkpoint": 5}, {"checkpoint": None}, {"checkpoint": ["1"]}, {}, {"a": "b"}):
        yield f"metadata {value!r}", sealed(header | {"__metadata__": value}, data)
    for depth in (50, 5000, 200_000):
        text = json.dumps(header | {"__metadata__": {"checkpoint": "deep"}})
        yield f"metadata {depth} deep", framed(text.replace('"deep"', "[" * depth + "]" * depth).encode(), data)
    tokens = header["tokens"]["shape"][0]
    yield "no tokens", tensor("tokens", None)
    yield "tokens, but none", tensor("tokens", b"", shape=(0,))
    yield "one token without an axis", tensor("tokens", bytes(4))
    yield "tokens in a square", tensor("tokens", bytes(16), shape=(2, 2))
    yield "a token less in a column", tensor("tokens", bytes(4 * tokens), shape=(tokens, 1))
    yield "long tokens", tensor("tokens", bytes(8 * tokens), "I64", (tokens,))
    yield "real tokens", tensor("tokens", bytes(4 * tokens), "F32", (tokens,))
    yield "tokens of another number of pages", tensor("tokens", bytes(4 * (tokens + 4)), shape=(tokens + 4,))
    yield "tokens of an unknown kind", tensor("tokens", bytes(4 * tokens), "X9", (tokens,))
    yield "no hidden row", tensor("hidden", None)
    yield "a hidden row without an axis", tensor("hidden", bytes(4), "F32")
    yield "hidden rows", tensor("hidden", bytes(32), "F32", (2, 4))
    yield "whole numbers as hidden row", tensor("hidden", bytes(32), "I32", (8,))
    yield "a shorter hidden row", tensor("hidden", bytes(28), "F32", (7,))
    yield "an empty hidden row", tensor("hidden", b"", "F32", (0,))
    beyond = {**header["hidden"], "data_offsets": [0, 1 << 40]}
    yield "a hidden row beyond the end", sealed(header | {"hidden": beyond}, data)
    yield "a negative shape", sealed(header | {"tokens": {**header["tokens"], "shape": [-1]}}, data)
    for size in (0, 1, 7, len(content), 1 << 20, 100_000_000, 100_000_001, 1 << 31, 1 << 62, (1 << 64) - 1):
        yield f"a header of {size} bytes", struct.pack("<Q", size) + content[8:]
    for raw in (b"", b"{", b"[]", b"null", b"5", b'"x"', b"{}", b"\xff" * 64, b"[" * 100_000):
        yield f"header {raw[:8]!r}", framed(raw, data)
    yield "nothing", b""
    yield "text", b"checkpoint\n" * 50
    yield "more behind it", content + bytes(64)


def framed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def sealed(header: Table, data: bytes) -> bytes:
    return framed(json.dumps(header).encode(), data)


def put_in_place(content: bytes, path: Path) -> None:
    """A listing in place of another, with the name that its digest gives it."""
    os.unlink(path)
    (path.parent / sha256(content).hexdigest()).write_bytes(content)
