"""Kimi-Linear token by token: KDA, latent attention without positions, experts beside a shared one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.references.common import (
    LATENT_NORM_EPSILON,
    Memory,
    Reference,
    Weights,
    grouped_choice,
    l2_norm,
    latent_read,
    mixture,
    rms_norm,
)


class KimiReference(Reference):
    def __init__(self, directory: Path | str) -> None:
        super().__init__(directory)
        self.linear: dict[str, Any] = self.config["linear_attn_config"]

    def start(self) -> Memory:
        heads, width = self.linear["num_heads"], self.linear["head_dim"]
        window = torch.zeros(3, heads * width, self.linear["short_conv_kernel_size"], dtype=torch.float64)
        state = torch.zeros(heads, width, width, dtype=torch.float64)  # [H, K, V]
        layers = range(self.config["num_hidden_layers"])
        return [{"window": window.clone(), "state": state.clone(), "latents": []} for _ in layers]

    def layer(self, index: int, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        epsilon = self.config["rms_norm_eps"]
        mixer = self.kda if index + 1 in self.linear["kda_layers"] else self.mla
        normed = rms_norm(x, weights["input_layernorm.weight"], epsilon)
        x = x + mixer(normed, weights.below("self_attn"), remembered)
        normed = rms_norm(x, weights["post_attention_layernorm.weight"], epsilon)
        dense = index < self.config["first_k_dense_replace"]
        return x + (
            weights.below("mlp").swiglu(normed) if dense else self.moe(normed, weights.below("block_sparse_moe"))
        )

    def kda(self, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        heads, width = self.linear["num_heads"], self.linear["head_dim"]
        mixed = []
        for part, name in enumerate("qkv"):
            window = remembered["window"][part].roll(-1, dims=-1)
            window[:, -1] = weights.linear(f"{name}_proj", x)
            remembered["window"][part] = window
            mixed.append(F.silu((window * weights[f"{name}_conv1d.weight"][:, 0]).sum(-1)).view(heads, width))
        q, k, v = l2_norm(mixed[0]) * width**-0.5, l2_norm(mixed[1]), mixed[2]
        step = F.softplus(weights.linear("f_b_proj", weights.linear("f_a_proj", x)) + weights["dt_bias"])
        decay = torch.exp(-weights["A_log"].exp().view(heads, 1) * step.view(heads, width))
        beta = torch.sigmoid(weights.linear("b_proj", x))
        state = remembered["state"] * decay[:, :, None]
        update = beta[:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
        state = remembered["state"] = state + torch.einsum("hk,hv->hkv", k, update)
        out = rms_norm(torch.einsum("hkv,hk->hv", state, q), weights["o_norm.weight"], self.config["rms_norm_eps"])
        gate = torch.sigmoid(weights.linear("g_b_proj", weights.linear("g_a_proj", x)))
        return weights.linear("o_proj", out.flatten() * gate)

    def mla(self, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        heads, rank = self.config["num_attention_heads"], self.config["kv_lora_rank"]
        nope, rope = self.config["qk_nope_head_dim"], self.config["qk_rope_head_dim"]
        q = weights.linear("q_proj", x).view(heads, nope + rope)
        compressed = weights.linear("kv_a_proj_with_mqa", x)
        latent = rms_norm(compressed[:rank], weights["kv_a_layernorm.weight"], LATENT_NORM_EPSILON)
        remembered["latents"].append((weights.linear("kv_b_proj", latent).view(heads, -1), compressed[rank:]))
        return weights.linear("o_proj", latent_read(q, nope, remembered).flatten())

    def moe(self, x: Tensor, weights: Weights) -> Tensor:
        scores, config = torch.sigmoid(weights.linear("gate", x)), self.config
        biased = scores + weights["gate.e_score_correction_bias"]
        groups, kept = config["num_expert_group"], config["topk_group"]
        chosen = grouped_choice(biased, groups, kept, config["num_experts_per_token"])
        share = scores[chosen]
        if config["moe_renormalize"]:
            share = share / (share.sum() + 1e-20)
        routed = mixture(x, weights, chosen, share * config["routed_scaling_factor"], ("w1", "w3", "w2"))
        return weights.below("shared_experts").swiglu(x) + routed
