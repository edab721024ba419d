"""The socket that a server listens on."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from statewise.errors import ConfigError

BACKLOG = 2048


def listen(host: str, port: int, unix_socket: Path | None = None) -> socket.socket:
    """A listening socket: a file where `unix_socket` is given, else an address. Raises `ConfigError`.

    Who may use the file is up to its directory and the umask. One that a server left behind is replaced; one that a
    server still listens at is not.
    """
    try:
        if unix_socket is not None:
            return _at_file(unix_socket)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        where = str(unix_socket) if unix_socket is not None else f"{host}, port {port}"
        if error.errno == errno.EADDRINUSE:
            free = "another --unix-socket" if unix_socket is not None else "another --port, or 0 for any free one"
            raise ConfigError(f"another program listens at {where}: give {free}") from None
        reason = error.strerror or "it is no address of this machine"
        raise ConfigError(f"the server cannot listen at {where}: {reason}") from None


def url_of(listener: socket.socket, host: str, tls: bool) -> str:
    """Where clients find a listening socket."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{listener.getsockname()[1]}"


def _at_file(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _left_behind(path):
            path.unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _left_behind(path: Path) -> bool:
    """Whether there is a socket that nobody listens at."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            caller.settimeout(1)
            caller.connect(os.fspath(path))
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
