"""Prefill pieces of latent attention: keys and values are expanded from the latents, a bounded number at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 4096
"""Rows of a piece, and tokens of its history, that are taken at a time: it bounds the memory."""

ABSORB_ROWS = 128
"""Pieces of fewer rows meet their history in the absorbed form, which spares them the expansion of all its tokens."""


def prefill(
    query: Tensor,  # [L, H, Dn + Dr]
    key_up: Tensor,  # [H, Dn, R]
    value_up: Tensor,  # [H, Dv, R]
    cache: Tensor,  # [pages, page_size, R + Dr]
    pages: Tensor,  # [P]
    length: int,  # tokens of the sequence, the L rows of the piece included
    scale: float,
    output: Tensor,  # [L, H, Dv]
) -> None:
    """Causal attention of the last L tokens of one sequence over all of it.

    A piece sees its own tokens causally and its history without a mask. Softmaxes over disjoint keys are merged by
    their log-sum-exp: out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i) (FlashAttention,
    arXiv 2205.14135).
    """
    start = length - query.shape[0]
    for first in range(start, length, BLOCK):
        last = min(first + BLOCK, length)
        rows = query[first - start : last - start].transpose(0, 1)  # [H, rows, Dn + Dr]
        result, lse = _expanded(rows, key_up, value_up, _entries(cache, pages, first, last), scale, causal=True)
        for begin in range(0, first, BLOCK):
            entries = _entries(cache, pages, begin, min(begin + BLOCK, first))
            if last - first < ABSORB_ROWS:
                part, part_lse = _absorbed(rows, key_up, value_up, entries, scale)
            else:
                part, part_lse = _expanded(rows, key_up, value_up, entries, scale, causal=False)
            whole = torch.logaddexp(lse, part_lse)
            result = torch.lerp(result.float(), part.float(), torch.exp(part_lse - whole).unsqueeze(-1))
            lse = whole
        output[first - start : last - start] = result.transpose(0, 1)


def _entries(cache: Tensor, pages: Tensor, begin: int, end: int) -> Tensor:
    """Cache entries of positions begin..end of a sequence: [end - begin, R + Dr]."""
    size = cache.shape[1]
    first = begin // size
    entries = cache[pages[first : -(-end // size)]].flatten(0, 1)
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
    if query.shape[2] < width:
        query = F.pad(query, (0, width - query.shape[2]))
    result, lse = _attend(query, keys, values, scale, causal)
    return result[..., :value_width], lse


def _absorbed(query: Tensor, key_up: Tensor, value_up: Tensor, entries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same over a history, without expanding it: all heads share one key, the entry, and one value, its latent."""
    heads, nope, rank = key_up.shape
    absorbed = torch.cat([torch.bmm(query[..., :nope], key_up), query[..., nope:]], dim=-1)
    entries = entries.unsqueeze(0)
    latent, lse = _attend(absorbed.flatten(0, 1).unsqueeze(0), entries, entries, scale, causal=False)
    latent = latent.view(heads, query.shape[1], -1)[..., :rank]
    return torch.bmm(latent, value_up.transpose(1, 2)), lse.view(heads, -1)


def _pad(weight: Tensor, width: int) -> Tensor:
    """[H, D, R] -> [H, width, R] with zero rows."""
    return F.pad(weight, (0, 0, 0, width - weight.shape[1]))


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention [A, L, D] over [A, n, D] with its log-sum-exp: ([A, L, D], float32 [A, L])."""
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), 0.0, causal, scale=scale
    )
    return result.squeeze(0), lse.squeeze(0)
