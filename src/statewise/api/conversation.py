"""What a session is made of, apart from any engine: tokens, the messages that they spell, turns, and named places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from statewise.errors import RequestError
from statewise.memory.snapshot_transcript import Transcript, is_name

if TYPE_CHECKING:
    from statewise.engine.tokenizer import Tokenizer

Content: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or messages of a conversation."""
MAX_FORKS = 4096
LONGEST_PIN_S = 31_536_000


@dataclass
class Conversation:
    """A list of tokens with its history. Every operation raises `RequestError`, and then nothing has changed."""

    tokens: list[int] = field(default_factory=list)
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)  # tokens at the end of each append and each answer
    names: dict[str, int] = field(default_factory=dict)  # of places, in tokens
    spoken: list[int] = field(default_factory=list)  # messages at the end of each turn; 0: they do not spell its tokens

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
        return Conversation.of(self.tokens, self.transcript)

    def extended(
        self,
        content: Content,
        tokenizer: Tokenizer | None,
        check_ids: Callable[[Any], list[int]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> tuple[list[int], list[Mapping[str, Any]]]:
        """All tokens and messages with `content` behind them, for `become`.

        `tools` and `arguments` go to the chat template.
        """
        if not isinstance(content, Sequence) or not content:
            raise RequestError("content", "append needs text, token ids or messages, and at least one of them")
        if not isinstance(content, str) and not isinstance(content[0], Mapping):
            return self.tokens + check_ids(content), []
        if tokenizer is None:
            raise RequestError("content", "this checkpoint has no tokenizer.json; append token ids")
        if isinstance(content, str):
            return self.tokens + tokenizer.encode(content, add_special_tokens=not self.tokens), []
        if self.tokens and not self.messages:
            raise RequestError("content", "messages can only follow messages; this session holds text or token ids")
        messages = [*self.messages, *content]
        return tokenizer.encode_chat(messages, True, tools, **arguments), messages

    def become(self, tokens: list[int], messages: list[Mapping[str, Any]]) -> None:
        """Take what `extended` gave. Turns that the new rendering spells otherwise end where it begins to differ."""
        kept = _common_length(self.tokens, tokens)
        self.turns = [*(min(end, kept) for end in self.turns), len(tokens)]
        self.spoken = [*(self.spoken if messages else [0] * len(self.spoken)), len(messages)]
        self.names = {name: at for name, at in self.names.items() if at <= kept}
        self.tokens, self.messages = tokens, messages

    def answer(self, token_ids: Sequence[int], answer: str | Mapping[str, Any]) -> None:
        """Take what was generated behind the tokens: its text, or the message that it is."""
        self.tokens += token_ids
        if self.messages:
            self.messages.append({"role": "assistant", "content": answer} if isinstance(answer, str) else answer)
        if token_ids:
            self.turns.append(len(self.tokens))
            self.spoken.append(len(self.messages))

    def name(self, name: str) -> None:
        """Give the end a name."""
        self.check_name(name)
        self.names[name] = len(self.tokens)

    def rewind(self, to: int | str | None, turn: int | None) -> None:
        """Go back to a token position, to a named place, or to the end of a turn (from 0; -1 is the last).

        Messages go on where a turn ends; elsewhere the rendering of those before would not end, and they are dropped.
        """
        position = self._position(to, turn)
        turns = [end for end in self.turns if end <= position]
        if position < len(self.tokens):
            self.messages = self.messages[: self.spoken[len(turns) - 1] if turns and turns[-1] == position else 0]
        self.tokens, self.turns = self.tokens[:position], turns
        self.spoken = self.spoken[: len(turns)] if self.messages else [0] * len(turns)
        self.names = {name: at for name, at in self.names.items() if at <= position}

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
    def check_forks(n: object) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_FORKS:
            raise RequestError("n", f"n must be an integer from 1 to {MAX_FORKS}, found {n!r}")

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
