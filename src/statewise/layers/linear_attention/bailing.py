"""The lightning attention of Ring-linear-2.0 (arXiv 2510.19338) and Ling/Ring-2.5."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

from statewise.config import EngineConfig
from statewise.layers.linear_attention.lightning import LightningAttention, LightningNames, LightningRule
from statewise.layers.pluggable import PluggableLayer

NAMES = LightningNames(qkv="query_key_value", gate="g_proj", norm="g_norm", output="dense")


@dataclass(frozen=True)
class BailingLinearConfig:
    """Sizes and options of a Bailing lightning layer. All heads are query, key and value heads alike."""

    num_heads: int
    head_dim: int
    norm_groups: int  # a count (`group_norm_size` in config.json), not a width
    silu: bool
    qk_norm: bool
    rotary_dim: int  # 0: no rotation
    rope_theta: float
    slope_formula: str  # `serving` or `hf`


class BailingModelConfig(Protocol):
    """What the layer reads from its model's configuration."""

    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    linear: BailingLinearConfig


@PluggableLayer.register("bailing_moe_linear_attention")
class BailingMoeLinearAttention(LightningAttention):
    """q and k are normalised per head, partly rotated, and q is scaled by D^(-1/2); the output norm goes by groups."""

    def __init__(self, config: BailingModelConfig, engine_config: EngineConfig, prefix: str) -> None:
        linear = config.linear
        rule = LightningRule(
            norm_eps=config.rms_norm_eps,
            norm_groups=linear.norm_groups,
            silu=linear.silu,
            qk_norm_eps=config.rms_norm_eps if linear.qk_norm else None,
            rotary_dim=linear.rotary_dim,
            rope_theta=linear.rope_theta,
            scale=linear.head_dim**-0.5,
            slope_formula=linear.slope_formula,
        )
        super().__init__(
            config,
            engine_config,
            prefix,
            num_heads=linear.num_heads,
            head_dim=linear.head_dim,
            rule=rule,
            names=NAMES,
        )

    @property
    def details(self) -> str:
        return f"slope formula {self.rule.slope_formula}"

    @classmethod
    def example_config(cls) -> BailingModelConfig:
        linear = BailingLinearConfig(
            4, 16, 4, silu=False, qk_norm=True, rotary_dim=8, rope_theta=1e4, slope_formula="serving"
        )
        return SimpleNamespace(hidden_size=48, num_layers=8, rms_norm_eps=1e-6, linear=linear)
