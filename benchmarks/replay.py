"""Plays a trace of conversations through an engine, and measures what the new tokens of a turn cost by themselves."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.conversations import Trace, Turn, draw

if TYPE_CHECKING:
    from statewise import LLM
    from statewise.engine.request import Request

WARM_UP_LENGTHS = (700, 60, 200, 30, 120)


@dataclass
class Served:
    """A turn that was answered. `known` tokens of its prompt had gone through the model in earlier requests."""

    turn: Turn
    prompt: list[int]
    known: int
    cached: int
    reason: str | None  # why fewer were cached than the engine remembers to have seen
    answer: list[int]
    first_token_s: float

    @property
    def new(self) -> int:
        return len(self.prompt) - self.known

    @property
    def recomputed(self) -> int:
        """Tokens that went through the model although they had before."""
        return max(0, self.known - self.cached)

    @property
    def hit(self) -> bool:
        return self.cached >= self.known > 0


@dataclass
class Control:
    """What about `tokens` new tokens cost behind a history of which nothing is missing."""

    tokens: int
    history: int
    first_token_s: list[float]


@dataclass
class Run:
    """One way to remember, played once in an engine of its own."""

    variant: str
    seconds: float
    served: list[Served]
    evictions: int  # checkpoints that left the device's pools
    from_host: int  # checkpoints continued from host memory
    controls: dict[str, list[Control]] = field(default_factory=dict)

    def samples(self) -> dict[str, Any]:
        """Everything but the tokens."""
        turns = [
            asdict(one.turn)
            | {"prompt_tokens": len(one.prompt), "known": one.known, "cached": one.cached, "hit": one.hit}
            | {"recomputed": one.recomputed, "reason": one.reason, "first_token_s": one.first_token_s}
            for one in self.served
        ]
        alone = {name: [asdict(one) for one in several] for name, several in self.controls.items()}
        counts = {"evictions": self.evictions, "from_host": self.from_host}
        return {"variant": self.variant, "seconds": self.seconds, **counts, "turns": turns, "controls": alone}


def submit(llm: LLM, prompt: list[int], answer_tokens: int) -> Request:
    from statewise import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
    return llm.engine.add(None, prompt, params)


def finish(llm: LLM, request: Request) -> float:
    """Run a request to its end; returns its time to first token in seconds."""
    while not request.finished:
        llm.engine.step()
    return first_token_s(request)


def first_token_s(request: Request) -> float:
    seconds = request.metrics.time_to_first_token_s
    if request.error is not None or seconds is None:
        raise RuntimeError(f"a request failed: {request.error}")
    return seconds


def warm_up(llm: LLM) -> None:
    """Prompts of several lengths, of which nothing is kept."""
    for length in WARM_UP_LENGTHS:
        finish(llm, submit(llm, draw(f"warm-up {length}", length, llm.engine.vocab_size), 16))
    llm.engine.scheduler.cache.clear()


class Replay:
    """The conversations of a trace as they grow: at most `concurrency` requests at a time, one per conversation."""

    def __init__(self, llm: LLM, trace: Trace, concurrency: int) -> None:
        self.llm, self.trace, self.concurrency = llm, trace, concurrency
        self.system = trace.system_prompt(llm.engine.vocab_size)
        self.history = {one: list(self.system) for one in range(trace.conversations)}
        self.known: dict[int, int] = {}  # tokens of a conversation whose memory a request has left
        self.served: list[Served] = []

    def play(self) -> float:
        """Serve all turns, each as soon as there is room for it; returns seconds."""
        waiting = list(self.trace.turns)
        running: dict[int, tuple[Turn, Request, int]] = {}  # by conversation; the number is what was known by then
        start = time.perf_counter()
        while waiting or running:
            while len(running) < self.concurrency:
                turn = next((turn for turn in waiting if turn.conversation not in running), None)
                if turn is None:
                    break
                waiting.remove(turn)
                running[turn.conversation] = (turn, self._ask(turn), self._known(turn))
            self.llm.engine.step()
            for turn, request, known in list(running.values()):
                if request.finished:
                    del running[turn.conversation]
                    self._take(turn, request, known)
        return time.perf_counter() - start

    def _ask(self, turn: Turn) -> Request:
        self.history[turn.conversation] += self.trace.new_piece(turn, self.llm.engine.vocab_size)
        return submit(self.llm, list(self.history[turn.conversation]), turn.answer_tokens)

    def _known(self, turn: Turn) -> int:
        return self.known.get(turn.conversation, len(self.system) if self.served else 0)

    def _take(self, turn: Turn, request: Request, known: int) -> None:
        seconds = first_token_s(request)
        metrics, answer = request.metrics, list(request.sequences[0].completion.token_ids)
        prompt = request.prompt_token_ids
        self.served.append(
            Served(turn, prompt, known, metrics.cached_tokens, metrics.cache_miss_reason, answer, seconds)
        )
        self.history[turn.conversation] += answer
        self.known[turn.conversation] = len(prompt) + len(answer) - 1  # the last token of an answer is only read


def controls(llm: LLM, served: Sequence[Served]) -> dict[str, list[Control]]:
    """What the new tokens of the last turns cost behind the same history, behind the first turn, and behind nothing:
    one entry for each of `last_turns`.

    Each is measured with one token fewer, as many, and one more, all in mixed order. Measured in a row they would find
    what the processor's library prepares for each length, which a turn of the trace does not.
    """
    first = {one.turn.conversation: one for one in served if one.turn.number == 1}
    found: dict[str, list[Control]] = {"the same history": [], "turn 1": [], "no history": []}
    tasks: list[tuple[Control, list[int], int]] = []
    for one in last_turns(served):
        begin = first[one.turn.conversation]
        short = [*begin.prompt, *begin.answer[:-1]]
        for name, history in zip(found, (one.prompt[: one.known], short, []), strict=True):
            control = Control(one.new, len(history), [])
            found[name].append(control)
            tasks += [(control, history, one.new + more) for more in (-1, 0, 1)]
    random.Random(len(tasks)).shuffle(tasks)
    for number, (control, history, tokens) in enumerate(tasks):
        control.first_token_s.append(behind(llm, history, draw(f"control {number}", tokens, llm.engine.vocab_size)))
    return found


def behind(llm: LLM, history: list[int], piece: list[int]) -> float:
    """Time to first token of a piece behind a history that was appended just before, the engine otherwise idle.
    Raises `RuntimeError` if not all of the history was found."""
    if history:
        llm.session().append(history)
    request = submit(llm, [*history, *piece], 1)
    seconds = finish(llm, request)
    if request.metrics.cached_tokens != len(history):
        raise RuntimeError(f"{request.metrics.cached_tokens} of {len(history)} tokens were found in a control")
    return seconds


def last_turns(served: Sequence[Served]) -> list[Served]:
    """The last turn of each conversation, by conversation."""
    last = {one.turn.conversation: one for one in sorted(served, key=lambda one: one.turn.number)}
    return [last[conversation] for conversation in sorted(last)]
