"""Norm and rotation in numba: one pass per head, by one kernel for any number of rows."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from statewise.ops.arrays import LIKE, memory
from statewise.ops.vector import load, store

PARALLEL_FROM = 32_768  # elements; below, starting the second core costs more than it saves


def rotary(
    x: Tensor, tables: tuple[Tensor, Tensor] | None, interleaved: bool, weight: Tensor | None, eps: float
) -> Tensor:
    """See `statewise.ops.rope.rotary`; tables (cos, sin) [T, R/2] float32, contiguous."""
    shape = x.shape
    output = torch.empty(shape, dtype=x.dtype)
    steps = x.stride()
    if len(shape) == 3:
        tokens, heads, width = shape
        row_step, head_step, _ = steps
    else:
        tokens, heads, width = shape[0], 1, shape[1]
        row_step, head_step = steps[0], 0
    half, cos, sin = 0, 0, 0
    if tables is not None:
        half, cos, sin = tables[0].shape[1], tables[0].data_ptr(), tables[1].data_ptr()
    like_weight, weight_address = LIKE[torch.float32], 0
    if weight is not None:
        like_weight, weight_address = LIKE[weight.dtype], weight.data_ptr()
    addresses = (x.data_ptr(), cos, sin, weight_address, output.data_ptr())
    sizes = (tokens, heads, width, half, row_step, head_step)
    kinds = (interleaved, weight is not None)
    if tokens * heads * width < PARALLEL_FROM:
        rotate(LIKE[x.dtype], like_weight, addresses, sizes, kinds, eps, 0, tokens)
    else:
        rotate_parallel(LIKE[x.dtype], like_weight, addresses, sizes, kinds, eps, torch.get_num_threads())
    return output


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def rotate(
    like: Any,  # an array of the dtype of x and the output ...
    like_weight: Any,  # ... and one of the weight's
    addresses: tuple[int, int, int, int, int],  # of x, cos, sin, weight, output; unused ones are 0
    sizes: tuple[int, int, int, int, int, int],  # tokens, heads, D, R/2, elements between tokens, between heads of x
    kinds: tuple[bool, bool],  # whether the pairs are interleaved, whether there is a norm
    eps: float,
    first: int,  # tokens first .. last - 1 are calculated
    last: int,
) -> None:
    x, output = memory(addresses[0], like), memory(addresses[4], like)
    cosines = memory(addresses[1], np.empty(0, np.float32))
    sines = memory(addresses[2], np.empty(0, np.float32))
    _tokens, heads, width, half, row_step, head_step = sizes
    interleaved, normed = kinds
    weight = memory(addresses[3], like_weight)[:width]
    values = np.empty(width, np.float32)
    for t in range(first, last):
        cos, sin = cosines[t * half : (t + 1) * half], sines[t * half : (t + 1) * half]
        for h in range(heads):
            start = t * row_step + h * head_step
            source = x[start : start + width]
            target = output[(t * heads + h) * width : (t * heads + h + 1) * width]
            square = np.float32(0.0)
            for c in range(width):
                values[c] = load(source[c])
                square += values[c] * values[c]
            if normed:
                factor = np.float32(1.0) / np.sqrt(square / np.float32(width) + np.float32(eps))
                for c in range(width):
                    values[c] = values[c] * factor * load(weight[c])
            if interleaved:
                for j in range(half):
                    a, b = values[2 * j], values[2 * j + 1]
                    store(target, 2 * j, a * cos[j] - b * sin[j])
                    store(target, 2 * j + 1, b * cos[j] + a * sin[j])
            else:
                low, high = target[:half], target[half:]
                for j in range(half):
                    a, b = values[j], values[half + j]
                    store(low, j, a * cos[j] - b * sin[j])
                    store(high, j, b * cos[j] + a * sin[j])
            for c in range(2 * half, width):
                store(target, c, values[c])


@numba.njit(nogil=True, cache=True, parallel=True)
def rotate_parallel(
    like: Any,
    like_weight: Any,
    addresses: tuple[int, int, int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    kinds: tuple[bool, bool],
    eps: float,
    parts: int,
) -> None:
    tokens = sizes[0]
    for part in numba.prange(parts):
        first, last = part * tokens // parts, (part + 1) * tokens // parts
        rotate(like, like_weight, addresses, sizes, kinds, eps, first, last)
