"""Prefill of lightning attention, chunk by chunk: matrix products in torch, the rest in numba.

With S the state before a chunk of n tokens and t, j its rows from 0 (MiniMax-01, arXiv 2501.08313, §2.2):

    O_t = e^(-s (t+1)) S^T q_t + sum_(j <= t) e^(-s (t-j)) (q_t . k_j) v_j
    S'  = e^(-s n) S + sum_j e^(-s (n-1-j)) k_j v_j^T

The state enters before the chunk's first token decays it, hence t + 1. No exponent is ever positive.

Sequences go through in bands whose states fit the cache, and within a band their chunks in groups. All but S is known
for all chunks of a group at once; S then moves from chunk to chunk, with the sequences and heads of the band side by
side. The arithmetic of a chunk does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from statewise.ops.arrays import memory
from statewise.ops.batch import CHUNK, Batch, Chunks, Freezes
from statewise.ops.lightning.rows import POWERS, fetch_row, head_row
from statewise.ops.vector import load, store

GROUP = 32  # chunks times heads calculated at once, with buffers of about 7 MB at D = 128; more gains nothing
AHEAD = 4  # rows; those of one head lie too far apart in memory for the processor to see them coming


class Work(NamedTuple):
    """Buffers for a group of chunks, float32; n = chunks times heads of the group."""

    queries: Tensor  # [n, CHUNK, K] q
    late_queries: Tensor  # [n, CHUNK, K] e^(-s (t+1)) q
    keys: Tensor  # [n, CHUNK, K] k
    early_keys: Tensor  # [n, CHUNK, K] e^(-s (n-1-t)) k
    values: Tensor  # [n, CHUNK, V] v
    decay: Tensor  # [n, 1] e^(-s n)
    attention: Tensor  # [n, CHUNK, CHUNK] q . k, then decayed, and zero above the diagonal
    output: Tensor  # [n, CHUNK, V] O


class Kept(NamedTuple):
    """States to write to the pool."""

    sequences: np.ndarray  # [n] int64, counted within the band
    records: np.ndarray  # [n] int64, the block that each of them goes to


class Group(NamedTuple):
    chunks: np.ndarray  # chunks of the batch that are calculated at once, ordinal after ordinal
    sizes: list[int]  # per ordinal: how many they are; those of the first sequences of the band
    frozen: list[Kept | None]  # per ordinal: states behind these chunks that are kept besides the final ones


class Band(NamedTuple):
    final: Kept  # the records of its sequences
    fresh: np.ndarray  # [sequences] bool
    groups: list[Group]


def plan(chunks: Chunks, batch: Batch, size: int) -> list[Band]:
    """Bands of at most `size` sequences, and their chunks in groups of at most `size`."""
    start = [0, *accumulate(chunks.active)]  # first chunk of every ordinal
    records, fresh = batch.records[chunks.sequences].numpy(), batch.fresh[chunks.sequences].numpy()
    bands = []
    for low in range(0, len(records), size):
        high = min(low + size, len(records))
        groups: list[Group] = []
        taken: list[np.ndarray] = []
        for ordinal, active in enumerate(chunks.active):
            if active <= low:
                break
            chosen = np.arange(start[ordinal] + low, start[ordinal] + min(high, active))
            if sum(map(len, taken)) + len(chosen) > size:
                groups.append(group_of(taken, batch.freezes))
                taken = []
            taken.append(chosen)
        groups.append(group_of(taken, batch.freezes))
        bands.append(Band(Kept(np.arange(high - low), records[low:high]), fresh[low:high], groups))
    return bands


def group_of(taken: list[np.ndarray], freezes: Freezes | None) -> Group:
    """The chunks of one ordinal after the other, each as the chunks of the band's first sequences."""
    frozen: list[Kept | None] = [None] * len(taken)
    if freezes is not None:
        for i, part in enumerate(taken):
            chosen = freezes.behind(part[0], part[-1] + 1)
            if freezes.chunks[chosen]:
                frozen[i] = Kept(np.array(freezes.chunks[chosen]) - part[0], freezes.records[chosen].numpy())
    return Group(np.concatenate(taken), [len(part) for part in taken], frozen)


