"""What all linear-attention layers share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from statewise.config import EngineConfig
from statewise.layers.mixer import TokenMixer
from statewise.memory.blocks import Field, Shard


class LinearAttention(TokenMixer):
    """A layer whose memory of a sequence is one record of fixed size.

    Subclasses say how many heads of what width they have; the base turns that into per-rank numbers and reads the
    layer index out of the prefix (`model.layers.7.self_attn` is layer 7).
    """

    scope: ClassVar[Literal["record", "page"]] = "record"

    def __init__(self, config: Any, engine_config: EngineConfig, prefix: str, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, engine_config, prefix)
        self.hidden_size: int = config.hidden_size
        self.num_heads = num_heads  # of all ranks
        self.head_dim = head_dim
        self.tp_rank, self.tp_size = self.ranks.rank, self.ranks.size
        self.rank_heads = self.split_heads(num_heads)

    @property
    def layer_index(self) -> int:
        """The number in the prefix, counted from 0 over all layers of the model."""
        return next(int(part) for part in self.prefix.split(".") if part.isdigit())


def recurrent_field(engine_config: EngineConfig, num_heads: int, key_dim: int, value_dim: int) -> Field:
    """The recurrent matrix of a layer, [heads, key_dim, value_dim], split over ranks by heads."""
    return Field(shape=(num_heads, key_dim, value_dim), dtype=engine_config.record_dtype, shard=Shard(axis=0))
