"""Checkpoints in files: blocks named by their digest, and for each checkpoint one file that lists its blocks.

A block that several checkpoints share is one file. Nothing is believed that does not have the digest of its name, so
what a dying process or machine left half written is never loaded.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from heapq import nsmallest
from io import FileIO
from pathlib import Path
from typing import IO

from torch import Tensor

from statewise.errors import ConfigError, SnapshotError
from statewise.memory.durable import clean_directory, replacing
from statewise.memory.eviction import Eviction, GreedyDual
from statewise.memory.listing import MAX_LISTING, Listing, Stored, decoded, encoded
from statewise.memory.tiers import Frozen

logger = logging.getLogger(__name__)


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

    def __init__(
        self,
        directory: Path,
        limit: int,
        belongs_to: str,
        record_bytes: int,
        page_bytes: int,
        hidden_size: int | None = None,
    ) -> None:
        """Files of at most `limit` bytes; `belongs_to` tells models and layouts apart. Raises `ConfigError` where the
        directory cannot be used."""
        self.limit = limit
        self.held: dict[Frozen, Stored] = {}
        self.policy: Eviction = GreedyDual()
        self.used_bytes = 0
        self._record_bytes, self._page_bytes, self._hidden_size = record_bytes, page_bytes, hidden_size
        self._references: Counter[str] = Counter()  # of blocks; one that was found damaged has them, but no size
        self._listed: set[str] = set()
        self._sizes: dict[str, int] = {}  # bytes of the files that are there, by name
        self._home = directory / belongs_to
        self._blocks, self._listings = self._home / "blocks", self._home / "checkpoints"
        try:
            for path in (directory, self._home, self._blocks, self._listings):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._home / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._lock: IO[bytes] = os.fdopen(descriptor, "wb")  # held as long as the engine lives
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "the directory of disk_cache is used by another engine: give each its own, or end the other one"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"disk_cache cannot be used ({reason}): name a directory to write to") from None

    def open(self, page_size: int) -> list[Listing]:
        """Clean the directory of all that is unfinished, damaged, used by nothing or beyond the limit. Returns what is
        sound, the longest unused first. A page has `page_size` tokens; 0 if no layer keeps any."""
        try:
            unfinished = clean_directory(self._blocks) + clean_directory(self._listings)
            sizes = {name: status.st_size for name, status in _plain_files(self._blocks)[0].items()}
            found, refused = _plain_files(self._listings)
            sound = []
            for name in sorted(found, key=lambda name: found[name].st_mtime_ns):
                listing = self._sound(name, page_size, sizes)
                if listing is None:
                    os.unlink(self._listings / name)
                    refused += 1
                else:
                    sound.append(listing)
                    self._references.update(listing.stored.digests)
                    self._listed.add(name)
                    self._sizes[name] = found[name].st_size
            for name in sizes.keys() - self._references.keys():
                os.unlink(self._blocks / name)
        except OSError as error:
            self.close()
            raise ConfigError(f"disk_cache cannot be read ({error.strerror}): name another directory") from None
        self._sizes |= {digest: sizes[digest] for digest in self._references}
        self.used_bytes = sum(self._sizes.values())
        if refused or unfinished:
            logger.warning("the disk cache held %d damaged checkpoints and %d unfinished files; they were removed",
                           refused, len(unfinished))  # fmt: skip
        excess = 0  # of a limit that was higher once
        while self.used_bytes > self.limit and excess < len(sound):
            self.remove(sound[excess].stored)
            excess += 1
        return sound[excess:]

    def _sound(self, name: str, page_size: int, sizes: Mapping[str, int]) -> Listing | None:
        try:
            with _opened(self._listings / name) as file:
                if os.fstat(file.fileno()).st_size > MAX_LISTING:
                    return None
                listing = decoded(name, file.readall(), self._hidden_size)
        except (OSError, SnapshotError):
            return None
        pages = -(-len(listing.tokens) // page_size) if page_size else 0
        there = [sizes.get(digest) for digest in listing.stored.digests]
        return listing if there == [self._record_bytes] + [self._page_bytes] * pages else None

    # Files

    def store(
        self,
        tenant: str,
        tokens: Sequence[int],
        hidden: Tensor,
        contents: Sequence[memoryview],
        digests: Sequence[str],
        victims: Sequence[tuple[Frozen, Stored]],
    ) -> Outcome:
        """Write a checkpoint, whose blocks have these digests. Where the directory is full, `victims` go first, in
        their order, as many as needed."""
        outcome, blocks = Outcome(list(digests)), dict(zip(digests, contents, strict=True))
        listing = encoded(tenant, tokens, hidden, digests)
        if len(listing) > MAX_LISTING or len(listing) + sum(map(len, blocks.values())) > self.limit:
            outcome.error = "it is too small"
            return outcome
        going = iter(victims)
        while self.used_bytes + len(listing) + sum(map(len, self._missing(blocks).values())) > self.limit:
            victim, stored = next(going, (None, None))
            if victim is None or stored is None:
                outcome.error = "it is too small"
                return outcome
            self.remove(stored)
            outcome.removed.append(victim)
        name, new = sha256(listing).hexdigest(), self._missing(blocks)
        try:
            for digest, content in new.items():
                self._write(self._blocks / digest, content)
            if name not in self._listed:
                self._write(self._listings / name, memoryview(listing))
                self._references.update(digests)
                self._listed.add(name)
        except OSError as error:
            for digest in new:
                if not self._references[digest]:
                    self._unlink(self._blocks / digest)
            outcome.error = error.strerror or str(error)
            return outcome
        outcome.stored = Stored(name, tuple(digests))
        return outcome

    def _missing(self, blocks: Mapping[str, memoryview]) -> dict[str, memoryview]:
        return {digest: content for digest, content in blocks.items() if digest not in self._sizes}

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
        """Read the blocks of a checkpoint. False: one is missing, or its bytes do not have its digest; that one is
        deleted, and whoever stores it next writes it again."""
        for digest, target in zip(stored.digests, targets, strict=True):
            if not self._read(digest, target):
                self._unlink(self._blocks / digest)
                return False
        with suppress(OSError):
            os.utime(self._listings / stored.listing)
        return True

    def _read(self, digest: str, target: memoryview) -> bool:
        try:
            with _opened(self._blocks / digest) as file:
                done = 0
                while done < len(target) and (count := file.readinto(target[done:])):
                    done += count
        except OSError:
            return False
        return done == len(target) and sha256(target).hexdigest() == digest

    def close(self) -> None:
        """Let another engine have the directory."""
        self._lock.close()

    def _write(self, path: Path, content: memoryview) -> None:
        # Not synced: what a failing machine leaves behind does not have the digest of its name.
        with replacing(path, sync=False) as file:
            file.write(content)
        self._sizes[path.name] = len(content)
        self.used_bytes += len(content)

    def _unlink(self, path: Path) -> None:
        try:
            _delete(path)
        except FileNotFoundError:
            pass
        except OSError:
            return  # it stays, and counts
        self.used_bytes -= self._sizes.pop(path.name, 0)

    # What the step loop asks

    def used(self, frozen: Frozen, tokens: int) -> None:
        """Tell the policy that a checkpoint was used, which saved so many tokens; the pages before them are shared."""
        pages = -(-(len(self.held[frozen].digests) - 1) * tokens // max(frozen.num_tokens, 1))
        self.policy.used(frozen, tokens, self._record_bytes + pages * self._page_bytes)

    def superseded(self, frozen: Frozen) -> None:
        """Tell the policy that one sequence has gone on from a checkpoint to a deeper one."""
        self.policy.superseded(frozen)

    def candidates(self, count: int) -> list[tuple[Frozen, Stored]]:
        """What should go next, at most `count`: by the policy, pinned ones last and awaited ones not at all."""
        now = time.monotonic()
        idle = (frozen for frozen in self.held if not (frozen.fixed or frozen.moving or frozen.wanted))
        going = nsmallest(count, idle, key=lambda f: (f.pinned_until > now, self.policy.order(f)))
        return [(frozen, self.held[frozen]) for frozen in going]


def _plain_files(directory: Path) -> tuple[dict[str, os.stat_result], int]:
    """The plain files of a directory, and the number of other things that lay there and were deleted."""
    with os.scandir(directory) as scanned:
        entries = list(scanned)
    plain = {entry.name: entry.stat(follow_symlinks=False) for entry in entries if entry.is_file(follow_symlinks=False)}
    for entry in entries:
        if entry.name not in plain:
            _delete(Path(entry.path))
    return plain, len(entries) - len(plain)


def _opened(path: Path) -> FileIO:
    """A plain file to read. Raises `OSError` for anything else; a pipe does not make us wait."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return FileIO(descriptor)


def _delete(path: Path) -> None:
    try:
        os.unlink(path)
    except IsADirectoryError:
        shutil.rmtree(path)
