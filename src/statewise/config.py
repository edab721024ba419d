"""The one frozen engine configuration that layers, models and the engine read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class EngineConfig:
    """Resolved once at start-up; nothing reads the environment or a global later.

    `tensor_parallel_rank` and `tensor_parallel_size` cut every state spec; one rank runs today.
    """

    dtype: torch.dtype = torch.float32  # activations, weights and page entries
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    page_size: int = 64  # tokens per page
    num_spec: int = 0  # draft tokens that the short-convolution window must be able to take back
    conv_channels_last: bool = False  # memory order of the short-convolution window
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    max_prefill_tokens: int = 2048  # prefill rows per step
    max_running: int = 64  # sequences that hold a record at the same time
    max_length: int = 0  # tokens of one sequence, prompt and answer; set from the model and the page pool
    num_records: int = 0
    num_pages: int = 0
