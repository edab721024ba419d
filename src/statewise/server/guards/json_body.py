"""What a JSON body may be, before a parser sees it. Nothing here keeps a body."""

from __future__ import annotations

import codecs
import re

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from statewise.server.errors import ApiError
from statewise.server.guards.headers import header_values

WINDOW = 1 << 16  # bytes looked at together
STRUCTURE = b'"[]{}'
NOT_STRUCTURE = bytes(set(range(256)) - set(STRUCTURE))
STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # one level down and one up, as int8
HIGH = rb"\\u[dD][89abAB][0-9a-fA-F]{2}"
PAIR = re.compile(HIGH + rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
UNFINISHED = re.compile(rb"(?:" + HIGH + rb")?(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z")
LONGEST = 11  # bytes that UNFINISHED can match


class JsonLimit:
    """Refuse JSON that no handler should have to think about (400).

    That is JSON nested deeper than `max_depth`, with more than `max_containers` objects and lists (a few bytes of body
    are then tens of bytes of memory each), not in UTF-8, or with half a surrogate pair, which Python takes for text
    until something writes it. Bodies that say they are JSON are looked at, and those that say nothing; a handler must
    not parse any other as JSON.
    """

    def __init__(self, app: ASGIApp, max_depth: int = 64, max_containers: int = 200_000) -> None:
        self.app = app
        self.max_depth = max_depth
        self.max_containers = max_containers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _may_be_json(scope):
            await self.app(scope, receive, send)
            return
        scan = JsonScan(self.max_depth, self.max_containers)
        error: ApiError | None = None

        async def scanned() -> Message:
            nonlocal error
            if error is not None:
                raise error
            message = await receive()
            if message["type"] == "http.request":
                more = message.get("more_body", False)
                problem = scan.feed(message.get("body", b""), last=not more)
                if problem is not None:
                    error = ApiError(
                        400, problem, code="invalid_json", headers={"Connection": "close"} if more else None
                    )
                    raise error
            return message

        await self.app(scope, scanned, send)


class JsonScan:
    """Follows a JSON text that comes in pieces, in time linear in its length.

    It sees every bracket that a parser would get to see: a backslash outside a string confuses it, but no parser reads
    on from there.
    """

    def __init__(self, max_depth: int, max_containers: int) -> None:
        self.max_depth = max_depth
        self.max_containers = max_containers
        self._depth = 0
        self._brackets = 0  # opened or closed
        self._in_string = False
        self._unfinished = b""  # an escape at the end of a piece, whose meaning comes with the next
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def feed(self, piece: bytes, last: bool = False) -> str | None:
        """What is wrong with the text up to here, as a sentence; None while nothing is."""
        try:
            for start in range(0, len(piece), WINDOW):
                window = piece[start : start + WINDOW]
                self._decoder.decode(window)
                problem = self._look_at(window)
                if problem is not None:
                    return problem
            self._decoder.decode(b"", final=last)
        except UnicodeDecodeError:
            return "The request body is not valid UTF-8"
        return None

    def _look_at(self, window: bytes) -> str | None:
        if b"\0" in window:  # no JSON has one, but JSON in UTF-16 and UTF-32 has, and its quotes are elsewhere
            return "The request body must be JSON in UTF-8"
        # Every backslash that is left begins an escape; the null keeps apart what was not side by side.
        text = (self._unfinished + window).replace(b"\\\\", b"\0")
        match = UNFINISHED.search(text, max(0, len(text) - LONGEST))
        self._unfinished = match[0] if match else b""
        text = text[: len(text) - len(self._unfinished)]
        if SURROGATE.search(text) and SURROGATE.search(PAIR.sub(b"\0", text)):
            return "A string in the request body has half of a surrogate pair, which is no character"
        parts = text.replace(b'\\"', b"").translate(None, NOT_STRUCTURE).split(b'"')
        brackets = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        if brackets:
            depths = np.cumsum(np.frombuffer(brackets.translate(STEPS), np.int8), dtype=np.int64) + self._depth
            if depths.max() > self.max_depth:
                return f"The JSON in the request body is nested deeper than {self.max_depth} levels"
            self._depth = int(depths[-1])
            self._brackets += len(brackets)
            if self._brackets > 2 * self.max_containers:
                return f"The JSON in the request body has more than {self.max_containers} objects and lists"
        return None


def _may_be_json(scope: Scope) -> bool:
    types = [value.partition(b";")[0].strip().lower() for value in header_values(scope, b"content-type")]
    return not types or any(kind == b"application/json" or kind.endswith(b"+json") for kind in types)
