"""What is asked: conversations of random words or token ids of a given length, or prompts of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from statewise.errors import RequestError

Endpoint = Literal["completions", "chat"]
Prompt = str | list[int] | list[dict[str, Any]]
MAX_FILE = 1 << 28  # bytes
WORDS = """
able above across after again air almost along always animal answer apple around autumn back ball bank basket beach
before begin behind below better between bird black blue boat book both bottle bottom bread bridge bright bring brother
brown build butter call candle carry castle centre chair change child circle city clean clear climb clock close cloud
coast cold colour come common copper corner country cover cross dance dark deep desk dinner doctor door draw dream dress
drink drive early earth east easy edge eight empty enough evening every face fair fall family farm father feather field
fifth find fire first fish five floor flower follow forest fork forty found four fresh friend front fruit garden gate
gather gentle give glass gold good grain grass great green ground grow half hammer hand happy harbour hard head hear
heart heavy help high hill hold home horse hour house hundred island join journey keep kind kitchen know lake lamp land
large late laugh leaf learn left letter light like line list little long look lost loud love low lunch make many map
market match meadow meet middle milk mind minute month moon morning mother mountain mouth move music name narrow near
never new night nine north nothing number ocean often old open orange other over page paint paper part path pencil
people picture place plain plant play point pond quick quiet rain reach read ready red rest rich right ring river road
roof room root round salt sand school sea season second seed seven shape share ship shoe shore short silver simple
sister six sleep slow small smile smooth snow soft song sound south space spring square stand star start station stay
steel step still stone store story straight street strong summer sun sweet swim table tail talk tall tea tell ten thank
thick thin third thread three tide time today together top touch tower town train travel tree true turn twelve twenty
under until upon valley village visit voice wait walk wall warm watch water wave way weather week well west wheel white
wide wild wind window winter wish wood word work world write year yellow young
""".split()


@dataclass(frozen=True)
class Turn:
    """One request of a conversation."""

    content: Prompt  # what is new: text, token ids or messages
    max_tokens: int | None  # None: as many as the server gives


@dataclass(frozen=True)
class Span:
    """Lengths from `low` to `high`, all equally likely."""

    low: int
    high: int

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)


@dataclass(frozen=True)
class Vocabulary:
    """What random prompts are made of."""

    ids: tuple[int, ...] | None = None  # None: prompts are words
    tokens_per_word: float = 1.0

    def draw(self, source: random.Random, tokens: int) -> str | list[int]:
        if self.ids is not None:
            return source.choices(self.ids, k=tokens)
        return " ".join(source.choices(WORDS, k=max(1, round(tokens / self.tokens_per_word)))) if tokens else ""


@dataclass(frozen=True)
class Synthetic:
    """Random conversations. The same seed makes the same ones."""

    vocabulary: Vocabulary
    prompt_tokens: Span
    output_tokens: Span
    shared_prefix_tokens: int = 0  # with which every conversation begins
    turns: int = 1
    seed: int = 0

    def conversations(self) -> Iterator[list[Turn]]:
        source = random.Random(self.seed)
        prefix = self.vocabulary.draw(source, self.shared_prefix_tokens)
        while True:
            turns = []
            for turn in range(self.turns):
                new = self.vocabulary.draw(source, self.prompt_tokens.draw(source))
                content = _joined(prefix, new) if turn == 0 else new
                turns.append(Turn(content, self.output_tokens.draw(source)))
            yield turns


@dataclass(frozen=True)
class Listed:
    """The prompts of a file, in order and again from the start. Each is a conversation of one turn."""

    turns: Sequence[Turn]

    def conversations(self) -> Iterator[list[Turn]]:
        while True:
            for turn in self.turns:
                yield [turn]


Workload = Synthetic | Listed


def read_prompts(path: Path, max_tokens: int | None = None) -> tuple[Listed, Endpoint]:
    """Prompts of a JSONL file: `prompt` (text or token ids) or `messages`, and perhaps `max_tokens`, else `max_tokens`.

    Raises `RequestError`, which names the line.
    """
    if path.stat().st_size > MAX_FILE:
        raise RequestError("prompt-file", f"{path.name} has more than {MAX_FILE >> 20} MiB")
    turns: list[Turn] = []
    kinds: set[Endpoint] = set()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise RequestError("prompt-file", f"{path.name} is not UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise RequestError("prompt-file", f"{where} is no JSON") from None
        prompt, kind = _prompt(row, where)
        limit = row.get("max_tokens", max_tokens)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            raise RequestError("prompt-file", f"{where}: max_tokens must be a whole number from 0 on")
        turns.append(Turn(prompt, limit))
        kinds.add(kind)
    if not turns:
        raise RequestError("prompt-file", f"{path.name} has no prompts")
    if len(kinds) > 1:
        raise RequestError("prompt-file", f"{path.name} mixes prompt and messages; use one of them")
    return Listed(turns), kinds.pop()


def _prompt(row: Any, where: str) -> tuple[Prompt, Endpoint]:
    if isinstance(row, dict) and ("prompt" in row) != ("messages" in row):
        if "messages" in row:
            messages = row["messages"]
            if isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages):
                return messages, "chat"
        else:
            prompt = row["prompt"]
            ids = isinstance(prompt, list) and all(type(one) is int for one in prompt)
            if prompt and (ids or isinstance(prompt, str)):
                return prompt, "completions"
        raise RequestError("prompt-file", f"{where}: write prompt as text or token ids, messages as a list of objects")
    raise RequestError("prompt-file", f"{where} must be an object with prompt or messages")


def _joined(prefix: str | list[int], new: str | list[int]) -> str | list[int]:
    if isinstance(prefix, str) and isinstance(new, str):
        return f"{prefix} {new}" if prefix else new
    return [*prefix, *new]
