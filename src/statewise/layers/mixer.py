"""What every token-mixing layer is: it declares its state and is given it back at each call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.errors import ConfigError
from statewise.layers.parameters import Component, Slot
from statewise.memory.blocks import Shard, StateSpec
from statewise.ops.batch import Batch

State = Mapping[str, Tensor]
"""A layer's fields by name, each `[blocks, *field.shape]`: records for linear layers, pages for attention."""


@dataclass(frozen=True)
class Capabilities:
    """What a layer can do, as data; the engine checks it at start-up, `inspect` shows it."""

    kernels: Mapping[str, str]  # by type of device: what serves it, in a few words
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    checkpoint_grid: int = 1  # a state may be frozen after any multiple of this many tokens
    interior_states: bool = False  # prefill honours Batch.freezes; otherwise a piece is cut where a state is wanted

    def __post_init__(self) -> None:
        if not isinstance(self.kernels, Mapping):
            raise TypeError(f"Capabilities needs a mapping of devices to words, found {self.kernels!r}")


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
        self.ranks = engine_config.ranks
        self.dtype: torch.dtype = engine_config.dtype

    @abstractmethod
    def state_spec(self) -> StateSpec:
        """The state of one sequence (`record`) or of one token (`page`), for all ranks together."""

    @abstractmethod
    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        """Mix `hidden` [T, hidden_size] along the sequences of the batch; updates `state` in place."""

    @property
    def details(self) -> str:
        """What `inspect` should say of the layer besides its class, in a few words; empty: nothing."""
        return ""

    # What the conformance kit needs besides

    @classmethod
    def example_config(cls) -> Any:
        """A small configuration of the layer, with heads that 2 and 4 ranks can share, for the conformance kit."""
        raise NotImplementedError(f"{cls.__name__} has no example_config()")

    def example_weight(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """A random weight that makes sense for the tensor `name`; None: a normal one scaled by its fan-in."""
        return None

    def reference(
        self, hidden: Tensor, weights: Mapping[str, Tensor], state: MutableMapping[str, Tensor], start: int
    ) -> Tensor:
        """The layer's specification: one sequence, all heads, token by token, in the dtype of `hidden` (float64).

        hidden [T, hidden_size] holds the tokens from position `start` on. `weights` are the checkpoint's tensors by
        their first spelling, below the layer's prefix. `state` is that behind `start` tokens and is replaced by that
        behind `start + T`: of a record [*field.shape], of pages [tokens, *field.shape]. Returns [T, hidden_size].
        """
        raise NotImplementedError(f"{type(self).__name__} has no reference()")

    # For subclasses

    def split_heads(self, num_heads: int) -> int:
        """Heads per rank. Raises `ConfigError` when they cannot be split evenly."""
        if num_heads % self.ranks.size:
            raise ConfigError(f"{num_heads} heads of {self.prefix} cannot be split over {self.ranks.size} ranks")
        return num_heads // self.ranks.size

    def rank_ranges(self, length: int, shard: Shard) -> tuple[tuple[int, int], ...]:
        """The half-open ranges of an axis of `length` that this rank keeps."""
        return tuple(shard.ranges(length, self.ranks.rank, self.ranks.size))

    def slot_by_heads(self, names: tuple[str, ...], target: Tensor) -> Slot:
        """A tensor of the checkpoint whose first axis is cut evenly by heads; `target` is this rank's part."""
        length = target.shape[0] * self.ranks.size
        return Slot(names, target, (length, *target.shape[1:]), 0, self.rank_ranges(length, Shard(axis=0)))
