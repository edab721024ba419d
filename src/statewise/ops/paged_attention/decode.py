"""Decode rows of latent attention: one query row per sequence, read straight from the pages."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from statewise.ops.arrays import memory
from statewise.ops.vector import exponential, load, store

FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered; NaN and infinity keep their meaning

BLOCK = 16  # tokens whose entries, scores and weights stay in the first-level cache
HEADS = 4  # heads are padded to a multiple of this, so that the inner loops have one form
SPLITS = 64  # a context is cut into at most this many splits ...
SHORTEST_SPLIT = 128  # ... of at least this many tokens


@njit(cache=True, nogil=True)
def split_length(length: int) -> int:
    """Tokens per split of one context. It depends on the context alone, never on the batch or on the number of
    threads: the sums, and so the bits of the result, do not change with the neighbours."""
    longest = max(SHORTEST_SPLIT, -(-length // SPLITS))
    return -(-longest // BLOCK) * BLOCK


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


@njit(cache=True, nogil=True, fastmath=FAST)
def _score(query, block, scores):  # type: ignore[no-untyped-def]
    """scores [H, BLOCK] = query [H, W] @ block [BLOCK, W].T; four heads by two tokens share their loads."""
    zero = np.float32(0)
    for h in range(0, query.shape[0], HEADS):
        for t in range(0, BLOCK, 2):
            a0, a1, a2, a3 = zero, zero, zero, zero
            b0, b1, b2, b3 = zero, zero, zero, zero
            for w in range(query.shape[1]):
                a, b = block[t, w], block[t + 1, w]
                q0, q1, q2, q3 = query[h, w], query[h + 1, w], query[h + 2, w], query[h + 3, w]
                a0 += q0 * a
                a1 += q1 * a
                a2 += q2 * a
                a3 += q3 * a
                b0 += q0 * b
                b1 += q1 * b
                b2 += q2 * b
                b3 += q3 * b
            scores[h, t], scores[h + 1, t], scores[h + 2, t], scores[h + 3, t] = a0, a1, a2, a3
            scores[h, t + 1], scores[h + 1, t + 1], scores[h + 2, t + 1], scores[h + 3, t + 1] = b0, b1, b2, b3


@njit(cache=True, nogil=True, fastmath=FAST)
def _weigh(scores, count, largest, total, output):  # type: ignore[no-untyped-def]
    """Turn scores [H, BLOCK] into exp(score - largest); rescale what was summed when `largest` [H] grows."""
    for h in range(scores.shape[0]):
        row = scores[h]
        row[count:] = -np.inf
        top = largest[h]
        for t in range(BLOCK):
            top = row[t] if row[t] > top else top
        if top > largest[h]:
            shrink = exponential(largest[h] - top)
            total[h] *= shrink
            for r in range(output.shape[1]):
                output[h, r] *= shrink
            largest[h] = top
        mass = np.float32(0)
        for t in range(len(row)):  # not BLOCK: a loop of known length is unrolled and then not vectorised
            row[t] = exponential(row[t] - top)
            mass += row[t]
        total[h] += mass


@njit(cache=True, nogil=True, fastmath=FAST)
def _accumulate(weights, block, output):  # type: ignore[no-untyped-def]
    """output [H, R] += weights [H, BLOCK] @ block [BLOCK, :R]; two heads by four tokens share loads and stores."""
    for h in range(0, weights.shape[0], 2):
        for t in range(0, BLOCK, 4):
            a0, a1, a2, a3 = weights[h, t], weights[h, t + 1], weights[h, t + 2], weights[h, t + 3]
            b0, b1, b2, b3 = weights[h + 1, t], weights[h + 1, t + 1], weights[h + 1, t + 2], weights[h + 1, t + 3]
            for r in range(output.shape[1]):
                x0, x1, x2, x3 = block[t, r], block[t + 1, r], block[t + 2, r], block[t + 3, r]
                output[h, r] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                output[h + 1, r] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3


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
        _score(query, block, scores)
        _weigh(scores, count, largest, total, output)
        _accumulate(scores, block, output)


@njit(cache=True, nogil=True, fastmath=FAST)
def _finish(largest, total, partial, value_up, merged, output):  # type: ignore[no-untyped-def]
    """Merge the splits of one head (partial [S, R]) and expand: output [Dv] = value_up [Dv, R] @ merged [R]."""
    top = largest[0]
    for s in range(1, len(largest)):
        top = max(top, largest[s])
    merged[:] = np.float32(0)
    whole = np.float32(0)
    for s in range(len(largest)):
        factor = exponential(largest[s] - top)
        whole += factor * total[s]
        for r in range(len(merged)):
            merged[r] += factor * partial[s, r]
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

    first = np.zeros(rows + 1, np.int64)  # first split of each sequence
    for b in range(rows):
        first[b + 1] = first[b] - (-lengths[b] // split_length(lengths[b]))
    splits = first[rows]
    owner = np.empty(splits, np.int64)
    before = np.zeros(splits + 1, np.int64)  # tokens of all earlier splits
    for b in range(rows):
        length = split_length(lengths[b])
        for s in range(first[b], first[b + 1]):
            owner[s] = b
            before[s + 1] = before[s] + min(length, lengths[b] - (s - first[b]) * length)
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
