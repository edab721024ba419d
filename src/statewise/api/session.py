"""`Session`: a conversation that can be frozen, forked and rewound."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from statewise.api.conversation import Content, Conversation
from statewise.engine.request import Completion, Delta, Request
from statewise.engine.sampling_params import SamplingParams
from statewise.errors import RequestError
from statewise.memory.snapshot_transcript import Transcript

if TYPE_CHECKING:
    from statewise.api.llm import LLM


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
        self._talk = Conversation.of(tokens, transcript)
        self._closed = False

    @property
    def token_ids(self) -> list[int]:
        return list(self._talk.tokens)

    @property
    def transcript(self) -> Transcript:
        """Turns, named places and messages, as a file keeps them."""
        return self._talk.transcript

    @property
    def info(self) -> SessionInfo:
        self._require_open()
        points = self._llm.engine.frozen(self._salt, self._talk.tokens)
        names: dict[int, tuple[str, ...]] = {}
        for name, position in self._talk.names.items():
            names[position] = (*names.get(position, ()), name)
        return SessionInfo(
            num_tokens=len(self._talk.tokens),
            nbytes=self._llm.engine.memory_of(len(self._talk.tokens)),
            turns=tuple(self._talk.turns),
            checkpoints=dict(self._talk.names),
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
        tokens, messages = self._talk.extended(content, self._llm.tokenizer, self._llm.check_ids)
        self._prefill(tokens)
        self._talk.become(tokens, messages)
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
        Conversation.check_forks(n)
        return [Session(self._llm, self._salt, self._talk.tokens, self.transcript) for _ in range(n)]

    def rewind(self, to: int | str | None = None, *, turn: int | None = None) -> Session:
        """Go back to a token position, to the name of a checkpoint, or to the end of a turn (from 0; -1 is the last).

        Returns the session itself. Raises `RequestError` for a place that the session does not have.
        """
        self._require_open()
        self._talk.rewind(to, turn)
        return self

    def checkpoint(self, name: str) -> Session:
        """Give the present place a name, and keep its memory. Returns the session itself."""
        self._require_open()
        Conversation.check_name(name)
        if self._talk.tokens:
            self._prefill(self._talk.tokens)
        self._talk.name(name)
        return self

    def pin(self, ttl: float = 3600.0) -> Session:
        """Keep the memory of the present place for `ttl` seconds, before all that is not pinned."""
        self._require_open()
        Conversation.check_ttl(ttl)
        if self._talk.tokens:
            self._prefill(self._talk.tokens)
            self._llm.engine.pin(self._salt, self._talk.tokens, time.monotonic() + ttl)
        return self

    def save(self, path: str | Path) -> int:
        """Write the session and its memory to a file (`*.state`), which is made or replaced; returns its bytes.

        It can be loaded by any engine with the same model, whatever its number of ranks. Of the memory, that at the
        session's end is written: what lies behind earlier turns and names is computed again where it is asked for.
        Raises `RequestError` and `SnapshotError`.
        """
        self._require_open()
        if not self._talk.tokens:
            raise RequestError("session", "the session is empty: append something first")
        self._prefill(self._talk.tokens)
        checkpoint, hidden = self._llm.engine.export(self._salt, self._talk.tokens)
        return self._llm.write_session(Path(path), self._talk.tokens, self.transcript, checkpoint, hidden)

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
        if not self._talk.tokens:
            raise RequestError("session", "the session is empty: append something first")
        return self._llm.engine.add(None, list(self._talk.tokens), replace(params, cache_salt=self._salt))

    def _take(self, request: Request) -> Completion:
        """Make what a request has generated part of the session."""
        completion = request.sequences[0].completion
        self._talk.answer(completion.token_ids, completion.text)
        if request.error is not None:
            raise RequestError("session", request.error)
        return completion
