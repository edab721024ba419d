"""Latent attention over pages on the CPU: decode rows by a numba kernel, prefill pieces by matrix products."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from statewise.ops.arrays import LIKE, as_array
from statewise.ops.batch import Batch
from statewise.ops.paged_attention.decode import decode
from statewise.ops.paged_attention.prefill import prefill


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
    if not _write(_memory(entries), _memory(cache), batch.slots.numpy(), sizes, steps):
        raise ValueError(f"every slot must lie within the {len(cache)} pages of the cache")


def mla_attention(
    q_nope: Tensor, q_rope: Tensor, key_up: Tensor, value_up: Tensor, cache: Tensor, batch: Batch, scale: float
) -> Tensor:
    """See `statewise.ops.paged_attention.mla_attention`."""
    pages, lengths = batch.pages.numpy(), batch.lengths.numpy()
    if not _covered(pages, lengths, batch.page_size, len(cache)):
        raise ValueError(
            f"the pages of every sequence must cover it and lie within the {len(cache)} pages of the cache"
        )
    output = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], value_up.shape[1])
    decodes = batch.num_decodes
    if decodes:
        decode(
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
    starts = batch.query_start.tolist()
    for sequence in range(decodes, batch.num_sequences):
        begin, end = starts[sequence], starts[sequence + 1]
        prefill(
            query[begin - decodes : end - decodes],
            key_up,
            value_up,
            cache,
            batch.pages[sequence],
            int(lengths[sequence]),
            scale,
            output[begin:end],
        )
    return output


def _memory(tensor: Tensor) -> np.ndarray:
    """All memory from the first element of a tensor to its last, as one flat array."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return as_array(tensor.as_strided((last + 1,), (1,)))
