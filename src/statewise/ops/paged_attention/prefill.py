"""Prefill pieces of attention over pages: by torch's fused kernel, a bounded number of rows and keys at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 4096
"""Rows of a piece, and tokens of its history, that are taken at a time: it bounds the memory."""

ABSORB_ROWS = 128
"""Latent attention: pieces of fewer rows meet their history in the absorbed form, which spares them the expansion of
all its tokens."""

Attend = Callable[[Tensor, int, int, bool], tuple[Tensor, Tensor]]
"""(rows [..., n, D], begin, end, causal) -> attention of some rows over positions begin..end of their sequence
[..., n, Dv] and its log-sum-exp [..., n]."""


def prefill_latent(
    query: Tensor,  # [L, H, Dn + Dr]
    key_up: Tensor,  # [H, Dn, R]
    value_up: Tensor,  # [H, Dv, R]
    cache: Tensor,  # [pages, page_size, R + Dr]
    pages: Tensor,  # [P]
    length: int,  # tokens of the sequence, the L rows of the piece included
    scale: float,
    output: Tensor,  # [L, H, Dv]
) -> None:
    """Causal latent attention of the last L tokens of one sequence over all of it."""

    def attend(rows: Tensor, begin: int, end: int, causal: bool) -> tuple[Tensor, Tensor]:
        entries = _entries(cache, pages, begin, end)
        if not causal and rows.shape[1] < ABSORB_ROWS:
            return _absorbed(rows, key_up, value_up, entries, scale)
        return _expanded(rows, key_up, value_up, entries, scale, causal)

    _in_blocks(query.transpose(0, 1), length, attend, output.transpose(0, 1))


def prefill_grouped(
    query: Tensor,  # [Hkv, G, L, D], G = H / Hkv
    keys: Tensor,  # [pages, page_size, Hkv, D]
    values: Tensor,  # [pages, page_size, Hkv, Dv]
    pages: Tensor,  # [P]
    length: int,  # tokens of the sequence, the L rows of the piece included
    scale: float,
    output: Tensor,  # [Hkv, G, L, Dv]
) -> None:
    """Causal grouped-query attention of the last L tokens of one sequence over all of it."""
    value_width = values.shape[3]
    width = max(query.shape[3], value_width)  # the fused kernel wants keys and values equally wide: pad with zeros

    def attend(rows: Tensor, begin: int, end: int, causal: bool) -> tuple[Tensor, Tensor]:
        key = _widen(_entries(keys, pages, begin, end), width).transpose(0, 1).unsqueeze(1)  # [Hkv, 1, n, width]
        value = _widen(_entries(values, pages, begin, end), width).transpose(0, 1).unsqueeze(1)
        rows = _widen(rows, width)
        sizes = rows.shape[:3]
        if causal:
            key, value = key.expand(-1, sizes[1], -1, -1), value.expand(-1, sizes[1], -1, -1)
        else:  # without a mask the rows of the heads that share a key are as good as rows of one head, and faster
            rows = rows.flatten(1, 2).unsqueeze(1)
        result, lse = _attend(rows, key, value, scale, causal)
        return result.reshape(*sizes, width)[..., :value_width], lse.reshape(sizes)

    _in_blocks(query, length, attend, output)


def _in_blocks(query: Tensor, length: int, attend: Attend, output: Tensor) -> None:
    """Attention of query [..., L, D], the last L of `length` tokens, written to output [..., L, Dv].

    A piece sees its own tokens causally and its history without a mask. Softmaxes over disjoint keys are merged by
    their log-sum-exp: out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i) (FlashAttention,
    arXiv 2205.14135).
    """
    start = length - query.shape[-2]
    for first in range(start, length, BLOCK):
        last = min(first + BLOCK, length)
        rows = query[..., first - start : last - start, :]
        result, lse = attend(rows, first, last, True)
        for begin in range(0, first, BLOCK):
            part, part_lse = attend(rows, begin, min(begin + BLOCK, first), False)
            whole = torch.logaddexp(lse, part_lse)
            result = torch.lerp(result.float(), part.float(), torch.exp(part_lse - whole).unsqueeze(-1))
            lse = whole
        output[..., first - start : last - start, :] = result


def _entries(cache: Tensor, pages: Tensor, begin: int, end: int) -> Tensor:
    """What the cache [pages, page_size, ...] holds of positions begin..end of a sequence: [end - begin, ...]."""
    size = cache.shape[1]
    first = begin // size
    entries = cache.index_select(0, pages[first : -(-end // size)]).flatten(0, 1)
    return entries[begin - first * size : end - first * size]


def _expanded(
    query: Tensor, key_up: Tensor, value_up: Tensor, entries: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of query [H, L, Dn + Dr] over expanded keys and values: ([H, L, Dv], log-sum-exp [H, L])."""
    heads, nope, rank = key_up.shape
    value_width = value_up.shape[1]
    latent, rope = entries[:, :rank], entries[:, rank:]
    width = max(query.shape[2], value_width)  # the fused kernel wants keys and values equally wide: pad with zeros
    key = _pad(key_up, width).flatten(0, 1)
    value = _pad(value_up, width).flatten(0, 1)
    keys = F.linear(latent, key).view(-1, heads, width).transpose(0, 1)  # [H, n, width]
    keys[..., nope : nope + rope.shape[1]] = rope
    values = F.linear(latent, value).view(-1, heads, width).transpose(0, 1)
    result, lse = _attend(_widen(query, width)[None], keys[None], values[None], scale, causal)
    return result.squeeze(0)[..., :value_width], lse.squeeze(0)


def _absorbed(query: Tensor, key_up: Tensor, value_up: Tensor, entries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same over a history, without expanding it: all heads share one key, the entry, and one value, its latent."""
    heads, nope, rank = key_up.shape
    absorbed = torch.cat([torch.bmm(query[..., :nope], key_up), query[..., nope:]], dim=-1)
    entries = entries[None, None]
    latent, lse = _attend(absorbed.flatten(0, 1)[None, None], entries, entries, scale, causal=False)
    latent = latent.view(heads, query.shape[1], -1)[..., :rank]
    return torch.bmm(latent, value_up.transpose(1, 2)), lse.view(heads, -1)


def _pad(weight: Tensor, width: int) -> Tensor:
    """[H, D, R] -> [H, width, R] with zero rows."""
    return F.pad(weight, (0, 0, 0, width - weight.shape[1]))


def _widen(rows: Tensor, width: int) -> Tensor:
    """[..., D] -> [..., width] with zeros behind."""
    return rows if rows.shape[-1] == width else F.pad(rows, (0, width - rows.shape[-1]))


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention [A, H, L, D] over [A, H, n, D] with its log-sum-exp: ([A, H, L, D], float32 [A, H, L])."""
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scale
    )
    return result, lse
