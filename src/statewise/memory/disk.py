"""Checkpoints in files: blocks named by their digest, and for each checkpoint one file that lists its blocks.

A block that several checkpoints share is one file. Nothing is believed that does not have the digest of its name, so
what a dying process or machine left half written is never loaded.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from statewise.errors import ConfigError, SnapshotError
from statewise.memory.durable import clean_directory, replacing
from statewise.memory.eviction import Eviction, GreedyDual
from statewise.memory.tiers import Frozen

logger = logging.getLogger(__name__)
VERSION = "1"
MAX_LISTING = 1 << 30  # bytes of a checkpoint's list of tokens and blocks
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Stored:
    """A checkpoint on the disk: the digests that name its files."""

    listing: str
    digests: tuple[str, ...]  # of the record and of each page


@dataclass(frozen=True)
class Listing:
    """What a checkpoint's own file says, beside its blocks."""

    tenant: str
    tokens: list[int]
    hidden: Tensor
    stored: Stored


@dataclass
class Outcome:
    """What became of an attempt to store a checkpoint."""

    digests: list[str]
    stored: Stored | None = None
    removed: list[Frozen] = field(default_factory=list)
    error: str | None = None


class DiskTier:
    """A directory that belongs to one engine, for one model and one layout of blocks.

    The methods under "Files" run one at a time on the thread that moves checkpoints and own the files; `held` and
    `policy` belong to the step loop.
    """

    def __init__(self, directory: Path, limit: int, belongs_to: str, record_bytes: int, page_bytes: int) -> None:
        """Raises `ConfigError` where the directory cannot be used."""
        self.limit = limit
        self.held: dict[Frozen, Stored] = {}
        self.policy: Eviction = GreedyDual()
        self.used_bytes = 0
        self._record_bytes, self._page_bytes = record_bytes, page_bytes
        self._references: Counter[str] = Counter()  # of blocks
        self._listed: set[str] = set()
        self._home = directory / belongs_to
        self._blocks, self._listings = self._home / "blocks", self._home / "checkpoints"
        try:
            for path in (self._home, self._blocks, self._listings):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock: IO[bytes] = open(self._home / "lock", "wb")  # noqa: SIM115, held as long as the engine lives
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "the directory of disk_cache is used by another engine: give each its own, or end the other one"
            ) from None
        except OSError as error:
            raise ConfigError(f"disk_cache cannot be used ({error.strerror}): name a directory to write to") from None

    def open(self) -> list[Listing]:
        """Clean the directory of all that is unfinished, damaged or used by nothing. Returns what is sound, the
        longest unused first."""
        try:
            unfinished = clean_directory(self._blocks) + clean_directory(self._listings)
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self._blocks)}
            found = sorted(os.scandir(self._listings), key=lambda entry: entry.stat().st_mtime_ns)
            sound, refused = [], 0
            for entry in found:
                listing = self._sound(Path(entry.path), sizes)
                if listing is None:
                    os.unlink(entry.path)
                    refused += 1
                else:
                    sound.append(listing)
                    self._references.update(listing.stored.digests)
                    self._listed.add(entry.name)
                    self.used_bytes += entry.stat().st_size
            for name in sizes.keys() - self._references.keys():
                os.unlink(self._blocks / name)
        except OSError as error:
            raise ConfigError(f"disk_cache cannot be read ({error.strerror}): name another directory") from None
        self.used_bytes += sum(sizes[digest] for digest in self._references)
        if refused or unfinished:
            logger.warning("the disk cache held %d damaged checkpoints and %d unfinished files; they were removed",
                           refused, len(unfinished))  # fmt: skip
        return sound

    def _sound(self, path: Path, sizes: dict[str, int]) -> Listing | None:
        try:
            listing = self._listing(path)
        except (OSError, SnapshotError):
            return None
        expected = [self._record_bytes] + [self._page_bytes] * (len(listing.stored.digests) - 1)
        there = [sizes.get(digest) for digest in listing.stored.digests]
        return listing if there == expected else None

    def _listing(self, path: Path) -> Listing:
        if path.stat().st_size > MAX_LISTING:
            raise SnapshotError("is too large")
        content = path.read_bytes()
        if sha256(content).hexdigest() != path.name:
            raise SnapshotError("is damaged")
        try:
            tensors = load(content)
            length = int.from_bytes(content[:8], "little")
            told = _metadata(content[8 : 8 + length])
            digests = tuple(told["blocks"].split())
            tokens, hidden = tensors["tokens"], tensors["hidden"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise SnapshotError("is malformed") from error
        named = all(len(digest) == 64 and _HEX.issuperset(digest) for digest in digests)
        if told["version"] != VERSION or not named or tokens.dtype != torch.int32 or hidden.dim() != 1:
            raise SnapshotError("is malformed")
        return Listing(told["tenant"], tokens.tolist(), hidden, Stored(path.name, digests))

    # Files

    def store(
        self,
        tenant: str,
        tokens: Sequence[int],
        hidden: Tensor,
        contents: Sequence[memoryview],
        victims: Sequence[tuple[Frozen, Stored]],
    ) -> Outcome:
        """Write a checkpoint. Where the directory is full, `victims` go first, in their order, as many as needed."""
        outcome = Outcome([sha256(content).hexdigest() for content in contents])
        new = {d: c for d, c in zip(outcome.digests, contents, strict=True) if d not in self._references}
        told = {"version": VERSION, "tenant": tenant, "blocks": " ".join(outcome.digests)}
        listing = save({"tokens": torch.tensor(tokens, dtype=torch.int32), "hidden": hidden.cpu()}, told)
        going = iter(victims)
        while self.used_bytes + len(listing) + sum(map(len, new.values())) > self.limit:
            victim, stored = next(going, (None, None))
            if victim is None or stored is None:
                outcome.error = "it is too small"
                return outcome
            self.remove(stored)
            outcome.removed.append(victim)
            new |= {d: c for d, c in zip(outcome.digests, contents, strict=True) if d not in self._references}
        name = sha256(listing).hexdigest()
        outcome.stored = Stored(name, tuple(outcome.digests))
        if name in self._listed:
            return outcome
        try:
            for digest, content in new.items():
                self._write(self._blocks / digest, content)
            self._write(self._listings / name, memoryview(listing))
        except OSError as error:
            for path in [self._listings / name, *(self._blocks / digest for digest in new)]:
                with suppress(OSError):
                    os.unlink(path)
            outcome.stored, outcome.error = None, error.strerror or str(error)
            return outcome
        self._listed.add(name)
        self._references.update(outcome.digests)
        self.used_bytes += len(listing) + sum(map(len, new.values()))
        return outcome

    def remove(self, stored: Stored) -> None:
        """Delete a checkpoint, and those of its blocks that no other one has. One that is gone stays gone."""
        if stored.listing not in self._listed:
            return
        self._listed.remove(stored.listing)
        self._unlink(self._listings / stored.listing)
        self._references.subtract(stored.digests)
        for digest in set(stored.digests):
            if self._references[digest] <= 0:
                del self._references[digest]
                self._unlink(self._blocks / digest)

    def load(self, stored: Stored, targets: Sequence[memoryview]) -> bool:
        """Read the blocks of a checkpoint. False: one is missing, or its bytes do not have its digest."""
        for digest, target in zip(stored.digests, targets, strict=True):
            try:
                descriptor = os.open(self._blocks / digest, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with open(descriptor, "rb", buffering=0) as file:
                    done = 0
                    while done < len(target) and (count := file.readinto(target[done:])):
                        done += count
            except OSError:
                return False
            if done < len(target) or sha256(target).hexdigest() != digest:
                return False
        with suppress(OSError):
            os.utime(self._listings / stored.listing)
        return True

    def close(self) -> None:
        """Let another engine have the directory."""
        self._lock.close()

    def _write(self, path: Path, content: memoryview) -> None:
        # Not synced: what a failing machine leaves behind does not have the digest of its name.
        with replacing(path, sync=False) as file:
            file.write(content)

    def _unlink(self, path: Path) -> None:
        with suppress(OSError):
            size = path.stat().st_size
            os.unlink(path)
            self.used_bytes -= size

    # What the step loop asks

    def used(self, frozen: Frozen, tokens: int) -> None:
        """Tell the policy that a checkpoint was used, which saved so many tokens; the pages before them are shared."""
        pages = -(-(len(self.held[frozen].digests) - 1) * tokens // max(frozen.num_tokens, 1))
        self.policy.used(frozen, tokens, self._record_bytes + pages * self._page_bytes)

    def superseded(self, frozen: Frozen) -> None:
        """Tell the policy that one sequence has gone on from a checkpoint to a deeper one."""
        self.policy.superseded(frozen)

    def candidates(self, count: int) -> Iterator[tuple[Frozen, Stored]]:
        """What should go next, at most `count`: by the policy, pinned ones last and awaited ones not at all."""
        now = time.monotonic()
        idle = [f for f in self.held if not f.fixed and not f.wanted]
        idle.sort(key=lambda f: (f.pinned_until > now, self.policy.order(f)))
        yield from ((frozen, self.held[frozen]) for frozen in idle[:count])


def _metadata(header: bytes) -> dict[str, str]:
    """The text entries of a safetensors header."""
    told = json.loads(header)["__metadata__"]
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise ValueError("no text")
    return told
