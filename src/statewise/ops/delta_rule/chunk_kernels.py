"""The numba kernels of the chunked gated delta rule: everything but the matrix products (see `chunked_cpu`)."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from statewise.ops.batch import CHUNK
from statewise.ops.vector import exponential, load, store

HALF = CHUNK // 2
QUARTER = CHUNK // 4
FAST = {"contract", "reassoc", "nsz"}


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def decay_forward(
    one: Any, two: Any, decay: Any, start: int, running: Any, to_one: Any, at_one: int, to_two: Any, at_two: int
) -> None:
    """QUARTER rows of `one` and `two`, each times `running` and all decays from `start` up to and with its own."""
    for r in range(QUARTER):
        for c in range(running.shape[0]):
            running[c] *= decay[start + r, c]
            to_one[at_one + r, c] = one[r, c] * running[c]
            to_two[at_two + r, c] = two[r, c] * running[c]


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def decay_backward(key: Any, decay: Any, start: int, running: Any, target: Any, at: int) -> None:
    """QUARTER rows of `key` from `start`, the last one first, each times all later decays and `running`."""
    for back in range(QUARTER):
        r = QUARTER - 1 - back
        for c in range(running.shape[0]):
            target[at + r, c] = key[start + r, c] * running[c]
            running[c] *= decay[start + r, c]


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def pairs(query: Any, key: Any, scaled: Any, decay: Any, start: int, lower: Any, attention: Any, row: int) -> None:
    """A and P among the QUARTER rows from `start`: the decay between two rows grows one factor at a time."""
    channels = key.shape[1]
    one, two = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for j in range(0, QUARTER, 2):  # two columns at once, so that every other row is loaded half as often
        a, b, c, d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for x in range(channels):
            one[x] = key[start + j, x] * decay[start + j + 1, x]
            two[x] = key[start + j + 1, x]
            a += query[j, x] * key[start + j, x]
            b += scaled[j + 1, x] * one[x]
            c += query[j + 1, x] * one[x]
            d += query[j + 1, x] * two[x]
        attention[row + j, start + j], lower[row + j + 1, start + j] = a, b
        attention[row + j + 1, start + j], attention[row + j + 1, start + j + 1] = c, d
        for t in range(j + 2, QUARTER):
            a, b, c, d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for x in range(channels):
                one[x] *= decay[start + t, x]
                two[x] *= decay[start + t, x]
                a += scaled[t, x] * one[x]
                b += query[t, x] * one[x]
                c += scaled[t, x] * two[x]
                d += query[t, x] * two[x]
            lower[row + t, start + j], attention[row + t, start + j] = a, b
            lower[row + t, start + j + 1], attention[row + t, start + j + 1] = c, d


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def prepare(
    q: Any, q_step: int, k: Any, k_step: int, v: Any, v_step: int, g: Any, g_step: int, per_channel: bool,
    beta: Any, beta_step: int, shape: tuple[int, int, int, int], scale: Any, normalize: bool, num_rows: int,
    rows: Any, keys: Any, queries: Any, ends: Any, total: Any, values: Any, half_left: Any, half_right: Any,
    quarter_left: Any, quarter_right: Any, lower: Any, attention: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Fill the buffers of `Work` for the pairs first .. last - 1; pair = chunk * heads + head.

    Forward in steps of QUARTER rows, which stay in the first-level cache while all that needs them is made.
    """
    heads, key_heads, channels, width = shape
    query, scaled = np.empty((QUARTER, channels), np.float32), np.empty((QUARTER, channels), np.float32)
    key, decay = np.empty((CHUNK, channels), np.float32), np.empty((CHUNK, channels), np.float32)
    of_chunk, of_half = np.empty(channels, np.float32), np.empty(channels, np.float32)
    of_quarter = np.empty(channels, np.float32)
    for pair in range(first, last):
        chunk, h = pair // heads, pair % heads
        row = pair * CHUNK
        key_head = h // (heads // key_heads) * channels
        for start in range(0, CHUNK, QUARTER):
            for r in range(QUARTER):
                t = rows[chunk, start + r]
                if t == num_rows:  # no such token: decay 1 and the rest zero leave the state as it is
                    query[r], scaled[r], key[start + r], decay[start + r] = 0.0, 0.0, 0.0, 1.0
                    values[row + start + r] = 0.0
                    continue
                q_row, k_row = q[t * q_step + key_head :], k[t * k_step + key_head :]
                query_square, key_square = np.float32(0.0), np.float32(0.0)
                for c in range(channels):
                    a, b = load(q_row[c]), load(k_row[c])
                    query_square += a * a
                    key_square += b * b
                query_factor, key_factor = scale, np.float32(1.0)
                if normalize:
                    query_factor = scale / np.sqrt(query_square + np.float32(1e-6))
                    key_factor = np.float32(1.0) / np.sqrt(key_square + np.float32(1e-6))
                rate = beta[t * beta_step + h]
                for c in range(channels):
                    query[r, c] = load(q_row[c]) * query_factor
                    key[start + r, c] = load(k_row[c]) * key_factor
                    scaled[r, c] = key[start + r, c] * rate
                if per_channel:
                    g_row = g[t * g_step + h * channels :]
                    for c in range(channels):
                        decay[start + r, c] = exponential(g_row[c])
                else:
                    decay[start + r] = exponential(g[t * g_step + h])
                v_row = v[t * v_step + h * width :]
                for x in range(width):
                    values[row + start + r, x] = load(v_row[x]) * rate
            pairs(query, key, scaled, decay, start, lower, attention, row + start)
            if start == 0:
                of_chunk[:] = 1.0
            decay_forward(scaled, query, decay, start, of_chunk, keys, row + start, queries, row + start)
            if start >= HALF:
                if start == HALF:
                    of_half[:] = 1.0
                at = row + start - HALF
                decay_forward(scaled, query, decay, start, of_half, half_left, at, half_left, at + HALF)
            if start % HALF == QUARTER:
                of_quarter[:] = 1.0
                at = row + start - QUARTER
                decay_forward(scaled, query, decay, start, of_quarter, quarter_left, at, quarter_left, at + QUARTER)
        total[pair] = of_chunk
        of_chunk[:] = 1.0
        of_half[:] = 1.0
        for start in range(CHUNK - QUARTER, -1, -QUARTER):
            decay_backward(key, decay, start, of_chunk, ends, row + start)
            if start < HALF:
                decay_backward(key, decay, start, of_half, half_right, pair * HALF + start)
            if start % HALF == 0:
                of_quarter[:] = 1.0
                decay_backward(key, decay, start, of_quarter, quarter_right, pair * HALF + start // 2)


@numba.njit(nogil=True, cache=True, parallel=True)
def prepare_parallel(
    q: Any, q_step: int, k: Any, k_step: int, v: Any, v_step: int, g: Any, g_step: int, per_channel: bool,
    beta: Any, beta_step: int, shape: tuple[int, int, int, int], scale: Any, normalize: bool, num_rows: int,
    rows: Any, keys: Any, queries: Any, ends: Any, total: Any, values: Any, half_left: Any, half_right: Any,
    quarter_left: Any, quarter_right: Any, lower: Any, attention: Any, parts: int,
) -> None:  # fmt: skip
    n = rows.shape[0] * shape[0]
    for part in numba.prange(parts):
        prepare(
            q, q_step, k, k_step, v, v_step, g, g_step, per_channel, beta, beta_step, shape, scale, normalize,
            num_rows, rows, keys, queries, ends, total, values, half_left, half_right, quarter_left, quarter_right,
            lower, attention, part * n // parts, (part + 1) * n // parts,
        )  # fmt: skip


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def solve(half: Any, quarter: Any, lower: Any, attention: Any, pair: int) -> None:
    """Put A and P of one pair together from their blocks, then replace A by (I + A)^-1."""
    row = pair * CHUNK
    for r in range(CHUNK):
        for c in range(r + 1, CHUNK):
            attention[row + r, c] = 0.0
            lower[row + r, c] = 0.0
        lower[row + r, r] = 0.0
    for r in range(HALF):
        for c in range(HALF):
            lower[row + HALF + r, c] = half[pair, r, c]
            attention[row + HALF + r, c] = half[pair, HALF + r, c]
    for part in range(2):
        low = part * HALF
        for r in range(QUARTER):
            for c in range(QUARTER):
                lower[row + low + QUARTER + r, low + c] = quarter[pair * 2 + part, r, c]
                attention[row + low + QUARTER + r, low + c] = quarter[pair * 2 + part, QUARTER + r, c]
    own = np.empty(CHUNK, np.float32)
    result = np.empty(CHUNK, np.float32)
    for r in range(CHUNK):
        # Row r of the inverse is e_r minus the rows above, each weighted by A_rj; they end at their diagonal.
        for c in range(CHUNK):
            own[c] = lower[row + r, c] if c < r else np.float32(0.0)
            result[c] = np.float32(1.0) if c == r else np.float32(0.0)
        for j in range(0, r, 4):  # own is zero from r on, and rows at or below r are finite: zero at the diagonal
            a0, a1, a2, a3 = own[j], own[j + 1], own[j + 2], own[j + 3]
            for c in range((r + 15) // 16 * 16):
                result[c] -= (
                    a0 * lower[row + j, c]
                    + a1 * lower[row + j + 1, c]
                    + a2 * lower[row + j + 2, c]
                    + a3 * lower[row + j + 3, c]
                )
        for c in range(CHUNK):
            lower[row + r, c] = result[c]


@numba.njit(nogil=True, cache=True, parallel=True)
def solve_parallel(half: Any, quarter: Any, lower: Any, attention: Any, parts: int) -> None:
    n = half.shape[0]
    for part in numba.prange(parts):
        for pair in range(part * n // parts, (part + 1) * n // parts):
            solve(half, quarter, lower, attention, pair)


@numba.njit(nogil=True, cache=True, parallel=True)
def write_parallel(results: Any, rows: Any, output: Any, shape: tuple[int, int, int], parts: int) -> None:
    """Move the results [pairs * CHUNK, V] of a group to their rows of the output [T, H, V]."""
    num_rows, heads, width = shape
    n = rows.shape[0] * heads
    for part in numba.prange(parts):
        for pair in range(part * n // parts, (part + 1) * n // parts):
            chunk, h = pair // heads, pair % heads
            for r in range(CHUNK):
                t = rows[chunk, r]
                if t < num_rows:
                    target = output[(t * heads + h) * width : (t * heads + h + 1) * width]
                    for x in range(width):
                        store(target, x, results[pair * CHUNK + r, x])
