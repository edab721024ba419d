"""What the HTTP process and the engine process say to each other: typed structs in msgpack, nothing that runs."""

from __future__ import annotations

import time
from typing import Any, ClassVar

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


class SoftmaxCost(msgspec.Struct, frozen=True):
    """Bytes of a token in models without linear layers, as `statewise.api.softmax_cost` counts them."""

    kv_bytes: int
    own_bytes: int
    own_description: str


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
    max_running: int = 0
    device: str = "cpu"
    host_bytes: int = 0  # for checkpoints that leave the device
    disk_bytes: int = 0  # the most that the disk cache may hold; 0: there is none
    prefix_cache: bool = True
    softmax: SoftmaxCost = SoftmaxCost(0, 0, "")


class Loading(msgspec.Struct, tag=True):
    """Bytes of the weights that are loaded, and all."""

    done: int
    total: int


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
    at: float = msgspec.field(default_factory=time.monotonic)  # seconds of the clock that all processes share


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
    reasons: list[FinishReason] = []  # why each continuation ended
    error_field: str | None = None  # of the request, where it is to blame for the error


BUSY = "busy"
"""The field that is to blame where there is too much to do at once."""
STORAGE = "storage"
"""The field that is to blame where a file cannot be written, which is no fault of the request."""


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
    records_live: int = 0  # of running sequences; the other used ones are checkpoints'
    pages_live: int = 0
    computed_tokens: int = 0  # that passed the model
    step_times: list[int] = []  # steps, by the buckets of `metrics_tally.STEP_S`
    step_sizes: list[int] = []  # steps, by the buckets of `metrics_tally.STEP_TOKENS`
    at: float = msgspec.field(default_factory=time.monotonic)

    SUMS: ClassVar = (
        *("steps", "step_seconds", "computed_tokens"),
        *("prompt_tokens", "cached_tokens", "generated_tokens", "preemptions"),
    )
    """What grows while the engine lives, beside `counts`."""


FromEngine = Loading | Loaded | LoadFailed | Step | Finished | Refused | Points | Taken | Done | Stats
