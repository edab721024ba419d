"""The file of a checkpoint on the disk: its tokens, its last hidden row, and the digests that name its blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from statewise.errors import SnapshotError

VERSION = "1"
MAX_LISTING = 1 << 27  # bytes
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Stored:
    """A checkpoint on the disk: the digests that name its files."""

    listing: str
    digests: tuple[str, ...]  # of the record and of each page


@dataclass(frozen=True)
class Listing:
    """What a checkpoint's own file says."""

    tenant: str
    tokens: list[int]
    hidden: Tensor  # [hidden]
    stored: Stored


def encoded(tenant: str, tokens: Sequence[int], hidden: Tensor, digests: Sequence[str]) -> bytes:
    """The content of a listing; its SHA-256 is its name."""
    told = "\n".join((VERSION, tenant, *digests))  # one text: the order of several would change from time to time
    return save({"tokens": torch.tensor(tokens, dtype=torch.int32), "hidden": hidden.cpu()}, {"checkpoint": told})


def decoded(name: str, content: bytes, hidden_size: int | None) -> Listing:
    """What the file of a name says. Raises `SnapshotError` where that cannot be believed."""
    if sha256(content).hexdigest() != name:
        raise SnapshotError("is damaged")
    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]  # text, or nothing: safetensors has looked
        version, tenant, *digests = metadata["checkpoint"].split("\n")
        tokens, hidden = tensors["tokens"], tensors["hidden"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SnapshotError("is malformed") from error
    named = all(len(digest) == 64 and _HEX.issuperset(digest) for digest in digests)
    counted = tokens.dtype == torch.int32 and tokens.dim() == 1 and len(tokens)
    row = hidden.is_floating_point() and hidden.dim() == 1 and hidden_size in (None, len(hidden))
    if version != VERSION or not named or not counted or not row:
        raise SnapshotError("is malformed")
    return Listing(tenant, tokens.tolist(), hidden, Stored(name, tuple(digests)))
