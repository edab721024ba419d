"""Mixture of experts on the CPU: numba kernels for few rows per expert, matrix products for many."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange
from torch import Tensor

from statewise.ops.arrays import as_array
from statewise.ops.moe import few_rows, routing
from statewise.ops.vector import load, store

FEW = 8
"""Up to this many rows per expert on average, `few_rows` is used: measured, it is ahead of the matrix products."""


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    softmax: bool,
    renormalize: bool,
    scale: float,
    num_groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    """See `statewise.ops.moe.route`."""
    rows, experts = logits.shape
    ids = torch.empty(rows, top_k, dtype=torch.int64)
    weights = torch.empty(rows, top_k)
    routing.choose(
        logits.contiguous().numpy(),
        np.zeros(experts, np.float32) if bias is None else bias.contiguous().numpy(),
        softmax,
        renormalize,
        np.float32(scale),
        num_groups,
        top_groups,
        ids.numpy(),
        weights.numpy(),
    )
    return ids, weights


def expert_mlp(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `statewise.ops.moe.expert_mlp`."""
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    experts = down.shape[0]
    if not _within(ids.numpy(), experts):
        raise ValueError(f"ids must be from 0 to {experts - 1}")
    if ids.numel() > FEW * experts:
        return _many_rows(x, ids, weights, gate_up, down)
    output = torch.empty(x.shape)
    few_rows.expert_mlp(
        as_array(x),
        ids.numpy(),
        weights.numpy(),
        as_array(gate_up),
        as_array(down),
        torch.get_num_threads(),
        output.numpy(),
    )
    return output.to(x.dtype)


@njit(cache=True, nogil=True)
def _within(ids, experts):  # type: ignore[no-untyped-def]
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if not 0 <= ids[t, k] < experts:
                return False
    return True


def _many_rows(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sort the pairs (row, k) by expert, two matrix products per expert that is hit, and sum each row's results."""
    top_k, inner = ids.shape[1], down.shape[2]
    order = ids.flatten().argsort(stable=True)
    source = order // top_k
    counts = ids.flatten().bincount(minlength=down.shape[0]).tolist()
    results = torch.empty(ids.numel(), x.shape[1], dtype=x.dtype)
    end = 0
    for expert, count in enumerate(counts):
        if count:
            begin, end = end, end + count
            both = F.linear(x.index_select(0, source[begin:end]), gate_up[expert])
            middle = F.silu(both[:, :inner], inplace=True).mul_(both[:, inner:])
            torch.mm(middle, down[expert].t(), out=results[begin:end])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    output = torch.empty_like(x)
    _combine(as_array(results), place.view(ids.shape).numpy(), weights.numpy(), as_array(output))
    return output


@njit(cache=True, nogil=True, parallel=True)
def _combine(results, place, weights, output):  # type: ignore[no-untyped-def]
    """output [T, hidden] = sum over k of weights [T, k] * results [place [T, k]], in float32, cast once."""
    for t in prange(output.shape[0]):
        total = np.zeros(output.shape[1], np.float32)
        for k in range(place.shape[1]):
            row = results[place[t, k]]
            weight = weights[t, k]
            for w in range(len(total)):
                total[w] += weight * load(row[w])
        target = output[t]
        for w in range(len(total)):
            store(target, w, total[w])
