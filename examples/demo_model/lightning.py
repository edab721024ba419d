"""Lightning attention as a differentiable operator: plain torch anywhere, fla-core's kernels on a GPU.

S <- exp(-slope) S + k v^T;   o = S^T q / sqrt(D)
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def lightning_torch(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, chunk: int = 64) -> Tensor:
    """All chunks at once, from a zero state: the decay between two chunks depends on their distance only.

    q, k, v: [B, T, H, D]; slopes: [H]. Returns [B, T, H, D] fp32 (or fp64, if q is).
    """
    length, dim = q.shape[1], q.shape[3]
    kind = torch.promote_types(q.dtype, torch.float32)
    chunks = -(-length // chunk)
    q, k, v = (
        pad(x.to(kind).transpose(1, 2), (0, 0, 0, chunks * chunk - length)).unflatten(2, (chunks, chunk))
        for x in (q * dim**-0.5, k, v)
    )  # [B, H, N, C, D]
    slope = slopes.to(kind)[:, None, None]
    at = torch.arange(max(chunk, chunks), device=q.device, dtype=kind)
    distance = at[:, None] - at
    near = torch.where(distance >= 0, -slope * distance, float("-inf")).exp()[:, :chunk, :chunk]
    far = torch.where(distance > 0, -slope * chunk * (distance - 1), float("-inf")).exp()[:, :chunks, :chunks]
    into = (-slope * (at[:chunk, None] + 1)).exp()[:, None]  # [H, 1, C, 1]
    left = (-slope * (chunk - 1 - at[:chunk, None])).exp()[:, None]
    added = (k * left).transpose(-1, -2) @ v
    states = torch.einsum("hnm,bhmkv->bhnkv", far, added)
    out = ((q @ k.transpose(-1, -2)) * near[:, None]) @ v + (q * into) @ states
    return out.flatten(2, 3)[:, :, :length].transpose(1, 2)


def lightning_fla(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g_gamma=-slopes)[0]
