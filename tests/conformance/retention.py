"""A layer as a third party would write it: plain torch, one file, no kernels. The kit's tests inject faults into it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.layers.linear_attention.base import LinearAttention, recurrent_field
from statewise.layers.mixer import Capabilities, State
from statewise.layers.projection import Linear, Rows
from statewise.memory.blocks import Shard, StateSpec
from statewise.ops.batch import Batch

HEADS, WIDTH = 4, 8


class Retention(LinearAttention):
    """Per head, with a constant decay: S <- 0.9^(h + 1) S + k v^T;  o = S^T q."""

    state_kind = "retention"
    capabilities = Capabilities({"cpu": "torch"})

    def __init__(self, config: Any, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__(config, engine_config, prefix, num_heads=HEADS, head_dim=WIDTH)
        rows = [Rows(HEADS * WIDTH, f"{prefix}.{name}_proj", shard=Shard(axis=0)) for name in "qkv"]
        self.in_proj = Linear(self.hidden_size, *rows, dtype=self.dtype, ranks=self.ranks)
        output = Rows(self.hidden_size, f"{prefix}.o_proj")
        self.o_proj = Linear(HEADS * WIDTH, output, dtype=self.dtype, ranks=self.ranks, split_input=True)
        first = self.tp_rank * self.rank_heads
        self.decay = 0.9 ** torch.arange(first + 1, first + self.rank_heads + 1, dtype=torch.float64)[:, None, None]

    def state_spec(self) -> StateSpec:
        return StateSpec(recurrent=recurrent_field(self.engine_config, HEADS, WIDTH, WIDTH))

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        q, k, v = self.in_proj(hidden).float().unflatten(-1, (3, self.rank_heads, WIDTH)).unbind(1)
        output = torch.empty_like(v)
        for i, record in enumerate(batch.records.tolist()):
            memory = state["recurrent"][record].float()
            if batch.fresh[i]:
                memory = torch.zeros_like(memory)
            for row in range(int(batch.query_start[i]), int(batch.query_start[i + 1])):
                memory = self.decay.float() * memory + k[row, :, :, None] * v[row, :, None, :]
                output[row] = (memory * q[row, :, :, None]).sum(1)
            state["recurrent"][record] = memory.to(state["recurrent"].dtype)
        return self.o_proj(output.flatten(1).to(hidden.dtype))

    @classmethod
    def example_config(cls) -> Any:
        return SimpleNamespace(hidden_size=24)

    def reference(
        self, hidden: Tensor, weights: Mapping[str, Tensor], state: MutableMapping[str, Tensor], start: int
    ) -> Tensor:
        q, k, v = ((hidden @ weights[f"{name}_proj.weight"].T).unflatten(-1, (HEADS, WIDTH)) for name in "qkv")
        output = torch.empty_like(v)
        for t in range(len(hidden)):
            state["recurrent"] = self.decay * state["recurrent"] + k[t, :, :, None] * v[t, :, None, :]
            output[t] = (state["recurrent"] * q[t, :, :, None]).sum(1)
        return output.flatten(1) @ weights["o_proj.weight"].T
