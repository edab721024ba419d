"""`Session`: a conversation that can be frozen, forked and rewound."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from statewise.engine.request import Completion, Delta, Request
from statewise.engine.sampling_params import SamplingParams
from statewise.errors import RequestError
from statewise.memory.snapshot_transcript import Transcript, is_name

if TYPE_CHECKING:
    from statewise.api.llm import LLM

Content: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or messages of a conversation."""


@dataclass(frozen=True)
class FrozenPoint:
    """A place in a session's tokens whose memory is kept."""

    num_tokens: int
    nbytes: int  # record and pages, the pages that others share included
    names: tuple[str, ...]  # given by `Session.checkpoint`
    tier: str  # the fastest memory that has it: device, host or disk


@dataclass(frozen=True)
class SessionInfo:
    """Where a session stands. `tree` holds the frozen points on the way to its end, first to last."""

    num_tokens: int
    nbytes: int  # of the memory at its end: one record and the pages that cover it
    turns: tuple[int, ...]  # tokens at the end of each append and each answer
    checkpoints: dict[str, int]  # names and token positions
    tree: tuple[FrozenPoint, ...]


class Session:
    """Tokens, and the memory of them that the engine keeps.

    A session owns no memory of its own: the engine's frozen points do, found by their tokens. So a fork is a copy of a
    list, a rewind cuts it, and what was evicted is computed again from the nearest point before it. Sessions of one
    `salt` share memory with each other and with plain requests of the same `cache_salt`.
    """

    def __init__(
        self, llm: LLM, salt: str | None = None, tokens: Sequence[int] = (), transcript: Transcript | None = None
    ) -> None:
        """Use `LLM.session`, `LLM.load_session` and `fork`. Without a transcript all `tokens` are one turn."""
        self._llm = llm
        self._salt = salt
        transcript = transcript or Transcript(turns=(len(tokens),) if tokens else ())
        self._tokens = list(tokens)
        self._messages = list(transcript.messages)
        self._turns = list(transcript.turns)
        self._names = dict(transcript.checkpoints)
        self._closed = False

    @property
    def token_ids(self) -> list[int]:
        return list(self._tokens)

    @property
    def info(self) -> SessionInfo:
        self._require_open()
        points = self._llm.engine.frozen(self._salt, self._tokens)
        names: dict[int, tuple[str, ...]] = {}
        for name, position in self._names.items():
            names[position] = (*names.get(position, ()), name)
        return SessionInfo(
            num_tokens=len(self._tokens),
            nbytes=self._llm.engine.memory_of(len(self._tokens)),
            turns=tuple(self._turns),
            checkpoints=dict(self._names),
            tree=tuple(
                FrozenPoint(count, self._llm.engine.memory_of(count), names.get(count, ()), tier)
                for count, tier in points
            ),
        )

    # Going on

    def append(self, content: Content) -> Session:
        """Add text, token ids or messages, and compute their memory. Returns the session itself.

        Messages are rendered with those before them by the chat template, up to where the assistant would speak. Where
        that spells earlier tokens otherwise than they were, turns that reached further end there, and names of places
        behind it are forgotten. Raises `RequestError`, and then nothing has changed.
        """
        self._require_open()
        tokens, messages = self._extended(content)
        self._prefill(tokens)
        kept = _common_length(self._tokens, tokens)
        self._turns = [min(end, kept) for end in self._turns]
        self._names = {name: at for name, at in self._names.items() if at <= kept}
        self._tokens, self._messages = tokens, messages
        self._turns.append(len(tokens))
        return self

    def generate(self, params: SamplingParams | None = None) -> Completion:
        """Continue by one answer, which becomes part of the session. Raises `RequestError` where it fails."""
        request = self._ask(params)
        try:
            while not request.finished:
                self._llm.engine.step()
        finally:
            self._llm.engine.abort(request)
        return self._take(request)

    def stream(self, params: SamplingParams | None = None) -> Iterator[Delta]:
        """`generate`, step by step. Closed early, the session keeps what was generated so far."""
        request = self._ask(params)
        try:
            while True:
                while request.deltas:
                    yield request.deltas.popleft()
                if request.finished:
                    break
                self._llm.engine.step()
        finally:
            self._llm.engine.abort(request)
            self._take(request)

    # Branches

    def fork(self, n: int = 1) -> list[Session]:
        """`n` sessions that go on from here by themselves."""
        self._require_open()
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 4096:
            raise RequestError("n", f"n must be an integer from 1 to 4096, found {n!r}")
        return [Session(self._llm, self._salt, self._tokens, self._transcript()) for _ in range(n)]

    def rewind(self, to: int | str | None = None, *, turn: int | None = None) -> Session:
        """Go back to a token position, to the name of a checkpoint, or to the end of a turn (from 0; -1 is the last).

        Returns the session itself. Raises `RequestError` for a place that the session does not have.
        """
        self._require_open()
        position = self._position(to, turn)
        if position < len(self._tokens):
            self._messages = []  # their rendering would not end here
        self._tokens = self._tokens[:position]
        self._turns = [end for end in self._turns if end <= position]
        self._names = {name: at for name, at in self._names.items() if at <= position}
        return self

    def checkpoint(self, name: str) -> Session:
        """Give the present place a name, and keep its memory. Returns the session itself."""
        self._require_open()
        if not is_name(name):
            raise RequestError("name", "the name of a checkpoint must have 1 to 256 printable characters")
        if self._tokens:
            self._prefill(self._tokens)
        self._names[name] = len(self._tokens)
        return self

    def pin(self, ttl: float = 3600.0) -> Session:
        """Keep the memory of the present place for `ttl` seconds, before all that is not pinned."""
        self._require_open()
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= 31_536_000:
            raise RequestError("ttl", f"ttl must be a number of seconds above 0 and at most a year, found {ttl!r}")
        if self._tokens:
            self._prefill(self._tokens)
            self._llm.engine.pin(self._salt, self._tokens, time.monotonic() + ttl)
        return self

    def save(self, path: str | Path) -> int:
        """Write the session and its memory to a file (`*.state`), which is made or replaced; returns its bytes.

        It can be loaded by any engine with the same model, whatever its number of ranks. Of the memory, that at the
        session's end is written: what lies behind earlier turns and names is computed again where it is asked for.
        Raises `RequestError` and `SnapshotError`.
        """
        self._require_open()
        if not self._tokens:
            raise RequestError("session", "the session is empty: append something first")
        self._prefill(self._tokens)
        checkpoint, hidden = self._llm.engine.export(self._salt, self._tokens)
        return self._llm.write_session(Path(path), self._tokens, self._transcript(), checkpoint, hidden)

    def close(self) -> None:
        """The session can no longer be used. Its memory stays as long as there is room."""
        self._closed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Inside

    def _require_open(self) -> None:
        if self._closed:
            raise RequestError("session", "the session is closed; open another one")

    def _transcript(self) -> Transcript:
        return Transcript(tuple(self._turns), dict(self._names), tuple(self._messages))

    def _extended(self, content: Content) -> tuple[list[int], list[Mapping[str, Any]]]:
        """The session's tokens and messages with `content` behind them."""
        tokenizer = self._llm.tokenizer
        if not isinstance(content, Sequence) or not content:
            raise RequestError("content", "append needs text, token ids or messages, and at least one of them")
        if not isinstance(content, str) and not isinstance(content[0], Mapping):
            return self._tokens + self._llm.check_ids(content), []
        if tokenizer is None:
            raise RequestError("content", "this checkpoint has no tokenizer.json; append token ids")
        if isinstance(content, str):
            return self._tokens + tokenizer.encode(content, add_special_tokens=not self._tokens), []
        if self._tokens and not self._messages:
            raise RequestError("content", "messages can only follow messages; this session holds text or token ids")
        messages = [*self._messages, *content]
        return tokenizer.encode_chat(messages), messages

    def _prefill(self, tokens: list[int]) -> None:
        params = SamplingParams(temperature=0, max_tokens=0, cache_salt=self._salt)
        request = self._llm.engine.add(None, tokens, params)
        try:
            while not request.finished:
                self._llm.engine.step()
        finally:
            self._llm.engine.abort(request)
        if request.error is not None:
            raise RequestError("content", request.error)

    def _ask(self, params: SamplingParams | None) -> Request:
        self._require_open()
        params = params or SamplingParams()
        if params.copies != 1:
            raise RequestError("n", f"a session has one continuation; fork it for {params.copies}")
        if not self._tokens:
            raise RequestError("session", "the session is empty: append something first")
        return self._llm.engine.add(None, list(self._tokens), replace(params, cache_salt=self._salt))

    def _take(self, request: Request) -> Completion:
        """Make what a request has generated part of the session."""
        completion = request.sequences[0].completion
        self._tokens += completion.token_ids
        if completion.token_ids:
            self._turns.append(len(self._tokens))
        if self._messages:
            self._messages.append({"role": "assistant", "content": completion.text})
        if request.error is not None:
            raise RequestError("session", request.error)
        return completion

    def _position(self, to: int | str | None, turn: int | None) -> int:
        if (to is None) == (turn is None):
            raise RequestError("to", "rewind needs one of a token position, a checkpoint's name and turn=")
        if turn is not None:
            if isinstance(turn, bool) or not isinstance(turn, int) or not -len(self._turns) <= turn < len(self._turns):
                raise RequestError("turn", f"turn {turn!r} is not one of the {len(self._turns)} turns")
            return self._turns[turn]
        if isinstance(to, str):
            if to not in self._names:
                known = ", ".join(self._names) or "none"
                raise RequestError("to", f"no checkpoint is named {to!r}; there are: {known}")
            return self._names[to]
        if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to <= len(self._tokens):
            raise RequestError("to", f"a token position must be an integer from 0 to {len(self._tokens)}, found {to!r}")
        return to


def _common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    if second[: len(first)] == first:  # nearly always, and fast
        return len(first)
    pairs = zip(first, second)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
