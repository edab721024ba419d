"""Checkpoints whose every byte follows from their tokens, in a directory."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from statewise.memory.disk import DiskTier, Outcome
from statewise.memory.listing import Listing, Stored
from statewise.memory.tiers import Frozen

RECORD, PAGE = 4096, 1024  # bytes
PAGE_SIZE = 4  # tokens
HIDDEN = 8


@cache
def blocks_of(tokens: tuple[int, ...], record: int = RECORD, page: int = PAGE) -> list[bytes]:
    """The record, and pages that are the same for all that begin alike."""
    ends = range(PAGE_SIZE, len(tokens) + PAGE_SIZE, PAGE_SIZE)
    return [
        random.Random(f"record of {list(tokens)}").randbytes(record),
        *(random.Random(f"page of {list(tokens[:end])}").randbytes(page) for end in ends),
    ]


def hidden_of(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([len(tokens), *range(HIDDEN - 1)], dtype=torch.float32)


class Directory:
    """An engine's part of the disk cache, by the tokens of its checkpoints."""

    def __init__(
        self, path: Path, limit: int = 1 << 20, belongs_to: str = "model", record: int = RECORD, page: int = PAGE
    ) -> None:
        self.home, self.record, self.page = path / belongs_to, record, page
        self.tier = DiskTier(path, limit, belongs_to, record, page, HIDDEN)
        self.found: list[Listing] = self.tier.open(PAGE_SIZE)
        self.held: dict[tuple[int, ...], Stored] = {tuple(listing.tokens): listing.stored for listing in self.found}

    def store(self, tokens: Sequence[int], victims: Sequence[tuple[Frozen, Stored]] = ()) -> Outcome:
        blocks = blocks_of(tuple(tokens), self.record, self.page)
        digests = [sha256(block).hexdigest() for block in blocks]
        views = [memoryview(block) for block in blocks]
        outcome = self.tier.store("tenant", tokens, hidden_of(tokens), views, digests, victims)
        assert outcome.digests == digests
        if outcome.stored is not None:
            self.held[tuple(tokens)] = outcome.stored
        return outcome

    def victims(self) -> list[tuple[Frozen, Stored]]:
        """All that is held, the longest held first."""
        return [(Frozen(len(tokens), hidden_of(tokens)), stored) for tokens, stored in self.held.items()]

    def remove(self, tokens: Sequence[int]) -> None:
        self.tier.remove(self.held.pop(tuple(tokens)))

    def load(self, tokens: Sequence[int]) -> bool:
        """Read a checkpoint; what is given as sound must be right. False: it was refused."""
        expected = blocks_of(tuple(tokens), self.record, self.page)
        targets = [bytearray(len(block)) for block in expected]
        sound = self.tier.load(self.held[tuple(tokens)], [memoryview(target) for target in targets])
        assert not sound or targets == expected
        return sound

    def assert_clean(self) -> None:
        """The files are those of what is held and are counted right, and all of it can be read."""
        for tokens in self.held:
            assert self.load(tokens)
        expected = {"lock"}
        for stored in self.held.values():
            expected |= {f"checkpoints/{stored.listing}", *(f"blocks/{digest}" for digest in stored.digests)}
        assert files(self.home).keys() == expected
        assert self.tier.used_bytes == sum(files(self.home).values()) <= self.tier.limit


def files(directory: Path) -> dict[str, int]:
    """Whatever lies below a directory, and its size in bytes."""
    found = {}
    for place, directories, names in os.walk(directory):
        strange = [name for name in directories if Path(place, name).is_symlink()]
        for name in names + strange:
            path = Path(place, name)
            found[str(path.relative_to(directory))] = path.lstat().st_size
    return found
