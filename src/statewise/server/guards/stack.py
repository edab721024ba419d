"""The guards in the order in which a request meets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp

from statewise.server.access_log import AccessLog, Observer
from statewise.server.guards.body import BodyLimit
from statewise.server.guards.cors import Cors
from statewise.server.guards.headers import HeaderLimit
from statewise.server.guards.host import HostCheck, allowed_hosts
from statewise.server.guards.json_body import JsonLimit
from statewise.server.guards.raw_errors import RawErrors
from statewise.server.guards.request_id import RequestId
from statewise.server.keys import KeyGuard, KeyRing


@dataclass(frozen=True)
class GuardSettings:
    """What the guards are told once, at the start."""

    bind: str = "127.0.0.1"  # the address that the server listens on
    hosts: tuple[str, ...] = ()  # host names that it answers to, besides those of the loopback
    origins: tuple[str, ...] = ()  # of web pages that may use it, besides its own; "*" for all
    keys: KeyRing = field(default_factory=KeyRing)
    open_paths: tuple[str, ...] = ("/health", "/")  # can be read without a key
    max_body_bytes: int = 16 << 20
    files: Mapping[str, int] = field(default_factory=dict)  # paths that take files, and of how many bytes
    max_body_seconds: float = 120.0
    max_json_depth: int = 64
    max_header_bytes: int = 32_768
    max_headers: int = 100
    max_target_bytes: int = 8_192  # path and query
    observe: Observer | None = None  # is told of every request
    quiet_paths: tuple[str, ...] = ("/health", "/ready", "/metrics", "/v1/statewise/stats")  # logged at DEBUG


def guarded(app: ASGIApp, settings: GuardSettings) -> ASGIApp:
    """`app` behind all guards. Raises `ConfigError` for a host or an origin that is none.

    From the outside in: what answers for failures; the request's name; the log, which has a line for refusals, too;
    what reads headers only, cheapest first; a preflight, which comes without a key, is answered before the key is
    asked for; nothing reads a body before the key is known.
    """
    app = JsonLimit(app, settings.max_json_depth)
    app = BodyLimit(app, settings.max_body_bytes, settings.max_body_seconds, settings.files)
    app = KeyGuard(app, settings.keys, settings.open_paths)
    app = Cors(app, settings.origins)
    app = HostCheck(app, allowed_hosts(settings.bind, settings.hosts))
    app = HeaderLimit(app, settings.max_header_bytes, settings.max_headers, settings.max_target_bytes)
    app = AccessLog(app, settings.quiet_paths, settings.observe)
    app = RequestId(app)
    return RawErrors(app)
