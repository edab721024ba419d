"""Root-mean-square norms, plain and gated."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.norm.naive import naive_gated_rms_norm, naive_rms_norm

__all__ = [
    "gated_rms_norm",
    "naive_gated_rms_norm",
    "naive_rms_norm",
    "rms_norm",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in x.dtype; float32 inside, one rounding at the end.

    x [T, D] or [T, H, D] float32 or bfloat16, rows may be slices of wider rows; weight [D].
    Raises ValueError for a wrong shape or dtype.
    """
    _check(x, weight)
    if x.device.type == "cpu":
        import statewise.ops.norm.cpu as cpu

        return cpu.norm_cpu(x, weight.float(), eps, cpu.PLAIN, x)
    raise NotImplementedError(f"rms_norm has no kernel for device {x.device.type!r}")


def gated_rms_norm(o: Tensor, weight: Tensor, gate: Tensor, eps: float, activation: str = "sigmoid") -> Tensor:
    """rms_norm(o) * activation(gate) in o.dtype; the norm before the gate, float32 inside, one rounding at the end.

    o, gate [T, H, D] (or [T, D]) float32 or bfloat16, rows may be slices of wider rows; weight [D], plain, never
    1 + w. activation "sigmoid" (Kimi Delta Attention) or "silu" (Gated DeltaNet).
    Raises ValueError for a wrong shape, dtype or activation.
    """
    _check(o, weight, gate)
    if activation not in ("sigmoid", "silu"):
        raise ValueError(f"activation must be 'sigmoid' or 'silu', got {activation!r}")
    if o.device.type == "cpu":
        import statewise.ops.norm.cpu as cpu

        kind = cpu.SIGMOID if activation == "sigmoid" else cpu.SILU
        return cpu.norm_cpu(o, weight.float(), eps, kind, gate)
    raise NotImplementedError(f"gated_rms_norm has no kernel for device {o.device.type!r}")


def _check(x: Tensor, weight: Tensor, gate: Tensor | None = None) -> None:
    if x.ndim not in (2, 3) or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x must be [T, D] or [T, H, D] float32 or bfloat16, got {list(x.shape)} {x.dtype}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    if gate is not None and (gate.shape != x.shape or gate.dtype != x.dtype):
        raise ValueError(f"gate must be {list(x.shape)} {x.dtype} like o, got {list(gate.shape)} {gate.dtype}")
