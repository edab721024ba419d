"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): a delta rule whose memory decays channel by channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Set
from dataclasses import dataclass
from types import SimpleNamespace
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
from statewise.memory.blocks import Shard, StateSpec
from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.kda import KdaWeights, kda, naive_kda


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
    capabilities = Capabilities({"cpu": "numba decode in one launch, chunked prefill"}, interior_states=True)
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
        keys, values = sizes.num_heads * sizes.head_dim, sizes.num_heads * sizes.value_dim
        self.segments = (("q", keys), ("k", keys), ("v", values))

        heads, gate = Shard(axis=0), (prefix, f"{prefix}.forget_gate")  # the latter is transformers' spelling
        self.in_proj = Linear(
            self.hidden_size,
            Rows(keys, f"{prefix}.q_proj", shard=heads),
            Rows(keys, f"{prefix}.k_proj", shard=heads),
            Rows(values, f"{prefix}.v_proj", shard=heads),
            Rows(sizes.head_dim, *(f"{spelling}.f_a_proj" for spelling in gate)),
            Rows(sizes.head_dim, f"{prefix}.g_a_proj"),
            Rows(sizes.num_heads, f"{prefix}.b_proj", shard=heads),
            dtype=self.dtype,
            ranks=self.ranks,
        )
        output = Rows(self.hidden_size, f"{prefix}.o_proj", f"{prefix}.dense")
        self.o_proj = Linear(values, output, dtype=self.dtype, ranks=self.ranks, split_input=True)
        keys, values = keys // self.tp_size, values // self.tp_size
        self.declare("conv_weight", (2 * keys + values, self.conv_taps), torch.float32)
        self.declare("f_b", (keys, sizes.head_dim), self.dtype)
        self.declare("A_log", (self.rank_heads,), torch.float32)
        self.declare("dt_bias", (keys,), torch.float32)
        self.declare("g_b", (values, sizes.head_dim), self.dtype)
        self.declare("o_norm", (self.value_dim,), self.dtype)

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
        channels = sum(width for _, width in self.segments)
        fused = f"{self.prefix}.conv1d.weight"
        if fused in names:
            shard = Shard(axis=0, segments=self.segments)
            yield Slot((fused,), self.conv_weight, (channels, self.conv_taps), 0, self.rank_ranges(channels, shard))
        else:
            begin = 0
            for name, width in self.segments:
                target = self.conv_weight[begin : begin + width // self.tp_size]
                yield self.slot_by_heads((f"{self.prefix}.{name}_conv1d.weight",), target)
                begin += width // self.tp_size
        for name, target in (("A_log", self.A_log), ("dt_bias", self.dt_bias), ("f_b_proj.weight", self.f_b)):
            yield self.slot_by_heads((f"{self.prefix}.{name}", f"{self.prefix}.forget_gate.{name}"), target)
        yield self.slot_by_heads((f"{self.prefix}.g_b_proj.weight",), self.g_b)
        yield Slot((f"{self.prefix}.o_norm.weight",), self.o_norm)

    @classmethod
    def example_config(cls) -> KdaModelConfig:
        return SimpleNamespace(hidden_size=48, rms_norm_eps=1e-5, kda=KdaConfig(4, 16, 8, 4))

    def example_weight(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        if name == "A_log":  # decays from almost none to a few tokens
            return torch.rand(shape, generator=generator).mul(16).add(0.1).log()
        if name == "dt_bias":
            return torch.rand(shape, generator=generator).mul(4).sub(7)
        return None

    def reference(
        self, hidden: Tensor, weights: Mapping[str, Tensor], state: MutableMapping[str, Tensor], start: int
    ) -> Tensor:
        inner = KdaWeights(
            conv=torch.cat([weights[f"{name}_conv1d.weight"].flatten(1) for name in "qkv"]),
            decay_up=weights["f_b_proj.weight"],
            a_log=weights["A_log"],
            dt_bias=weights["dt_bias"],
            gate_up=weights["g_b_proj.weight"],
            norm=weights["o_norm.weight"],
            eps=self.config.rms_norm_eps,
            scale=self.head_dim**-0.5,
        )
        names = ("q_proj", "k_proj", "v_proj", "f_a_proj", "g_a_proj", "b_proj")
        projected = torch.cat([hidden @ weights[f"{name}.weight"].T for name in names], dim=-1)
        batch = build_batch([Piece(range(len(hidden)), start, record=0)], page_size=1)
        conv, recurrent = state["conv"][None].clone(), state["recurrent"][None].clone()
        mixed = naive_kda(projected, inner, conv, recurrent, batch, dtype=hidden.dtype)
        state["conv"], state["recurrent"] = conv[0], recurrent[0]
        return mixed @ weights["o_proj.weight"].T
