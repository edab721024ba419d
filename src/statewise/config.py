"""The one frozen engine configuration that layers, models and the engine read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


class Ranks:
    """The tensor-parallel group as one of its members sees it. This one is alone: a sum over all ranks is the tensor.

    A group of several is a subclass with its own `all_reduce`; layers cut their weights by `rank` and `size`.
    """

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks; every rank must call it, in the same order."""
        return x


ALONE = Ranks()


@dataclass(frozen=True)
class EngineConfig:
    """Resolved once at start-up; nothing reads the environment or a global later."""

    dtype: torch.dtype = torch.float32  # activations, weights and page entries
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    page_size: int = 64  # tokens per page
    num_spec: int = 0  # draft tokens that the short-convolution window must be able to take back
    conv_channels_last: bool = False  # memory order of the short-convolution window
    record_dtype: torch.dtype = torch.float32  # recurrent matrices in the records
    ranks: Ranks = ALONE  # cuts weights and every state spec; the engine runs one rank today
    max_prefill_tokens: int = 2048  # prefill rows per step
    max_running: int = 64  # sequences that hold a record at the same time
    max_length: int = 0  # tokens of one sequence, prompt and answer; set from the model and the page pool
    prefix_cache: bool = True  # keep frozen points of prompts and turns, and go on from them
    num_records: int = 0
    num_pages: int = 0
    host_cache: int | None = None  # bytes of host memory for checkpoints; None: as much again as the pools have
    disk_cache: Path | None = None  # a directory for checkpoints that leave host memory
    disk_cache_bytes: int = 10 << 30
    identity: str = ""  # of the model that the files in disk_cache belong to
    host_records: int = 0
    host_pages: int = 0
