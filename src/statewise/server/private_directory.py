"""A directory for one server's sockets and files, which leaves nothing behind whatever ends the server."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "statewise-serve-"
LOCK = "lock"
LONGEST_BASE = 60  # bytes: the whole path of a socket has at most 107


class PrivateDirectory:
    """Readable by this user only, and locked for as long as this process lives.

    A process that is killed cannot remove its directory, but it loses its lock: the next server sees that by it, and
    removes the directory.
    """

    def __init__(self) -> None:
        remove_stale()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_base()))
        # The lock has its name when it is held: whoever finds it free knows that its owner has gone.
        self._lock = os.open(self.path / f"{LOCK}-new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(self.path / f"{LOCK}-new", self.path / LOCK)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _base() -> Path:
    """The directory for temporary files, or another where its name leaves no room for a socket's."""
    base = tempfile.gettempdir()
    return Path(base if len(os.fsencode(base)) <= LONGEST_BASE else "/tmp")


def remove_stale() -> None:
    """Remove what servers of this user have left that were killed. What is not surely theirs stays."""
    for path in _base().glob(f"{PREFIX}*"):
        try:
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                continue
            lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # its server lives
        finally:
            os.close(lock)
