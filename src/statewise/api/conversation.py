"""What a session is made of, apart from any engine: tokens, the messages that they spell, turns, and named places."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from statewise.errors import RequestError, SnapshotError
from statewise.memory.snapshot_transcript import (
    MAX_DEPTH,
    MAX_MARKS,
    MAX_TEXT,
    MAX_TRANSCRIPT,
    Transcript,
    is_name,
    message_extent,
)

if TYPE_CHECKING:
    from statewise.engine.tokenizer import Tokenizer

Content: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or messages of a conversation."""
SYSTEM = ("system", "developer")
MAX_FORKS = 4096
LONGEST_PIN_S = 31_536_000
FRAME_BYTES = 256  # of a transcript, around what it holds
TURN_BYTES = 24  # at most: two numbers with commas
NAME_BYTES = 6 * MAX_TEXT + 24  # at most: escaped, with its number


@dataclass
class Conversation:
    """A list of tokens with its history. Every operation raises `RequestError`, and then nothing has changed.

    No list or dictionary is ever written to, only replaced, so that copies share them.
    """

    tokens: list[int] = field(default_factory=list)
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)  # tokens at the end of each append and each answer
    names: dict[str, int] = field(default_factory=dict)  # of places, in tokens
    spoken: list[int] = field(default_factory=list)  # messages at the end of each turn; 0: they do not spell its tokens
    _extents: list[tuple[int, int]] = field(
        default_factory=list
    )  # bytes and marks of the first messages, when measured

    @classmethod
    def of(cls, tokens: Sequence[int], transcript: Transcript | None = None) -> Conversation:
        """Without a transcript all `tokens` are one turn."""
        transcript = transcript or Transcript(turns=(len(tokens),) if tokens else ())
        turns, spoken = list(transcript.turns), list(transcript.spoken) or [0] * len(transcript.turns)
        return cls(list(tokens), list(transcript.messages), turns, dict(transcript.checkpoints), spoken)

    @property
    def transcript(self) -> Transcript:
        return Transcript(tuple(self.turns), dict(self.names), tuple(self.messages), tuple(self.spoken))

    def copy(self) -> Conversation:
        return replace(self)

    def extended(
        self,
        content: Content,
        tokenizer: Tokenizer | None,
        check_ids: Callable[[Any], list[int]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> tuple[list[int], list[Mapping[str, Any]]]:
        """All tokens and messages with `content` behind them, for `become`.

        `tools` and `arguments` go to the chat template. A system message that the session begins with is not repeated:
        clients send theirs with every request.
        """
        if not isinstance(content, Sequence) or not content:
            raise RequestError("content", "append needs text, token ids or messages, and at least one of them")
        if not isinstance(content, str) and not isinstance(content[0], Mapping):
            self._require_room([])
            return self.tokens + check_ids(content), []
        if tokenizer is None:
            raise RequestError("content", "this checkpoint has no tokenizer.json; append token ids")
        if isinstance(content, str):
            self._require_room([])
            return self.tokens + tokenizer.encode(content, add_special_tokens=not self.tokens), []
        if self.tokens and not self.messages:
            raise RequestError("content", "messages can only follow messages; this session holds text or token ids")
        again = len(content) > 1 and content[0] in self.messages[:1] and content[0].get("role") in SYSTEM
        messages = [*self.messages, *(content[1:] if again else content)]
        self._require_room(messages)
        return tokenizer.encode_chat(messages, True, tools, **arguments), messages

    def become(self, tokens: list[int], messages: list[Mapping[str, Any]]) -> None:
        """Take what `extended` gave. Turns that the new rendering spells otherwise end where it begins to differ."""
        kept = _common_length(self.tokens, tokens)
        self.turns = [*(min(end, kept) for end in self.turns), len(tokens)]
        self.spoken = [*(self.spoken if messages else [0] * len(self.spoken)), len(messages)]
        self.names = {name: at for name, at in self.names.items() if at <= kept}
        self._extents = self._extents[: len(messages)]
        self.tokens, self.messages = tokens, messages

    def answer(self, token_ids: Sequence[int], answer: str | Mapping[str, Any]) -> None:
        """Take what was generated behind the tokens: its text, or the message that it is.

        Behind an answer it is more of the same message. Where that ended before, the messages then say too much.
        """
        if not token_ids:
            return
        if self.messages:
            said = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
            before = self.messages[-1]
            contents = [one.get("content") or "" for one in (before, said)]
            if self._behind_answer and all(isinstance(one, str) for one in contents):
                said = {**before, **said, "content": "".join(contents)}
                self.messages, self.spoken = self.messages[:-1], [*self.spoken[:-1], 0]
                self._extents = self._extents[: len(self.messages)]
            self.messages = [*self.messages, said]
        self.tokens = [*self.tokens, *token_ids]
        self.turns = [*self.turns, len(self.tokens)]
        self.spoken = [*self.spoken, len(self.messages)]

    @property
    def _behind_answer(self) -> bool:
        """Whether the last turn is one message of the assistant, with which the tokens end."""
        count = len(self.messages)
        if count < 2 or not self.turns or self.turns[-1] != len(self.tokens) or self.spoken[-1] != count:
            return False
        return self.messages[-1].get("role") == "assistant" and max(self.spoken[:-1], default=0) == count - 1

    def name(self, name: str) -> None:
        """Give the end a name."""
        self.check_name(name)
        self._require_room(self.messages, names=1)
        self.names = {**self.names, name: len(self.tokens)}

    def rewind(self, to: int | str | None, turn: int | None) -> None:
        """Go back to a token position, to a named place, or to the end of a turn (from 0; -1 is the last).

        Messages go on where a turn ends; elsewhere the rendering of those before would not end, and they are dropped.
        """
        position = self._position(to, turn)
        if turn is not None:
            kept = turn % len(self.turns) + 1
        elif position == len(self.tokens):
            kept = len(self.turns)
        else:  # of several turns that end there, the later ones once reached further: their messages say more
            kept = bisect_left(self.turns, position)
            kept += kept < len(self.turns) and self.turns[kept] == position
        ends = kept > 0 and self.turns[kept - 1] == position
        if position < len(self.tokens) or kept < len(self.turns):
            self.messages = self.messages[: self.spoken[kept - 1] if ends else 0]
        self.tokens, self.turns = self.tokens[:position], self.turns[:kept]
        self.spoken = self.spoken[:kept] if self.messages else [0] * kept
        self.names = {name: at for name, at in self.names.items() if at <= position}
        self._extents = self._extents[: len(self.messages)]

    def _require_room(self, messages: Sequence[Mapping[str, Any]], names: int = 0) -> None:
        """Refuse to go on with messages that no file takes, or with more than one takes. Raises `RequestError`.

        `messages` begin with those that are there; only the new ones are measured.
        """
        extents = self._extents[: len(messages)]
        try:
            extents = [*extents, *map(message_extent, messages[len(extents) :])]
        except SnapshotError:
            raise RequestError(
                "messages",
                "a message of a session holds text, finite numbers, lists and objects with text as keys, at most "
                f"{MAX_DEPTH} deep: leave out what is something else",
            ) from None
        nbytes, marks = self._extent(extents, len(self.turns) + 2, len(self.names) + names)
        if nbytes > MAX_TRANSCRIPT or marks > MAX_MARKS:
            raise RequestError(
                "messages",
                f"the messages, turns and names of a session would have {nbytes} bytes and {marks} texts and "
                f"separators, at most {MAX_TRANSCRIPT} and {MAX_MARKS} are kept: send less, or begin another session",
            )
        self._extents = extents[: len(self.messages)]

    @staticmethod
    def _extent(extents: Sequence[tuple[int, int]], turns: int, names: int) -> tuple[int, int]:
        """At most how many bytes and marks a transcript has."""
        nbytes = FRAME_BYTES + sum(one for one, _ in extents) + turns * TURN_BYTES + names * NAME_BYTES
        return nbytes, 32 + sum(one for _, one in extents) + 2 * turns + 2 * names

    def _position(self, to: int | str | None, turn: int | None) -> int:
        if (to is None) == (turn is None):
            raise RequestError("to", "rewind needs one of a token position, a checkpoint's name and turn=")
        if turn is not None:
            if isinstance(turn, bool) or not isinstance(turn, int) or not -len(self.turns) <= turn < len(self.turns):
                raise RequestError("turn", f"turn {turn!r} is not one of the {len(self.turns)} turns")
            return self.turns[turn]
        if isinstance(to, str):
            if to not in self.names:
                known = ", ".join(self.names) or "none"
                raise RequestError("to", f"no checkpoint is named {to!r}; there are: {known}")
            return self.names[to]
        if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to <= len(self.tokens):
            raise RequestError("to", f"a token position must be an integer from 0 to {len(self.tokens)}, found {to!r}")
        return to

    @staticmethod
    def check_name(name: object) -> None:
        if not is_name(name):
            raise RequestError("name", "the name of a checkpoint must have 1 to 256 printable characters")

    @staticmethod
    def check_forks(n: object, most: int = MAX_FORKS) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most:
            raise RequestError("n", f"n must be an integer from 1 to {most}, found {n!r}")

    @staticmethod
    def check_ttl(ttl: object) -> None:
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= LONGEST_PIN_S:
            raise RequestError("ttl", f"ttl must be a number of seconds above 0 and at most a year, found {ttl!r}")


def _common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    if second[: len(first)] == first:  # nearly always, and fast
        return len(first)
    pairs = zip(first, second)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
