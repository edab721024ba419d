"""Attention over pages, token by token: the specification."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from statewise.ops.batch import Batch


def write_pages(entries: Tensor, cache: Tensor, batch: Batch) -> None:
    """Write row t of `entries` [T, ...] to slot `batch.slots[t]` of `cache` [pages, page_size, ...], in place."""
    for entry, slot in zip(entries, batch.slots.tolist(), strict=True):
        cache[slot // batch.page_size, slot % batch.page_size] = entry


def mla_attention(
    q_nope: Tensor,  # [T, H, Dn]
    q_rope: Tensor,  # [T, H, Dr]
    key_up: Tensor,  # [H, Dn, R]
    value_up: Tensor,  # [H, Dv, R]
    cache: Tensor,  # [pages, page_size, R + Dr]
    batch: Batch,
    scale: float,
) -> Tensor:
    """Multi-head latent attention, expanded form (DeepSeek-V2, arXiv 2405.04434, §2.1). Returns [T, H, Dv].

    With l_p the latent and r_p the shared rope key of the token at position p, for a query at position t and head h:

        k_p = key_up[h] l_p      v_p = value_up[h] l_p
        s_p = scale * (q_nope . k_p + q_rope . r_p)
        out = sum over p <= t of softmax(s)_p v_p
    """
    rank = key_up.shape[2]
    output = torch.empty(*q_nope.shape[:2], value_up.shape[1], dtype=q_nope.dtype)
    starts = batch.query_start.tolist()
    for sequence, (begin, end) in enumerate(pairwise(starts)):
        for row in range(begin, end):
            position = torch.arange(int(batch.positions[row]) + 1)
            page = batch.pages[sequence, position // batch.page_size]
            entry = cache[page, position % batch.page_size].to(key_up.dtype)  # [positions, R + Dr]
            key = torch.einsum("hdr,pr->hpd", key_up, entry[:, :rank])
            value = torch.einsum("hdr,pr->hpd", value_up, entry[:, :rank])
            score = torch.einsum("hd,hpd->hp", q_nope[row], key)
            score += torch.einsum("hd,pd->hp", q_rope[row], entry[:, rank:])
            weight = torch.softmax(score * scale, dim=-1)
            output[row] = torch.einsum("hp,hpd->hd", weight, value)
    return output


def gqa_attention(
    q: Tensor,  # [T, H, D]
    keys: Tensor,  # [pages, page_size, Hkv, D]
    values: Tensor,  # [pages, page_size, Hkv, Dv]
    batch: Batch,
    scale: float,
) -> Tensor:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245, §2.2). Returns [T, H, Dv].

    With k_p and v_p the key and value that the token at position p has for key head h // (H / Hkv), for a query at
    position t and head h:

        s_p = scale * q . k_p      out = sum over p <= t of softmax(s)_p v_p
    """
    group = q.shape[1] // keys.shape[2]
    output = torch.empty(*q.shape[:2], values.shape[3], dtype=q.dtype)
    starts = batch.query_start.tolist()
    for sequence, (begin, end) in enumerate(pairwise(starts)):
        for row in range(begin, end):
            position = torch.arange(int(batch.positions[row]) + 1)
            page, offset = batch.pages[sequence, position // batch.page_size], position % batch.page_size
            key = keys[page, offset].repeat_interleave(group, dim=1)  # [positions, H, D]
            value = values[page, offset].repeat_interleave(group, dim=1)
            weight = torch.softmax(torch.einsum("hd,phd->hp", q[row], key) * scale, dim=-1)
            output[row] = torch.einsum("hp,phd->hd", weight, value)
    return output
