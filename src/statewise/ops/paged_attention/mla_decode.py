"""Decode rows of latent attention: one query row per sequence, read straight from the pages."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from statewise.ops.arrays import memory
from statewise.ops.paged_attention.softmax import BLOCK, FAST, HEADS, accumulate, cut, merge, score, split_length, weigh
from statewise.ops.vector import load, store


@njit(cache=True, nogil=True, fastmath=FAST)
def _absorb(q_nope, q_rope, key_up, scale, query):  # type: ignore[no-untyped-def]
    """query [R + Dr] = scale * [q_nope [Dn] @ key_up [Dn, R] | q_rope [Dr]] of one head."""
    rank = key_up.shape[1]
    query[:] = np.float32(0)
    for d in range(key_up.shape[0]):
        element = load(q_nope[d]) * scale
        for r in range(rank):
            query[r] += element * load(key_up[d, r])
    for d in range(len(q_rope)):
        query[rank + d] = load(q_rope[d]) * scale


@njit(cache=True, nogil=True)
def _attend(query, cache, page_stride, page_size, pages, begin, end, block, scores, largest, total, output):  # type: ignore[no-untyped-def]
    """Softmax numerators of positions begin..end of one sequence, summed: output [H, R], total [H], largest [H]."""
    width = query.shape[1]
    largest[:] = np.float32(-3e38)
    total[:] = np.float32(0)
    output[:] = np.float32(0)
    for first in range(begin, end, BLOCK):
        count = min(BLOCK, end - first)
        for t in range(count):
            position = first + t
            source = pages[position // page_size] * page_stride + (position % page_size) * width
            entry = cache[source : source + width]
            for w in range(width):
                block[t, w] = load(entry[w])
        block[count:] = np.float32(0)
        score(query, block, scores)
        weigh(scores, count, largest, total, output)
        accumulate(scores, block, output)


@njit(cache=True, nogil=True, fastmath=FAST)
def _finish(largest, total, partial, value_up, merged, output):  # type: ignore[no-untyped-def]
    """Merge the splits of one head (partial [S, R]) and expand: output [Dv] = value_up [Dv, R] @ merged [R]."""
    whole = merge(largest, total, partial, merged)
    for d in range(len(output)):
        dot = np.float32(0)
        for r in range(len(merged)):
            dot += merged[r] * load(value_up[d, r])
        store(output, d, dot / whole)


@njit(cache=True, nogil=True, parallel=True)
def decode(sizes, like, addresses, steps, page_size, pages, lengths, scale, workers):  # type: ignore[no-untyped-def]
    """Absorbed latent attention of B rows, one per sequence. `sizes` is (B, H, Dn, R, Dr, Dv).

    pages [N, P] and lengths [N] int64, N >= B. `addresses` are those of q_nope [B, H, Dn], q_rope [B, H, Dr],
    key_up [H, Dn, R], value_up [H, Dv, R], the cache and the output [B, H, Dv]; all have the dtype of `like`.
    `steps` holds the elements between rows and between heads of q_nope, the same of q_rope, between heads of key_up,
    between heads of value_up and between pages of the cache. All heads share each cache entry that is read.
    """
    q_nope, q_rope = memory(addresses[0], like), memory(addresses[1], like)
    key_up, value_up = memory(addresses[2], like), memory(addresses[3], like)
    cache, output = memory(addresses[4], like), memory(addresses[5], like)
    rows, heads, nope, rank, rope, value = sizes
    width = rank + rope
    padded = -(-heads // HEADS) * HEADS
    query = np.zeros((rows, padded, width), np.float32)
    for item in prange(rows * heads):  # the rows of one head together: its part of key_up stays in the cache
        h, b = item // rows, item % rows
        at_nope, at_rope = b * steps[0] + h * steps[1], b * steps[2] + h * steps[3]
        up = key_up[h * steps[4] : h * steps[4] + nope * rank].reshape(nope, rank)
        _absorb(q_nope[at_nope : at_nope + nope], q_rope[at_rope : at_rope + rope], up, scale, query[b, h])

    first, owner, before = cut(lengths, rows)
    splits = len(owner)
    largest = np.empty((padded, splits), np.float32)
    total = np.empty((padded, splits), np.float32)
    partial = np.empty((splits, padded, rank), np.float32)
    for worker in prange(workers):  # equal shares of the tokens, not of the sequences
        block = np.empty((BLOCK, width), np.float32)
        scores = np.empty((padded, BLOCK), np.float32)
        top = np.empty(padded, np.float32)
        mass = np.empty(padded, np.float32)
        for s in range(splits):
            if before[s] * workers // before[splits] == worker:
                b = owner[s]
                begin = (s - first[b]) * split_length(lengths[b])
                end = begin + before[s + 1] - before[s]
                _attend(
                    query[b], cache, steps[6], page_size, pages[b], begin, end, block, scores, top, mass, partial[s]
                )
                largest[:, s] = top
                total[:, s] = mass

    for item in prange(rows * heads):
        h, b = item // rows, item % rows
        low, high = first[b], first[b + 1]
        up = value_up[h * steps[5] : h * steps[5] + value * rank].reshape(value, rank)
        target = output[(b * heads + h) * value : (b * heads + h + 1) * value]
        _finish(largest[h, low:high], total[h, low:high], partial[low:high, h], up, np.empty(rank, np.float32), target)
