"""Kimi-Linear as llama.cpp wants it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf  # type: ignore[import-not-found,unused-ignore]
import numpy as np
from gguf import MODEL_TENSOR as T

from benchmarks.gguf_checkpoint import Checkpoint, Family, Named

KDA = {
    "q_proj": T.ATTN_Q,
    "k_proj": T.ATTN_K,
    "v_proj": T.ATTN_V,
    "o_proj": T.ATTN_OUT,
    "f_a_proj": T.SSM_F_A,
    "f_b_proj": T.SSM_F_B,
    "g_a_proj": T.SSM_G_A,
    "g_b_proj": T.SSM_G_B,
    "b_proj": T.SSM_BETA,
    "o_norm": T.SSM_NORM,
}
CONVOLUTIONS = {"q_conv1d": T.SSM_CONV1D_Q, "k_conv1d": T.SSM_CONV1D_K, "v_conv1d": T.SSM_CONV1D_V}
MLA = {
    "q_proj": T.ATTN_Q,
    "kv_a_proj_with_mqa": T.ATTN_KV_A_MQA,
    "kv_a_layernorm": T.ATTN_KV_A_NORM,
    "o_proj": T.ATTN_OUT,
}
DENSE = {"gate_proj": T.FFN_GATE, "up_proj": T.FFN_UP, "down_proj": T.FFN_DOWN}
SHARED = {"gate_proj": T.FFN_GATE_SHEXP, "up_proj": T.FFN_UP_SHEXP, "down_proj": T.FFN_DOWN_SHEXP}


def layer(checkpoint: Checkpoint, index: int) -> Iterator[Named]:
    prefix, config = f"model.layers.{index}.", checkpoint.config
    linear = index + 1 in config["linear_attn_config"]["kda_layers"]
    yield from (kda if linear else mla)(checkpoint, f"{prefix}self_attn.")
    if index < config["first_k_dense_replace"]:
        yield from checkpoint.renamed(f"{prefix}mlp.", DENSE)
        return
    prefix = f"{prefix}block_sparse_moe."
    yield from checkpoint.experts(prefix, config["num_experts"])
    yield T.FFN_EXP_PROBS_B, "bias", checkpoint[f"{prefix}gate.e_score_correction_bias"]
    yield from checkpoint.renamed(f"{prefix}shared_experts.", SHARED)


def kda(checkpoint: Checkpoint, prefix: str) -> Iterator[Named]:
    yield from checkpoint.renamed(prefix, KDA)
    for name, tensor in CONVOLUTIONS.items():
        yield tensor, "weight", checkpoint[f"{prefix}{name}.weight"][None]  # [1, channels, 1, taps]
    yield T.SSM_A, "", -np.exp(checkpoint[f"{prefix}A_log"])  # [1, 1, heads, 1]; llama.cpp wants the rate itself
    yield T.SSM_DT, "bias", checkpoint[f"{prefix}dt_bias"]


def mla(checkpoint: Checkpoint, prefix: str) -> Iterator[Named]:
    """The latent cache of llama.cpp wants `kv_b_proj` in two parts, the key part transposed per head."""
    nope, value = checkpoint.config["qk_nope_head_dim"], checkpoint.config["v_head_dim"]
    yield from checkpoint.renamed(prefix, MLA)
    heads = checkpoint[f"{prefix}kv_b_proj.weight"].reshape(-1, nope + value, checkpoint.config["kv_lora_rank"])
    yield T.ATTN_K_B, "weight", heads[:, :nope].transpose(0, 2, 1)
    yield T.ATTN_V_B, "weight", heads[:, nope:]


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The latent is one shared key head, KDA layers have none."""
    linear, latent, rope = config["linear_attn_config"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    if linear["num_heads"] != config["num_attention_heads"]:
        raise ValueError("llama.cpp reads one number of heads for KDA and MLA layers")
    layers = range(1, config["num_hidden_layers"] + 1)
    writer.add_context_length(config["model_max_length"])
    writer.add_head_count_kv([int(layer in linear["full_attn_layers"]) for layer in layers])
    writer.add_ssm_conv_kernel(linear["short_conv_kernel_size"])
    writer.add_kda_head_dim(linear["head_dim"])
    writer.add_kv_lora_rank(latent)
    writer.add_rope_dimension_count(rope)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_token"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])


FAMILY = Family(
    gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.KIMI_LINEAR],
    add_settings,
    layer,
    frozenset({T.FFN_GATE_INP, T.SSM_CONV1D_Q, T.SSM_CONV1D_K, T.SSM_CONV1D_V, T.SSM_A}),
)
