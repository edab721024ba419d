"""Feed-forward layers: the dense SwiGLU and the routed mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from statewise.config import EngineConfig
from statewise.layers.parameters import Component, Slot
from statewise.layers.projection import Linear, Rows
from statewise.ops.moe import Experts, Routing, sparse_moe


@dataclass(frozen=True)
class MoeConfig:
    """Sizes and rules of a routed layer."""

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int  # all shared experts together; 0: none
    renormalize: bool
    scale: float  # factor on the routed weights, not on the shared expert
    num_groups: int = 1
    top_groups: int = 1
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    selection_bias: bool = True  # the checkpoint has a bias that counts for the choice of experts only


class SwiGLU(Component):
    """down( silu(gate x) ⊙ (up x) )."""

    def __init__(self, hidden_size: int, width: int, prefixes: tuple[str, ...], engine_config: EngineConfig) -> None:
        super().__init__()
        self.gate_up = Linear(
            hidden_size,
            Rows(width, *(f"{prefix}.gate_proj" for prefix in prefixes)),
            Rows(width, *(f"{prefix}.up_proj" for prefix in prefixes)),
            dtype=engine_config.dtype,
        )
        self.down = Linear(
            width, Rows(hidden_size, *(f"{prefix}.down_proj" for prefix in prefixes)), dtype=engine_config.dtype
        )

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class SparseMoE(Component):
    """Each token goes to its `top_k` experts and to the shared one:

        s = σ(W x) in fp32;  experts = top_k(s + bias);  w = s / Σs · scale;  y = Σ w_e·expert_e(x) + shared(x)

    The bias only selects; the weights come from the unbiased scores (DeepSeek-V3, arXiv 2412.19437). A SwiGLU is a
    sum over its width, so the shared one is kept as experts of the routed ones' width that every token takes.
    """

    router: Tensor  # [experts, hidden]
    bias: Tensor  # [experts]
    gate_up: Tensor  # [experts + shared, 2 * width, hidden], the gate's rows first
    down: Tensor  # [experts + shared, hidden, width]

    def __init__(self, config: MoeConfig, hidden_size: int, prefixes: tuple[str, ...], engine: EngineConfig) -> None:
        super().__init__()
        if config.shared_width % config.expert_width:
            raise ValueError(f"shared_width must be a multiple of {config.expert_width}, not {config.shared_width}")
        self.config = config
        self.prefixes = prefixes
        experts = config.num_experts + config.shared_width // config.expert_width
        self.declare("router", (config.num_experts, hidden_size), torch.float32)
        self.declare("bias", (config.num_experts,), torch.float32, loaded=config.selection_bias)
        self.declare("gate_up", (experts, 2 * config.expert_width, hidden_size), engine.dtype)
        self.declare("down", (experts, hidden_size, config.expert_width), engine.dtype)

    def finalize(self) -> None:
        config = self.config
        if not config.selection_bias:
            self.bias.zero_()
        routing = Routing(
            config.top_k,
            scoring=config.scoring,
            renormalize=config.renormalize,
            scale=config.scale,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
        )
        self.experts = Experts(self.router, self.bias, self.gate_up, self.down, routing)

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        return sparse_moe(x, self.experts)

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        prefixes, width, count = self.prefixes, self.config.expert_width, self.config.num_experts
        yield Slot(tuple(f"{prefix}.gate.weight" for prefix in prefixes), self.router)
        if self.config.selection_bias:
            bias = ("gate.e_score_correction_bias", "gate.expert_bias", "e_score_correction_bias")
            yield Slot(tuple(f"{prefix}.{name}" for prefix in prefixes for name in bias), self.bias)
        if self.config.shared_width:
            hidden, shared = self.down.shape[1], self.config.shared_width
            for name, target, shape in (
                ("gate_proj", self.gate_up[count:, :width], (shared, hidden)),
                ("up_proj", self.gate_up[count:, width:], (shared, hidden)),
                ("down_proj", self.down[count:].transpose(0, 1), (hidden, shared)),
            ):
                spellings = tuple(f"{prefix}.shared_experts.{name}.weight" for prefix in prefixes)
                yield Slot(spellings, target, shape)
        if any(f"{prefix}.experts.gate_up_proj" in names for prefix in prefixes):
            yield Slot(tuple(f"{prefix}.experts.gate_up_proj" for prefix in prefixes), self.gate_up[:count])
            yield Slot(tuple(f"{prefix}.experts.down_proj" for prefix in prefixes), self.down[:count])
            return
        for expert in range(count):
            for spellings, target in (
                (("w1", "gate_proj"), self.gate_up[expert, :width]),
                (("w3", "up_proj"), self.gate_up[expert, width:]),
                (("w2", "down_proj"), self.down[expert]),
            ):
                stems = [f"{prefix}.experts.{expert}.{name}" for prefix in prefixes for name in spellings]
                yield Slot(tuple(f"{stem}.weight" for stem in stems), target)
