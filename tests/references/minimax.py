"""MiniMax-Text-01, M1 and the `-hf` layout, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.checkpoints.minimax import RESIDUAL_KEYS, minimax_layer_kinds
from tests.references.common import (
    Memory,
    Reference,
    Weights,
    alibi_slopes,
    lightning_read,
    mixture,
    rms_norm,
    rotate_halves,
    softmax_read,
)

LIGHTNING_NORM_EPSILON = 1e-6  # not the epsilon of the configuration


class MiniMaxReference(Reference):
    def __init__(self, directory: Path | str) -> None:
        super().__init__(directory)
        self.full = minimax_layer_kinds(self.config)  # per layer: softmax attention
        self.factors = {name: self.config.get(name, self.config.get(RESIDUAL_KEYS[name])) for name in RESIDUAL_KEYS}

    def start(self) -> Memory:
        heads, width = self.config["num_attention_heads"], self.config["head_dim"]
        empty = torch.zeros(heads, width, width, dtype=torch.float64)  # [H, K, V]
        return [{"keys": [], "values": []} if full else {"state": empty.clone()} for full in self.full]

    def layer(self, index: int, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        kind, mixer = "full" if self.full[index] else "linear", weights.below("self_attn")
        normed = rms_norm(x, weights["input_layernorm.weight"], self.config["rms_norm_eps"])
        if self.full[index]:
            mixed = self.softmax(normed, mixer, remembered)
        else:
            mixed = self.lightning(normed, mixer, remembered, index)
        x = self.residual(x, normed, mixed, f"{kind}_attn")
        normed = rms_norm(x, weights["post_attention_layernorm.weight"], self.config["rms_norm_eps"])
        return self.residual(x, normed, self.feed_forward(normed, weights), "mlp")

    def residual(self, x: Tensor, normed: Tensor, y: Tensor, kind: str) -> Tensor:
        """With `postnorm` what was normed before a block is also what is added behind it."""
        kept = normed if self.config.get("postnorm", True) else x
        return self.factors[f"{kind}_alpha_factor"] * kept + self.factors[f"{kind}_beta_factor"] * y

    def slopes(self, index: int) -> Tensor:
        """[H]: ALiBi's, smaller in later layers, counted over all layers."""
        depth = index / max(1, self.config["num_hidden_layers"] - 1)
        return alibi_slopes(self.config["num_attention_heads"]) * (1 - depth + 1e-5)

    def lightning(self, x: Tensor, weights: Weights, remembered: dict[str, Any], index: int) -> Tensor:
        heads = self.config["num_attention_heads"]
        q, k, v = F.silu(weights.linear("qkv_proj", x)).view(heads, 3, -1).unbind(1)
        out = lightning_read(q, k, v, self.slopes(index), remembered).flatten()
        out = rms_norm(out, weights["norm.weight"], LIGHTNING_NORM_EPSILON)
        return weights.linear("out_proj", torch.sigmoid(weights.linear("output_gate", x)) * out)

    def softmax(self, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        width, position = self.config["head_dim"], len(remembered["keys"])
        rotated = self.config.get("rotary_dim", width)
        q, k, v = (weights.linear(f"{name}_proj", x).view(-1, width) for name in "qkv")
        q, k = (rotate_halves(part, position, rotated, self.theta) for part in (q, k))
        return weights.linear("o_proj", softmax_read(q, k, v, remembered).flatten())

    @property
    def theta(self) -> float:
        if "rope_theta" in self.config:
            return float(self.config["rope_theta"])
        return float(self.config["rope_parameters"]["rope_theta"])

    def feed_forward(self, x: Tensor, weights: Weights) -> Tensor:
        moe = weights.below("block_sparse_moe")
        probabilities, chosen = torch.softmax(moe.linear("gate", x), -1).topk(self.config["num_experts_per_tok"])
        routed = mixture(x, moe, chosen, probabilities / probabilities.sum(), ("w1", "w3", "w2"))
        if "coefficient.weight" not in weights:
            return routed
        coefficient = torch.sigmoid(weights.linear("coefficient", x))
        return (1 - coefficient) * routed + coefficient * weights.below("shared_mlp").swiglu(x)
