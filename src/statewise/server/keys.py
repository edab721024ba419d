"""API keys: who may use the server, and whose frozen prompts belong to whom."""

from __future__ import annotations

import hmac
import logging
import os
import re
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from statewise.errors import ConfigError
from statewise.server.errors import ApiError, refuse
from statewise.server.guards.headers import header_values

logger = logging.getLogger(__name__)

MAX_FILE = 1 << 20  # bytes
MAX_KEYS = 1000  # every request is compared with all of them
SHORT_KEY = 16  # characters; a shorter one can be guessed
KEY = re.compile(r"[!-~]{1,256}")  # printable ASCII without spaces: what a header carries unchanged
NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")  # fit for a line of the log
BEARER = re.compile(rb"bearer +([!-~]+) *", re.IGNORECASE)
TENANT_DOMAIN = b"statewise tenant"  # keeps the tenant's digest apart from the one that keys are compared by
READING = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class ApiKey:
    """A key as the server remembers it: the key itself is not kept."""

    name: str  # for the log
    digest: bytes  # SHA-256 of the key
    tenant: str  # of its user's frozen prompts; the same after a restart, so that those on the disk are found again

    @classmethod
    def of(cls, key: str, name: str) -> ApiKey:
        """Forget a key. The tenant does not tell the digest, nor the other way round."""
        secret = key.encode()
        tenant = hmac.new(secret, TENANT_DOMAIN, sha256).hexdigest()[:32]
        return cls(name, sha256(secret).digest(), tenant)


class KeyRing:
    """The keys that are accepted. None at all: the server is open to whoever reaches it."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)
        if len(self._keys) > MAX_KEYS:
            raise ConfigError(f"there are {len(self._keys)} API keys; at most {MAX_KEYS} can be used")
        if len({key.digest for key in self._keys}) < len(self._keys):
            raise ConfigError("an API key is listed twice")

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: bytes) -> ApiKey | None:
        """The key that was presented. How long this takes tells nothing about it or about the others."""
        digest = sha256(presented).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key  # and go on: the place in the list is nobody's business
        return found


def load_keys(keys: Iterable[str] = (), file: Path | None = None) -> KeyRing:
    """The keys of a list, such as a command line's, and of a file; either holds `key` or `name: key`.

    A file has one a line, empty lines, and comments that begin with #. It should be readable by its owner only; for
    one that others can read the log has a warning, since secrets mounted into a container often are. Raises
    `ConfigError`, which never repeats a key, for an empty key and for a file without any: an unset variable must not
    open the server.
    """
    found = [_parse(entry, f"API key {number}", f"key-{number}") for number, entry in enumerate(keys, 1)]
    if file is not None:
        lines = [line.strip() for line in _read(file).splitlines()]
        entries = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
        if not entries:
            raise ConfigError(f"{file} holds no API key; write one a line, as `key` or `name: key`")
        found += [_parse(line, f"line {number} of {file}", f"line-{number}") for number, line in entries]
    return KeyRing(found)


def salt_of(tenant: str | None, cache_salt: str | None) -> str | None:
    """The salt under which a request's frozen prompts are kept.

    A client's own `cache_salt` divides what belongs to its key; it cannot lead into what belongs to another's.
    """
    if tenant is None:
        return cache_salt
    return f"{tenant}/{cache_salt or ''}"


class KeyGuard:
    """Let only requests with a key through, to every path but the open ones, which can be read without.

    `scope["state"]` gets `tenant` and `key_name`; both are None where no key is needed. A key comes as
    `Authorization: Bearer KEY` or `x-api-key: KEY`. Open paths are compared as they are, letter by letter.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: Collection[str] = ("/health", "/")) -> None:
        self.app = app
        self.keys = keys
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["tenant"] = state["key_name"] = None
        if self.keys and not self._is_open(scope):
            key = self.keys.find(_presented(scope))
            if key is None:
                await refuse(ApiError.unauthorized(), scope, receive, send)
                return
            state["tenant"], state["key_name"] = key.tenant, key.name
        await self.app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        root: str = scope.get("root_path", "")
        path: str = scope["path"]
        return scope.get("method") in READING and path.startswith(root) and path[len(root) :] in self.open_paths


def _presented(scope: Scope) -> bytes:
    """The one key that a request brings; empty if it brings none, or several that differ."""
    bearers = [BEARER.fullmatch(value) for value in header_values(scope, b"authorization")]
    keys = {match[1] for match in bearers if match} | set(header_values(scope, b"x-api-key"))
    return keys.pop() if len(keys) == 1 else b""


def _parse(entry: str, where: str, name: str) -> ApiKey:
    """`where` says in a message which key it is about; `name` is for a key that has none."""
    entry = entry.strip()
    if ":" in entry:
        given, _, key = entry.partition(":")
        name, key, spaced = given.strip(), key.strip(), key[:1].isspace()
        if not spaced or NAME.fullmatch(name) is None:
            raise ConfigError(
                f"{where} has a colon, so it must be `name: key`, with a space between them and a name of at most 64 "
                "letters, digits and . _ @ -"
            )
    else:
        key = entry
    if KEY.fullmatch(key) is None:
        raise ConfigError(f"{where} is not 1 to 256 printable ASCII characters without spaces")
    if len(key) < SHORT_KEY:
        logger.warning("%s has fewer than %d characters: it can be guessed", where, SHORT_KEY)
    return ApiKey.of(key, name)


def _read(file: Path) -> str:
    try:
        with file.open("rb") as source:
            mode = os.fstat(source.fileno()).st_mode
            content = source.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"the API keys in {file} cannot be read: {error.strerror}") from None
    if mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        logger.warning("other users can read or change the API keys in %s: chmod 600 it", file)
    if len(content) > MAX_FILE:
        raise ConfigError(f"{file} is too large for a file of API keys: at most {MAX_FILE} bytes are read")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not a text file in UTF-8") from None
