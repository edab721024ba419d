"""Causal depthwise short convolution with SiLU over a mixed batch, its window kept per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.short_convolution.naive import naive_short_convolution

__all__ = ["naive_short_convolution", "shift_window", "short_convolution"]


def short_convolution(x: Tensor, weight: Tensor, state: Tensor, batch: Batch) -> Tensor:
    """silu(conv(x)) of every row of the batch, [T, C] in x.dtype; the windows move on in place.

    x [T, C] float32 or bfloat16, rows may be slices of wider rows. weight [C, W] float32; tap W - 1 belongs to the
    current token. state [blocks, C, columns] in x.dtype or float32, any strides, columns >= W - 1: block
    `batch.records[i]` holds the last raw inputs of sequence i, oldest first; only the last W - 1 are read, the
    earlier ones let `shift_window` take tokens back. The window of a fresh sequence counts as zero. The windows of
    `batch.freezes` are written, too.
    Formula: `naive_short_convolution`. Raises ValueError for a wrong shape or dtype.
    """
    if x.ndim != 2 or x.shape[0] != batch.num_rows or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x must be [{batch.num_rows}, C] float32 or bfloat16, got {list(x.shape)} {x.dtype}")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 1 or weight.dtype != torch.float32:
        raise ValueError(f"weight must be [{x.shape[1]}, W] float32, got {list(weight.shape)} {weight.dtype}")
    if state.ndim != 3 or state.shape[1] != x.shape[1] or state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"state must be [blocks, {x.shape[1]}, {weight.shape[1] - 1} or more], got {list(state.shape)}"
        )
    if state.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"state must be {x.dtype} or float32, got {state.dtype}")
    if x.device.type == "cpu":
        from statewise.ops.short_convolution.cpu import short_convolution_cpu

        return short_convolution_cpu(x, weight, state, batch)
    raise NotImplementedError(f"short_convolution has no kernel for device {x.device.type!r}")


def shift_window(state: Tensor, records: Tensor, back: Tensor) -> None:
    """Take the last `back[i]` inputs out of the window in block `records[i]`, in place.

    state [blocks, C, columns]; records and back [N] int64. Older inputs move right, zeros enter on the left. The
    window stays exact as long as `back[i]` is at most columns - (W - 1).
    """
    columns = state.shape[2]
    if records.shape != back.shape or records.ndim != 1:
        raise ValueError(f"records and back must be [N], got {list(records.shape)} and {list(back.shape)}")
    source = torch.arange(columns, device=state.device) - back[:, None]  # [N, columns]
    window = state[records]
    moved = window.gather(2, source.clamp(min=0)[:, None, :].expand_as(window))
    state[records] = moved.masked_fill((source < 0)[:, None, :], 0)
