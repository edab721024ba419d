"""Text that stands between a fact and the question about it, and how long it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources
from random import Random

from statewise.evaluation.words import VOCABULARY

CountTokens = Callable[[str], int]

SPLIT_PER_LETTER = 0.23

_PIECE = re.compile(r"\d|[A-Za-z]+|[^\sA-Za-z\d]+|\n")


@lru_cache(maxsize=1)
def shipped_prose() -> tuple[str, ...]:
    """The lines of the public-domain text inside the package, in reading order.

    It was held out of the demo model's training text.
    """
    text = resources.files("statewise.evaluation").joinpath("prose.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


@lru_cache(maxsize=200_000)
def approximate_tokens(text: str) -> int:
    """Tokens of `text` for the demo model's tokenizer, without the tokenizer.

    A digit, a run of punctuation and a word of the skills are one token each; other words are split the more the
    longer they are (the slope was fitted to the prose).
    """
    total = 0.0
    for piece in _PIECE.findall(text):
        whole = piece in VOCABULARY or not piece.isalpha()
        total += 1.0 if whole else 1.0 + SPLIT_PER_LETTER * max(0.0, len(piece) - 3.5)
    return max(1, round(total))


def prose_lines(rng: Random, tokens: int, lines: Sequence[str], count: CountTokens) -> list[str]:
    """Consecutive lines of `lines` from a random place on, about `tokens` tokens with their line breaks."""
    chosen: list[str] = []
    at = rng.randrange(len(lines))
    used = 0
    while used < tokens:
        line = lines[at % len(lines)]
        size = count(line) + 1
        if used + size > tokens:
            line = _first_words(line, tokens - used - 1, size)
            if line:
                chosen.append(line)
            break
        chosen.append(line)
        used += size
        at += 1
    return chosen


def _first_words(line: str, tokens: int, size: int) -> str:
    """The beginning of `line` (`size` tokens) that has about `tokens` tokens, cut between words."""
    words = line.split(" ")
    keep = int(len(words) * tokens / size)
    return " ".join(words[:keep]).rstrip(",;:-(")
