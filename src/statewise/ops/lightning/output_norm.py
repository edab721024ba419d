"""The output of a layer from the heads' read-outs: RMSNorm in groups of columns, times sigmoid(gate) (numba).

A group may be wider or narrower than a head, and the read-outs of a row may lie apart: head h begins `head_step`
elements behind head h - 1. Runs of columns that share a head and a group make both ordinary.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from statewise.ops.arrays import memory
from statewise.ops.batch import CHUNK
from statewise.ops.lightning.rows import FAST
from statewise.ops.vector import load, sigmoid, store


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def square_sums(o: Any, at: int, head_step: int, sizes: Any, totals: Any) -> None:
    """totals [groups] = sums of squares of one row of read-outs, whose first head begins at o[at]."""
    heads, _, width, _, group, run = sizes
    totals[:] = 0.0
    for column in range(0, heads * width, run):
        part = o[at + column // width * head_step + column % width :][:run]
        square = np.float32(0.0)
        for c in range(run):
            square += part[c] * part[c]
        totals[column // group] += square


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def norm_and_gate(
    o: Any, at: int, head_step: int, sizes: Any, totals: Any, norm: Any, eps: Any, gate: Any, target: Any
) -> None:
    """target [H V] = one row of read-outs, normed by the totals of its groups, times sigmoid(gate)."""
    heads, _, width, _, group, run = sizes
    for column in range(0, heads * width, run):
        factor = np.float32(1.0) / np.sqrt(totals[column // group] / np.float32(group) + eps)
        part = o[at + column // width * head_step + column % width :][:run]
        weight, opening, result = norm[column : column + run], gate[column:][:run], target[column:][:run]
        for c in range(run):
            store(result, c, part[c] * factor * weight[c] * sigmoid(load(opening[c])))


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def finish(
    like: Any,  # an array of the dtype of gate and output
    tables: Any,
    sizes: Any,
    numbers: Any,
    gates: tuple[int, int],  # address of the gate of row 0, elements between rows
    output: int,  # address of the output [T, H V]
    o: Any,  # read-outs [T, H V], flat
    totals: Any,  # [T, groups] sums of squares over all ranks, flat; or empty: they are calculated
    first: int,  # rows first .. last - 1
    last: int,
) -> None:
    columns = sizes[0] * sizes[2]
    groups = max(1, columns // sizes[4])
    own = np.empty(groups, np.float32)
    gate, target = memory(gates[0], like), memory(output, like)
    for t in range(first, last):
        if len(totals):
            own[:] = totals[t * groups : (t + 1) * groups]
        else:
            square_sums(o, t * columns, sizes[2], sizes, own)
        norm_and_gate(
            o, t * columns, sizes[2], sizes, own, tables[4], np.float32(numbers[2]), gate[t * gates[1] :],
            target[t * columns :],
        )  # fmt: skip


@numba.njit(nogil=True, cache=True, parallel=True)
def finish_parallel(
    like: Any, tables: Any, sizes: Any, numbers: Any, gates: Any, output: int, o: Any, totals: Any, rows: int,
    parts: int,
) -> None:  # fmt: skip
    for part in numba.prange(parts):
        first, last = part * rows // parts, (part + 1) * rows // parts
        finish(like, tables, sizes, numbers, gates, output, o, totals, first, last)


@numba.njit(nogil=True, cache=True, parallel=True)
def sums_parallel(sizes: Any, o: Any, totals: Any, parts: int) -> None:
    """totals [T, groups] of the read-outs o [T, H V]."""
    columns, rows = sizes[0] * sizes[2], totals.shape[0]
    for part in numba.prange(parts):
        for t in range(part * rows // parts, (part + 1) * rows // parts):
            square_sums(o, t * columns, sizes[2], sizes, totals[t])


@numba.njit(nogil=True, cache=True, parallel=True)
def finish_chunks(
    like: Any,
    tables: Any,
    sizes: Any,
    numbers: Any,
    gates: Any,
    output: int,
    o: Any,  # read-outs [chunks, H, CHUNK, V], flat
    rows: Any,  # [all chunks, CHUNK] as in `Chunks`
    chunks: Any,  # which chunks these are
    num_rows: int,
    parts: int,
) -> None:
    """`finish` for the rows of a few chunks, straight from the buffer of their products."""
    heads, width = sizes[0], sizes[2]
    columns, n = heads * width, len(chunks) * CHUNK
    for part in numba.prange(parts):
        own = np.empty(max(1, columns // sizes[4]), np.float32)
        gate, target = memory(gates[0], like), memory(output, like)
        for i in range(part * n // parts, (part + 1) * n // parts):
            place, r = i // CHUNK, i % CHUNK
            t = rows[chunks[place], r]
            if t < num_rows:
                at = (place * heads * CHUNK + r) * width
                square_sums(o, at, CHUNK * width, sizes, own)
                norm_and_gate(
                    o, at, CHUNK * width, sizes, own, tables[4], np.float32(numbers[2]), gate[t * gates[1] :],
                    target[t * columns :],
                )  # fmt: skip
