"""Attention over pages on the CPU: decode rows by numba kernels, prefill pieces by matrix products."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import njit
from torch import Tensor

from statewise.ops.arrays import LIKE
from statewise.ops.batch import Batch
from statewise.ops.paged_attention import gqa_decode, mla_decode
from statewise.ops.paged_attention.prefill import prefill_grouped, prefill_latent
from statewise.ops.vector import flat


@njit(cache=True, nogil=True)
def _write(entries, cache, slots, sizes, steps):  # type: ignore[no-untyped-def]
    """Copy rows to their slots, or return False. Both are flat; `steps` between rows and between pages."""
    width, num_pages, page_size = sizes
    for t in range(len(slots)):
        if not 0 <= slots[t] < num_pages * page_size:
            return False
    for t in range(len(slots)):
        source = t * steps[0]
        target = slots[t] // page_size * steps[1] + slots[t] % page_size * width
        cache[target : target + width] = entries[source : source + width]
    return True


@njit(cache=True, nogil=True)
def _covered(pages, lengths, page_size, num_pages):  # type: ignore[no-untyped-def]
    """Whether every token of every sequence lies in a page of the cache."""
    for i in range(len(lengths)):
        used = -(-lengths[i] // page_size)
        if used > pages.shape[1]:
            return False
        for p in range(used):
            if not 0 <= pages[i, p] < num_pages:
                return False
    return True


def write_pages(entries: Tensor, cache: Tensor, batch: Batch) -> None:
    """See `statewise.ops.paged_attention.write_pages`."""
    sizes = (entries.shape[1], len(cache), batch.page_size)
    steps = (entries.stride(0), cache.stride(0))
    if not _write(flat(entries), flat(cache), batch.slots.numpy(), sizes, steps):
        raise ValueError(f"every slot must lie within the {len(cache)} pages of the cache")


def mla_attention(
    q_nope: Tensor, q_rope: Tensor, key_up: Tensor, value_up: Tensor, cache: Tensor, batch: Batch, scale: float
) -> Tensor:
    """See `statewise.ops.paged_attention.mla_attention`."""
    pages, lengths = _table(batch, cache)
    output = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], value_up.shape[1])
    decodes = batch.num_decodes
    if decodes:
        mla_decode.decode(
            (decodes, *key_up.shape, q_rope.shape[2], value_up.shape[1]),
            LIKE[cache.dtype],
            tuple(tensor.data_ptr() for tensor in (q_nope, q_rope, key_up, value_up, cache, output)),
            (*q_nope.stride()[:2], *q_rope.stride()[:2], key_up.stride(0), value_up.stride(0), cache.stride(0)),
            batch.page_size,
            pages,
            lengths,
            np.float32(scale),
            torch.get_num_threads(),
        )
    if decodes == batch.num_sequences:
        return output
    query = torch.cat([q_nope[decodes:], q_rope[decodes:]], dim=-1)
    for rows, own_pages, length in _pieces(batch):
        own = slice(rows.start - decodes, rows.stop - decodes)
        prefill_latent(query[own], key_up, value_up, cache, own_pages, length, scale, output[rows])
    return output


def gqa_attention(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    """See `statewise.ops.paged_attention.gqa_attention`."""
    pages, lengths = _table(batch, keys)
    heads, shared, value_width = q.shape[1], *values.shape[2:]
    output = q.new_empty(q.shape[0], heads, value_width)
    if batch.num_decodes:
        gqa_decode.decode(
            (batch.num_decodes, heads, shared, q.shape[2], value_width),
            LIKE[q.dtype],
            (q.data_ptr(), keys.data_ptr(), values.data_ptr(), output.data_ptr()),
            (*q.stride()[:2], keys.stride(0), values.stride(0)),
            batch.page_size,
            pages,
            lengths,
            np.float32(scale),
            torch.get_num_threads(),
        )
    if batch.num_decodes == batch.num_sequences:
        return output
    grouped, target = (x.view(len(x), shared, -1, x.shape[2]).permute(1, 2, 0, 3) for x in (q, output))
    for rows, own_pages, length in _pieces(batch):
        prefill_grouped(grouped[:, :, rows], keys, values, own_pages, length, scale, target[:, :, rows])
    return output


def _table(batch: Batch, cache: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(pages [N, P], lengths [N]) of the batch, all of them within the cache."""
    pages, lengths = batch.pages.numpy(), batch.lengths.numpy()
    if not _covered(pages, lengths, batch.page_size, len(cache)):
        raise ValueError(
            f"the pages of every sequence must cover it and lie within the {len(cache)} pages of the cache"
        )
    return pages, lengths


def _pieces(batch: Batch) -> Iterator[tuple[slice, Tensor, int]]:
    """(its rows, its pages [P], tokens of its sequence) for each prefill piece of the batch."""
    starts, lengths = batch.query_start.tolist(), batch.lengths.tolist()
    for sequence in range(batch.num_decodes, batch.num_sequences):
        yield slice(starts[sequence], starts[sequence + 1]), batch.pages[sequence], lengths[sequence]
