"""All of Kimi Delta Attention between its projections, over a mixed batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.kda.naive import naive_kda

__all__ = ["KdaWeights", "kda", "naive_kda"]


@dataclass(frozen=True)
class KdaWeights:
    """The parameters between the projections, and with them the sizes: H heads, keys of K, values of V, rank R.

    `conv` [H (2 K + V), taps] float32, channels q, k, v; `decay_up` [H K, R], `gate_up` [H V, R] and `norm` [V] in the
    dtype of the activations; `a_log` [H] and `dt_bias` [H K] float32.
    """

    conv: Tensor
    decay_up: Tensor
    a_log: Tensor
    dt_bias: Tensor
    gate_up: Tensor
    norm: Tensor
    eps: float
    scale: float
    _kernel: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """(H, K, V, R)"""
        heads = self.a_log.shape[0]
        return heads, self.dt_bias.shape[0] // heads, self.norm.shape[0], self.decay_up.shape[1]

    @cached_property
    def widths(self) -> tuple[int, int, int, int]:
        """Columns of a projected row: q|k|v, the bottleneck of the decay, that of the output gate, beta."""
        heads, _, _, rank = self.sizes
        return self.conv.shape[0], rank, rank, heads

    @cached_property
    def width(self) -> int:
        return sum(self.widths)

    def kernel_arguments(self, conv: Tensor, recurrent: Tensor) -> tuple[Any, ...]:
        """What the CPU kernel gets besides the rows, made once for the pool that a layer works on."""
        place = (conv.data_ptr(), conv.shape, conv.stride(), recurrent.data_ptr(), recurrent.shape, recurrent.stride())
        if self._kernel.get("place") != place:
            from statewise.ops.kda.cpu import kernel_arguments

            check_states(self, conv, recurrent)
            self._kernel.update(place=place, arguments=kernel_arguments(self, conv, recurrent))
        arguments: tuple[Any, ...] = self._kernel["arguments"]
        return arguments


def check_states(weights: KdaWeights, conv: Tensor, recurrent: Tensor) -> None:
    """Raise ValueError for states of a wrong shape or layout."""
    heads, keys, values, _ = weights.sizes
    if conv.dtype != weights.norm.dtype or recurrent.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"conv must be {weights.norm.dtype} and recurrent float32 or bfloat16, got {conv.dtype}, {recurrent.dtype}"
        )
    if recurrent.shape[1:] != (heads, keys, values) or recurrent.stride()[1:] != (keys * values, values, 1):
        raise ValueError(f"recurrent must be [blocks, {heads}, {keys}, {values}], contiguous within a block")
    if conv.shape[1] != weights.conv.shape[0] or conv.shape[2] < weights.conv.shape[1] - 1:
        raise ValueError(f"conv must be [blocks, {weights.conv.shape[0]}, {weights.conv.shape[1] - 1} or more]")


def kda(projected: Tensor, weights: KdaWeights, conv: Tensor, recurrent: Tensor, batch: Batch) -> Tensor:
    """Output rows [T, H V] in the dtype of `projected`; both states move on in place. Formula: `naive_kda`.

    projected [T, sum of weights.widths] float32 or bfloat16, contiguous: q | k | v before the convolution, the
    bottlenecks of decay and output gate, beta before its sigmoid. conv [blocks, channels, columns], recurrent
    [blocks, H, K, V]: block `batch.records[i]` belongs to sequence i and counts as zero where `batch.fresh[i]`; the
    states of `batch.freezes` are written, too.
    Raises ValueError for a wrong shape, dtype or layout.
    """
    if projected.shape != (batch.num_rows, weights.width) or not projected.is_contiguous():
        raise ValueError(f"projected must be contiguous [{batch.num_rows}, {weights.width}]")
    if projected.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"projected must be float32 or bfloat16, got {projected.dtype}")
    if projected.device.type == "cpu":
        from statewise.ops.kda.cpu import kda_cpu

        return kda_cpu(projected, weights, conv, recurrent, batch)
    raise NotImplementedError(f"kda has no kernel for device {projected.device.type!r}")
