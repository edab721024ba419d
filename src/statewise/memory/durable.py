"""Files that are either whole or not there, whenever the process or the machine dies."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = re.compile(r"\.\d+\.[0-9a-f]{16}\.partial")
"""Names of files that are being written: process id and a random token. No finished file may have one."""


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A new file, readable by its owner only, that takes the place of `path` when the block ends without an error.

    Until then it lies beside `path` under a name of its own and is locked. On an error it is removed and `path` stays
    as it was. When this returns, contents and name are on the disk; without `sync` that outlives the process but
    maybe not the machine, and the file must be checked when it is read. Raises `OSError`.
    """
    if PARTIAL.fullmatch(path.name):
        raise OSError(f"the name {path.name} is kept for unfinished files")
    partial, file = _begin(path.parent)
    with file:  # closing it gives up the lock
        try:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
    if sync:
        _sync(path.parent)


def _begin(directory: Path) -> tuple[Path, BinaryIO]:
    while True:
        partial = directory / f".{os.getpid()}.{secrets.token_hex(8)}.partial"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = os.fdopen(descriptor, "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return partial, file
        file.close()  # a cleaner found it between its making and its locking


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean_directory(directory: Path) -> list[str]:
    """Remove what dead writers left half written. Returns the names.

    A file whose writer lives is locked and stays; the lock, unlike a process id, dies with the writer and is never
    somebody else's. Finished files are not looked at. Raises `OSError`.
    """
    removed = []
    with os.scandir(directory) as entries:
        found = [entry for entry in entries if PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
    for name in sorted(entry.name for entry in found):
        with suppress(FileNotFoundError):  # finished meanwhile, or another cleaner was faster
            descriptor = os.open(directory / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(directory / name)
                removed.append(name)
            except BlockingIOError:
                pass
            finally:
                os.close(descriptor)
    return removed
