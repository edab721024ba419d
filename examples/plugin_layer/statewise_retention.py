"""Gated retention (RetNet, arXiv 2307.08621) as a layer for Statewise, in its own package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Set
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.layers.linear_attention.base import LinearAttention, recurrent_field
from statewise.layers.mixer import Capabilities, State
from statewise.layers.parameters import Slot
from statewise.layers.pluggable import PluggableLayer
from statewise.layers.projection import Linear, Rows
from statewise.memory.blocks import Shard, StateSpec
from statewise.ops.batch import Batch
from statewise.ops.lightning import lightning_attention
from statewise.ops.norm import gated_rms_norm


class ModelConfig(Protocol):
    """What the layer reads from its model's configuration."""

    hidden_size: int
    num_heads: int
    head_dim: int
    rms_norm_eps: float


def head_decays(num_heads: int) -> Tensor:
    """γ [H] float64 = 1 - 2^(-5 - h): the first head forgets within some thirty tokens, each next one half as fast."""
    return 1.0 - torch.exp2(-5.0 - torch.arange(num_heads, dtype=torch.float64))


@PluggableLayer.register("gated_retention")
class GatedRetention(LinearAttention):
    """Per head, without positions:

        S ← γ S + k vᵀ;   o = Sᵀq / √D
        y = W_o ( RMSNorm(o) ⊙ SiLU(W_g x) )

    The norm goes head by head; all heads share its weight.
    """

    state_kind = "retention"
    capabilities = Capabilities({"cpu": "numba decode and chunked prefill of lightning attention"})
    norm: Tensor  # [head_dim]

    def __init__(self, config: ModelConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__(config, engine_config, prefix, num_heads=config.num_heads, head_dim=config.head_dim)
        width = self.num_heads * self.head_dim
        rows = [Rows(width, f"{prefix}.{name}_proj", shard=Shard(axis=0)) for name in "qkvg"]
        self.in_proj = Linear(self.hidden_size, *rows, dtype=self.dtype, ranks=self.ranks)
        output = Rows(self.hidden_size, f"{prefix}.out_proj")
        self.out_proj = Linear(width, output, dtype=self.dtype, ranks=self.ranks, split_input=True)
        self.declare("norm", (self.head_dim,), self.dtype)
        first = self.tp_rank * self.rank_heads
        self.slopes = -head_decays(self.num_heads).log()[first : first + self.rank_heads].float()

    def state_spec(self) -> StateSpec:
        return StateSpec(recurrent=recurrent_field(self.engine_config, self.num_heads, self.head_dim, self.head_dim))

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        heads = self.in_proj(hidden).unflatten(-1, (-1, self.head_dim))  # [T, 4 heads, head_dim]
        q, k, v, gate = heads.split(self.rank_heads, dim=1)
        o = lightning_attention(q, k, v, self.slopes, state["recurrent"], batch, scale=self.head_dim**-0.5)
        return self.out_proj(gated_rms_norm(o, self.norm, gate, self.config.rms_norm_eps, activation="silu").flatten(1))

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        yield Slot((f"{self.prefix}.norm.weight",), self.norm)

    # For `statewise conformance`

    @classmethod
    def example_config(cls) -> ModelConfig:
        return SimpleNamespace(hidden_size=48, num_heads=4, head_dim=16, rms_norm_eps=1e-5)

    def reference(
        self, hidden: Tensor, weights: Mapping[str, Tensor], state: MutableMapping[str, Tensor], start: int
    ) -> Tensor:
        shape = (self.num_heads, self.head_dim)
        q, k, v, gate = ((hidden @ weights[f"{name}_proj.weight"].T).unflatten(-1, shape) for name in "qkvg")
        decay, memory, rows = head_decays(self.num_heads)[:, None, None], state["recurrent"], []
        for t in range(len(hidden)):
            memory = decay * memory + k[t, :, :, None] * v[t, :, None, :]
            rows.append((memory * q[t, :, :, None]).sum(1) * self.head_dim**-0.5)
        state["recurrent"] = memory
        o = torch.stack(rows)
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * weights["norm.weight"]
        return (o * torch.nn.functional.silu(gate)).flatten(1) @ weights["out_proj.weight"].T
