"""One token of many sequences through lightning attention in numba: the decode step, in one launch."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from statewise.ops.arrays import memory
from statewise.ops.lightning.output_norm import finish
from statewise.ops.lightning.rows import FAST, head_row
from statewise.ops.vector import load, prefetch, store

BLOCK = 8  # rows of a state that one sweep reads; they stay in the first-level cache until they are written


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def dot(one: Any, other: Any) -> Any:
    result = np.float32(0.0)
    for c in range(len(one)):
        result += one[c] * other[c]
    return result


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def head_step(query: Any, key: Any, value: Any, loss: Any, matrix: Any, upcoming: Any, result: Any) -> None:
    """One head, one token: `matrix` [K, V] moves on in place, `result` [V] becomes S^T q of the new state.

    query (scaled) and key [K], value [V] float32. loss = 1 - e^(-s), and the state keeps S - loss S: e^(-s) itself
    rounds a slope of 1e-7 to whole units of the last place, which the tokens would add up. So the compiler must not
    factor S out. `upcoming` [K, V] is the matrix of the next call: memory fetches it while this one is calculated.
    """
    keys, width = matrix.shape
    product = dot(query, key)
    result[:] = 0.0
    for c in range(0, keys // BLOCK * BLOCK, BLOCK):
        q0, q1, q2, q3 = query[c], query[c + 1], query[c + 2], query[c + 3]
        q4, q5, q6, q7 = query[c + 4], query[c + 5], query[c + 6], query[c + 7]
        for x in range(width):
            result[x] += (
                (q0 * load(matrix[c, x]) + q1 * load(matrix[c + 1, x]))
                + (q2 * load(matrix[c + 2, x]) + q3 * load(matrix[c + 3, x]))
                + (q4 * load(matrix[c + 4, x]) + q5 * load(matrix[c + 5, x]))
                + (q6 * load(matrix[c + 6, x]) + q7 * load(matrix[c + 7, x]))
            )
        for r in range(c, c + BLOCK):
            for x in range(0, width, 64 // upcoming.itemsize):
                prefetch(upcoming, r * width + x)
            add = key[r]
            for x in range(width):
                before = load(matrix[r, x])
                store(matrix, (r, x), before + (add * value[x] - loss * before))
    for r in range(keys // BLOCK * BLOCK, keys):
        add, take = key[r], query[r]
        for x in range(width):
            before = load(matrix[r, x])
            result[x] += take * before
            store(matrix, (r, x), before + (add * value[x] - loss * before))
    # The output follows without the new state: S^T q = e^(-s) S^T q of the old one + (k . q) v.
    for x in range(width):
        result[x] += product * value[x] - loss * result[x]


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def step(
    like: Any,
    like_state: Any,  # an array of the dtype of the states
    tables: Any,
    sizes: Any,
    silu: bool,
    numbers: Any,
    place: tuple[int, int],  # address of the states, elements between blocks
    sources: Any,
    steps: Any,
    records: Any,
    fresh: Any,
    output: Any,  # read-outs [T, H V], flat, float32 or bfloat16
    first: int,  # tasks first .. last - 1; task = sequence * heads + head, the order in which the states lie
    last: int,
) -> None:
    heads, keys, width = sizes[:3]
    query, key = np.empty(keys, np.float32), np.empty(keys, np.float32)
    value, result = np.empty(width, np.float32), np.empty(width, np.float32)
    states = memory(place[0], like_state)
    for task in range(first, last):
        i, h = task // heads, task % heads
        head_row(like, tables, sizes, silu, numbers, sources, steps, i, h, query, key, value)
        matrix = states[records[i] * place[1] + h * keys * width :][: keys * width].reshape(keys, width)
        if fresh[i]:
            matrix[:] = 0
        following = min(task + 1, last - 1)
        begin = records[following // heads] * place[1] + following % heads * keys * width
        upcoming = states[begin:][: keys * width].reshape(keys, width)
        head_step(query, key, value, tables[1][h], matrix, upcoming, result)
        target = output[task * width : (task + 1) * width]
        for x in range(width):
            store(target, x, result[x])


@numba.njit(nogil=True, cache=True, parallel=True)
def step_parallel(
    like: Any, like_state: Any, tables: Any, sizes: Any, silu: bool, numbers: Any, place: Any, sources: Any, steps: Any,
    records: Any, fresh: Any, output: Any, tasks: int, parts: int,
) -> None:  # fmt: skip
    for part in numba.prange(parts):
        begin, end = np.int64(part * tasks // parts), np.int64((part + 1) * tasks // parts)
        step(like, like_state, tables, sizes, silu, numbers, place, sources, steps, records, fresh, output, begin, end)


@numba.njit(nogil=True, cache=True)
def decode(
    like: Any, like_state: Any, tables: Any, sizes: Any, silu: bool, numbers: Any, place: Any, sources: Any, steps: Any,
    gates: tuple[int, int], output: int, records: Any, fresh: Any, rows: int,
) -> None:  # fmt: skip
    """All of a layer between its projections for `rows` decode rows, on this thread."""
    tasks = rows * sizes[0]
    o = np.empty(tasks * sizes[2], np.float32)
    start = np.int64(0)  # a literal would have `step` and `finish` compiled a second time
    step(like, like_state, tables, sizes, silu, numbers, place, sources, steps, records, fresh, o, start, tasks)
    finish(like, tables, sizes, numbers, gates, output, o, o[:0], start, rows)


@numba.njit(nogil=True, cache=True, parallel=True)
def decode_parallel(
    like: Any, like_state: Any, tables: Any, sizes: Any, silu: bool, numbers: Any, place: Any, sources: Any, steps: Any,
    gates: tuple[int, int], output: int, records: Any, fresh: Any, rows: int, parts: int,
) -> None:  # fmt: skip
    """`decode` on several threads: heads of sequences first, then whole rows, since a norm group may span heads."""
    tasks = rows * sizes[0]
    o = np.empty(tasks * sizes[2], np.float32)
    for part in numba.prange(parts):
        begin, end = np.int64(part * tasks // parts), np.int64((part + 1) * tasks // parts)
        step(like, like_state, tables, sizes, silu, numbers, place, sources, steps, records, fresh, o, begin, end)
    shares = min(rows, parts)
    for part in numba.prange(shares):
        begin, end = np.int64(part * rows // shares), np.int64((part + 1) * rows // shares)
        finish(like, tables, sizes, numbers, gates, output, o, o[:0], begin, end)
