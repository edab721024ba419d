"""What all linear-attention layers share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from statewise.config import EngineConfig
from statewise.errors import ConfigError
from statewise.layers.mixer import TokenMixer


class LinearAttention(TokenMixer):
    """A layer whose memory of a sequence is one record of fixed size.

    Subclasses say how many heads of what width they have; the base turns that into per-rank numbers and reads the
    layer index out of the prefix (`model.layers.7.self_attn` is layer 7).
    """

    scope: ClassVar[Literal["record", "page"]] = "record"

    def __init__(self, config: Any, engine_config: EngineConfig, prefix: str, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, engine_config, prefix)
        self.hidden_size: int = config.hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.tp_rank = engine_config.tensor_parallel_rank
        self.tp_size = engine_config.tensor_parallel_size
        if num_heads % self.tp_size:
            raise ConfigError(f"{num_heads} heads of {prefix} cannot be split over {self.tp_size} ranks")
        self.dtype: torch.dtype = engine_config.dtype

    @property
    def layer_index(self) -> int:
        """The number in the prefix, counted from 0 over all layers of the model."""
        return next(int(part) for part in self.prefix.split(".") if part.isdigit())
