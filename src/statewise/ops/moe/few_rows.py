"""Experts of a decode step: few rows each, so the time is that of reading the weights, each of them once."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from statewise.ops.vector import load, sigmoid

TILE = 2  # rows of x that share a pass over a row of the weights; a missing one is zeros
AHEAD = 2  # rows of the weights between the one being read and the one being asked for
FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered; NaN and infinity keep their meaning


@intrinsic
def _prefetch(typingctx: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line that holds the element `offset` of a contiguous array, which may lie behind its end."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
        word = ir.IntType(32)
        fetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word]), "llvm.prefetch.p0"
        )
        builder.call(fetch, [address, ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@njit(cache=True, nogil=True)
def _fetch_ahead(matrix, row):  # type: ignore[no-untyped-def]
    """Start reading a row that is needed soon: the processor itself does not look beyond the next 4 kB."""
    begin = (row + AHEAD) * matrix.shape[1]
    for element in range(begin, begin + matrix.shape[1], 64 // matrix.itemsize):
        _prefetch(matrix, element)


@njit(cache=True, nogil=True, fastmath=FAST)
def _dots(first, second, rows):  # type: ignore[no-untyped-def]
    """Products of two weight rows [W] with the two rows of a tile [TILE, W]."""
    zero = np.float32(0)
    a0, a1, b0, b1 = zero, zero, zero, zero
    for w in range(len(first)):
        a, b = load(first[w]), load(second[w])
        x0, x1 = rows[0, w], rows[1, w]
        a0 += a * x0
        a1 += a * x1
        b0 += b * x0
        b1 += b * x1
    return (a0, a1), (b0, b1)


@njit(cache=True, nogil=True)
def _tiles(ids, experts):  # type: ignore[no-untyped-def]
    """Group the pairs (row, k) by expert: (hit experts, first tile of each and one end, pairs [tiles, TILE]).

    A pair is row * k + its place, or -1 where a tile is not full. Pairs of an expert keep the order of their rows.
    """
    pairs = ids.reshape(-1)
    count = np.zeros(experts, np.int64)
    for pair in range(len(pairs)):
        count[pairs[pair]] += 1
    hits = 0
    tiles = 0
    next_place = np.zeros(experts, np.int64)
    hit = np.empty(experts, np.int64)
    first = np.zeros(experts + 1, np.int64)
    for e in range(experts):
        if count[e]:
            hit[hits] = e
            next_place[e] = tiles * TILE
            tiles += -(-count[e] // TILE)
            hits += 1
            first[hits] = tiles
    places = np.full(tiles * TILE, -1, np.int64)
    for pair in range(len(pairs)):
        places[next_place[pairs[pair]]] = pair
        next_place[pairs[pair]] += 1
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


@njit(cache=True, nogil=True, parallel=True)
def expert_mlp(x, ids, weights, gate_up, down, workers, output):  # type: ignore[no-untyped-def]
    """x [T, hidden], gate_up [E, 2 I, hidden], down [E, hidden, I] -> output [T, hidden] float32.

    Two launches. In each, every worker reads an equal, consecutive share of the rows of the weights that are hit.
    The order of a row's sums is that of its experts' indices, whatever the other rows.
    """
    hidden, inner, top_k = x.shape[1], down.shape[2], ids.shape[1]
    hit, first, places = _tiles(ids, down.shape[0])
    tiles = len(places)
    inputs = np.zeros((tiles, TILE, hidden), np.float32)
    for tile in range(tiles):
        for j in range(TILE):
            if places[tile, j] >= 0:
                row = x[places[tile, j] // top_k]
                for w in range(hidden):
                    inputs[tile, j, w] = load(row[w])

    gates = np.empty((tiles, TILE, inner), np.float32)
    ups = np.empty((tiles, TILE, inner), np.float32)
    items = len(hit) * inner
    for worker in prange(workers):
        low, high = worker * items // workers, (worker + 1) * items // workers
        for h in range(low // inner, -(-high // inner)):
            begin, end = max(low - h * inner, 0), min(high - h * inner, inner)
            matrix = gate_up[hit[h]]
            for i in range(begin, end):
                _fetch_ahead(matrix, i)
                _fetch_ahead(matrix, inner + i)
                for tile in range(first[h], first[h + 1]):
                    gate, up = _dots(matrix[i], matrix[inner + i], inputs[tile])
                    for j in range(TILE):
                        gates[tile, j, i] = gate[j]
                        ups[tile, j, i] = up[j]
            for tile in range(first[h], first[h + 1]):
                for j in range(TILE):
                    _gated(gates[tile, j, begin:end], ups[tile, j, begin:end])

    results = np.empty((tiles, TILE, hidden), np.float32)
    for worker in prange(workers):
        begin, end = worker * hidden // workers, (worker + 1) * hidden // workers
        output[:, begin:end] = np.float32(0)
        for h in range(len(hit)):
            matrix = down[hit[h]]
            for r in range(begin, end, 2):
                second = min(r + 1, end - 1)
                _fetch_ahead(matrix, r)
                _fetch_ahead(matrix, second)
                for tile in range(first[h], first[h + 1]):
                    one, other = _dots(matrix[r], matrix[second], gates[tile])
                    for j in range(TILE):
                        results[tile, j, r] = one[j]
                        results[tile, j, second] = other[j]
            for tile in range(first[h], first[h + 1]):
                for j in range(TILE):
                    pair = places[tile, j]
                    if pair >= 0:
                        weight = weights[pair // top_k, pair % top_k]
                        _add(output[pair // top_k, begin:end], weight, results[tile, j, begin:end])
