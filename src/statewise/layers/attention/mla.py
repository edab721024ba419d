"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) that caches one latent row per token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Set
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.layers.mixer import Capabilities, State, TokenMixer
from statewise.layers.norm import RMSNorm
from statewise.layers.parameters import Slot
from statewise.layers.pluggable import PluggableLayer
from statewise.layers.projection import Linear, Rows
from statewise.memory.blocks import Field, Shard, StateSpec
from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.norm import naive_rms_norm
from statewise.ops.paged_attention import mla_attention, write_pages
from statewise.ops.paged_attention.naive import mla_attention as naive_mla_attention
from statewise.ops.rope import inverse_frequencies, rotary
from statewise.ops.rope.naive import naive_rotary

MLA_LAYER = "multi_head_latent_attention"
LATENT_NORM_EPS = 1e-6  # the published modelling code fixes it; it is not the model's rms_norm_eps


@dataclass(frozen=True)
class MlaConfig:
    """Sizes of an MLA layer. `rope_dim` is the width of the key part that all heads share."""

    num_heads: int
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None  # width of the bottleneck in front of the queries; None: there is none
    rope_theta: float | None = None  # None: no position enters


class MlaModelConfig(Protocol):
    """What the layer reads from its model's configuration."""

    hidden_size: int
    mla: MlaConfig


@PluggableLayer.register(MLA_LAYER)
class MultiHeadLatentAttention(TokenMixer):
    """[k_nope | v]_h = W_kv,h ℓ;   score = (q_nope·k_nope + q_r·k_r) / √(nope + rope);   o_h = Σ softmax(score) v_h

    ℓ = RMSNorm(first part of W_a x), k_r = the rest of W_a x, shared by all heads. q_r and k_r are rotated in
    interleaved pairs over all their dims, or not at all (Kimi-Linear's "NoPE"). The page entry of a token is (ℓ | k_r).
    """

    scope: ClassVar[Literal["record", "page"]] = "page"
    state_kind = "mla"
    capabilities = Capabilities({"cpu": "numba decode over pages, SDPA prefill"}, interior_states=True)
    kv_up: Tensor  # [heads, nope + value, latent]

    def __init__(self, config: MlaModelConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__(config, engine_config, prefix)
        self.sizes = sizes = config.mla
        self.rank_heads = self.split_heads(sizes.num_heads)
        self.scale = (sizes.nope_dim + sizes.rope_dim) ** -0.5
        width, low = sizes.num_heads * (sizes.nope_dim + sizes.rope_dim), sizes.query_rank
        latent = Rows(sizes.latent_dim + sizes.rope_dim, f"{prefix}.kv_a_proj_with_mqa")
        heads, linear = Shard(axis=0), partial(Linear, dtype=self.dtype, ranks=self.ranks)
        if low is None:
            query = Rows(width, f"{prefix}.q_proj", shard=heads)
        else:
            query = Rows(low, f"{prefix}.q_a_proj")
            self.q_a_layernorm = RMSNorm(low, f"{prefix}.q_a_layernorm", LATENT_NORM_EPS, self.dtype)
            self.q_b_proj = linear(low, Rows(width, f"{prefix}.q_b_proj", shard=heads))
        self.in_proj = linear(config.hidden_size, query, latent)
        self.widths = [self.in_proj.widths[0], sizes.latent_dim, sizes.rope_dim]
        self.kv_a_layernorm = RMSNorm(sizes.latent_dim, f"{prefix}.kv_a_layernorm", LATENT_NORM_EPS, self.dtype)
        self.declare("kv_up", (self.rank_heads, sizes.nope_dim + sizes.value_dim, sizes.latent_dim), self.dtype)
        output = Rows(config.hidden_size, f"{prefix}.o_proj", f"{prefix}.dense")
        self.o_proj = linear(sizes.num_heads * sizes.value_dim, output, split_input=True)
        rotates = sizes.rope_theta is not None
        self.frequencies = inverse_frequencies(sizes.rope_dim, sizes.rope_theta) if rotates else None

    def state_spec(self) -> StateSpec:  # every rank keeps all of it
        return StateSpec(latent=Field(shape=(self.sizes.latent_dim + self.sizes.rope_dim,), dtype=self.dtype))

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        sizes = self.sizes
        q, latent, rope_key = torch.split(self.in_proj(hidden), self.widths, dim=-1)
        if sizes.query_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q_heads = q.unflatten(-1, (self.rank_heads, -1))
        q_nope, q_rope = torch.split(q_heads, [sizes.nope_dim, sizes.rope_dim], dim=-1)
        if self.frequencies is not None:
            q_rope = rotary(q_rope, self.frequencies, batch, interleaved=True)
            rope_key = rotary(rope_key, self.frequencies, batch, interleaved=True)
        write_pages(torch.cat((self.kv_a_layernorm(latent), rope_key), dim=-1), state["latent"], batch)
        key_up, value_up = torch.split(self.kv_up, [sizes.nope_dim, sizes.value_dim], dim=1)
        o = mla_attention(q_nope, q_rope, key_up, value_up, state["latent"], batch, scale=self.scale)
        return self.o_proj(o.flatten(1))

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        yield self.slot_by_heads((f"{self.prefix}.kv_b_proj.weight",), self.kv_up.flatten(0, 1))

    @classmethod
    def example_config(cls) -> MlaModelConfig:
        mla = MlaConfig(4, latent_dim=24, nope_dim=16, rope_dim=8, value_dim=12, query_rank=20, rope_theta=1e4)
        return SimpleNamespace(hidden_size=48, mla=mla)

    def reference(
        self, hidden: Tensor, weights: Mapping[str, Tensor], state: MutableMapping[str, Tensor], start: int
    ) -> Tensor:
        sizes = self.sizes

        def norm(x: Tensor, name: str) -> Tensor:
            return naive_rms_norm(x, weights[f"{name}.weight"], LATENT_NORM_EPS)

        if sizes.query_rank is None:
            q = hidden @ weights["q_proj.weight"].T
        else:
            q = norm(hidden @ weights["q_a_proj.weight"].T, "q_a_layernorm") @ weights["q_b_proj.weight"].T
        latent, rope_key = (hidden @ weights["kv_a_proj_with_mqa.weight"].T).split(
            [sizes.latent_dim, sizes.rope_dim], -1
        )
        batch = build_batch([Piece(range(len(hidden)), start, 0, range(start + len(hidden)))], page_size=1)
        q_nope, q_rope = q.unflatten(-1, (sizes.num_heads, -1)).split([sizes.nope_dim, sizes.rope_dim], dim=-1)
        q_rope = naive_rotary(q_rope, self.frequencies, batch.positions, interleaved=True)
        rope_key = naive_rotary(rope_key, self.frequencies, batch.positions, interleaved=True)
        entries = torch.cat([norm(latent, "kv_a_layernorm"), rope_key], dim=-1)
        state["latent"] = torch.cat([state["latent"], entries])
        up = weights["kv_b_proj.weight"].unflatten(0, (sizes.num_heads, -1))
        key_up, value_up = up.split([sizes.nope_dim, sizes.value_dim], dim=1)
        cache = state["latent"][:, None]  # pages of one token
        o = naive_mla_attention(q_nope, q_rope, key_up, value_up, cache, batch, scale=self.scale)
        return o.flatten(1) @ weights["o_proj.weight"].T
