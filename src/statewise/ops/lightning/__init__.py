"""Lightning attention (MiniMax-Text-01, Ring-linear) over a mixed batch: linear attention whose heads decay evenly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.lightning.naive import naive_lightning, naive_lightning_attention, recurrence
from statewise.ops.vector import DTYPES

__all__ = [
    "LightningWeights",
    "lightning",
    "lightning_attention",
    "naive_lightning",
    "naive_lightning_attention",
    "recurrence",
]


WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class LightningWeights:
    """The parameters between the projections, and with them the sizes: H heads of width D, R rotated dims per head.

    Raises ValueError for a wrong shape or dtype. The kernels keep copies: a tensor must not be altered afterwards. The
    specification takes float64 as well.
    """

    slopes: Tensor  # [H] float32, > 0: log decay per token, layer factor included
    norm: Tensor  # [H D] in the dtype of the activations: weight of the output norm
    group_width: int  # columns of one norm group, over all tensor-parallel ranks (MiniMax H D, Bailing a part of it)
    eps: float  # of the output norm
    scale: float  # on q (MiniMax 1, Bailing D ** -0.5)
    silu: bool  # SiLU on q, k and v before all else (MiniMax)
    query_norm: Tensor | None  # [D] weight of the norm of every query head before the rotation; None: no such norm
    key_norm: Tensor | None  # [D]
    qk_eps: float  # of the two norms
    frequencies: Tensor | None  # [R/2] float32, radians per token: dims j and j + R/2 turn together; None: none do
    _kernel: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.slopes.ndim != 1 or self.slopes.dtype not in WIDE or not bool((self.slopes > 0).all()):
            raise ValueError(
                f"slopes must be [H] float32 and positive, got {list(self.slopes.shape)} {self.slopes.dtype}"
            )
        if self.norm.ndim != 1 or self.norm.dtype not in (*DTYPES, *WIDE) or self.norm.shape[0] % self.slopes.shape[0]:
            raise ValueError(
                f"norm must be [multiple of {self.slopes.shape[0]}] float32 or bfloat16, "
                f"got {list(self.norm.shape)} {self.norm.dtype}"
            )
        width = self.sizes[1]
        for name, weight in (("query_norm", self.query_norm), ("key_norm", self.key_norm)):
            if weight is not None and (weight.shape != (width,) or weight.dtype not in (*DTYPES, *WIDE)):
                raise ValueError(f"{name} must be [{width}] float32 or bfloat16, got {list(weight.shape)}")
        turned = self.frequencies
        if turned is not None and (turned.ndim != 1 or 2 * len(turned) > width or turned.dtype != torch.float32):
            raise ValueError(f"frequencies must be at most [{width // 2}] float32, got {list(turned.shape)}")
        if self.group_width < 1:
            raise ValueError(f"group_width must be positive, got {self.group_width}")

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """(H, D)"""
        heads = self.slopes.shape[0]
        return heads, self.norm.shape[0] // heads

    def kernel_arguments(self, recurrent: Tensor) -> tuple[Any, ...]:
        """What the CPU kernels get besides the rows, made once for the pool that a layer works on."""
        place = (recurrent.data_ptr(), recurrent.dtype, recurrent.shape, recurrent.stride())
        if self._kernel.get("place") != place:
            from statewise.ops.lightning.cpu import layer_arguments

            heads, width = self.sizes
            _check_slopes(self.slopes, heads)
            _check_state(recurrent, heads, width, width)
            self._kernel.update(place=place, arguments=layer_arguments(self, recurrent))
        arguments: tuple[Any, ...] = self._kernel["arguments"]
        return arguments


def lightning(
    projected: Tensor,
    weights: LightningWeights,
    recurrent: Tensor,
    batch: Batch,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Output rows [T, H D] in the dtype of `projected`; the state moves on in place. Formula: `naive_lightning`.

    projected [T, 4 H D] float32 or bfloat16, contiguous: q | k | v | gate, each with its heads one after the other.
    recurrent [blocks, H, D, D] float32 or bfloat16, contiguous within a block: block `batch.records[i]` belongs to
    sequence i and counts as zero where `batch.fresh[i]`; the states of `batch.freezes` are written, too. All
    mathematics is float32, with one rounding at the end.

    reduce: needed where a norm group spans ranks, and not to be given where it does not. It gets the sums of squares
    [T, groups] float32 of the columns that are here and returns their sums over the ranks of the group.
    Raises ValueError for a wrong shape, dtype or layout, or if the groups do not divide the columns.
    """
    columns = weights.norm.shape[0]
    if projected.shape != (batch.num_rows, 4 * columns) or not projected.is_contiguous():
        raise ValueError(f"projected must be contiguous [{batch.num_rows}, {4 * columns}]")
    if projected.dtype is not weights.norm.dtype:
        raise ValueError(f"projected must be {weights.norm.dtype} like the norm, got {projected.dtype}")
    if columns % weights.group_width and (reduce is None or weights.group_width < columns):
        raise ValueError(
            f"group_width {weights.group_width} must divide the {columns} columns; a group that spans ranks needs "
            "`reduce`"
        )
    if projected.is_cpu:
        from statewise.ops.lightning.cpu import lightning_cpu

        return lightning_cpu(projected, weights, recurrent, batch, reduce)
    raise NotImplementedError(f"lightning has no kernel for device {projected.device.type!r}")


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor, batch: Batch, scale: float
) -> Tensor:
    """o [T, H, V] in v.dtype for every row of the batch; the states move on in place. Formula: `recurrence`.

    q, k [T, H, K] and v [T, H, V] float32 or bfloat16, all of one dtype; rows may be slices of wider rows. slopes [H]
    float32 > 0, log decay per token. state [blocks, H, K, V] float32 or bfloat16, contiguous within a block: block
    `batch.records[i]` belongs to sequence i and counts as zero where `batch.fresh[i]`; the states of `batch.freezes`
    are written, too. q is multiplied by `scale`. All mathematics is float32. Raises ValueError for a wrong shape, dtype
    or layout.
    """
    rows = batch.num_rows
    if q.ndim != 3 or q.shape[0] != rows or k.shape != q.shape:
        raise ValueError(f"q and k must be [{rows}, H, K], got {list(q.shape)} and {list(k.shape)}")
    heads, keys = q.shape[1:]
    if v.ndim != 3 or v.shape[:2] != (rows, heads):
        raise ValueError(f"v must be [{rows}, {heads}, V], got {list(v.shape)}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v must all be float32 or all bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}")
    _check_slopes(slopes, heads)
    _check_state(state, heads, keys, v.shape[2])
    if v.is_cpu:
        from statewise.ops.lightning.cpu import lightning_attention_cpu

        return lightning_attention_cpu(q, k, v, slopes, state, batch, scale)
    raise NotImplementedError(f"lightning_attention has no kernel for device {v.device.type!r}")


def _check_slopes(slopes: Tensor, heads: int) -> None:
    if slopes.shape != (heads,) or slopes.dtype != torch.float32 or not bool((slopes > 0).all()):
        raise ValueError(f"slopes must be [{heads}] float32 and positive, got {list(slopes.shape)} {slopes.dtype}")


def _check_state(state: Tensor, heads: int, keys: int, width: int) -> None:
    if state.ndim != 4 or state.shape[1:] != (heads, keys, width) or state.dtype not in DTYPES:
        raise ValueError(
            f"state must be [blocks, {heads}, {keys}, {width}] float32 or bfloat16, "
            f"got {list(state.shape)} {state.dtype}"
        )
    if state.stride()[1:] != (keys * width, width, 1) and not state[:1].is_contiguous():
        raise ValueError("state must be contiguous within a block")
