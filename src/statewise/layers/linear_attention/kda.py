"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): a delta rule whose memory decays channel by channel."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.layers.linear_attention.base import LinearAttention
from statewise.layers.linear_attention.delta import delta_state_spec
from statewise.layers.mixer import Capabilities, State
from statewise.layers.parameters import Slot
from statewise.layers.pluggable import PluggableLayer
from statewise.layers.projection import Linear, Rows
from statewise.memory.blocks import StateSpec
from statewise.ops.batch import Batch
from statewise.ops.kda import KdaWeights, kda


@dataclass(frozen=True)
class KdaConfig:
    """Sizes of a KDA layer. The value heads may be wider or narrower than the key heads."""

    num_heads: int
    head_dim: int  # width of a query and key head
    value_dim: int  # width of a value head
    conv_taps: int


class KdaModelConfig(Protocol):
    """What the layer reads from its model's configuration."""

    hidden_size: int
    rms_norm_eps: float
    kda: KdaConfig


@PluggableLayer.register("kimi_gated_delta_net_attention")
class KimiDeltaAttention(LinearAttention):
    """Per head, with q and k l2-normalised and q scaled by K^(-1/2):

        S ← diag(e^g) S;   u = β (v - Sᵀk);   S ← S + k uᵀ;   o = Sᵀq
        g = -e^A · softplus(W_f x + b)   per key channel,   β = σ(W_b x)
        y = W_o ( RMSNorm(o) ⊙ σ(W_g x) )

    q, k and v pass a causal convolution over the last `conv_taps` tokens and SiLU first. W_f and W_g are low-rank.
    """

    state_kind = "kda"
    capabilities = Capabilities({"cpu": "numba decode in one launch, chunked prefill"})
    conv_weight: Tensor  # [channels, taps]; the last tap meets the current token
    f_b: Tensor  # [heads * key, key], the wide half of W_f
    A_log: Tensor  # [heads]
    dt_bias: Tensor  # [heads * key]
    g_b: Tensor  # [heads * value, key], the wide half of W_g
    o_norm: Tensor  # [value]

    def __init__(self, config: KdaModelConfig, engine_config: EngineConfig, prefix: str) -> None:
        sizes = config.kda
        super().__init__(config, engine_config, prefix, num_heads=sizes.num_heads, head_dim=sizes.head_dim)
        self.value_dim, self.conv_taps = sizes.value_dim, sizes.conv_taps
        heads, key, value = sizes.num_heads, sizes.head_dim, sizes.value_dim
        self.segments = (("q", heads * key), ("k", heads * key), ("v", heads * value))

        gate = (prefix, f"{prefix}.forget_gate")  # the latter is transformers' spelling
        self.in_proj = Linear(
            self.hidden_size,
            Rows(heads * key, f"{prefix}.q_proj"),
            Rows(heads * key, f"{prefix}.k_proj"),
            Rows(heads * value, f"{prefix}.v_proj"),
            Rows(key, *(f"{spelling}.f_a_proj" for spelling in gate)),
            Rows(key, f"{prefix}.g_a_proj"),
            Rows(heads, f"{prefix}.b_proj"),
            dtype=self.dtype,
        )
        self.o_proj = Linear(
            heads * value, Rows(self.hidden_size, f"{prefix}.o_proj", f"{prefix}.dense"), dtype=self.dtype
        )
        self.declare("conv_weight", (heads * (2 * key + value), self.conv_taps), torch.float32)
        self.declare("f_b", (heads * key, key), self.dtype)
        self.declare("A_log", (heads,), torch.float32)
        self.declare("dt_bias", (heads * key,), torch.float32)
        self.declare("g_b", (heads * value, key), self.dtype)
        self.declare("o_norm", (value,), self.dtype)

    def state_spec(self) -> StateSpec:
        return delta_state_spec(
            self.engine_config,
            segments=self.segments,
            conv_taps=self.conv_taps,
            num_heads=self.num_heads,
            key_dim=self.head_dim,
            value_dim=self.value_dim,
        )

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        mixed = kda(self.in_proj(hidden), self.weights, state["conv"], state["recurrent"], batch)
        return self.o_proj(mixed)

    def finalize(self) -> None:
        self.weights = KdaWeights(
            conv=self.conv_weight,
            decay_up=self.f_b,
            a_log=self.A_log,
            dt_bias=self.dt_bias,
            gate_up=self.g_b,
            norm=self.o_norm,
            eps=self.config.rms_norm_eps,
            scale=self.head_dim**-0.5,
        )

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        fused = f"{self.prefix}.conv1d.weight"
        if fused in names:
            yield Slot((fused,), self.conv_weight)
        else:
            begin = 0
            for name, width in self.segments:
                yield Slot((f"{self.prefix}.{name}_conv1d.weight",), self.conv_weight[begin : begin + width])
                begin += width
        for name, target in (("A_log", self.A_log), ("dt_bias", self.dt_bias), ("f_b_proj.weight", self.f_b)):
            yield Slot((f"{self.prefix}.{name}", f"{self.prefix}.forget_gate.{name}"), target)
        yield Slot((f"{self.prefix}.g_b_proj.weight",), self.g_b)
        yield Slot((f"{self.prefix}.o_norm.weight",), self.o_norm)
