"""Root-mean-square norms: plain, gated, and after a residual sum."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.norm import cpu
from statewise.ops.norm.naive import naive_gated_rms_norm, naive_rms_norm

__all__ = [
    "add_rms_norm",
    "gated_rms_norm",
    "naive_gated_rms_norm",
    "naive_rms_norm",
    "rms_norm",
]

DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in x.dtype; float32 inside, one rounding at the end.

    x [T, D] or [T, H, D] float32 or bfloat16, rows may be slices of wider rows; weight [D] likewise, contiguous.
    Raises ValueError for a wrong shape or dtype.
    """
    _check(x, weight)
    return cpu.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """x <- alpha x + beta delta in place; returns rms_norm(x) of the new x, in the memory of `delta`.

    x and delta [T, D] of one dtype, contiguous, without common memory; the rest is as for `rms_norm`. With both factors
    1 the same bits as from the two operators. Nothing is allocated: in a decode step that costs as much as the norm.
    Raises ValueError for a wrong shape, dtype or layout.
    """
    _check(x, weight)
    if delta.shape != x.shape or delta.dtype != x.dtype:
        raise ValueError(f"delta must be {list(x.shape)} {x.dtype} like x, got {list(delta.shape)} {delta.dtype}")
    if not (x.is_contiguous() and delta.is_contiguous()):
        raise ValueError("x and delta must be contiguous")
    cpu.add_rms_norm(x, delta, weight, eps, alpha, beta)
    return delta


def gated_rms_norm(o: Tensor, weight: Tensor, gate: Tensor, eps: float, activation: str = "sigmoid") -> Tensor:
    """rms_norm(o) * activation(gate) in o.dtype; the norm before the gate, float32 inside, one rounding at the end.

    o, gate [T, H, D] (or [T, D]) float32 or bfloat16, rows may be slices of wider rows; weight [D], plain, never
    1 + w. activation "sigmoid" (Kimi Delta Attention) or "silu" (Gated DeltaNet).
    Raises ValueError for a wrong shape, dtype or activation.
    """
    _check(o, weight)
    if gate.shape != o.shape or gate.dtype != o.dtype:
        raise ValueError(f"gate must be {list(o.shape)} {o.dtype} like o, got {list(gate.shape)} {gate.dtype}")
    if activation not in ("sigmoid", "silu"):
        raise ValueError(f"activation must be 'sigmoid' or 'silu', got {activation!r}")
    return cpu.gated_rms_norm(o, weight, gate, eps, activation)


def _check(x: Tensor, weight: Tensor) -> None:
    shape = x.shape
    if len(shape) not in (2, 3) or x.dtype not in DTYPES:
        raise ValueError(f"x must be [T, D] or [T, H, D] float32 or bfloat16, got {list(shape)} {x.dtype}")
    if weight.shape != shape[-1:] or weight.dtype not in DTYPES or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{shape[-1]}], got {list(weight.shape)} {weight.dtype}")
    if not x.is_cpu:
        raise NotImplementedError(f"the norms have no kernel for device {x.device.type!r}")
