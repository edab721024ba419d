"""One token of many sequences through the gated delta rule in numba: the decode step."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.vector import exponential, flat, flat_rows, load, prefetch, store

SHARED_FROM = 4  # sequences times heads; below, starting the second core costs more than it saves


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: Batch,
    scale: float,
    normalize: bool,
    output: Tensor,
) -> None:
    """The decode rows of the batch: output [T, H, V] is written for them, their states move on in place."""
    heads, width = v.shape[1:]
    tasks = batch.num_decodes * heads
    parts = min(numba.get_num_threads(), tasks // SHARED_FROM)
    arguments = (
        *flat_rows(q),
        *flat_rows(k),
        *flat_rows(v),
        *flat_rows(g),
        g.ndim == 3,
        *flat_rows(beta),
        flat(state),
        state.stride(0),
        flat(output),
        (heads, q.shape[1], q.shape[2], width),
        batch.records.numpy(),
        batch.fresh.numpy(),
        np.float32(scale),
        normalize,
    )
    if parts > 1:
        step_parallel(*arguments, tasks, parts)
    else:
        step(*arguments, 0, tasks)


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def head_step(
    query: Any, key: Any, decay: Any, values: Any, rate: Any, matrix: Any, upcoming: Any, scratch: Any, read: Any
) -> None:
    """One head, one token: `matrix` [K, V] moves on in place, `read` [V] becomes S^T q of the new state.

    query (scaled), key and decay (e^g) [K], values [V] float32; rate is beta. scratch [2 K + V] float32 is overwritten.
    `upcoming` [K, V] is the matrix of the next call: memory fetches it while this one is calculated.
    """
    keys, width = matrix.shape
    key_read, query_read, update = scratch[:keys], scratch[keys : 2 * keys], scratch[2 * keys :]
    product = np.float32(0.0)
    for c in range(keys):
        product += query[c] * key[c]
        query_read[c] = query[c] * decay[c]
        key_read[c] = key[c] * decay[c]
    # First pass: k^T diag(decay) S and q^T diag(decay) S together, so that the state comes from memory once;
    # four rows at a time, or the two sums cost more loads and stores than the state itself.
    update[:] = 0.0
    read[:] = 0.0
    for c in range(0, keys // 4 * 4, 4):
        k0, k1, k2, k3 = key_read[c], key_read[c + 1], key_read[c + 2], key_read[c + 3]
        q0, q1, q2, q3 = query_read[c], query_read[c + 1], query_read[c + 2], query_read[c + 3]
        for x in range(width):
            s0, s1 = load(matrix[c, x]), load(matrix[c + 1, x])
            s2, s3 = load(matrix[c + 2, x]), load(matrix[c + 3, x])
            update[x] += k0 * s0 + k1 * s1 + k2 * s2 + k3 * s3
            read[x] += q0 * s0 + q1 * s1 + q2 * s2 + q3 * s3
    for c in range(keys // 4 * 4, keys):
        for x in range(width):
            update[x] += key_read[c] * load(matrix[c, x])
            read[x] += query_read[c] * load(matrix[c, x])
    # The output follows without the new state: S^T q = (diag(decay) S)^T q + (k . q) u.
    for x in range(width):
        update[x] = rate * (values[x] - update[x])
        read[x] += product * update[x]
    # Second pass, from the cache: S <- diag(decay) S + k u^T.
    for c in range(keys):
        for x in range(0, width, 64 // upcoming.itemsize):
            prefetch(upcoming, c * width + x)
        keep, add = decay[c], key[c]
        for x in range(width):
            store(matrix, (c, x), keep * load(matrix[c, x]) + add * update[x])


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def step(
    q: Any,
    q_step: int,
    k: Any,
    k_step: int,
    v: Any,
    v_step: int,
    g: Any,
    g_step: int,
    per_channel: bool,
    beta: Any,
    beta_step: int,
    state: Any,
    block_step: int,
    output: Any,
    shape: tuple[int, int, int, int],
    records: Any,
    fresh: Any,
    scale: Any,
    normalize: bool,
    first: int,  # tasks first .. last - 1; task = sequence * heads + head
    last: int,
) -> None:
    heads, key_heads, keys, width = shape
    key, query, decay = np.empty(keys, np.float32), np.empty(keys, np.float32), np.empty(keys, np.float32)
    scratch = np.empty(2 * keys + width, np.float32)
    values, read = np.empty(width, np.float32), np.empty(width, np.float32)
    for task in range(first, last):
        i, h = task // heads, task % heads
        key_head = h // (heads // key_heads) * keys
        q_row, k_row = q[i * q_step + key_head :], k[i * k_step + key_head :]
        query_square, key_square = np.float32(0.0), np.float32(0.0)
        for c in range(keys):
            query[c], key[c] = load(q_row[c]), load(k_row[c])
            query_square += query[c] * query[c]
            key_square += key[c] * key[c]
        query_factor, key_factor = scale, np.float32(1.0)
        if normalize:
            query_factor = scale / np.sqrt(query_square + np.float32(1e-6))
            key_factor = np.float32(1.0) / np.sqrt(key_square + np.float32(1e-6))
        if per_channel:
            g_row = g[i * g_step + h * keys :]
            for c in range(keys):
                decay[c] = exponential(g_row[c])
        else:
            decay[:] = exponential(g[i * g_step + h])
        for c in range(keys):
            query[c] *= query_factor
            key[c] *= key_factor
        begin = records[i] * block_step + h * keys * width
        matrix = state[begin : begin + keys * width].reshape(keys, width)
        if fresh[i]:
            matrix[:] = 0
        v_row, o_row = v[i * v_step + h * width :], output[(i * heads + h) * width :]
        for x in range(width):
            values[x] = load(v_row[x])
        following = min(task + 1, last - 1)
        begin = records[following // heads] * block_step + following % heads * keys * width
        upcoming = state[begin : begin + keys * width].reshape(keys, width)
        head_step(query, key, decay, values, beta[i * beta_step + h], matrix, upcoming, scratch, read)
        for x in range(width):
            store(o_row, x, read[x])


@numba.njit(nogil=True, cache=True, parallel=True)
def step_parallel(
    q: Any,
    q_step: int,
    k: Any,
    k_step: int,
    v: Any,
    v_step: int,
    g: Any,
    g_step: int,
    per_channel: bool,
    beta: Any,
    beta_step: int,
    state: Any,
    block_step: int,
    output: Any,
    shape: tuple[int, int, int, int],
    records: Any,
    fresh: Any,
    scale: Any,
    normalize: bool,
    tasks: int,
    parts: int,
) -> None:
    for part in numba.prange(parts):
        step(
            q, q_step, k, k_step, v, v_step, g, g_step, per_channel, beta, beta_step, state, block_step, output,
            shape, records, fresh, scale, normalize, part * tasks // parts, (part + 1) * tasks // parts,
        )  # fmt: skip
