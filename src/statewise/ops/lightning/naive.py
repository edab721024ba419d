"""The specification of lightning attention: its recurrence, and a layer's arithmetic between the projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.rope.naive import naive_rotary

if TYPE_CHECKING:
    from statewise.ops.lightning import LightningWeights


def recurrence(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence, q already scaled: per token and head (MiniMax-01, arXiv 2501.08313; Ring-linear, arXiv 2510.19338)

        S <- e^(-s) S + k v^T;   o = S^T q

    The current token counts in full: what decays is the state before it. q, k [T, H, K]; v [T, H, V]; slopes s [H]
    per token; state [H, K, V]; all of one dtype. Returns (o [T, H, V], final state).
    """
    state, outputs = initial_state.clone(), torch.empty_like(v)
    decay = (-slopes).exp()[:, None, None]
    for t in range(q.shape[0]):
        state = decay * state + torch.einsum("hk,hv->hkv", k[t], v[t])
        outputs[t] = torch.einsum("hkv,hk->hv", state, q[t])
    return outputs, state


def naive_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    batch: Batch,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`lightning_attention` sequence by sequence through `recurrence`, calculated in `dtype`."""
    wide_q, wide_k, wide_v, slopes = q.to(dtype) * scale, k.to(dtype), v.to(dtype), slopes.to(dtype)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    for i, block in enumerate(batch.records.tolist()):
        current = (torch.zeros_like(state[block]) if batch.fresh[i] else state[block]).to(dtype)
        for rows, kept in batch.runs(i):
            o, current = recurrence(wide_q[rows], wide_k[rows], wide_v[rows], slopes, current)
            output[rows] = o.to(v.dtype)
            state[kept] = current.to(state.dtype)
    return output


def naive_lightning(
    projected: Tensor,
    weights: LightningWeights,
    recurrent: Tensor,
    batch: Batch,
    reduce: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """With q, k, v after SiLU (if any), q and k after their norm per head and the rotation (if any):

    o = lightning attention;  y = RMSNorm(o in groups of columns) norm sigmoid(gate)
    """
    q, k, v, gate = projected.to(dtype).chunk(4, dim=-1)
    if weights.silu:
        q, k, v = (torch.nn.functional.silu(part) for part in (q, k, v))
    q, k, v = (part.unflatten(-1, (len(weights.slopes), -1)) for part in (q, k, v))
    q = naive_rotary(q, weights.frequencies, batch.positions, weight=weights.query_norm, eps=weights.qk_eps)
    k = naive_rotary(k, weights.frequencies, batch.positions, weight=weights.key_norm, eps=weights.qk_eps)
    o = naive_lightning_attention(q, k, v, weights.slopes, recurrent, batch, weights.scale, dtype=dtype)
    groups = o.flatten(1).unflatten(1, (-1, min(weights.group_width, len(weights.norm))))
    squares = groups.square().sum(-1)
    if reduce is not None:
        squares = reduce(squares)
    normed = (groups * torch.rsqrt(squares / weights.group_width + weights.eps)[..., None]).flatten(1)
    gated: Tensor = normed * weights.norm.to(dtype) * gate.sigmoid()
    return gated.to(projected.dtype)
