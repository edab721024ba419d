"""Prefill of the gated delta rule, chunk by chunk: matrix products in torch, the rest in numba.

With G the running sum of g inside a chunk, S the state before it and t, j rows of it (arXiv 2412.06464, 2510.26692):

    A_tj = beta_t sum_c k_tc k_jc e^(G_tc - G_jc)  for j < t        P_tj = the same of q_t, no beta, for j <= t
    (I + A) U = beta (V - (K e^G) S)        O = (Q e^G) S + P U        S' = e^(G_end) S + (K e^(G_end - G))^T U

e^(-G) alone overflows. Here no exponent is ever positive, and no difference of sums is taken either: every
e^(G_t - G_j) is a product of the decays e^g <= 1 between the two rows. A and P fall into blocks by halves: rows
32..63 against 0..31 meet at row 32, each side decayed to that point, which makes their block one matrix product;
likewise 16..31 against 0..15 and 48..63 against 32..47. Inside 16 rows the product runs pair by pair.

The chunks go through in groups small enough for the cache. Within a group everything but S is known for all
chunks at once; S then moves from chunk to chunk, with all sequences and heads side by side. The arithmetic of a
chunk does not depend on what else is in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from statewise.ops.batch import CHUNK, Batch, Chunks, Freezes
from statewise.ops.delta_rule.chunk_kernels import (
    HALF,
    QUARTER,
    prepare_parallel,
    solve_parallel,
    write_parallel,
)
from statewise.ops.vector import flat, flat_rows

GROUP = 16  # chunks times heads calculated at once: about 4 MB of buffers, near the second-level caches of two cores


class Work(NamedTuple):
    """Buffers for a group of chunks, float32; n = chunks times heads of the group."""

    keys: Tensor  # [n, CHUNK, K] beta k e^G
    queries: Tensor  # [n, CHUNK, K] q e^G
    ends: Tensor  # [n, CHUNK, K] k e^(G_end - G)
    decay: Tensor  # [n, K] e^(G_end)
    values: Tensor  # [n, CHUNK, V] beta v, then V - (K e^G) S times beta
    half_left: Tensor  # [n, 2 HALF, K] beta k and q of the later half, decayed from its start
    half_right: Tensor  # [n, HALF, K] k of the earlier half, decayed to its end
    quarter_left: Tensor  # [2 n, 2 QUARTER, K] the same inside each half
    quarter_right: Tensor  # [2 n, QUARTER, K]
    inverse: Tensor  # [n, CHUNK, CHUNK] A, then (I + A)^-1
    attention: Tensor  # [n, CHUNK, CHUNK] P
    update: Tensor  # [n, CHUNK, V] U
    output: Tensor  # [n, CHUNK, V] O


def allocate(n: int, keys: int, width: int) -> Work:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32)

    return Work(
        keys=empty(n, CHUNK, keys),
        queries=empty(n, CHUNK, keys),
        ends=empty(n, CHUNK, keys),
        decay=empty(n, keys),
        values=empty(n, CHUNK, width),
        half_left=empty(n, 2 * HALF, keys),
        half_right=empty(n, HALF, keys),
        quarter_left=empty(2 * n, 2 * QUARTER, keys),
        quarter_right=empty(2 * n, QUARTER, keys),
        inverse=empty(n, CHUNK, CHUNK),
        attention=empty(n, CHUNK, CHUNK),
        update=empty(n, CHUNK, width),
        output=empty(n, CHUNK, width),
    )


def chunked_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: Batch,
    chunks: Chunks,
    scale: float,
    normalize: bool,
    output: Tensor,
) -> None:
    """The prefill rows of the batch: output [T, H, V] is written for them, their states move on in place.

    The states of `batch.freezes` are copied out between two chunks.
    """
    heads, width = v.shape[1:]
    keys = q.shape[2]
    records = batch.records[chunks.sequences]
    states = state[records].float()  # [prefills, H, K, V], by falling number of chunks
    states[batch.fresh[chunks.sequences]] = 0.0
    states = states.view(-1, keys, width)
    total = chunks.rows.shape[0]
    size = min(total, max(1, GROUP // heads))
    work = allocate(size * heads, keys, width)
    flat_work = [x.view(-1, x.shape[-1]).numpy() for x in work]
    inputs = (
        *flat_rows(q),
        *flat_rows(k),
        *flat_rows(v),
        *flat_rows(g),
        g.ndim == 3,
        *flat_rows(beta),
        (heads, q.shape[1], keys, width),
        np.float32(scale),
        normalize,
    )
    rows = chunks.rows.numpy()
    parts = numba.get_num_threads()
    bounds = np.concatenate(([0], np.cumsum(chunks.active))).tolist()  # first chunk of every ordinal
    ordinal = 0
    for start in range(0, total, size):
        end = min(start + size, total)
        prepare_parallel(*inputs, batch.num_rows, rows[start:end], *flat_work[:11], parts)
        n = (end - start) * heads
        half = torch.bmm(work.half_left[:n], work.half_right[:n].mT)
        quarter = torch.bmm(work.quarter_left[: 2 * n], work.quarter_right[: 2 * n].mT)
        solve_parallel(half.numpy(), quarter.numpy(), *flat_work[9:11], parts)
        at = start
        while at < end:
            while bounds[ordinal + 1] <= at:
                ordinal += 1
            until = min(end, bounds[ordinal + 1])
            first = at - bounds[ordinal]
            advance(
                Work(*(x[(at - start) * x.shape[0] // size : (until - start) * x.shape[0] // size] for x in work)),
                states[first * heads : (first + until - at) * heads],
            )
            if batch.freezes is not None:
                keep(batch.freezes, at, until, states[first * heads :], state)
            at = until
        write_parallel(flat_work[12], rows[start:end], flat(output), tuple(output.shape), parts)
    state[records] = states.view(-1, heads, keys, width).to(state.dtype)


def keep(freezes: Freezes, first: int, last: int, states: Tensor, state: Tensor) -> None:
    """Copy the states behind the chunks first .. last - 1 that are to be kept; `states` begins with that of `first`."""
    chosen, (_, heads, keys, width) = freezes.behind(first, last), state.shape
    by_chunk = states.view(-1, heads, keys, width)
    for chunk, record in zip(freezes.chunks[chosen], freezes.records[chosen].tolist(), strict=True):
        state[record].copy_(by_chunk[chunk - first])


def advance(work: Work, states: Tensor) -> None:
    """One chunk each of several sequences: work.output from the state before the chunk, then the state behind it."""
    work.values.baddbmm_(work.keys, states, alpha=-1.0)
    torch.bmm(work.inverse, work.values, out=work.update)
    torch.bmm(work.queries, states, out=work.output)
    work.output.baddbmm_(work.attention, work.update)
    states.mul_(work.decay[:, :, None])
    states.baddbmm_(work.ends.mT, work.update)
