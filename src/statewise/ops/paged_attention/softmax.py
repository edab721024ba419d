"""What the decode kernels share: a context in splits, and a softmax that is summed block by block and then merged.

Over a block of tokens: `score`, `weigh`, `accumulate`. Over the splits of a context: `merge` (FlashAttention, arXiv
2205.14135, and Flash-Decoding's split of the keys).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from statewise.ops.vector import exponential

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


@njit(cache=True, nogil=True)
def cut(lengths, rows):  # type: ignore[no-untyped-def]
    """The splits of the first `rows` contexts in order: (first split of each context [rows + 1], context of each
    split [S], tokens of all earlier splits [S + 1])."""
    first = np.zeros(rows + 1, np.int64)
    for b in range(rows):
        first[b + 1] = first[b] - (-lengths[b] // split_length(lengths[b]))
    splits = first[rows]
    owner = np.empty(splits, np.int64)
    before = np.zeros(splits + 1, np.int64)
    for b in range(rows):
        length = split_length(lengths[b])
        for s in range(first[b], first[b + 1]):
            owner[s] = b
            before[s + 1] = before[s] + min(length, lengths[b] - (s - first[b]) * length)
    return first, owner, before


@njit(cache=True, nogil=True, fastmath=FAST)
def score(query, block, scores):  # type: ignore[no-untyped-def]
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
def weigh(scores, count, largest, total, output):  # type: ignore[no-untyped-def]
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
def accumulate(weights, block, output):  # type: ignore[no-untyped-def]
    """output [H, R] += weights [H, BLOCK] @ block [BLOCK, :R]; two heads by four tokens share loads and stores."""
    for h in range(0, weights.shape[0], 2):
        for t in range(0, BLOCK, 4):
            a0, a1, a2, a3 = weights[h, t], weights[h, t + 1], weights[h, t + 2], weights[h, t + 3]
            b0, b1, b2, b3 = weights[h + 1, t], weights[h + 1, t + 1], weights[h + 1, t + 2], weights[h + 1, t + 3]
            for r in range(output.shape[1]):
                x0, x1, x2, x3 = block[t, r], block[t + 1, r], block[t + 2, r], block[t + 3, r]
                output[h, r] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                output[h + 1, r] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3


@njit(cache=True, nogil=True, fastmath=FAST)
def merge(largest, total, partial, merged):  # type: ignore[no-untyped-def]
    """merged [R] = the sum of the splits' numerators (partial [S, R]) of one head; returns their denominator."""
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
    return whole
