"""Mixture of experts on the CPU: numba kernels for few rows per expert, matrix products for many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange
from torch import Tensor

from statewise.ops.arrays import LIKE, as_array
from statewise.ops.moe import few_rows, routing
from statewise.ops.vector import load, store

if TYPE_CHECKING:
    from statewise.ops.moe import Experts, Routing

FEW = 8
"""Up to this many rows per expert on average, `few_rows` is used: measured, it is ahead of the matrix products."""


def route(logits: Tensor, bias: Tensor | None, how: Routing) -> tuple[Tensor, Tensor]:
    """See `statewise.ops.moe.route`."""
    rows, experts = logits.shape
    ids = torch.empty(rows, how.top_k, dtype=torch.int64)
    weights = torch.empty(rows, how.top_k)
    routing.choose(
        logits.contiguous().numpy(),
        np.zeros(experts, np.float32) if bias is None else bias.contiguous().numpy(),
        how.rule,
        np.float32(how.scale),
        ids.numpy(),
        weights.numpy(),
    )
    return ids, weights


def sparse_moe(x: Tensor, experts: Experts) -> Tensor:
    """See `statewise.ops.moe.sparse_moe`."""
    x = x.contiguous()
    rows, sizes = len(x), experts.sizes
    if rows * sizes[4] > FEW * sizes[2]:
        return _many_rows(x, experts)
    output = torch.empty_like(x)
    few_rows.sparse_moe(
        LIKE[x.dtype],
        (rows, *sizes),
        (x.data_ptr(), *experts.addresses, output.data_ptr()),
        experts.routing.rule,
        np.float32(experts.routing.scale),
        torch.get_num_threads(),
    )
    return output


def _many_rows(x: Tensor, experts: Experts) -> Tensor:
    """Sort the pairs (row, k) by expert, two matrix products per expert that is hit, and sum each row's results."""
    _, inner, count, _, top_k = experts.sizes
    ids, weights = route(F.linear(x.float(), experts.router), experts.bias, experts.routing)
    order = ids.flatten().argsort(stable=True)
    source = order // top_k
    results = torch.empty(ids.numel(), x.shape[1], dtype=x.dtype)
    end = 0
    for expert, hits in enumerate(ids.flatten().bincount(minlength=count).tolist()):
        if hits:
            begin, end = end, end + hits
            middle = _gated(x.index_select(0, source[begin:end]), experts.gate_up[expert], inner)
            torch.mm(middle, experts.down[expert].t(), out=results[begin:end])
    output = torch.zeros_like(x)
    for expert in range(count, len(experts.down)):
        output += F.linear(_gated(x, experts.gate_up[expert], inner), experts.down[expert])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    _combine(as_array(results), place.view(ids.shape).numpy(), weights.numpy(), as_array(output))
    return output


def _gated(x: Tensor, gate_up: Tensor, inner: int) -> Tensor:
    both = F.linear(x, gate_up)
    return F.silu(both[:, :inner], inplace=True).mul_(both[:, inner:])


@njit(cache=True, nogil=True, parallel=True)
def _combine(results, place, weights, output):  # type: ignore[no-untyped-def]
    """output [T, hidden] += sum over k of weights [T, k] * results [place [T, k]], in float32, cast once."""
    for t in prange(output.shape[0]):
        target = output[t]
        total = np.empty(len(target), np.float32)
        for w in range(len(total)):
            total[w] = load(target[w])
        for k in range(place.shape[1]):
            row = results[place[t, k]]
            weight = weights[t, k]
            for w in range(len(total)):
                total[w] += weight * load(row[w])
        for w in range(len(total)):
            store(target, w, total[w])
