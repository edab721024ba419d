"""Kimi-Linear token by token in fp64: the whole model as its equations, with nothing fast about it.

The independent reference of the engine's tests. It reads checkpoints with the hub's names (`tests/checkpoints.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

LATENT_NORM_EPSILON = 1e-6  # of kv_a_layernorm and of the l2 norms: not the epsilon of the configuration


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LATENT_NORM_EPSILON)


class Weights:
    """The tensors of a checkpoint below a name prefix, in fp64."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def below(self, prefix: str) -> Weights:
        return Weights(self.tensors, f"{self.prefix}{prefix}.")

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self[f"{name}.weight"] @ x

    def swiglu(self, x: Tensor, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Tensor:
        return self.linear(down, F.silu(self.linear(gate, x)) * self.linear(up, x))


class KimiReference:
    """The model of a checkpoint directory. A sequence is a list of what each layer remembers (`start()`)."""

    def __init__(self, directory: Path | str) -> None:
        directory = Path(directory)
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.linear: dict[str, Any] = self.config["linear_attn_config"]
        files = sorted(directory.glob("*.safetensors"))
        self.weights = Weights({name: t.double() for file in files for name, t in load_file(file).items()})

    def start(self) -> list[dict[str, Any]]:
        heads, width = self.linear["num_heads"], self.linear["head_dim"]
        window = torch.zeros(3, heads * width, self.linear["short_conv_kernel_size"], dtype=torch.float64)
        state = torch.zeros(heads, width, width, dtype=torch.float64)  # [H, K, V]
        layers = range(self.config["num_hidden_layers"])
        return [{"window": window.clone(), "state": state.clone(), "latents": []} for _ in layers]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[T, vocabulary] fp64 of a sequence from its start."""
        memory = self.start()
        return torch.stack([self.step(token, memory) for token in tokens])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after a prompt, one after the other; no token ends it."""
        memory, tokens = self.start(), []
        row = torch.stack([self.step(token, memory) for token in prompt])[-1]
        for _ in range(count):
            tokens.append(int(row.argmax()))
            row = self.step(tokens[-1], memory)
        return tokens

    def step(self, token: int, memory: list[dict[str, Any]]) -> Tensor:
        """[vocabulary] fp64: the logits after one more token; `memory` is brought up to it."""
        epsilon = self.config["rms_norm_eps"]
        x = self.weights["model.embed_tokens.weight"][token]
        for index, remembered in enumerate(memory):
            layer = self.weights.below(f"model.layers.{index}")
            mixer = self.kda if index + 1 in self.linear["kda_layers"] else self.mla
            normed = rms_norm(x, layer["input_layernorm.weight"], epsilon)
            x = x + mixer(normed, layer.below("self_attn"), remembered)
            normed = rms_norm(x, layer["post_attention_layernorm.weight"], epsilon)
            dense = index < self.config["first_k_dense_replace"]
            x = x + (layer.below("mlp").swiglu(normed) if dense else self.moe(normed, layer.below("block_sparse_moe")))
        return self.weights.linear("lm_head", rms_norm(x, self.weights["model.norm.weight"], epsilon))

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
        expanded, shared_keys = (torch.stack(part) for part in zip(*remembered["latents"], strict=True))
        keys, values = expanded[..., :nope], expanded[..., nope:]  # [T, H, nope], [T, H, v]
        scores = torch.einsum("hd,thd->ht", q[:, :nope], keys) + q[:, nope:] @ shared_keys.T
        probabilities = torch.softmax(scores * (nope + rope) ** -0.5, dim=-1)
        return weights.linear("o_proj", torch.einsum("ht,thd->hd", probabilities, values).flatten())

    def moe(self, x: Tensor, weights: Weights) -> Tensor:
        scores = torch.sigmoid(weights.linear("gate", x))
        biased = scores + weights["gate.e_score_correction_bias"]
        groups = biased.view(self.config["num_expert_group"], -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(self.config["topk_group"]).indices
        allowed = torch.full_like(groups, -torch.inf).index_copy(0, best, groups[best]).flatten()
        chosen = allowed.topk(self.config["num_experts_per_token"]).indices
        share = scores[chosen]
        if self.config["moe_renormalize"]:
            share = share / (share.sum() + 1e-20)
        out = weights.below("shared_experts").swiglu(x)
        for weight, expert in zip(share * self.config["routed_scaling_factor"], chosen.tolist(), strict=True):
            out = out + weight * weights.below(f"experts.{expert}").swiglu(x, "w1", "w3", "w2")
        return out
