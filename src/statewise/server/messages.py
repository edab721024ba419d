"""What the HTTP process and the engine process say to each other: typed structs in msgpack, nothing that runs."""

from __future__ import annotations

from typing import Any

import msgspec

from statewise.engine.request import FinishReason, RequestMetrics, TokenLogprob
from statewise.engine.sampling_params import SamplingParams

# To the engine


class Load(msgspec.Struct, tag=True):
    """The first message: which model, and the arguments of `LLM`."""

    model: str
    arguments: dict[str, Any]


class Generate(msgspec.Struct, tag=True):
    """Continue a prompt. The answer is pieces, then `Finished`; or `Refused`."""

    id: int  # chosen by the sender, never used twice
    token_ids: list[int]
    params: SamplingParams


class Abort(msgspec.Struct, tag=True):
    """End requests, wherever they are."""

    ids: list[int]


class Frozen(msgspec.Struct, tag=True):
    """Which points on the way through these tokens are kept? Answered by `Points`."""

    id: int
    salt: str | None
    token_ids: list[int]


class Pin(msgspec.Struct, tag=True):
    """Evict the memory behind these tokens last. Answered by `Done`."""

    id: int
    salt: str | None
    token_ids: list[int]
    seconds: float


class Export(msgspec.Struct, tag=True):
    """Write a session to a file in the private directory. Answered by `Done`."""

    id: int
    salt: str | None
    token_ids: list[int]
    transcript: bytes  # as in a snapshot file
    path: str


class Import(msgspec.Struct, tag=True):
    """Take up a session from a file in the private directory. Answered by `Taken`."""

    id: int
    salt: str | None
    path: str


class Close(msgspec.Struct, tag=True):
    """End everything, write what is worth it to the disk cache, and exit."""


ToEngine = Load | Generate | Abort | Frozen | Pin | Export | Import | Close

# From the engine


class Loaded(msgspec.Struct, tag=True):
    """The model is ready."""

    max_length: int  # tokens of prompt and answer
    vocab_size: int
    num_records: int
    num_pages: int
    record_bytes: int
    page_bytes: int
    page_size: int  # tokens
    summary: dict[str, Any]


class LoadFailed(msgspec.Struct, tag=True):
    """The model cannot be served. The process ends."""

    message: str


class Piece(msgspec.Struct, array_like=True):
    """What a step added to one continuation of a request."""

    id: int
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[TokenLogprob] | None


class Step(msgspec.Struct, tag=True):
    """What a step gave, to all requests."""

    pieces: list[Piece]


class Choice(msgspec.Struct):
    """A whole continuation, of a request that was not streamed because the best of several was asked for."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[TokenLogprob] | None


class Finished(msgspec.Struct, tag=True):
    """The last of a request."""

    id: int
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprob | None] | None
    error: str | None
    choices: list[Choice] | None


class Refused(msgspec.Struct, tag=True):
    """A request or a question that cannot be served, and why."""

    id: int
    field: str
    message: str


class Points(msgspec.Struct, tag=True):
    """The answer to `Frozen`: token counts, rising, and in which tier each lies."""

    id: int
    points: list[tuple[int, str]]
    record_bytes: int
    page_bytes: int


class Taken(msgspec.Struct, tag=True):
    """The answer to `Import`."""

    id: int
    token_ids: list[int]
    transcript: bytes


class Done(msgspec.Struct, tag=True):
    """Done as asked."""

    id: int


class Stats(msgspec.Struct, tag=True):
    """A heartbeat of the step loop: what is there now, and what has happened since the start."""

    running: int
    waiting: int
    steps: int
    step_seconds: float  # of all steps
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    records_used: int
    pages_used: int
    checkpoints: dict[str, int]  # by tier
    disk_bytes: int
    counts: dict[str, int]  # of the cache, by event


FromEngine = Loaded | LoadFailed | Step | Finished | Refused | Points | Taken | Done | Stats
