"""The norms in numba: one pass per row, by one kernel for any number of rows."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from statewise.ops.arrays import LIKE, memory
from statewise.ops.vector import load, sigmoid, store

PARALLEL_FROM = 32_768  # elements; below, starting the second core costs more than it saves
PLAIN, ADD, SIGMOID, SILU = 0, 1, 2, 3


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `statewise.ops.norm.rms_norm`."""
    x = _rows(x)
    output = torch.empty_like(x)
    address = x.data_ptr()
    _launch(x, (address, address, weight.data_ptr(), output.data_ptr()), 0, weight, (eps, 1.0, 1.0), PLAIN)
    return output


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, alpha: float, beta: float) -> None:
    """See `statewise.ops.norm.add_rms_norm`."""
    address = delta.data_ptr()
    _launch(x, (x.data_ptr(), address, weight.data_ptr(), address), delta.stride(0), weight, (eps, alpha, beta), ADD)


def gated_rms_norm(o: Tensor, weight: Tensor, gate: Tensor, eps: float, activation: str) -> Tensor:
    """See `statewise.ops.norm.gated_rms_norm`."""
    o, gate = _rows(o), _rows(gate)
    output = torch.empty_like(o)
    addresses = (o.data_ptr(), gate.data_ptr(), weight.data_ptr(), output.data_ptr())
    kind = SIGMOID if activation == "sigmoid" else SILU
    _launch(o, addresses, gate.stride(0), weight, (eps, 1.0, 1.0), kind)
    return output


def _launch(
    x: Tensor,
    addresses: tuple[int, int, int, int],
    beside_step: int,
    weight: Tensor,
    numbers: tuple[float, float, float],
    kind: int,
) -> None:
    shape = x.shape
    tokens, heads, width = shape if len(shape) == 3 else (shape[0], 1, shape[1])
    sizes = (tokens, heads, width, x.stride(0), beside_step)
    if tokens * heads * width < PARALLEL_FROM:
        norm(LIKE[x.dtype], LIKE[weight.dtype], addresses, sizes, numbers, kind, 0, tokens)
    else:
        norm_parallel(LIKE[x.dtype], LIKE[weight.dtype], addresses, sizes, numbers, kind, torch.get_num_threads())


def _rows(x: Tensor) -> Tensor:
    """x if everything behind dim 0 is contiguous, else a copy of it."""
    return x if x.is_contiguous() or x[:1].is_contiguous() else x.contiguous()


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def norm(
    like: Any,  # an array of the dtype of all tensors but the weight ...
    like_weight: Any,  # ... and one of the weight's
    addresses: tuple[int, int, int, int],  # of x, gate or delta, weight, output
    sizes: tuple[int, int, int, int, int],  # tokens, heads, D, elements between tokens of x and of gate or delta
    numbers: tuple[float, float, float],  # epsilon, and the factors of x and delta
    kind: int,  # PLAIN does not read the gate; ADD writes the sum of x and delta over x
    first: int,  # tokens first .. last - 1 are calculated
    last: int,
) -> None:
    x, other = memory(addresses[0], like), memory(addresses[1], like)
    output = memory(addresses[3], like)
    _tokens, heads, width, x_step, other_step = sizes
    weight = memory(addresses[2], like_weight)[:width]
    values = np.empty(width, np.float32)
    eps, alpha, beta = np.float32(numbers[0]), np.float32(numbers[1]), np.float32(numbers[2])
    for t in range(first, last):
        for h in range(heads):
            source = x[t * x_step + h * width : t * x_step + (h + 1) * width]
            beside = other[t * other_step + h * width : t * other_step + (h + 1) * width]
            target = output[(t * heads + h) * width : (t * heads + h + 1) * width]
            if kind == ADD:
                for c in range(width):
                    store(source, c, alpha * load(source[c]) + beta * load(beside[c]))
            square = np.float32(0.0)
            for c in range(width):
                values[c] = load(source[c])
                square += values[c] * values[c]
            factor = np.float32(1.0) / np.sqrt(square / np.float32(width) + eps)
            if kind == SIGMOID:
                for c in range(width):
                    store(target, c, values[c] * factor * load(weight[c]) * sigmoid(load(beside[c])))
            elif kind == SILU:
                for c in range(width):
                    opening = load(beside[c])
                    store(target, c, values[c] * factor * load(weight[c]) * opening * sigmoid(opening))
            else:
                for c in range(width):
                    store(target, c, values[c] * factor * load(weight[c]))


@numba.njit(nogil=True, cache=True, parallel=True)
def norm_parallel(
    like: Any,
    like_weight: Any,
    addresses: tuple[int, int, int, int],
    sizes: tuple[int, int, int, int, int],
    numbers: tuple[float, float, float],
    kind: int,
    parts: int,
) -> None:
    tokens = sizes[0]
    for part in numba.prange(parts):
        first, last = part * tokens // parts, (part + 1) * tokens // parts
        norm(like, like_weight, addresses, sizes, numbers, kind, first, last)
