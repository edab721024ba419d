"""What lies between the projection and the recurrence, for one head of one token: SiLU, norm, rotation, scale (numba).

Decode and prefill both take their rows from here, so that a token is the same to either of them.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from statewise.ops.arrays import memory
from statewise.ops.batch import CHUNK
from statewise.ops.vector import load, prefetch, sigmoid

POWERS = CHUNK + 1  # entries of `powers` per head: entry i is e^(-s (CHUNK - i)), so that rising j means less decay
FAST = {"contract", "reassoc", "nsz"}


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def read(source: Any, silu: bool, target: Any) -> None:
    """target = source in float32, through SiLU if asked for."""
    if silu:
        for c in range(len(target)):
            value = load(source[c])
            target[c] = value * sigmoid(value)
    else:
        for c in range(len(target)):
            target[c] = load(source[c])


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def norm_and_rotate(target: Any, weight: Any, eps: Any, cos: Any, sin: Any, factor: Any) -> None:
    """In place: RMSNorm with `weight` (none if that is empty), rotation of the first 2 len(cos) dims, times factor."""
    width, half = len(target), len(cos)
    if len(weight):
        square = np.float32(0.0)
        for c in range(width):
            square += target[c] * target[c]
        factor = factor / np.sqrt(square / np.float32(width) + eps)
        for c in range(width):
            target[c] *= factor * weight[c]
    elif factor != np.float32(1.0):
        for c in range(width):
            target[c] *= factor
    if half:
        low, high = target[:half], target[half : 2 * half]
        for j in range(half):
            a, b = low[j], high[j]
            low[j] = a * cos[j] - b * sin[j]
            high[j] = b * cos[j] + a * sin[j]


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def head_row(
    like: Any,  # an array of the dtype of q, k, v
    tables: Any,  # powers [H POWERS], loss [H], query norm [K], key norm [K], output norm [H V], all float32
    sizes: tuple[int, int, int, int, int, int],  # H, K, V, R/2, columns of a norm group, of a run in one head and group
    silu: bool,
    numbers: tuple[float, float, float],  # scale of q, epsilon of the norms of q and k, of the output norm
    sources: tuple[int, int, int, int, int],  # addresses of q, k, v, cos, sin
    steps: tuple[int, int, int],  # elements between rows of q, k, v
    t: int,
    h: int,
    query: Any,
    key: Any,
    value: Any,
) -> None:
    """query [K] (scaled), key [K] and value [V] of head h in row t."""
    _heads, keys, values, half, _group, _run = sizes
    read(memory(sources[0], like)[t * steps[0] + h * keys :][:keys], silu, query)
    read(memory(sources[1], like)[t * steps[1] + h * keys :][:keys], silu, key)
    read(memory(sources[2], like)[t * steps[2] + h * values :][:values], silu, value)
    cos, sin = memory(sources[3], tables[0])[t * half :][:half], memory(sources[4], tables[0])[t * half :][:half]
    scale, qk_eps = np.float32(numbers[0]), np.float32(numbers[1])
    norm_and_rotate(query, tables[2], qk_eps, cos, sin, scale)
    norm_and_rotate(key, tables[3], qk_eps, cos, sin, np.float32(1.0))


@numba.njit(nogil=True, cache=True)
def fetch_row(like: Any, sizes: Any, sources: Any, steps: Any, t: int, h: int) -> None:
    """Ask memory for what `head_row` will read of q, k and v."""
    for i in range(3):
        width = sizes[2] if i == 2 else sizes[1]
        source, at = memory(sources[i], like), t * steps[i] + h * width
        for c in range(0, width, 64 // like.itemsize):
            prefetch(source, at + c)
