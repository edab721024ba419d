"""The specification of the norms in plain torch: float32 inside (or float64), one rounding at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def naive_gated_rms_norm(o: Tensor, weight: Tensor, gate: Tensor, eps: float, activation: str = "sigmoid") -> Tensor:
    """rms_norm(o) * activation(gate): the norm comes before the gate, and its weight is plain, never 1 + w.

    sigmoid: output norm of Kimi Delta Attention (`kimi_linear`); silu: of Gated DeltaNet (`qwen3_next`).
    """
    opened = torch.sigmoid(gate.float()) if activation == "sigmoid" else torch.nn.functional.silu(gate.float())
    return (naive_rms_norm(o.float(), weight, eps) * opened).to(o.dtype)
