"""Root-mean-square norms with a weight."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor

from statewise.layers.parameters import Component, Slot
from statewise.ops.norm import gated_rms_norm, rms_norm


class RMSNorm(Component):
    """x / sqrt(mean(x²) + eps) · w over the last axis, in fp32, cast back once."""

    weight: Tensor

    def __init__(self, width: int, name: str, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.declare("weight", (width,), dtype)

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        yield Slot((f"{self.name}.weight",), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(o) ⊙ σ(gate), per head: the norm comes before the gate."""

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]  # [T, H, D] each
        return gated_rms_norm(o, self.weight, gate, self.eps)
