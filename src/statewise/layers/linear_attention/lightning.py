"""Lightning attention (MiniMax-01, arXiv 2501.08313): linear attention whose memory decays at a constant rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.errors import ConfigError
from statewise.layers.linear_attention.base import LinearAttention, recurrent_field
from statewise.layers.linear_attention.slopes import decay_slopes
from statewise.layers.mixer import Capabilities, State
from statewise.layers.parameters import Slot
from statewise.layers.projection import Linear, Rows
from statewise.memory.blocks import Shard, StateSpec
from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.lightning import LightningWeights, lightning, naive_lightning
from statewise.ops.rope import inverse_frequencies


@dataclass(frozen=True)
class LightningRule:
    """What distinguishes one family's lightning attention from another's."""

    norm_eps: float  # of the output norm
    norm_groups: int = 1  # parts of the concatenated heads that are normalised each by itself
    silu: bool = False  # q, k and v pass SiLU first
    qk_norm_eps: float | None = None  # of the norm of every head of q and k; None: no such norm
    rotary_dim: int = 0  # leading dims of every head of q and k that are rotated; 0: none
    rope_theta: float = 10_000.0
    scale: float = 1.0  # on q
    slope_formula: str = "serving"


@dataclass(frozen=True)
class LightningNames:
    """What the tensors are called in checkpoints, below the layer's prefix."""

    qkv: str
    gate: str
    norm: str
    output: str
    query_norm: str = "query_layernorm"
    key_norm: str = "key_layernorm"
    qkv_by_head: bool = False  # rows head by head, q | k | v within one; else all q, all k, all v


class LightningAttention(LinearAttention):
    """Per head, with a constant s > 0 that falls with the head's and the layer's index:

        S ← e^(-s) S + k vᵀ;   o = Sᵀq
        y = W_o ( RMSNorm(o) ⊙ σ(W_g x) )

    The norm spans all heads together or `norm_groups` equal parts of them.
    """

    state_kind = "linear"
    capabilities = Capabilities({"cpu": "numba decode in one launch, chunked prefill"}, interior_states=True)
    norm: Tensor  # [heads * head_dim]
    query_norm: Tensor  # [head_dim]
    key_norm: Tensor  # [head_dim]

    def __init__(
        self,
        config: Any,
        engine_config: EngineConfig,
        prefix: str,
        *,
        num_heads: int,
        head_dim: int,
        rule: LightningRule,
        names: LightningNames,
    ) -> None:
        super().__init__(config, engine_config, prefix, num_heads=num_heads, head_dim=head_dim)
        width = num_heads * head_dim
        if width % rule.norm_groups:
            raise ConfigError(f"{prefix}: {rule.norm_groups} norm groups do not divide {num_heads} heads of {head_dim}")
        if rule.norm_groups > 1 and rule.norm_groups % self.tp_size:
            raise ConfigError(
                f"{prefix}: the {rule.norm_groups} groups of the norm (group_norm_size) cannot be split over "
                f"{self.tp_size} ranks; choose a number of ranks that divides {rule.norm_groups}"
            )
        self.rule, self.names = rule, names
        self.slopes = decay_slopes(num_heads, self.layer_index, config.num_layers, rule.slope_formula)  # [H] float64
        parts = tuple((name, width) for name in ("q", "k", "v"))
        # Rows that go head by head are cut in one run, the others part by part.
        qkv = Shard(axis=0) if names.qkv_by_head else Shard(axis=0, segments=parts)
        self.in_proj = Linear(
            self.hidden_size,
            Rows(
                3 * width,
                f"{prefix}.{names.qkv}",
                shard=qkv,
                **({"heads": num_heads, "parts": 3} if names.qkv_by_head else {}),
            ),
            Rows(width, f"{prefix}.{names.gate}", shard=Shard(axis=0)),
            dtype=self.dtype,
            ranks=self.ranks,
        )
        output = Rows(self.hidden_size, f"{prefix}.{names.output}")
        self.out_proj = Linear(width, output, dtype=self.dtype, ranks=self.ranks, split_input=True)
        self.declare("norm", (width // self.tp_size,), self.dtype)
        if rule.qk_norm_eps is not None:
            self.declare("query_norm", (head_dim,), self.dtype)
            self.declare("key_norm", (head_dim,), self.dtype)

    def state_spec(self) -> StateSpec:
        return StateSpec(
            recurrent=recurrent_field(self.engine_config, self.num_heads, self.head_dim, self.head_dim),
        )

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        mixed = lightning(self.in_proj(hidden), self.weights, state["recurrent"], batch, self.reduce)
        return self.out_proj(mixed)

    def finalize(self) -> None:
        first, rule = self.tp_rank * self.rank_heads, self.rule
        normed = rule.qk_norm_eps is not None
        self.weights = LightningWeights(
            slopes=self.slopes[first : first + self.rank_heads].float(),
            norm=self.norm,
            group_width=self.num_heads * self.head_dim // rule.norm_groups,
            eps=rule.norm_eps,
            scale=rule.scale,
            silu=rule.silu,
            query_norm=self.query_norm if normed else None,
            key_norm=self.key_norm if normed else None,
            qk_eps=rule.qk_norm_eps or 0.0,
            frequencies=inverse_frequencies(rule.rotary_dim, rule.rope_theta) if self.rule.rotary_dim else None,
        )
        spans_ranks = self.weights.group_width > self.rank_heads * self.head_dim
        self.reduce = self.ranks.all_reduce if spans_ranks else None

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        yield self.slot_by_heads((f"{self.prefix}.{self.names.norm}.weight",), self.norm)
        if self.rule.qk_norm_eps is not None:
            yield Slot((f"{self.prefix}.{self.names.query_norm}.weight",), self.query_norm)
            yield Slot((f"{self.prefix}.{self.names.key_norm}.weight",), self.key_norm)

    def reference(
        self, hidden: Tensor, weights: Mapping[str, Tensor], state: MutableMapping[str, Tensor], start: int
    ) -> Tensor:
        names = self.names
        qkv = hidden @ weights[f"{names.qkv}.weight"].T
        if names.qkv_by_head:
            qkv = qkv.unflatten(-1, (self.num_heads, 3, self.head_dim)).transpose(1, 2).flatten(1)
        inner = replace(
            self.weights,
            slopes=self.slopes,
            norm=weights[f"{names.norm}.weight"],
            query_norm=weights.get(f"{names.query_norm}.weight"),
            key_norm=weights.get(f"{names.key_norm}.weight"),
        )
        projected = torch.cat([qkv, hidden @ weights[f"{names.gate}.weight"].T], dim=-1)
        batch = build_batch([Piece(range(len(hidden)), start, record=0)], page_size=1)
        recurrent = state["recurrent"][None].clone()
        mixed = naive_lightning(projected, inner, recurrent, batch, dtype=hidden.dtype)
        state["recurrent"] = recurrent[0]
        return mixed @ weights[f"{names.output}.weight"].T
