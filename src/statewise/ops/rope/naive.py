"""The specification of rotary embedding in plain torch: float32 inside (or float64), one rounding at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_rotary(
    x: Tensor,  # [T, H, D] or [T, D]
    frequencies: Tensor | None,  # [R/2] float32
    positions: Tensor,  # [T] int64
    *,
    interleaved: bool = False,
    weight: Tensor | None = None,  # [D]
    eps: float = 0.0,
) -> Tensor:
    """RMSNorm with `weight` if given, then the rotation of RoFormer (arXiv 2104.09864, eq. 34) on the first R dims."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps) * weight.to(y.dtype)
    if frequencies is None:
        return y.to(x.dtype)
    half = len(frequencies)
    angle = (positions.float()[:, None] * frequencies).to(y.dtype)  # rounded to float32
    if x.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin()
    turned, rest = y[..., : 2 * half], y[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1).to(x.dtype)
