"""The root-mean-square norm with a weight."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor

from statewise.layers.parameters import Component, Slot
from statewise.ops.norm import add_rms_norm, rms_norm


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

    def add(self, x: Tensor, delta: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
        """x <- alpha x + beta delta in place; returns the norm of the new x. The memory of `delta` is used up."""
        if not delta.is_contiguous() or delta.data_ptr() == x.data_ptr():  # a plug-in may return what it likes
            delta = delta.clone(memory_format=torch.contiguous_format)
        return add_rms_norm(x, delta, self.weight, self.eps, alpha, beta)
