"""The norms in numba: one pass per row, by one kernel for any number of rows."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from statewise.ops.vector import flat, flat_rows, load, sigmoid, store

PARALLEL_FROM = 32_768  # elements; below, starting the second core costs more than it saves
PLAIN, SIGMOID, SILU = 0, 1, 2


def norm_cpu(x: Tensor, weight: Tensor, eps: float, kind: int, gate: Tensor) -> Tensor:
    """x and gate [T, D] or [T, H, D]; a PLAIN norm does not read the gate."""
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    source, step = flat_rows(x)
    beside, beside_step = (source, step) if gate is x else flat_rows(gate)
    shape = (x.shape[0], x.shape[1] if x.ndim == 3 else 1, x.shape[-1])
    arguments = (source, step, beside, beside_step, weight.numpy(), np.float32(eps), flat(output), shape, kind)
    if x.numel() < PARALLEL_FROM:
        norm(*arguments, 0, shape[0])
    else:
        norm_parallel(*arguments, numba.get_num_threads())
    return output


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def norm(
    x: Any,
    x_step: int,
    gate: Any,
    gate_step: int,
    weight: Any,
    eps: Any,
    output: Any,
    shape: tuple[int, int, int],  # tokens, heads, D
    kind: int,
    first: int,  # tokens first .. last - 1 are calculated
    last: int,
) -> None:
    _tokens, heads, width = shape
    values = np.empty(width, np.float32)
    for t in range(first, last):
        for h in range(heads):
            source = x[t * x_step + h * width :]
            beside = gate[t * gate_step + h * width :]
            target = output[(t * heads + h) * width :]
            square = np.float32(0.0)
            for c in range(width):
                values[c] = load(source[c])
                square += values[c] * values[c]
            factor = np.float32(1.0) / np.sqrt(square / np.float32(width) + eps)
            if kind == SIGMOID:
                for c in range(width):
                    store(target, c, values[c] * factor * weight[c] * sigmoid(load(beside[c])))
            elif kind == SILU:
                for c in range(width):
                    opening = load(beside[c])
                    store(target, c, values[c] * factor * weight[c] * opening * sigmoid(opening))
            else:
                for c in range(width):
                    store(target, c, values[c] * factor * weight[c])


@numba.njit(nogil=True, cache=True, parallel=True)
def norm_parallel(
    x: Any,
    x_step: int,
    gate: Any,
    gate_step: int,
    weight: Any,
    eps: Any,
    output: Any,
    shape: tuple[int, int, int],
    kind: int,
    parts: int,
) -> None:
    tokens = shape[0]
    for part in numba.prange(parts):
        norm(
            x, x_step, gate, gate_step, weight, eps, output, shape, kind,
            part * tokens // parts, (part + 1) * tokens // parts,
        )  # fmt: skip
