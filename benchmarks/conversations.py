"""A trace of conversations that return again and again: who speaks when, and how long each piece is.

Only the standard library. The order and the lengths depend on the seed alone, so every engine sees the same trace.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

NEW_TOKENS = (20, 120)  # of a user's turn, both ends included
ANSWER_TOKENS = (16, 48)
SYSTEM_TOKENS = 600
BETWEEN_STARTS_S = 30.0  # mean time between the starts of two conversations: a Poisson process
RETURN_MEDIAN_S = 30.0  # of the time in which a user returns with the next turn: log-normal
RETURN_SPREAD = 1.5  # of its logarithm: one return in ten takes over 200 s, one in a hundred about 1,000 s
FIRST_TOKEN = 3  # smaller ids are often special tokens


@dataclass(frozen=True)
class Turn:
    """One request: what a user adds to a conversation, and how much is answered."""

    conversation: int
    number: int  # from 1
    new_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Trace:
    """`turns` are in the order of arrival, which keeps the order of each conversation."""

    seed: int
    system_tokens: int
    turns: tuple[Turn, ...]

    @property
    def conversations(self) -> int:
        return len({turn.conversation for turn in self.turns})

    def length(self, conversation: int) -> int:
        """Tokens at the end of a conversation."""
        own = sum(t.new_tokens + t.answer_tokens for t in self.turns if t.conversation == conversation)
        return self.system_tokens + own

    def system_prompt(self, vocabulary: int) -> list[int]:
        """The tokens that all conversations begin with."""
        return draw(f"{self.seed} system", self.system_tokens, vocabulary)

    def new_piece(self, turn: Turn, vocabulary: int) -> list[int]:
        """The tokens that a user adds in a turn."""
        return draw(f"{self.seed} {turn.conversation} {turn.number}", turn.new_tokens, vocabulary)

    def room(self, share: float, concurrency: int, page_size: int) -> tuple[int, int]:
        """Records and pages for a share of what all conversations hold at their end, beside the running sequences.

        To go on, a conversation needs one record and the pages of its tokens; the full pages of the system prompt are
        held once, and its end is one more record. A running sequence has a record of its own.
        """
        common = self.system_tokens // page_size
        lengths = [math.ceil(self.length(one) / page_size) for one in range(self.conversations)]
        records = math.ceil(share * (self.conversations + 1)) + concurrency
        pages = math.ceil(share * (common + sum(length - common for length in lengths)))
        return records, max(pages, concurrency * max(lengths))


def make_trace(seed: int, conversations: int, turns: int, system_tokens: int, between_starts_s: float) -> Trace:
    """Conversations that start at random times and whose users take a random time to return: some seconds, some
    many minutes. The engine does not wait for them: only the order counts."""
    source = random.Random(seed)
    arrivals: list[tuple[float, Turn]] = []
    start = 0.0
    for conversation in range(conversations):
        start += source.expovariate(1 / between_starts_s)
        at = start
        for number in range(1, turns + 1):
            turn = Turn(conversation, number, source.randint(*NEW_TOKENS), source.randint(*ANSWER_TOKENS))
            arrivals.append((at, turn))
            at += source.lognormvariate(math.log(RETURN_MEDIAN_S), RETURN_SPREAD)
    arrivals.sort(key=lambda arrival: arrival[0])
    return Trace(seed, system_tokens, tuple(turn for _, turn in arrivals))


def draw(seed: str, count: int, vocabulary: int) -> list[int]:
    """Random token ids, the same for the same seed."""
    return random.Random(seed).choices(range(FIRST_TOKEN, vocabulary), k=count)
