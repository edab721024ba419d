"""The short convolution in numba: convolution, SiLU and the new window in one pass over the input."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.vector import flat, flat_rows, load, sigmoid, store

TILE = 512  # channels that one pass handles: the rows it looks back at stay in the first-level cache
PARALLEL_FROM = 8_192  # inputs; below, starting the second core costs more than it saves
NONE = np.empty(0, np.int64)


def short_convolution_cpu(x: Tensor, weight: Tensor, state: Tensor, batch: Batch) -> Tensor:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, row_step = flat_rows(x)
    freezes: tuple[np.ndarray, ...] = (NONE, NONE, NONE)
    if batch.freezes is not None:
        freezes = tuple(part.numpy() for part in (batch.freezes.sequences, batch.freezes.ends, batch.freezes.records))
    arguments = (
        rows,
        row_step,
        flat(weight),
        weight.stride(),
        (*weight.shape, state.shape[2]),
        flat(state),
        state.stride(),
        flat(output),
        batch.query_start.numpy(),
        batch.records.numpy(),
        batch.fresh.numpy(),
        freezes,
    )
    if x.numel() < PARALLEL_FROM:
        convolve(*arguments, 0, x.shape[1])
    else:
        convolve_parallel(*arguments)
    return output


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def gather(memory: Any, step: int, values: Any, width: int) -> None:
    """values[c] = memory[c * step]; contiguous memory is worth its own loop."""
    if step == 1:
        for c in range(width):
            values[c] = load(memory[c])
    else:
        for c in range(width):
            values[c] = load(memory[c * step])


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def scatter(values: Any, memory: Any, step: int, width: int) -> None:
    """memory[c * step] = values[c]"""
    if step == 1:
        for c in range(width):
            store(memory, c, values[c])
    else:
        for c in range(width):
            store(memory, c * step, values[c])


@numba.njit(nogil=True, cache=True)
def keep(
    x: Any, row_step: int, begin: int, end: int, low: int, width: int, window: Any, block: Any,
    steps: tuple[int, int, int], values: Any,
) -> None:  # fmt: skip
    """Write the window behind row end - 1 to `block`; `window` is the one before row `begin`, `values` is scratch."""
    columns = window.shape[0]
    for j in range(columns):
        source = end - columns + j
        if source < begin:
            scatter(window[source - begin + columns], block[j * steps[2] :], steps[1], width)
        else:
            gather(x[source * row_step + low :], 1, values, width)
            scatter(values, block[j * steps[2] :], steps[1], width)


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def convolve(
    x: Any,
    row_step: int,
    weight: Any,
    weight_steps: tuple[int, int],  # elements between channels and taps
    shape: tuple[int, int, int],  # channels, taps, columns of the window
    state: Any,
    steps: tuple[int, int, int],  # elements between blocks, channels and columns
    output: Any,
    query_start: Any,
    records: Any,
    fresh: Any,
    freezes: tuple[Any, Any, Any],  # sequences, ends and records
    first: int,  # channels first .. last - 1 are calculated
    last: int,
) -> None:
    channels, taps, columns = shape
    past = taps - 1
    tap = np.empty((taps, TILE), np.float32)
    window = np.empty((columns, TILE), np.float32)
    total = np.empty(TILE, np.float32)
    for low in range(first, last, TILE):
        width = min(TILE, last - low)
        for j in range(taps):
            gather(weight[low * weight_steps[0] + j * weight_steps[1] :], weight_steps[0], tap[j], width)
        for i in range(records.shape[0]):
            begin, end = query_start[i], query_start[i + 1]
            block = state[records[i] * steps[0] + low * steps[1] :]
            for j in range(columns):
                if fresh[i]:
                    window[j] = 0.0
                else:
                    gather(block[j * steps[2] :], steps[1], window[j], width)
            for row in range(begin, end):
                total[:] = 0.0
                for j in range(taps):
                    weights = tap[j]
                    source = row - past + j
                    if source < begin:
                        earlier = window[source - begin + columns]
                        for c in range(width):
                            total[c] += weights[c] * earlier[c]
                    else:
                        inputs = x[source * row_step + low : source * row_step + low + width]
                        for c in range(width):
                            total[c] += weights[c] * load(inputs[c])
                results = output[row * channels + low : row * channels + low + width]
                for c in range(width):
                    store(results, c, total[c] * sigmoid(total[c]))
            for freeze in range(len(freezes[0])):
                if freezes[0][freeze] == i:
                    place = state[freezes[2][freeze] * steps[0] + low * steps[1] :]
                    keep(x, row_step, begin, freezes[1][freeze], low, width, window, place, steps, total)
            keep(x, row_step, begin, end, low, width, window, block, steps, total)


@numba.njit(nogil=True, cache=True, parallel=True)
def convolve_parallel(
    x: Any,
    row_step: int,
    weight: Any,
    weight_steps: tuple[int, int],
    shape: tuple[int, int, int],
    state: Any,
    steps: tuple[int, int, int],
    output: Any,
    query_start: Any,
    records: Any,
    fresh: Any,
    freezes: tuple[Any, Any, Any],
) -> None:
    channels = shape[0]
    for tile in numba.prange((channels + TILE - 1) // TILE):
        low = tile * TILE
        high = min(channels, low + TILE)
        convolve(
            x, row_step, weight, weight_steps, shape, state, steps, output, query_start, records, fresh, freezes, low,
            high,
        )  # fmt: skip
