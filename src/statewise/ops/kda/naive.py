"""The specification of Kimi Delta Attention between its projections (Kimi Linear, arXiv 2510.26692)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.delta_rule.naive import naive_gated_delta_rule
from statewise.ops.short_convolution.naive import naive_short_convolution

if TYPE_CHECKING:
    from statewise.ops.kda import KdaWeights


def naive_kda(
    projected: Tensor,
    weights: KdaWeights,
    conv: Tensor,
    recurrent: Tensor,
    batch: Batch,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """With q, k, v after convolution and SiLU, q and k l2-normalised, q scaled, per head:

    g = -e^A softplus(W_f f + b);  beta = sigmoid(b);  o = gated delta rule;  y = RMSNorm(o) sigmoid(W_g gate)
    """
    heads, keys, values, _ = weights.sizes
    qkv, f, gate, beta = projected.to(dtype).split(list(weights.widths), dim=-1)
    qkv = naive_short_convolution(qkv, weights.conv.to(dtype), conv, batch)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv.split([heads * keys, heads * keys, heads * values], -1))
    step = torch.nn.functional.softplus(f @ weights.decay_up.to(dtype).mT + weights.dt_bias.to(dtype))
    g = -weights.a_log.to(dtype).exp()[:, None] * step.unflatten(-1, (heads, -1))
    o = naive_gated_delta_rule(q, k, v, g, beta.sigmoid(), recurrent, batch, weights.scale, dtype=dtype)
    normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + weights.eps) * weights.norm.to(dtype)
    gated: Tensor = normed.flatten(1) * (gate @ weights.gate_up.to(dtype).mT).sigmoid()
    return gated.to(projected.dtype)
