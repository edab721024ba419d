"""What every token-mixing layer is: it declares its state and is given it back at each call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.layers.parameters import Component
from statewise.memory.blocks import StateSpec
from statewise.ops.batch import Batch

State = Mapping[str, Tensor]
"""A layer's fields by name, each `[blocks, *field.shape]`: records for linear layers, pages for attention."""


@dataclass(frozen=True)
class Capabilities:
    """What a layer can do, as data; the engine checks it at start-up, `inspect` shows it."""

    kernels: Mapping[str, str]  # by type of device: what serves it, in a few words
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    checkpoint_grid: int = 1  # a state may be frozen after any multiple of this many tokens


class TokenMixer(Component):
    """Base of linear-attention and softmax-attention layers.

    `scope` says what the state belongs to: one `record` per sequence, or one entry per token of a `page`.
    """

    scope: ClassVar[Literal["record", "page"]]
    state_kind: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def __init__(self, config: Any, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.engine_config = engine_config
        self.prefix = prefix

    @abstractmethod
    def state_spec(self) -> StateSpec:
        """The state of one sequence (`record`) or of one token (`page`), for all ranks together."""

    @abstractmethod
    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        """Mix `hidden` [T, hidden_size] along the sequences of the batch; updates `state` in place."""
