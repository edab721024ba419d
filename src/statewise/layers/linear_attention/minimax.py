"""The lightning attention of MiniMax-Text-01 and MiniMax-M1 (arXiv 2501.08313, 2506.13585)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Protocol

from statewise.config import EngineConfig
from statewise.layers.linear_attention.lightning import LightningAttention, LightningNames, LightningRule
from statewise.layers.pluggable import PluggableLayer

NAMES = LightningNames(qkv="qkv_proj", gate="output_gate", norm="norm", output="out_proj", qkv_by_head=True)
# One norm over all heads. Its epsilon is that of the published modelling code, not the model's rms_norm_eps.
RULE = LightningRule(norm_eps=1e-6, silu=True)


class MiniMaxModelConfig(Protocol):
    """What the layer reads from its model's configuration."""

    hidden_size: int
    num_layers: int  # of all kinds: the slopes shrink with depth
    num_heads: int
    head_dim: int


@PluggableLayer.register("minimax_text_01_attention")
class MiniMaxText01LinearAttention(LightningAttention):
    """[q | k | v] = SiLU(W x) per head; no positions, no scale; the output norm spans all heads."""

    def __init__(self, config: MiniMaxModelConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__(
            config,
            engine_config,
            prefix,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            rule=RULE,
            names=NAMES,
        )

    @classmethod
    def example_config(cls) -> MiniMaxModelConfig:
        return SimpleNamespace(hidden_size=48, num_layers=8, num_heads=4, head_dim=16)
