"""The mathematics of the layers, token by token. Weights go by the names that Kimi-Linear has published them under.

Lightning layers have two more: q_norm and k_norm. Their own published names are in export.py.
"""

import torch
import torch.nn.functional as F
from config import BailingConfig, ModelConfig
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def short_conv(x: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """Causal depthwise convolution of four taps over flat rows. x: [T, C], weight: [C, 1, 4], position: [T] in row."""
    taps = weight[:, 0].float()
    x = x.float()
    total = x * taps[:, 3]
    for back in (1, 2, 3):
        moved = F.pad(x, (0, 0, back, 0))[: x.shape[0]]
        total = total + torch.where((position >= back)[:, None], moved, 0.0) * taps[:, 3 - back]
    return F.silu(total)


def kda_inputs(x: Tensor, position: Tensor, p: dict[str, Tensor], c: ModelConfig, dtype: torch.dtype) -> list[Tensor]:
    """From the residual stream [T, hidden] to q, k, v [T, H, D] (q, k normalised), g fp32, beta fp32, output gate."""
    shape = (x.shape[0], c.heads, c.head_dim)
    h = rms_norm(x, p["input_layernorm.weight"], c.eps).to(dtype)
    q, k, v = (
        short_conv(linear(h, p[f"self_attn.{n}_proj.weight"]), p[f"self_attn.{n}_conv1d.weight"], position).view(shape)
        for n in "qkv"
    )
    f = linear(linear(h, p["self_attn.f_a_proj.weight"]), p["self_attn.f_b_proj.weight"]).float()
    rate = p["self_attn.A_log"].float().exp().view(1, c.heads, 1)
    g = -rate * F.softplus(f + p["self_attn.dt_bias"]).view(shape)
    beta = torch.sigmoid(linear(h, p["self_attn.b_proj.weight"]).float())
    gate = linear(linear(h, p["self_attn.g_a_proj.weight"]), p["self_attn.g_b_proj.weight"]).view(shape)
    return [l2_norm(q).to(dtype), l2_norm(k).to(dtype), v.to(dtype), g, beta, gate]


def kda_output(x: Tensor, o: Tensor, gate: Tensor, p: dict[str, Tensor], c: ModelConfig) -> Tensor:
    o = rms_norm(o, p["self_attn.o_norm.weight"], c.eps) * torch.sigmoid(gate.float())
    return x + linear(o.flatten(1).to(gate.dtype), p["self_attn.o_proj.weight"]).float()


def angles(position: Tensor, dims: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, dims/2] of the rotation of `dims` dimensions at each position [T]."""
    frequency = theta ** (torch.arange(0, dims, 2, device=position.device) / -dims)
    angle = (position.float()[:, None] * frequency)[:, None]
    return angle.cos(), angle.sin()


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension j turns with j + dims/2; dimensions beyond those with an angle stay. x: [T, H, D]."""
    size = cos.shape[-1]
    a, b, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension 2j turns with 2j + 1. x: [T, H, D]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def lightning_inputs(
    x: Tensor, position: Tensor, p: dict[str, Tensor], c: BailingConfig, dtype: torch.dtype
) -> list[Tensor]:
    """From the residual stream [T, hidden] to q, k, v [T, H, D] and the output gate [T, H*D]. q is not scaled yet."""
    h = rms_norm(x, p["input_layernorm.weight"], c.eps).to(dtype)
    q, k, v = (linear(h, p[f"self_attn.{n}_proj.weight"]).view(-1, c.heads, c.head_dim) for n in "qkv")
    cos, sin = angles(position, int(c.head_dim * c.rotated_share), c.rope_theta)
    q = rotate_halves(rms_norm(q, p["self_attn.q_norm.weight"], c.eps), cos, sin)
    k = rotate_halves(rms_norm(k, p["self_attn.k_norm.weight"], c.eps), cos, sin)
    return [q.to(dtype), k.to(dtype), v, linear(h, p["self_attn.g_proj.weight"])]


def lightning_output(x: Tensor, o: Tensor, gate: Tensor, p: dict[str, Tensor], c: BailingConfig) -> Tensor:
    weight = p["self_attn.o_norm.weight"].view(c.norm_groups, -1)
    o = rms_norm(o.reshape(-1, *weight.shape), weight, c.eps).flatten(1) * torch.sigmoid(gate.float())
    return x + linear(o.to(gate.dtype), p["self_attn.o_proj.weight"]).float()


def mla_inputs(x: Tensor, position: Tensor, p: dict[str, Tensor], c: ModelConfig, dtype: torch.dtype) -> list[Tensor]:
    """q, k: [T, H, nope+rope], v: [T, H, value]."""
    h = rms_norm(x, p["input_layernorm.weight"], c.eps).to(dtype)
    q = linear(h, p["self_attn.q_proj.weight"]).view(-1, c.heads, c.nope_dim + c.rope_dim)
    latent, shared = linear(h, p["self_attn.kv_a_proj_with_mqa.weight"]).split([c.kv_lora, c.rope_dim], -1)
    latent = rms_norm(latent, p["self_attn.kv_a_layernorm.weight"], 1e-6).to(dtype)
    kv = linear(latent, p["self_attn.kv_b_proj.weight"]).view(-1, c.heads, c.nope_dim + c.value_dim)
    k_nope, v = kv.split([c.nope_dim, c.value_dim], -1)
    shared = shared[:, None]
    if isinstance(c, BailingConfig):
        cos, sin = angles(position, c.rope_dim, c.rope_theta)
        q_nope, q_rope = q.split([c.nope_dim, c.rope_dim], -1)
        q = torch.cat([q_nope, rotate_pairs(q_rope, cos, sin).to(dtype)], -1)
        shared = rotate_pairs(shared, cos, sin).to(dtype)
    k = torch.cat([k_nope, shared.expand(-1, c.heads, -1)], -1)
    return [q, k, v]


def mla_output(x: Tensor, o: Tensor, p: dict[str, Tensor]) -> Tensor:
    return x + linear(o.flatten(1), p["self_attn.o_proj.weight"]).float()


def swiglu(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(F.silu(linear(h, gate)) * linear(h, up), down)


def dense_mlp(x: Tensor, p: dict[str, Tensor], c: ModelConfig, dtype: torch.dtype) -> Tensor:
    h = rms_norm(x, p["post_attention_layernorm.weight"], c.eps).to(dtype)
    return x + swiglu(h, *(p[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))).float()


def moe(x: Tensor, real: Tensor, p: dict[str, Tensor], c: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Routed and shared experts; also the number of tokens each expert was given ([E], padding not counted).

    All experts are computed for all tokens and weighted, most of them with zero: for experts this narrow that is
    faster on a GPU than gathering.
    """
    h = rms_norm(x, p["post_attention_layernorm.weight"], c.eps)
    scores = torch.sigmoid(F.linear(h, p["block_sparse_moe.gate.weight"]))
    biased = scores.detach() + p["block_sparse_moe.gate.e_score_correction_bias"]
    if c.groups > 1:  # only the groups whose two best experts score highest
        best = biased.view(-1, c.groups, c.experts // c.groups).topk(2, dim=2).values.sum(2)
        kept = torch.zeros_like(best).scatter(1, best.topk(c.groups_per_token, dim=1).indices, 1.0)
        biased = biased.masked_fill(kept.repeat_interleave(c.experts // c.groups, 1) == 0, float("-inf"))
    chosen = torch.zeros_like(scores).scatter(1, biased.topk(c.experts_per_token, dim=1).indices, 1.0)
    weight = scores * chosen
    weight = weight / (weight.sum(1, keepdim=True) + 1e-20) * c.routed_scale
    h = h.to(dtype)
    w1, w2, w3 = (p[f"block_sparse_moe.experts.{n}"].to(dtype) for n in ("w1", "w2", "w3"))
    inner = F.silu(F.linear(h, w1.flatten(0, 1))) * F.linear(h, w3.flatten(0, 1))
    inner = inner.view(-1, c.experts, c.expert_width) * weight[:, :, None].to(dtype)
    routed = inner.flatten(1) @ w2.transpose(1, 2).flatten(0, 1)
    shared = swiglu(h, *(p[f"block_sparse_moe.shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down")))
    return x + routed.float() + shared.float(), (chosen * real[:, None]).sum(0)


def kda_then_moe(x, o, gate, real, p, c, dtype):
    return moe(kda_output(x, o, gate, p, c), real, p, c, dtype)


def kda_then_dense(x, o, gate, p, c, dtype):
    return dense_mlp(kda_output(x, o, gate, p, c), p, c, dtype)


def lightning_then_moe(x, o, gate, real, p, c, dtype):
    return moe(lightning_output(x, o, gate, p, c), real, p, c, dtype)


def lightning_then_dense(x, o, gate, p, c, dtype):
    return dense_mlp(lightning_output(x, o, gate, p, c), p, c, dtype)


def mla_then_moe(x, o, real, p, c, dtype):
    return moe(mla_output(x, o, p), real, p, c, dtype)


def token_loss(
    x: Tensor, target: Tensor, weight: Tensor, norm: Tensor, head: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy and, per token, whether the likeliest token is the target."""
    logits = linear(rms_norm(x, norm, eps).to(dtype), head).float()
    loss = F.cross_entropy(logits, target, reduction="none")
    return (loss * weight).sum() / weight.sum().clamp_min(1.0), logits.argmax(1) == target
