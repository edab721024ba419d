"""The log-decay of the gated delta rule from its projection."""

from __future__ import annotations

import torch
from torch import Tensor


def log_decay(f: Tensor, a_log: Tensor, dt_bias: Tensor, lower_bound: float | None = None) -> Tensor:
    """g <= 0 in float32: -e^{a_log} softplus(f + dt_bias), or lower_bound sigmoid(e^{a_log} (f + dt_bias)).

    The first form is that of Gated DeltaNet and of Kimi-Linear, the second the safe gate of Ling-3
    (`bailing_hybrid`), which keeps g above `lower_bound` < 0.
    f [T, H, K] or [T, H]; a_log [H]; dt_bias like f[0], flat or not. Raises ValueError for a wrong shape.
    """
    if f.ndim not in (2, 3):
        raise ValueError(f"f must be [T, H] or [T, H, K], got {list(f.shape)}")
    if a_log.shape != f.shape[1:2]:
        raise ValueError(f"a_log must be [{f.shape[1]}], got {list(a_log.shape)}")
    if dt_bias.numel() != f[:1].numel() and f.shape[0]:
        raise ValueError(f"dt_bias must have {f[:1].numel()} values, got {dt_bias.numel()}")
    if lower_bound is not None and not lower_bound < 0:
        raise ValueError(f"lower_bound must be negative, got {lower_bound}")
    rate = a_log.float().exp().view(-1, *[1] * (f.ndim - 2))  # [H] or [H, 1]
    x = f + dt_bias.float().view(f.shape[1:])
    if lower_bound is not None:
        return x.mul_(rate).sigmoid_().mul_(lower_bound)
    return torch.nn.functional.softplus(x).mul_(-rate)
