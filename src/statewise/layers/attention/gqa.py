"""Grouped-query softmax attention (arXiv 2305.13245) with partial rotation and optional norms of q and k."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Set
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.errors import ConfigError
from statewise.layers.mixer import Capabilities, State, TokenMixer
from statewise.layers.parameters import Slot
from statewise.layers.pluggable import PluggableLayer
from statewise.layers.projection import Linear, Rows
from statewise.memory.blocks import Field, Shard, StateSpec
from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.norm import naive_rms_norm, rms_norm
from statewise.ops.paged_attention import gqa_attention, write_pages
from statewise.ops.paged_attention.naive import gqa_attention as naive_gqa_attention
from statewise.ops.rope import inverse_frequencies, rotary
from statewise.ops.rope.naive import naive_rotary

GQA_LAYER = "grouped_query_attention"


@dataclass(frozen=True)
class GqaConfig:
    """Sizes and options of a grouped-query attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # leading dims of every head that are rotated, half-style; 0: none
    rope_theta: float
    norm: Literal["none", "head", "row"] = "none"  # RMSNorm of q and k: of every head, or of all heads together
    norm_eps: float = 1e-6
    fused: bool = False  # q, k and v are one matrix `query_key_value` in the checkpoint


class GqaModelConfig(Protocol):
    """What the layer reads from its model's configuration."""

    hidden_size: int
    gqa: GqaConfig


