"""Lightning attention on the CPU: decode rows by the recurrent step, prefill rows chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

from statewise.ops.arrays import LIKE, as_array
from statewise.ops.batch import CHUNK, Batch
from statewise.ops.lightning.chunked_cpu import chunked_prefill, write_chunks
from statewise.ops.lightning.output_norm import finish_chunks, finish_parallel, sums_parallel
from statewise.ops.lightning.recurrent_cpu import decode, decode_parallel, step, step_parallel
from statewise.ops.rope import rotary_tables

if TYPE_CHECKING:
    from statewise.ops.lightning import LightningWeights

SHARED_FROM = 4  # sequences times heads per thread; below, a second core costs more than it saves
NONE = torch.empty(0, dtype=torch.float32)


def kernel_arguments(
    dtype: torch.dtype,
    slopes: Tensor,
    norms: tuple[Tensor, Tensor, Tensor],  # of queries, keys and output; empty: none
    sizes: tuple[int, int, int, int, int],  # H, K, V, R/2, columns of a norm group
    silu: bool,
    numbers: tuple[float, float, float],  # scale of q, epsilon of the norms of q and k, of the output norm
    state: Tensor,
) -> tuple[Any, ...]:
    """What every kernel gets first: `head_row` and `step` say what it is."""
    exponents = -slopes.double()[:, None] * torch.arange(CHUNK, -1, -1)
    tables = (exponents.exp(), -torch.expm1(-slopes.double()), *norms)
    _, _, width, _, group = sizes
    return (
        LIKE[dtype],
        LIKE[state.dtype],
        tuple(table.detach().float().flatten().numpy() for table in tables),
        (*sizes, gcd(width, group)),
        silu,
        numbers,
        (state.data_ptr(), state.stride(0)),
    )


def layer_arguments(weights: LightningWeights, recurrent: Tensor) -> tuple[Any, ...]:
    heads, width = weights.sizes
    half = 0 if weights.frequencies is None else weights.frequencies.shape[0]
    query_norm, key_norm = (NONE if norm is None else norm for norm in (weights.query_norm, weights.key_norm))
    return kernel_arguments(
        weights.norm.dtype,
        weights.slopes,
        (query_norm, key_norm, weights.norm),
        (heads, width, width, half, weights.group_width),
        weights.silu,
        (float(weights.scale), float(weights.qk_eps), float(weights.eps)),
        recurrent,
    )


def lightning_cpu(
    projected: Tensor,
    weights: LightningWeights,
    recurrent: Tensor,
    batch: Batch,
    reduce: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    layer = weights.kernel_arguments(recurrent)
    rows, width = projected.shape
    columns, address, item = width // 4, projected.data_ptr(), projected.itemsize
    output = projected.new_empty(rows, columns)
    cos, sin = 0, 0
    if weights.frequencies is not None:
        tables = rotary_tables(weights.frequencies, batch)
        cos, sin = tables[0].data_ptr(), tables[1].data_ptr()
    sources = (address, address + columns * item, address + 2 * columns * item, cos, sin)
    steps, gates, target = (width, width, width), (address + 3 * columns * item, width), output.data_ptr()
    if reduce is not None:
        whole = torch.empty(rows, columns, dtype=torch.float32)
        attend(layer, sources, steps, batch, whole.view(-1).numpy())
        finish_across_ranks(layer, whole, gates, target, reduce)
        return output
    decodes, heads = batch.num_decodes, weights.sizes[0]
    if decodes:
        arguments = (*layer, sources, steps, gates, target, batch.arrays.records, batch.arrays.fresh, decodes)
        parts = min(numba.get_num_threads(), decodes * heads // SHARED_FROM)
        if parts > 1:
            decode_parallel(*arguments, parts)
        else:
            decode(*arguments)
    if batch.chunks is not None:
        like, _, tables, sizes, _, numbers, _ = layer

        def deliver(results: np.ndarray, chunk_rows: np.ndarray, chunks: np.ndarray) -> None:
            parts = numba.get_num_threads()
            finish_chunks(like, tables, sizes, numbers, gates, target, results, chunk_rows, chunks, rows, parts)

        chunked_prefill(layer, sources, steps, batch, batch.chunks, deliver)
    return output


def lightning_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor, batch: Batch, scale: float
) -> Tensor:
    q, k, v = (x if x.is_contiguous() or x[:1].is_contiguous() else x.contiguous() for x in (q, k, v))
    _, heads, width = v.shape
    sizes = (heads, q.shape[2], width, 0, width)
    layer = kernel_arguments(v.dtype, slopes, (NONE, NONE, NONE), sizes, False, (float(scale), 0.0, 0.0), state)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    sources = (q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, 0)
    attend(layer, sources, (q.stride(0), k.stride(0), v.stride(0)), batch, as_array(output).reshape(-1))
    return output


def attend(
    layer: tuple[Any, ...],
    sources: tuple[int, int, int, int, int],
    steps: tuple[int, int, int],
    batch: Batch,
    output: np.ndarray,
) -> None:
    """The read-outs [T, H V] of all rows, into the flat memory of `output`; the states move on in place."""
    sizes, threads = layer[3], numba.get_num_threads()
    tasks = batch.num_decodes * sizes[0]
    if tasks:
        arguments = (*layer, sources, steps, batch.arrays.records, batch.arrays.fresh, output)
        parts = min(threads, tasks // SHARED_FROM)
        if parts > 1:
            step_parallel(*arguments, tasks, parts)
        else:
            step(*arguments, 0, tasks)
    if batch.chunks is not None:

        def deliver(results: np.ndarray, rows: np.ndarray, chunks: np.ndarray) -> None:
            write_chunks(results, rows, chunks, sizes, output, batch.num_rows, threads)

        chunked_prefill(layer, sources, steps, batch, batch.chunks, deliver)


def finish_across_ranks(
    layer: tuple[Any, ...],
    o: Tensor,
    gates: tuple[int, int],
    target: int,
    reduce: Callable[[Tensor], Tensor],
) -> None:
    """Norm and gate of read-outs [T, H V] whose norm groups have more columns on other ranks."""
    like, _, tables, sizes, _, numbers, _ = layer
    rows, columns = o.shape
    parts, flat = numba.get_num_threads(), o.view(-1).numpy()
    totals = torch.empty(rows, max(1, columns // sizes[4]), dtype=torch.float32)
    sums_parallel(sizes, flat, totals.numpy(), parts)
    totals = reduce(totals).contiguous()
    finish_parallel(like, tables, sizes, numbers, gates, target, flat, totals.view(-1).numpy(), rows, parts)
