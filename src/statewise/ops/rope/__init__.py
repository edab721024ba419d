"""Rotary position embedding (RoFormer, arXiv 2104.09864), with the per-head norm that often comes before it."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.rope import cpu
from statewise.ops.rope.naive import naive_rotary
from statewise.ops.vector import DTYPES

__all__ = ["inverse_frequencies", "naive_rotary", "rotary", "rotary_tables"]


@cache
def inverse_frequencies(rotary_dim: int, theta: float) -> Tensor:
    """theta ** (-2j / R) for j = 0 .. R/2 - 1, in radians per token: [R/2] float32, calculated in float64.

    R = rotary_dim is the number of dims that are rotated, not the width of a head (RoFormer, §3.2.2). The same
    arguments give the same tensor, so that all layers share one pair of tables; it must not be altered.
    Raises ValueError if rotary_dim is not positive and even or theta not positive.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be positive and even, got {rotary_dim}")
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}")
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    return torch.from_numpy((float(theta) ** -exponents).astype(np.float32))


def rotary_tables(frequencies: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position * frequency for every row of the batch: two tensors [T, R/2] float32.

    The angle is rounded to float32 as in the published models. frequencies [R/2] float32, contiguous, in radians per
    token. Calculated once per batch and kept in `batch.shared` for the other layers.
    Raises ValueError for a wrong shape, dtype or layout.
    """
    if frequencies.dim() != 1 or frequencies.dtype is not torch.float32 or not frequencies.is_contiguous():
        raise ValueError(
            f"frequencies must be contiguous [R/2] float32, got {list(frequencies.shape)} {frequencies.dtype}"
        )
    # The entry holds `frequencies` itself: while it lives no other tensor can lie at the same address.
    key = ("rotary", frequencies.data_ptr(), frequencies.shape[0])
    entry = batch.shared.get(key)
    if entry is None:
        angles = torch.outer(batch.positions.to(torch.float32), frequencies)
        entry = batch.shared[key] = (angles.cos(), angles.sin(), frequencies)
    return entry[0], entry[1]


def rotary(
    x: Tensor,
    frequencies: Tensor | None,
    batch: Batch,
    *,
    interleaved: bool = False,
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate the first R dims of every head by position * frequency, after an optional norm. A new contiguous tensor.

    x [T, H, D] or [T, D] float32 or bfloat16, row t at `batch.positions[t]`; any strides but a contiguous last dim.
    frequencies [R/2] float32 with R <= D, or None to rotate nothing; dims from R on pass through. The pairs are
    (j, j + R/2), or (2j, 2j + 1) if `interleaved`:

        y_a = x_a cos - x_b sin,   y_b = x_b cos + x_a sin      for each pair (a, b)

    With weight [D] (contiguous, float32 or bfloat16) each head is first x / sqrt(mean(x^2) + eps) * weight. float32
    inside, one rounding at the end; a row's result does not depend on the others, to the bit.
    Raises ValueError for a wrong shape, dtype or layout.
    """
    shape = x.shape
    width = shape[-1]
    if len(shape) not in (2, 3) or x.dtype not in DTYPES:
        raise ValueError(f"x must be [T, D] or [T, H, D] float32 or bfloat16, got {list(shape)} {x.dtype}")
    if shape[0] != batch.num_rows:
        raise ValueError(f"x must have the {batch.num_rows} rows of the batch, got {shape[0]}")
    if x.stride(-1) != 1:
        raise ValueError("x must be contiguous in its last dim")
    if weight is not None and (weight.shape != shape[-1:] or weight.dtype not in DTYPES or not weight.is_contiguous()):
        raise ValueError(f"weight must be contiguous [{width}], got {list(weight.shape)} {weight.dtype}")
    if not x.is_cpu:
        raise NotImplementedError(f"rotary has no kernel for device {x.device.type!r}")
    if frequencies is None:
        return cpu.rotary(x, None, interleaved, weight, eps)
    tables = rotary_tables(frequencies, batch)
    if 2 * tables[0].shape[1] > width:
        raise ValueError(f"frequencies must be at most {width // 2} for heads of {width}, got {len(frequencies)}")
    return cpu.rotary(x, tables, interleaved, weight, eps)
