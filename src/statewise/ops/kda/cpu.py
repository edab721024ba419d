"""KDA between its projections on the CPU: the decode rows in one launch, the prefill rows operator by operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from statewise.ops.arrays import as_array
from statewise.ops.batch import Batch
from statewise.ops.delta_rule import gated_delta_rule, log_decay
from statewise.ops.delta_rule.recurrent_cpu import head_step
from statewise.ops.norm import gated_rms_norm
from statewise.ops.short_convolution import short_convolution
from statewise.ops.vector import exponential, flat, load, sigmoid, softplus, store

if TYPE_CHECKING:
    from statewise.ops.kda import KdaWeights

SHARED_FROM = 4  # sequences times heads per thread; below, a second core costs more than it saves


def kernel_arguments(weights: KdaWeights, conv: Tensor, recurrent: Tensor) -> tuple[Any, ...]:
    """What the decode kernel gets at every step of a layer. The matrices lie transposed, so that its loops run along
    contiguous outputs; the views of the pool stay valid as long as the pool."""
    heads, keys, values, rank = weights.sizes
    matrices = (weights.conv, weights.decay_up, weights.gate_up)
    return (
        *(as_array(matrix.t().contiguous()) for matrix in matrices),
        *(as_array(vector) for vector in (weights.a_log.exp(), weights.dt_bias, weights.norm)),
        flat(conv),
        conv.stride(),
        flat(recurrent),
        recurrent.stride(0),
        (heads, keys, values, rank, conv.shape[2]),
        np.float32(weights.scale),
        np.float32(weights.eps),
    )


def kda_cpu(projected: Tensor, weights: KdaWeights, conv: Tensor, recurrent: Tensor, batch: Batch) -> Tensor:
    decodes = batch.num_decodes
    if batch.chunks is None:
        return decode(projected, weights, conv, recurrent, batch)
    pieces = prefill(projected[decodes:], weights, conv, recurrent, batch.prefills)
    if decodes == 0:
        return pieces
    return torch.cat((decode(projected[:decodes], weights, conv, recurrent, batch), pieces))


def prefill(projected: Tensor, weights: KdaWeights, conv: Tensor, recurrent: Tensor, batch: Batch) -> Tensor:
    heads, keys, values, _ = weights.sizes
    qkv, f, gate, beta = torch.split(projected, list(weights.widths), dim=-1)
    qkv = short_convolution(qkv, weights.conv, conv, batch)
    q, k, v = torch.split(qkv, [heads * keys, heads * keys, heads * values], dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
    g = log_decay(F.linear(f, weights.decay_up).unflatten(-1, (heads, -1)), weights.a_log, weights.dt_bias)
    o = gated_delta_rule(q, k, v, g, beta.float().sigmoid(), recurrent, batch, weights.scale)
    gates = F.linear(gate, weights.gate_up).unflatten(-1, (heads, -1))
    return gated_rms_norm(o, weights.norm, gates, weights.eps).flatten(1)


def decode(projected: Tensor, weights: KdaWeights, conv: Tensor, recurrent: Tensor, batch: Batch) -> Tensor:
    heads, _, values, _ = weights.sizes
    rows = projected.shape[0]
    output = projected.new_empty(rows, heads * values)
    arguments = (
        *weights.kernel_arguments(conv, recurrent),
        as_array(projected),
        as_array(output),
        batch.arrays.records,
        batch.arrays.fresh,
    )
    tasks = rows * heads
    parts = min(numba.get_num_threads(), tasks // SHARED_FROM)
    if parts > 1:
        steps_parallel(*arguments, tasks, parts)
    else:
        steps(*arguments, 0, tasks)
    return output


FAST = {"contract", "reassoc", "nsz"}


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def convolve(row: Any, weight: Any, window: Any, steps: Any, columns: int, first: int, result: Any) -> None:
    """result = SiLU of the convolution of len(result) channels from `first` on; their windows take in the row.

    weight [taps, channels]. `window` is the block of the sequence, `steps` the elements between channels and columns.
    """
    taps, width = weight.shape[0], len(result)
    inputs, weights = row[first : first + width], weight[:, first : first + width]
    for c in range(width):
        result[c] = weights[taps - 1, c] * load(inputs[c])
    if steps[0] == 1:  # channel-last: every column is contiguous
        for j in range(columns):
            column = window[j * steps[1] + first : j * steps[1] + first + width]
            tap = j - columns + taps - 1
            if tap >= 0:
                for c in range(width):
                    result[c] += weights[tap, c] * load(column[c])
            if j > 0:
                before = window[(j - 1) * steps[1] + first : (j - 1) * steps[1] + first + width]
                for c in range(width):
                    before[c] = column[c]
        newest = window[(columns - 1) * steps[1] + first : (columns - 1) * steps[1] + first + width]
        for c in range(width):
            newest[c] = inputs[c]
    else:
        for c in range(width):
            at = (first + c) * steps[0]
            for j in range(columns):
                tap = j - columns + taps - 1
                if tap >= 0:
                    result[c] += weights[tap, c] * load(window[at + j * steps[1]])
                if j > 0:
                    window[at + (j - 1) * steps[1]] = window[at + j * steps[1]]
            window[at + (columns - 1) * steps[1]] = inputs[c]
    for c in range(width):
        result[c] *= sigmoid(result[c])


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def expand(low: Any, matrix: Any, first: int, result: Any) -> None:
    """result = low @ matrix[:, first : first + len(result)]; four rows share the loads and stores of the result."""
    width, rank = len(result), len(low)
    result[:] = 0.0
    for r in range(0, rank // 4 * 4, 4):
        a0, a1, a2, a3 = load(low[r]), load(low[r + 1]), load(low[r + 2]), load(low[r + 3])
        m0, m1 = matrix[r, first : first + width], matrix[r + 1, first : first + width]
        m2, m3 = matrix[r + 2, first : first + width], matrix[r + 3, first : first + width]
        for c in range(width):
            result[c] += a0 * load(m0[c]) + a1 * load(m1[c]) + a2 * load(m2[c]) + a3 * load(m3[c])
    for r in range(rank // 4 * 4, rank):
        for c in range(width):
            result[c] += load(low[r]) * load(matrix[r, first + c])


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def steps(
    conv_weight: Any,
    decay_up: Any,
    gate_up: Any,
    rates: Any,
    dt_bias: Any,
    norm: Any,
    conv: Any,
    conv_steps: tuple[int, int, int],  # elements between blocks, channels and columns
    recurrent: Any,
    block_step: int,
    sizes: tuple[int, int, int, int, int],  # heads, keys, values, rank, columns of the window
    scale: Any,
    eps: Any,
    projected: Any,
    output: Any,
    records: Any,
    fresh: Any,
    first: int,  # tasks first .. last - 1; task = head * sequences + sequence
    last: int,
) -> None:
    heads, keys, values, rank, columns = sizes
    sequences = projected.shape[0]
    query, key, decay = np.empty(keys, np.float32), np.empty(keys, np.float32), np.empty(keys, np.float32)
    value, read, gate = np.empty(values, np.float32), np.empty(values, np.float32), np.empty(values, np.float32)
    scratch = np.empty(2 * keys + values, np.float32)
    at_f = heads * (2 * keys + values)
    for task in range(first, last):
        h, i = task // sequences, task % sequences  # one head of all sequences, then the next: its weights stay near
        row = projected[i]
        window = conv[records[i] * conv_steps[0] :]
        begin = records[i] * block_step + h * keys * values
        matrix = recurrent[begin : begin + keys * values].reshape(keys, values)
        if fresh[i]:
            matrix[:] = 0
            for at in ((h * keys, keys), ((heads + h) * keys, keys), (2 * heads * keys + h * values, values)):
                for c in range(at[0], at[0] + at[1]):
                    for j in range(columns):
                        window[c * conv_steps[1] + j * conv_steps[2]] = 0
        convolve(row, conv_weight, window, conv_steps[1:], columns, h * keys, query)
        convolve(row, conv_weight, window, conv_steps[1:], columns, (heads + h) * keys, key)
        convolve(row, conv_weight, window, conv_steps[1:], columns, 2 * heads * keys + h * values, value)
        query_square, key_square = np.float32(0.0), np.float32(0.0)
        for c in range(keys):
            query_square += query[c] * query[c]
            key_square += key[c] * key[c]
        query_factor = scale / np.sqrt(query_square + np.float32(1e-6))
        key_factor = np.float32(1.0) / np.sqrt(key_square + np.float32(1e-6))
        expand(row[at_f : at_f + rank], decay_up, h * keys, decay)
        rate = rates[h]
        for c in range(keys):
            query[c] *= query_factor
            key[c] *= key_factor
            decay[c] = exponential(-rate * softplus(decay[c] + dt_bias[h * keys + c]))
        following = min(task + 1, last - 1)
        begin = records[following % sequences] * block_step + following // sequences * keys * values
        upcoming = recurrent[begin : begin + keys * values].reshape(keys, values)
        head_step(query, key, decay, value, sigmoid(load(row[at_f + 2 * rank + h])), matrix, upcoming, scratch, read)
        expand(row[at_f + rank : at_f + 2 * rank], gate_up, h * values, gate)
        square = np.float32(0.0)
        for x in range(values):
            square += read[x] * read[x]
        factor = np.float32(1.0) / np.sqrt(square / np.float32(values) + eps)
        for x in range(values):
            store(output[i], h * values + x, read[x] * factor * load(norm[x]) * sigmoid(gate[x]))


@numba.njit(nogil=True, cache=True, parallel=True)
def steps_parallel(
    conv_weight: Any,
    decay_up: Any,
    gate_up: Any,
    rates: Any,
    dt_bias: Any,
    norm: Any,
    conv: Any,
    conv_steps: tuple[int, int, int],
    recurrent: Any,
    block_step: int,
    sizes: tuple[int, int, int, int, int],
    scale: Any,
    eps: Any,
    projected: Any,
    output: Any,
    records: Any,
    fresh: Any,
    tasks: int,
    parts: int,
) -> None:
    for part in numba.prange(parts):
        steps(
            conv_weight, decay_up, gate_up, rates, dt_bias, norm, conv, conv_steps, recurrent, block_step, sizes, scale,
            eps, projected, output, records, fresh, part * tasks // parts, (part + 1) * tasks // parts,
        )  # fmt: skip
