"""The gated delta rule (Gated DeltaNet, Kimi Delta Attention) over a mixed batch, its state kept per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.delta_rule.decay import log_decay
from statewise.ops.delta_rule.naive import naive_gated_delta_rule, recurrence

__all__ = ["gated_delta_rule", "log_decay", "naive_gated_delta_rule", "recurrence"]

DTYPES = (torch.float32, torch.bfloat16)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: Batch,
    scale: float,
    normalize: bool = True,
) -> Tensor:
    """o [T, H, V] in v.dtype for every row of the batch; the states move on in place. Formula: `recurrence`.

    q, k [T, Hk, K] and v [T, H, V] float32 or bfloat16, all of one dtype; rows may be slices of wider rows. H is a
    multiple of Hk, and value head h uses key head h // (H // Hk). g float32 log-decay <= 0, [T, H] per head or
    [T, H, K] per channel. beta [T, H] float32. state [blocks, H, K, V] float32 or bfloat16, every block
    contiguous: block `batch.records[i]` belongs to sequence i and counts as zero where `batch.fresh[i]`; the states of
    `batch.freezes` are written, too.
    `normalize`: q and k are first divided by their l2 norm. q is multiplied by `scale`. All mathematics is float32.
    Raises ValueError for a wrong shape, dtype or layout.
    """
    rows = batch.num_rows
    if q.ndim != 3 or q.shape[0] != rows or k.shape != q.shape:
        raise ValueError(f"q and k must be [{rows}, Hk, K], got {list(q.shape)} and {list(k.shape)}")
    if v.ndim != 3 or v.shape[0] != rows or v.shape[1] % q.shape[1]:
        raise ValueError(f"v must be [{rows}, multiple of {q.shape[1]}, V], got {list(v.shape)}")
    heads, keys = v.shape[1], q.shape[2]
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v must all be float32 or all bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}")
    if g.shape not in ((rows, heads), (rows, heads, keys)) or g.dtype != torch.float32:
        raise ValueError(
            f"g must be [{rows}, {heads}] or [{rows}, {heads}, {keys}] float32, got {list(g.shape)} {g.dtype}"
        )
    if beta.shape != (rows, heads) or beta.dtype != torch.float32:
        raise ValueError(f"beta must be [{rows}, {heads}] float32, got {list(beta.shape)} {beta.dtype}")
    if state.ndim != 4 or state.shape[1:] != (heads, keys, v.shape[2]) or state.dtype not in DTYPES:
        raise ValueError(
            f"state must be [blocks, {heads}, {keys}, {v.shape[2]}] float32 or bfloat16, "
            f"got {list(state.shape)} {state.dtype}"
        )
    inner = (keys * v.shape[2], v.shape[2], 1)
    if state.stride()[1:] != inner and not state[:1].is_contiguous():
        raise ValueError("state must be contiguous within a block")
    if v.device.type == "cpu":
        from statewise.ops.delta_rule.cpu import gated_delta_rule_cpu

        return gated_delta_rule_cpu(q, k, v, g, beta, state, batch, scale, normalize)
    raise NotImplementedError(f"gated_delta_rule has no kernel for device {v.device.type!r}")
