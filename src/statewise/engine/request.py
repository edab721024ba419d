"""Requests, the sequences they run as, and what comes back."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from statewise.engine.grammar import Matcher
from statewise.engine.sampling_params import SamplingParams
from statewise.engine.stop import StopMatcher
from statewise.engine.tokenizer import IncrementalDecoder

if TYPE_CHECKING:  # who only reads what came back needs no torch
    import torch

    from statewise.memory.tiers import Frozen

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one token under the model, before temperature, penalties and truncation."""

    token_id: int
    logprob: float
    rank: int  # 1: the most likely token
    top: dict[int, float]  # the most likely alternatives, most likely first


@dataclass
class RequestMetrics:
    """Tokens and seconds of a request. Seconds are None until the event has happened."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that needed no forward pass
    cache_miss_reason: str | None = (
        None  # why they were fewer than the prompt shares with earlier ones; None: they were not
    )
    preemptions: int = 0
    queue_s: float | None = None  # arrival to first forward pass
    time_to_first_token_s: float | None = None  # arrival to first token
    decode_s: float | None = None  # first token to last token
    total_s: float | None = None


@dataclass
class Completion:
    """One continuation of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop id or stop string that ended it
    logprobs: list[TokenLogprob] | None = None
    logits: torch.Tensor | None = None  # [generated, vocab] fp32, with return_logits


@dataclass
class RequestOutput:
    """All that a finished request gave."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprob | None] | None
    outputs: list[Completion]
    metrics: RequestMetrics
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """What one step added to one continuation of a request."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None  # with the last delta of the request


@dataclass(eq=False)
class Sequence:
    """A live generation: at most one writable record, a page list, tokens.

    `tokens` is prompt and answer. The record and the pages hold the memory of the first `computed` of them; the rest
    is pending. A decode step has one pending token.
    """

    request: Request
    index: int
    tokens: list[int]
    completion: Completion
    decoder: IncrementalDecoder | None
    stops: StopMatcher | None
    random: random.Random
    matcher: Matcher | None = None  # of the structure that the answer must have
    # set by the scheduler
    computed: int = 0
    record: int | None = None
    pages: list[int] = field(default_factory=list)
    frozen: Frozen | None = None  # its memory while it is preempted, as long as there was room for it
    preempted: bool = False  # ever
    freeze_at: list[int] = field(default_factory=list)  # token counts to freeze on the way, rising
    # set by the engine
    hidden: torch.Tensor | None = None  # [hidden] row of the last computed token
    logprob: float = 0.0  # of all generated tokens, where it is wanted
    counts: Counter[int] = field(default_factory=Counter)  # generated tokens, for the penalties
    logits: list[torch.Tensor] = field(default_factory=list)
    prompt_rows: list[torch.Tensor] = field(default_factory=list)  # logits of prompt rows, where they are wanted

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return self.completion.finish_reason is not None

    @property
    def owner(self) -> str:
        return f"{self.request.request_id}/{self.index}"


@dataclass(eq=False)
class Request:
    """A prompt with its parameters and the `n` sequences that continue it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int  # of params, or fewer where the context ends
    keep_prompt_logits: bool
    tenant: str  # whose checkpoints it may use
    arrival: float  # seconds of the engine's clock
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    # set by the engine
    deltas: deque[Delta] = field(default_factory=deque)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    prompt_logits: torch.Tensor | None = None  # [prompt, vocab] fp32
    first_token: float | None = None
    error: str | None = None
    error_field: str | None = None  # of the request, which is to blame for the error; None: nothing in it is

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether every token of the prompt must pass the model in this request."""
        return self.keep_prompt_logits or self.params.prompt_logprobs is not None

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    def _chosen(self) -> list[Completion]:
        """All continuations, or the likeliest of those that `best_of` asked for, the likeliest first."""
        if self.params.copies == self.params.n:
            return [sequence.completion for sequence in self.sequences]
        ranked = sorted(self.sequences, key=lambda s: s.logprob / max(s.generated, 1), reverse=True)
        return [replace(s.completion, index=index) for index, s in enumerate(ranked[: self.params.n])]

    def output(self) -> RequestOutput:
        """The result so far; final once the request is finished."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=self._chosen(),
            metrics=self.metrics,
            error=self.error,
        )
