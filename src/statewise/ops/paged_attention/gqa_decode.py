"""Decode rows of grouped-query attention: one query row per sequence, keys and values read straight from the pages."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from statewise.ops.arrays import memory
from statewise.ops.paged_attention.softmax import BLOCK, FAST, HEADS, accumulate, cut, merge, score, split_length, weigh
from statewise.ops.vector import load, prefetch, store

PARALLEL_FROM = 32_768  # elements of keys and values; below, starting the second core costs more than it saves
LINE = 64  # bytes that one prefetch fetches


@njit(cache=True, nogil=True)
def _row(pages, position, page_size, page_step, width, shared, head):  # type: ignore[no-untyped-def]
    """Where the key (or value) of a position for one of the `shared` key heads begins in the cache."""
    page, offset = pages[position // page_size], position % page_size
    return page * page_step + (offset * shared + head) * width


@njit(cache=True, nogil=True)
def _fetch_ahead(cache, source, width):  # type: ignore[no-untyped-def]
    for c in range(0, width, LINE // cache.itemsize):
        prefetch(cache, source + c)


@njit(cache=True, nogil=True)
def _widen(cache, source, row):  # type: ignore[no-untyped-def]
    """row = the float32 values of what lies from `source` on."""
    narrow = cache[source : source + len(row)]
    for c in range(len(row)):
        row[c] = load(narrow[c])


@njit(cache=True, nogil=True)
def _attend(query, caches, steps, pages, place, begin, end, blocks, scores, largest, total, output):  # type: ignore[no-untyped-def]
    """Softmax numerators of positions begin..end for one key head, summed: output [G, Dv], total [G], largest [G].

    `caches` are keys and values, `steps` the elements between their pages, `place` is (page_size, Hkv, key head).
    """
    keys, values = caches
    key, value = blocks
    page_size, shared, head = place
    width, value_width = key.shape[1], value.shape[1]
    largest[:] = np.float32(-3e38)
    total[:] = np.float32(0)
    output[:] = np.float32(0)
    for first in range(begin, end, BLOCK):
        for p in range(first + BLOCK, min(first + 2 * BLOCK, end)):  # a page is not where the processor expects it
            _fetch_ahead(keys, _row(pages, p, page_size, steps[0], width, shared, head), width)
            _fetch_ahead(values, _row(pages, p, page_size, steps[1], value_width, shared, head), value_width)
        count = min(BLOCK, end - first)
        for t in range(count):
            _widen(keys, _row(pages, first + t, page_size, steps[0], width, shared, head), key[t])
            _widen(values, _row(pages, first + t, page_size, steps[1], value_width, shared, head), value[t])
        key[count:] = np.float32(0)
        value[count:] = np.float32(0)
        score(query, key, scores)
        weigh(scores, count, largest, total, output)
        accumulate(scores, value, output)


@njit(cache=True, nogil=True)
def _share(sizes, like, addresses, steps, page_size, pages, lengths, scale, splits, sums, worker, workers):  # type: ignore[no-untyped-def]
    """One worker's part of all splits and key heads: equal shares of the tokens, not of the sequences."""
    query, caches = memory(addresses[0], like), (memory(addresses[1], like), memory(addresses[2], like))
    _rows, heads, shared, width, value_width = sizes
    group = heads // shared
    first, owner, before = splits
    largest, total, partial = sums
    padded = largest.shape[1]
    scaled = np.zeros((padded, width), np.float32)
    blocks = (np.empty((BLOCK, width), np.float32), np.empty((BLOCK, value_width), np.float32))
    scores = np.empty((padded, BLOCK), np.float32)
    top = np.empty(padded, np.float32)
    mass = np.empty(padded, np.float32)
    for s in range(len(owner)):
        b, tokens = owner[s], before[s + 1] - before[s]
        begin = (s - first[b]) * split_length(lengths[b])
        for k in range(shared):
            if (before[s] * shared + k * tokens) * workers // (before[-1] * shared) != worker:
                continue
            for g in range(group):
                source = b * steps[0] + (k * group + g) * steps[1]
                for c in range(width):
                    scaled[g, c] = load(query[source + c]) * scale
            place, end, output = (page_size, shared, k), begin + tokens, partial[s, k]
            _attend(scaled, caches, steps[2:], pages[b], place, begin, end, blocks, scores, top, mass, output)
            largest[k, :, s] = top
            total[k, :, s] = mass


@njit(cache=True, nogil=True, fastmath=FAST)
def _finish(sizes, like, address, splits, sums, item):  # type: ignore[no-untyped-def]
    """Merge the splits of one head of one row, and normalise."""
    _rows, heads, shared, _width, value_width = sizes
    b, h = item // heads, item % heads
    k, g = h // (heads // shared), h % (heads // shared)
    low, high = splits[0][b], splits[0][b + 1]
    largest, total, partial = sums
    output = memory(address, like)
    merged = np.empty(value_width, np.float32)
    whole = merge(largest[k, g, low:high], total[k, g, low:high], partial[low:high, k, g], merged)
    for d in range(value_width):
        store(output, item * value_width + d, merged[d] / whole)


@njit(cache=True, nogil=True, parallel=True)
def _spread(sizes, like, addresses, steps, page_size, pages, lengths, scale, splits, sums, workers):  # type: ignore[no-untyped-def]
    for worker in prange(workers):  # int64 everywhere: for each kind of integer a function would be compiled anew
        _share(sizes, like, addresses, steps, page_size, pages, lengths, scale, splits, sums, np.int64(worker), workers)
    for item in prange(sizes[0] * sizes[1]):
        _finish(sizes, like, addresses[3], splits, sums, np.int64(item))


@njit(cache=True, nogil=True)
def decode(sizes, like, addresses, steps, page_size, pages, lengths, scale, workers):  # type: ignore[no-untyped-def]
    """Grouped-query attention of B rows, one per sequence. `sizes` is (B, H, Hkv, D, Dv).

    pages [N, P] and lengths [N] int64, N >= B. `addresses` are those of the queries [B, H, D], the keys
    [pages, page_size, Hkv, D], the values [pages, page_size, Hkv, Dv] and the output [B, H, Dv]; all have the dtype of
    `like`. `steps` holds the elements between rows and between heads of the queries, between pages of the keys and
    between pages of the values. The H / Hkv query heads of one key head share each key and value that is read.
    """
    rows, heads, shared, width, value_width = sizes
    padded = -(-(heads // shared) // HEADS) * HEADS
    splits = cut(lengths, rows)
    count = len(splits[1])
    sums = (  # of every split: largest score, sum of the weights, weighted sum of the values
        np.empty((shared, padded, count), np.float32),
        np.empty((shared, padded, count), np.float32),
        np.empty((count, shared, padded, value_width), np.float32),
    )
    if workers > 1 and splits[2][-1] * shared * (width + value_width) >= PARALLEL_FROM:
        _spread(sizes, like, addresses, steps, page_size, pages, lengths, scale, splits, sums, workers)
    else:
        _share(sizes, like, addresses, steps, page_size, pages, lengths, scale, splits, sums, np.int64(0), np.int64(1))
        for item in range(rows * heads):
            _finish(sizes, like, addresses[3], splits, sums, np.int64(item))
