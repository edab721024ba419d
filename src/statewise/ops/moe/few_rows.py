"""A routed layer in a decode step: few rows per expert, so the time is that of reading the weights, once each."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from statewise.ops.arrays import memory
from statewise.ops.moe.routing import choose, choose_row
from statewise.ops.vector import load, prefetch, sigmoid, store

TILE = 2  # rows of x that share a pass over a row of the weights; a missing one is zeros
AHEAD = 2  # rows of the weights between the one being read and the one being asked for
SCORES = 2048  # up to this many, one thread chooses the experts of all rows
FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered; NaN and infinity keep their meaning


@njit(cache=True, nogil=True)
def _fetch_ahead(matrix, row):  # type: ignore[no-untyped-def]
    """Start reading a row that is needed soon: the processor itself does not look beyond the next 4 kB."""
    begin = (row + AHEAD) * matrix.shape[1]
    for element in range(begin, begin + matrix.shape[1], 64 // matrix.itemsize):
        prefetch(matrix, element)


@njit(cache=True, nogil=True, fastmath=FAST)
def _dots(first, second, one, other):  # type: ignore[no-untyped-def]
    """Products of two weight rows [W] with the two rows [W] of a tile."""
    zero = np.float32(0)
    a0, a1, b0, b1 = zero, zero, zero, zero
    for w in range(len(first)):
        a, b = load(first[w]), load(second[w])
        x0, x1 = one[w], other[w]
        a0 += a * x0
        a1 += a * x1
        b0 += b * x0
        b1 += b * x1
    return (a0, a1), (b0, b1)


@njit(cache=True, nogil=True)
def _tiles(ids, experts, always):  # type: ignore[no-untyped-def]
    """Group pairs by expert: (hit experts, first tile of each and one end, pairs of each tile [tiles, TILE]).

    Pair row * k + j is the row with its j-th choice; pair rows * k + a * rows + row is the row with the a-th expert
    that every row takes; one more stands where a tile is not full. Experts are in order, those that all take behind
    the others, and the pairs of an expert in the order of their rows.
    """
    rows, top_k = ids.shape
    chosen = ids.reshape(-1)
    count = np.zeros(experts + always, np.int64)
    for pair in range(len(chosen)):
        count[chosen[pair]] += 1
    count[experts:] = rows
    hits = 0
    tiles = 0
    next_place = np.zeros(experts + always, np.int64)
    hit = np.empty(experts + always, np.int64)
    first = np.zeros(experts + always + 1, np.int64)
    for e in range(experts + always):
        if count[e]:
            hit[hits] = e
            next_place[e] = tiles * TILE
            tiles += -(-count[e] // TILE)
            hits += 1
            first[hits] = tiles
    pairs = rows * (top_k + always)
    places = np.full(tiles * TILE, pairs, np.int64)
    for pair in range(pairs):
        e = chosen[pair] if pair < len(chosen) else experts + (pair - len(chosen)) // rows
        places[next_place[e]] = pair
        next_place[e] += 1
    return hit[:hits], first[: hits + 1], places.reshape(tiles, TILE)


@njit(cache=True, nogil=True, fastmath=FAST)
def _gated(gate, up):  # type: ignore[no-untyped-def]
    """gate <- silu(gate) * up; a loop of its own, because only then it is vectorised."""
    for i in range(len(gate)):
        gate[i] *= sigmoid(gate[i]) * up[i]


@njit(cache=True, nogil=True, fastmath=FAST)
def _add(output, weight, row):  # type: ignore[no-untyped-def]
    for w in range(len(row)):
        output[w] += weight * row[w]


@njit(cache=True, nogil=True)
def _score(wide, router, begin, end, logits):  # type: ignore[no-untyped-def]
    """logits [rows, begin:end] of the experts begin .. end - 1; the last row of `wide` is zeros."""
    rows = len(logits)
    for e in range(begin, end, 2):
        second = min(e + 1, end - 1)
        _fetch_ahead(router, e)
        _fetch_ahead(router, second)
        for t in range(0, rows, TILE):
            one, other = _dots(router[e], router[second], wide[t], wide[t + 1])
            logits[t, e], logits[t, second] = one[0], other[0]
            if t + 1 < rows:
                logits[t + 1, e], logits[t + 1, second] = one[1], other[1]


@njit(cache=True, nogil=True)
def _widen(matrix, gate, up, places, sources, wide, begin, end, gates, ups):  # type: ignore[no-untyped-def]
    """gates [pairs, begin:end] = silu(gate x) * up x of one expert, for the pairs of its tiles."""
    for i in range(begin, end):
        _fetch_ahead(matrix, gate + i)
        _fetch_ahead(matrix, up + i)
        for tile in range(len(places)):
            p, q = places[tile, 0], places[tile, 1]
            g, u = _dots(matrix[gate + i], matrix[up + i], wide[sources[p]], wide[sources[q]])
            gates[p, i], gates[q, i] = g
            ups[p, i], ups[q, i] = u
    for tile in range(len(places)):
        for j in range(TILE):
            _gated(gates[places[tile, j], begin:end], ups[places[tile, j], begin:end])


@njit(cache=True, nogil=True)
def _narrow(matrix, places, gates, begin, end, results):  # type: ignore[no-untyped-def]
    """results [pairs, begin:end] = down gates of one expert, for the pairs of its tiles."""
    for r in range(begin, end, 2):
        second = min(r + 1, end - 1)
        _fetch_ahead(matrix, r)
        _fetch_ahead(matrix, second)
        for tile in range(len(places)):
            p, q = places[tile, 0], places[tile, 1]
            one, other = _dots(matrix[r], matrix[second], gates[p], gates[q])
            results[p, r], results[q, r] = one
            results[p, second], results[q, second] = other


@njit(cache=True, nogil=True, parallel=True)
def sparse_moe(like, sizes, addresses, rule, scale, workers):  # type: ignore[no-untyped-def]
    """A routed layer in three launches; in each, a worker reads an equal, consecutive share of the weights needed.

    `sizes` is (rows, hidden, width, experts, experts that every row takes, experts chosen), `addresses` those of
    x, router, bias, gate_up, down and the output, of which x, gate_up, down and the output have the dtype of `like`;
    `rule` is (softmax, renormalize, groups, groups kept). The order of a row's sums is that of its experts' indices,
    whatever the other rows.
    """
    rows, hidden, width, experts, always, top_k = sizes
    x = memory(addresses[0], like)[: rows * hidden].reshape(rows, hidden)
    output = memory(addresses[5], like)[: rows * hidden].reshape(rows, hidden)
    floats = np.empty(0, np.float32)
    router = memory(addresses[1], floats)[: experts * hidden].reshape(experts, hidden)
    bias = memory(addresses[2], floats)[:experts]
    total = experts + always
    gate_up = memory(addresses[3], like)[: total * 2 * width * hidden].reshape(total, 2 * width, hidden)
    down = memory(addresses[4], like)[: total * hidden * width].reshape(total, hidden, width)

    wide = np.empty((rows + 1, hidden), np.float32)
    for t in range(rows):
        for w in range(hidden):
            wide[t, w] = load(x[t, w])
    wide[rows] = np.float32(0)
    logits = np.empty((rows, experts), np.float32)
    for worker in prange(workers):
        _score(wide, router, worker * experts // workers, (worker + 1) * experts // workers, logits)
    ids = np.empty((rows, top_k), np.int64)
    pairs = rows * (top_k + always)
    weights = np.ones(pairs, np.float32)
    shares = weights[: rows * top_k].reshape(rows, top_k)
    if rows * experts <= SCORES:
        for t in range(rows):
            choose_row(logits[t], bias, rule, scale, ids[t], shares[t])
    else:
        choose(logits, bias, rule, scale, ids, shares)

    hit, first, places = _tiles(ids, experts, always)
    sources = np.empty(pairs + 1, np.int64)  # row of each pair
    for pair in range(pairs):
        sources[pair] = pair // top_k if pair < rows * top_k else (pair - rows * top_k) % rows
    sources[pairs] = rows
    gates = np.empty((pairs + 1, width), np.float32)
    ups = np.empty((pairs + 1, width), np.float32)
    items = len(hit) * width
    for worker in prange(workers):
        low, high = worker * items // workers, (worker + 1) * items // workers
        for h in range(low // width, -(-high // width)):
            begin, end = max(low - h * width, 0), min(high - h * width, width)
            group = places[first[h] : first[h + 1]]
            _widen(gate_up[hit[h]], 0, width, group, sources, wide, begin, end, gates, ups)

    results = np.empty((pairs + 1, hidden), np.float32)
    sums = np.empty((rows, hidden), np.float32)
    for worker in prange(workers):
        begin, end = worker * hidden // workers, (worker + 1) * hidden // workers
        sums[:, begin:end] = np.float32(0)
        for h in range(len(hit)):
            group = places[first[h] : first[h + 1]]
            _narrow(down[hit[h]], group, gates, begin, end, results)
            for tile in range(len(group)):
                for j in range(TILE):
                    pair = group[tile, j]
                    if pair < pairs:
                        _add(sums[sources[pair], begin:end], weights[pair], results[pair, begin:end])
        for t in range(rows):
            for w in range(begin, end):
                store(output[t], w, sums[t, w])