def allocate(n: int, keys: int, width: int) -> Work:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32)

    return Work(
        queries=empty(n, CHUNK, keys),
        late_queries=empty(n, CHUNK, keys),
        keys=empty(n, CHUNK, keys),
        early_keys=empty(n, CHUNK, keys),
        values=empty(n, CHUNK, width),
        decay=empty(n, 1),
        attention=empty(n, CHUNK, CHUNK),
        output=empty(n, CHUNK, width),
    )


def chunked_prefill(
    layer: tuple[Any, ...],
    sources: tuple[int, int, int, int, int],
    steps: tuple[int, int, int],
    batch: Batch,
    chunks: Chunks,
    deliver: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
) -> None:
    """The prefill rows of the batch; their states move on in place, and those of `batch.freezes` are copied on the way.

    layer: what `step` gets first; sources, steps: where q, k, v lie. deliver(O flat, rows of all chunks, chunks of
    the group) takes the results out of the buffer.
    """
    like, like_state, tables, sizes, silu, numbers, place = layer
    heads, keys, width = sizes[:3]
    size = max(1, GROUP // heads)
    bands = batch.shared.get(("lightning", size))
    if bands is None:
        bands = batch.shared["lightning", size] = plan(chunks, batch, size)
    rows = chunks.rows.numpy()
    size = min(size, rows.shape[0])
    work = allocate(size * heads, keys, width)
    buffers = tuple(x.view(-1, x.shape[-1]).numpy() for x in work[:6])
    attention, output = work.attention.view(-1, CHUNK).numpy(), work.output.view(-1).numpy()
    states = torch.empty(min(size, len(chunks.sequences)) * heads, keys, width, dtype=torch.float32)
    held = states.view(-1).numpy()
    parts = numba.get_num_threads()
    for band in bands:
        fetch_states(like_state, place, sizes, held, band.final.records, band.fresh, parts)
        for group in band.groups:
            n = len(group.chunks) * heads
            inputs = (like, tables, sizes, silu, numbers, sources, steps, batch.num_rows, rows, group.chunks)
            prepare(*inputs, buffers, parts)
            torch.bmm(work.queries[:n], work.keys[:n].mT, out=work.attention[:n])
            decay_pairs(attention, tables[0], heads, n, parts)
            start = 0
            for count, frozen in zip(group.sizes, group.frozen, strict=True):
                end = start + count * heads
                advance(Work(*(x[start:end] for x in work)), states[: end - start])
                if frozen is not None:
                    keep_states(like_state, place, sizes, held, *frozen, parts)
                start = end
            work.output[:n].baddbmm_(work.attention[:n], work.values[:n])
            deliver(output, rows, group.chunks)
        keep_states(like_state, place, sizes, held, *band.final, parts)


def advance(work: Work, states: Tensor) -> None:
    """One chunk each of several sequences: what the state gives to work.output, then the state behind the chunk."""
    torch.bmm(work.late_queries, states, out=work.output)
    states.mul_(work.decay[:, :, None])
    states.baddbmm_(work.early_keys.mT, work.values)


@numba.njit(nogil=True, cache=True, parallel=True)
def prepare(
    like: Any, tables: Any, sizes: Any, silu: bool, numbers: Any, sources: Any, steps: Any, num_rows: int, rows: Any,
    chunks: Any, buffers: Any, parts: int,
) -> None:  # fmt: skip
    """Fill the first six buffers of `Work`; n = (index into `chunks`) * heads + head."""
    heads = sizes[0]
    n = len(chunks) * heads
    queries, late_queries, keys, early_keys, values, decay = buffers
    for part in numba.prange(parts):
        for pair in range(part * n // parts, (part + 1) * n // parts):
            chunk, h, begin = chunks[pair // heads], pair % heads, pair * CHUNK
            powers = tables[0][h * POWERS : (h + 1) * POWERS]
            tokens = 0
            while tokens < CHUNK and rows[chunk, tokens] < num_rows:
                tokens += 1
            for r in range(tokens):
                query, key = queries[begin + r], keys[begin + r]
                ahead = rows[chunk, min(r + AHEAD, tokens - 1)]
                fetch_row(like, sizes, sources, steps, ahead, h)
                head_row(
                    like, tables, sizes, silu, numbers, sources, steps, rows[chunk, r], h, query, key,
                    values[begin + r],
                )  # fmt: skip
                late, early = powers[CHUNK - 1 - r], powers[CHUNK - tokens + 1 + r]
                late_query, early_key = late_queries[begin + r], early_keys[begin + r]
                for c in range(len(query)):
                    late_query[c] = query[c] * late
                    early_key[c] = key[c] * early
            for r in range(begin + tokens, begin + CHUNK):  # no such token: zero adds nothing to the state
                queries[r], late_queries[r], keys[r], early_keys[r], values[r] = 0.0, 0.0, 0.0, 0.0, 0.0
            decay[pair, 0] = powers[CHUNK - tokens]


@numba.njit(nogil=True, cache=True, parallel=True)
def decay_pairs(attention: Any, powers: Any, heads: int, n: int, parts: int) -> None:
    """attention [n CHUNK, CHUNK]: times e^(-s (t-j)) at and below the diagonal, zero above it."""
    for part in numba.prange(parts):
        for pair in range(part * n // parts, (part + 1) * n // parts):
            own = powers[pair % heads * POWERS : (pair % heads + 1) * POWERS]
            for t in range(CHUNK):
                row, factors = attention[pair * CHUNK + t], own[CHUNK - t :]
                for j in range(t + 1):
                    row[j] *= factors[j]
                row[t + 1 :] = 0.0


@numba.njit(nogil=True, cache=True, parallel=True)
def fetch_states(
    like_state: Any, place: tuple[int, int], sizes: Any, held: Any, records: Any, fresh: Any, parts: int
) -> None:
    """held = the states of the sequences in float32; zero where they are fresh."""
    states, block = memory(place[0], like_state), sizes[0] * sizes[1] * sizes[2]
    for part in numba.prange(parts):
        low, high = part * block // parts, (part + 1) * block // parts
        for i in range(len(records)):
            source, target = states[records[i] * place[1] :], held[i * block : (i + 1) * block]
            if fresh[i]:
                target[low:high] = 0.0
            else:
                for x in range(low, high):
                    target[x] = load(source[x])


@numba.njit(nogil=True, cache=True, parallel=True)
def keep_states(
    like_state: Any, place: tuple[int, int], sizes: Any, held: Any, sequences: Any, records: Any, parts: int
) -> None:
    """Write held states to records, in the dtype of the pool."""
    states, block = memory(place[0], like_state), sizes[0] * sizes[1] * sizes[2]
    for part in numba.prange(parts):
        low, high = part * block // parts, (part + 1) * block // parts
        for i in range(len(records)):
            source, target = held[sequences[i] * block : (sequences[i] + 1) * block], states[records[i] * place[1] :]
            for x in range(low, high):
                store(target, x, source[x])


@numba.njit(nogil=True, cache=True, parallel=True)
def write_chunks(results: Any, rows: Any, chunks: Any, sizes: Any, output: Any, num_rows: int, parts: int) -> None:
    """Move the results [chunks, H, CHUNK, V] of a group to their rows of the output [T, H V], both flat."""
    heads, _, width = sizes[:3]
    n = len(chunks) * CHUNK
    for part in numba.prange(parts):
        for i in range(part * n // parts, (part + 1) * n // parts):
            chunk, r = i // CHUNK, i % CHUNK
            t = rows[chunks[chunk], r]
            if t < num_rows:
                for h in range(heads):
                    source = results[((chunk * heads + h) * CHUNK + r) * width :][:width]
                    target = output[(t * heads + h) * width :][:width]
                    for x in range(width):
                        store(target, x, source[x])
