"""Ring-linear-2.0 and Ling/Ring-2.5 token by token, with either of the two formulas for the slopes of a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.checkpoints.bailing import bailing_is_full
from tests.references.common import (
    LATENT_NORM_EPSILON,
    Memory,
    Reference,
    Weights,
    alibi_slopes,
    grouped_choice,
    latent_read,
    lightning_read,
    mixture,
    rms_norm,
    rotate_halves,
    rotate_pairs,
    softmax_read,
)

SlopeFormula = Literal["serving", "hf"]


class BailingReference(Reference):
    """`slope_formula`: "serving" counts layers from 0 as serving engines do, "hf" from -1 as the published code."""

    embedding = "model.word_embeddings"

    def __init__(self, directory: Path | str, slope_formula: SlopeFormula = "serving") -> None:
        super().__init__(directory)
        self.first_depth = {"serving": 0, "hf": -1}[slope_formula]
        self.head_dim = self.config.get("linear_head_dim", self.config["head_dim"])
        self.full = self.mla if "kv_lora_rank" in self.config else self.gqa

    def start(self) -> Memory:
        empty = torch.zeros(self.config["num_attention_heads"], self.head_dim, self.head_dim, dtype=torch.float64)
        layers = range(self.config["num_hidden_layers"])
        return [{"position": 0, "state": empty.clone(), "keys": [], "values": [], "latents": []} for _ in layers]

    def layer(self, index: int, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        epsilon, mixer = self.config["rms_norm_eps"], weights.below("attention")
        normed = rms_norm(x, weights["input_layernorm.weight"], epsilon)
        if bailing_is_full(self.config, index):
            x = x + self.full(normed, mixer, remembered)
        else:
            x = x + self.lightning(normed, mixer, remembered, index)
        remembered["position"] += 1
        normed = rms_norm(x, weights["post_attention_layernorm.weight"], epsilon)
        dense, mlp = index < self.config["first_k_dense_replace"], weights.below("mlp")
        return x + (mlp.swiglu(normed) if dense else self.moe(normed, mlp))

    def slopes(self, index: int) -> Tensor:
        last = self.config["num_hidden_layers"] - 1
        depth = (index + self.first_depth) / last if last else 0.0
        return alibi_slopes(self.config["num_attention_heads"]) * (1 - depth + 1e-5)

    def lightning(self, x: Tensor, weights: Weights, remembered: dict[str, Any], index: int) -> Tensor:
        config, heads = self.config, self.config["num_attention_heads"]
        qkv = weights.linear("query_key_value", x)
        if config.get("use_linear_silu", config["linear_silu"]):
            qkv = F.silu(qkv)
        q, k, v = qkv.view(3, heads, self.head_dim)
        q, k = self.normed(q, k, weights)
        if config.get("linear_rope", True):
            q, k = (self.rotated(part, remembered["position"]) for part in (q, k))
        out = lightning_read(q * self.head_dim**-0.5, k, v, self.slopes(index), remembered)
        groups = config["group_norm_size"]
        out = rms_norm(out.view(groups, -1), weights["g_norm.weight"].view(groups, -1), config["rms_norm_eps"])
        return weights.linear("dense", out.flatten() * torch.sigmoid(weights.linear("g_proj", x)))

    def gqa(self, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        heads, shared = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        qkv = weights.linear("query_key_value", x).view(heads + 2 * shared, -1)
        q, k, v = qkv.split([heads, shared, shared])
        q, k = (self.rotated(part, remembered["position"]) for part in self.normed(q, k, weights))
        return weights.linear("dense", softmax_read(q, k, v, remembered).flatten())

    def normed(self, q: Tensor, k: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        if not self.config["use_qk_norm"]:
            return q, k
        epsilon = self.config["rms_norm_eps"]
        q = rms_norm(q, weights["query_layernorm.weight"], epsilon)
        return q, rms_norm(k, weights["key_layernorm.weight"], epsilon)

    def rotated(self, x: Tensor, position: int) -> Tensor:
        width = int(x.shape[-1] * self.config["partial_rotary_factor"])
        return rotate_halves(x, position, width, self.config["rope_theta"])

    def mla(self, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        heads, rank = self.config["num_attention_heads"], self.config["kv_lora_rank"]
        nope, theta, position = self.config["qk_nope_head_dim"], self.config["rope_theta"], remembered["position"]
        if self.config["q_lora_rank"] is None:
            q = weights.linear("q_proj", x)
        else:
            latent = rms_norm(weights.linear("q_a_proj", x), weights["q_a_layernorm.weight"], LATENT_NORM_EPSILON)
            q = weights.linear("q_b_proj", latent)
        q = q.view(heads, -1)
        q = torch.cat([q[:, :nope], rotate_pairs(q[:, nope:], position, theta)], dim=-1)
        compressed = weights.linear("kv_a_proj_with_mqa", x)
        latent = rms_norm(compressed[:rank], weights["kv_a_layernorm.weight"], LATENT_NORM_EPSILON)
        shared_key = rotate_pairs(compressed[rank:], position, theta)
        remembered["latents"].append((weights.linear("kv_b_proj", latent).view(heads, -1), shared_key))
        return weights.linear("dense", latent_read(q, nope, remembered).flatten())

    def moe(self, x: Tensor, weights: Weights) -> Tensor:
        scores, config = torch.sigmoid(weights.linear("gate", x)), self.config
        biased = scores + weights["gate.expert_bias"] if "gate.expert_bias" in weights else scores
        chosen = grouped_choice(biased, config["n_group"], config["topk_group"], config["num_experts_per_tok"])
        share = scores[chosen]
        if config["norm_topk_prob"]:
            share = share / (share.sum() + 1e-20)
        names = ("gate_proj", "up_proj", "down_proj")
        out = mixture(x, weights, chosen, share * config["routed_scaling_factor"], names)
        return out + weights.below("shared_experts").swiglu(x) if config["num_shared_experts"] else out
