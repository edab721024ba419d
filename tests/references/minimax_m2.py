"""MiniMax-M2 token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.references.common import (
    Memory,
    Reference,
    Weights,
    grouped_choice,
    mixture,
    rms_norm,
    rotate_halves,
    softmax_read,
)


class MiniMaxM2Reference(Reference):
    def start(self) -> Memory:
        return [{"keys": [], "values": []} for _ in range(self.config["num_hidden_layers"])]

    def layer(self, index: int, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        epsilon = self.config["rms_norm_eps"]
        normed = rms_norm(x, weights["input_layernorm.weight"], epsilon)
        x = x + self.attention(normed, weights.below("self_attn"), remembered)
        normed = rms_norm(x, weights["post_attention_layernorm.weight"], epsilon)
        return x + self.moe(normed, weights.below("block_sparse_moe"))

    def attention(self, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        width, rotated, theta = (self.config[key] for key in ("head_dim", "rotary_dim", "rope_theta"))
        position = len(remembered["keys"])
        q, k, v = (weights.linear(f"{name}_proj", x) for name in "qkv")
        if self.config["use_qk_norm"]:
            q, k = self.normed(q, weights["q_norm.weight"]), self.normed(k, weights["k_norm.weight"])
        q, k = (rotate_halves(part.view(-1, width), position, rotated, theta) for part in (q, k))
        return weights.linear("o_proj", softmax_read(q, k, v.view(-1, width), remembered).flatten())

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """One norm as wide as its weight: over all heads of the row ("per_layer") or over each ("per_head")."""
        return rms_norm(x.view(-1, weight.shape[0]), weight, self.config["rms_norm_eps"]).flatten()

    def moe(self, x: Tensor, weights: Weights) -> Tensor:
        scores = torch.sigmoid(weights.linear("gate", x))
        bias = weights["e_score_correction_bias"] if self.config["use_routing_bias"] else 0.0
        chosen = grouped_choice(scores + bias, 1, 1, self.config["num_experts_per_tok"])
        return mixture(x, weights, chosen, scores[chosen] / scores[chosen].sum(), ("w1", "w3", "w2"))
