"""The names under which a server answers: a web page must not reach a loopback server by renaming itself to it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from statewise.errors import ConfigError
from statewise.server.errors import ApiError, refuse
from statewise.server.guards.headers import header_values

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*)\.?(?::[0-9]{1,5})?")


def allowed_hosts(bind: str, configured: Collection[str] = ()) -> frozenset[str] | None:
    """The names that a server bound to `bind` answers to, without ports; None for every name.

    A server on a loopback address answers to the loopback's names and to the configured ones; one on another address
    does so when names are configured, and to every name otherwise, since nobody can know what it is called. `*` among
    the configured names is every name. Raises `ConfigError` for one that is no host name.
    """
    names = set(LOOPBACK_NAMES)
    for name in configured:
        if name != "*":
            match = HOST.fullmatch(name.lower())
            if match is None:
                raise ConfigError(f"{name!r} is no host name; write it like example.com or [2001:db8::1]")
            names.add(match[1])
    if "*" in configured or not (configured or is_loopback(bind)):
        return None
    if is_loopback(bind):
        names.add(f"[{bind.lower()}]" if ":" in bind else bind.lower())
    return frozenset(names)


def is_loopback(bind: str) -> bool:
    """Whether only programs of this machine can reach a server there."""
    try:
        address = ipaddress.ip_address(bind)
    except ValueError:
        return bind.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class HostCheck:
    """Refuse requests whose `Host` is not one of `hosts` (421), which `allowed_hosts` makes.

    A page of evil.example can have its name resolved to 127.0.0.1, and is then of one origin with whatever listens
    there. Its requests still carry the name.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if self.hosts is not None and scope["type"] in ("http", "websocket") else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await refuse(error, scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        hosts = header_values(scope, b"host")
        match = HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
        if match is None:
            return ApiError.invalid("The request must have one Host header with a host name", code="invalid_host")
        if self.hosts is not None and match[1] not in self.hosts:
            message = "This server does not answer to that host name; it must be started with it as an allowed host"
            return ApiError(421, message, code="unknown_host")
        return None