@PluggableLayer.register(GQA_LAYER)
class GroupedQueryAttention(TokenMixer):
    """o_h = Σ softmax(q_h·k_g / √D) v_g, where query head h reads key-value head g = ⌊h · H_kv / H⌋."""

    scope: ClassVar[Literal["record", "page"]] = "page"
    state_kind = "gqa"
    capabilities = Capabilities({"cpu": "numba decode over pages, SDPA prefill"}, interior_states=True)
    query_norm: Tensor
    key_norm: Tensor

    def __init__(self, config: GqaModelConfig, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__(config, engine_config, prefix)
        self.sizes = sizes = config.gqa
        self.rank_heads = self.split_heads(sizes.num_heads)
        if sizes.num_kv_heads % self.ranks.size and self.ranks.size % sizes.num_kv_heads:
            raise ConfigError(
                f"{sizes.num_kv_heads} key-value heads of {prefix} cannot be split or shared by {self.ranks.size} ranks"
            )
        q, kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        segments = (("q", q), ("k", kv), ("v", kv))
        shard = Shard(axis=0, unit=sizes.head_dim, shared=True)
        if sizes.fused:
            fused = Shard(axis=0, segments=segments, unit=sizes.head_dim, shared=True)
            rows = [Rows(q + 2 * kv, f"{prefix}.query_key_value", shard=fused)]
        else:
            rows = [Rows(width, f"{prefix}.{name}_proj", shard=shard) for name, width in segments]
        self.in_proj = Linear(config.hidden_size, *rows, dtype=self.dtype, ranks=self.ranks)
        output = Rows(config.hidden_size, f"{prefix}.o_proj", f"{prefix}.dense")
        self.o_proj = Linear(q, output, dtype=self.dtype, ranks=self.ranks, split_input=True)
        self.kv_ranges = self.rank_ranges(kv, shard)
        self.widths = [q // self.ranks.size, *[stop - start for start, stop in self.kv_ranges] * 2]
        self.frequencies = inverse_frequencies(sizes.rotary_dim, sizes.rope_theta) if sizes.rotary_dim else None
        if sizes.norm != "none":
            whole = sizes.norm == "row"
            self.declare("query_norm", (self.widths[0] if whole else sizes.head_dim,), self.dtype)
            self.declare("key_norm", (self.widths[1] if whole else sizes.head_dim,), self.dtype)

    def state_spec(self) -> StateSpec:
        shape, shard = (self.sizes.num_kv_heads, self.sizes.head_dim), Shard(axis=0, shared=True)
        return StateSpec(key=Field(shape, self.dtype, shard), value=Field(shape, self.dtype, shard))

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        projected, (q_width, k_width, v_width) = self.in_proj(hidden), self.widths
        if self.sizes.norm == "none":  # one launch for both
            both, v = projected.split([q_width + k_width, v_width], dim=-1)
            heads = (q_width // self.sizes.head_dim, k_width // self.sizes.head_dim)
            q, k = self._positioned(both, "", batch).split(heads, dim=1)
        else:
            q, k, v = projected.split(self.widths, dim=-1)
            q, k = self._positioned(q, "query_norm", batch), self._positioned(k, "key_norm", batch)
        write_pages(k, state["key"], batch)
        write_pages(v.unflatten(-1, (-1, self.sizes.head_dim)), state["value"], batch)
        o = gqa_attention(q, state["key"], state["value"], batch, scale=self.sizes.head_dim**-0.5)
        return self.o_proj(o.flatten(1))

    def _positioned(self, x: Tensor, norm: str, batch: Batch) -> Tensor:  # [T, h * D] -> [T, h, D]
        sizes = self.sizes
        if sizes.norm == "row":
            x = self._row_norm(x, norm)
        weight = getattr(self, norm) if sizes.norm == "head" else None
        return rotary(x.unflatten(-1, (-1, sizes.head_dim)), self.frequencies, batch, weight=weight, eps=sizes.norm_eps)

    def _row_norm(self, x: Tensor, norm: str) -> Tensor:
        """The norm over the heads of all ranks."""
        weight, eps = getattr(self, norm), self.sizes.norm_eps
        if self.ranks.size == 1:
            return rms_norm(x, weight, eps)
        width = x.shape[1] * self.ranks.size  # counts a head that several ranks share as often
        wide = x.float()
        square = self.ranks.all_reduce(wide.square().sum(-1, keepdim=True))
        return (wide * torch.rsqrt(square / width + eps) * weight.float()).to(x.dtype)

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        if self.sizes.norm == "none":
            return
        spellings = {"query_norm": ("q_norm", "query_layernorm"), "key_norm": ("k_norm", "key_layernorm")}
        head = self.sizes.head_dim
        for name, heads in (("query_norm", self.sizes.num_heads), ("key_norm", self.sizes.num_kv_heads)):
            accepted = tuple(f"{self.prefix}.{spelling}.weight" for spelling in spellings[name])
            target = getattr(self, name)
            if self.sizes.norm == "head":
                yield Slot(accepted, target)
            else:
                ranges = self.rank_ranges(heads * head, Shard(axis=0, unit=head, shared=True))
                yield Slot(accepted, target, (heads * head,), 0, ranges)

    @classmethod
    def example_config(cls) -> GqaModelConfig:
        gqa = GqaConfig(num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8, rope_theta=1e4, norm="row")
        return SimpleNamespace(hidden_size=48, gqa=gqa)

    def reference(
        self, hidden: Tensor, weights: Mapping[str, Tensor], state: MutableMapping[str, Tensor], start: int
    ) -> Tensor:
        sizes = self.sizes
        if sizes.fused:
            q_width, kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
            q, k, v = (hidden @ weights["query_key_value.weight"].T).split([q_width, kv, kv], dim=-1)
        else:
            q, k, v = (hidden @ weights[f"{name}_proj.weight"].T for name in "qkv")
        batch = build_batch([Piece(range(len(hidden)), start, 0, range(start + len(hidden)))], page_size=1)
        parts = []
        for x, norm in ((q, "q_norm.weight"), (k, "k_norm.weight")):
            if sizes.norm == "row":
                x = naive_rms_norm(x, weights[norm], sizes.norm_eps)
            weight = weights[norm] if sizes.norm == "head" else None
            heads = x.unflatten(-1, (-1, sizes.head_dim))
            parts.append(naive_rotary(heads, self.frequencies, batch.positions, weight=weight, eps=sizes.norm_eps))
        state["key"] = torch.cat([state["key"], parts[1]])
        state["value"] = torch.cat([state["value"], v.unflatten(-1, (-1, sizes.head_dim))])
        cache = (state["key"][:, None], state["value"][:, None])  # pages of one token
        o = naive_gqa_attention(parts[0], *cache, batch, scale=sizes.head_dim**-0.5)
        return o.flatten(1) @ weights["o_proj.weight"].T
