"""The two-state contract of delta-rule layers: one conv window for q, k and v, one recurrent matrix."""

from __future__ import annotations

from statewise.config import EngineConfig
from statewise.layers.linear_attention.base import recurrent_field
from statewise.memory.blocks import Field, Shard, StateSpec


def delta_state_spec(
    engine_config: EngineConfig,
    *,
    segments: tuple[tuple[str, int], ...],
    conv_taps: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
) -> StateSpec:
    """State of a gated delta rule layer.

    `conv` [channels, taps - 1 + num_spec]: the last raw inputs of the short convolution, oldest first. The channels
    are those of the named `segments` one after the other (`q`, `k`, `v`; they may differ in width), and each segment
    is split over ranks on its own. `recurrent` [heads, key_dim, value_dim] is split by heads.
    """
    channels = sum(width for _, width in segments)
    return StateSpec(
        conv=Field(
            shape=(channels, conv_taps - 1 + engine_config.num_spec),
            dtype=engine_config.dtype,
            shard=Shard(axis=0, segments=segments),
            order=(1, 0) if engine_config.conv_channels_last else None,
        ),
        recurrent=recurrent_field(engine_config, num_heads, key_dim, value_dim),
    )
