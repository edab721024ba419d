"""The specification of the gated delta rule, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.batch import Batch


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence, q already scaled: per token and head

        S <- diag(e^g) S;   u = beta (v - S^T k);   S <- S + k u^T;   o = S^T q

    The decay comes first, and u reads the decayed state. g is one log-decay per head (Gated DeltaNet, Yang et al.
    2024, arXiv 2412.06464) or one per key channel (Kimi Delta Attention, arXiv 2510.26692).
    q, k [T, H, K]; v [T, H, V]; g [T, H] or [T, H, K]; beta [T, H]; state [H, K, V]; all of one dtype.
    Returns (o [T, H, V], final state).
    """
    state, outputs = initial_state.clone(), torch.empty_like(v)
    decay = g.exp() if g.ndim == 3 else g.exp()[..., None]  # [T, H, K or 1]
    for t in range(q.shape[0]):
        state = decay[t, :, :, None] * state
        error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], beta[t, :, None] * error)
        outputs[t] = torch.einsum("hkv,hk->hv", state, q[t])
    return outputs, state


def normalized(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dim; the epsilon is added to the sum (`qwen3_next`, `kimi_linear`)."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: Batch,
    scale: float,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`gated_delta_rule` sequence by sequence through `recurrence`, calculated in `dtype`."""
    heads = v.shape[1]
    q, k, v_, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if normalize:
        q, k = normalized(q), normalized(k)
    q, k = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (q * scale, k))
    output = torch.empty_like(v)
    for i, block in enumerate(batch.records.tolist()):
        current = (torch.zeros_like(state[block]) if batch.fresh[i] else state[block]).to(dtype)
        for rows, kept in batch.runs(i):
            o, current = recurrence(q[rows], k[rows], v_[rows], g[rows], beta[rows], current)
            output[rows] = o.to(v.dtype)
            state[kept] = current.to(state.dtype)
    return output
