"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) that caches one latent row per token."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.layers.mixer import Capabilities, State, TokenMixer
from statewise.layers.norm import RMSNorm
from statewise.layers.parameters import Slot
from statewise.layers.pluggable import PluggableLayer
from statewise.layers.projection import Linear, Rows
from statewise.memory.blocks import Field, StateSpec
from statewise.ops.batch import Batch
from statewise.ops.paged_attention import mla_attention, write_pages

LATENT_NORM_EPS = 1e-6  # the published modelling code fixes it; it is not the model's rms_norm_eps


@dataclass(frozen=True)
class MlaConfig:
    """Sizes of an MLA layer. `rope_dim` is the width of the key part that all heads share."""

    num_heads: int
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int


class MlaModelConfig(Protocol):
    """What the layer reads from its model's configuration."""

    hidden_size: int
    mla: MlaConfig


@PluggableLayer.register("multi_head_latent_attention")
class MultiHeadLatentAttention(TokenMixer):
    """[k_nope | v]_h = W_kv,h ℓ;   score = (q_nope·k_nope + q_r·k_r) / √(nope + rope);   o_h = Σ softmax(score) v_h

    ℓ = RMSNorm(first part of W_a x), k_r = the rest of W_a x, shared by all heads. No position enters (Kimi-Linear's
    "NoPE"): the `rope` part exists but is not rotated. The page entry of a token is (ℓ | k_r).
    """

    scope: ClassVar[Literal["record", "page"]] = "page"
    state_kind = "mla"
    capabilities = Capabilities({"cpu": "numba decode over pages, SDPA prefill"})
    kv_up: Tensor  # [heads, nope + value, latent]

    def __init__(self, config: MlaModelConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__(config, engine_config, prefix)
        self.sizes = sizes = config.mla
        self.dtype: torch.dtype = engine_config.dtype
        heads = sizes.num_heads
        self.scale = (sizes.nope_dim + sizes.rope_dim) ** -0.5
        self.in_proj = Linear(
            config.hidden_size,
            Rows(heads * (sizes.nope_dim + sizes.rope_dim), f"{prefix}.q_proj"),
            Rows(sizes.latent_dim + sizes.rope_dim, f"{prefix}.kv_a_proj_with_mqa"),
            dtype=self.dtype,
        )
        self.kv_a_layernorm = RMSNorm(sizes.latent_dim, f"{prefix}.kv_a_layernorm", LATENT_NORM_EPS, self.dtype)
        self.declare("kv_up", (heads, sizes.nope_dim + sizes.value_dim, sizes.latent_dim), self.dtype)
        self.o_proj = Linear(
            heads * sizes.value_dim, Rows(config.hidden_size, f"{prefix}.o_proj", f"{prefix}.dense"), dtype=self.dtype
        )

    def state_spec(self) -> StateSpec:
        return StateSpec(latent=Field(shape=(self.sizes.latent_dim + self.sizes.rope_dim,), dtype=self.dtype))

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        sizes = self.sizes
        q_width = sizes.num_heads * (sizes.nope_dim + sizes.rope_dim)
        q, latent, rope_key = torch.split(self.in_proj(hidden), [q_width, sizes.latent_dim, sizes.rope_dim], dim=-1)
        write_pages(torch.cat((self.kv_a_layernorm(latent), rope_key), dim=-1), state["latent"], batch)
        q_heads = q.unflatten(-1, (sizes.num_heads, -1))
        q_nope, q_rope = torch.split(q_heads, [sizes.nope_dim, sizes.rope_dim], dim=-1)
        key_up, value_up = torch.split(self.kv_up, [sizes.nope_dim, sizes.value_dim], dim=1)
        o = mla_attention(q_nope, q_rope, key_up, value_up, state["latent"], batch, scale=self.scale)
        return self.o_proj(o.flatten(1))

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        yield Slot((f"{self.prefix}.kv_b_proj.weight",), self.kv_up.flatten(0, 1))
