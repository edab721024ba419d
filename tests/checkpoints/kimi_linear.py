"""Kimi-Linear: KDA and MLA without positions, dense first layers, experts beside a shared one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints.common import (
    BIAS_SPREAD,
    Config,
    Random,
    Spelling,
    Tensors,
    below,
    experts,
    fuse_experts,
    model,
    overridden,
    swiglu,
)


def kimi_linear_config(**overrides: Any) -> Config:
    """`config.json` of a tiny Kimi-Linear: six layers, MLA at the 1-based places 4 and 6, layer 1 dense.

    Widths differ from each other wherever the architecture allows it, so that a mixed-up axis is a shape error.
    `linear_attn_config` may be given in part; everything else replaces the value here.
    """
    linear = {"kda_layers": [1, 2, 3, 5], "full_attn_layers": [4, 6], "num_heads": 4, "head_dim": 32}
    linear |= {"short_conv_kernel_size": 4} | overrides.pop("linear_attn_config", {})
    config: Config = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "dtype": "float32",
        "vocab_size": 320,
        "hidden_size": 96,
        "head_dim": 24,  # a decoy, as in the published file: no layer has this width
        "intermediate_size": 160,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": 2.446,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "mla_use_nope": True,
        "linear_attn_config": linear,
        "model_max_length": 4096,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return overridden(config, overrides)


def kimi_linear_tensors(config: Config, seed: int) -> Tensors:
    """Random fp32 weights by their names on the hub: logits spread over about ±6, decays and gates are lively."""
    random, hidden = Random(seed), config["hidden_size"]

    def layer(index: int) -> Tensors:
        linear = index + 1 in config["linear_attn_config"]["kda_layers"]
        mixer = below("self_attn.", (_kda if linear else _mla)(config, random))
        if index < config["first_k_dense_replace"]:
            return mixer | below("mlp.", swiglu(hidden, config["intermediate_size"], random))
        return mixer | below("block_sparse_moe.", _moe(config, random))

    return model(config, random, layer)


def _kda(config: Config, random: Random) -> Tensors:
    hidden, linear = config["hidden_size"], config["linear_attn_config"]
    heads, width, taps = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    channels = heads * width
    step = torch.exp(random.uniform(channels, low=math.log(0.001), high=math.log(0.1)))
    tensors = {f"{name}_proj.weight": random.linear(channels, hidden) for name in "qkv"}
    tensors |= {f"{name}_conv1d.weight": random.normal(channels, 1, taps, std=0.5) for name in "qkv"}
    for gate in "fg":
        tensors[f"{gate}_a_proj.weight"] = random.linear(width, hidden)
        tensors[f"{gate}_b_proj.weight"] = random.linear(channels, width)
    return tensors | {
        "dt_bias": step + torch.log(-torch.expm1(-step)),  # softplus(dt_bias) = step
        "A_log": torch.log(random.uniform(1, 1, heads, 1, low=1.0, high=16.0)),
        "b_proj.weight": random.linear(heads, hidden),
        "o_norm.weight": random.norm(width),
        "o_proj.weight": random.linear(hidden, channels),
    }


def _mla(config: Config, random: Random) -> Tensors:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return {
        "q_proj.weight": random.linear(heads * (nope + rope), hidden),
        "kv_a_proj_with_mqa.weight": random.linear(latent + rope, hidden),
        "kv_a_layernorm.weight": random.norm(latent),
        "kv_b_proj.weight": random.linear(heads * (nope + value), latent),
        "o_proj.weight": random.linear(hidden, heads * value),
    }


def _moe(config: Config, random: Random) -> Tensors:
    hidden, width, count = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    tensors = {
        "gate.weight": random.linear(count, hidden),
        "gate.e_score_correction_bias": random.normal(count, std=BIAS_SPREAD),
    }
    tensors |= experts(count, hidden, width, random)
    return tensors | below("shared_experts.", swiglu(hidden, width * config["num_shared_experts"], random))


def respell_kimi_linear(tensors: Tensors, config: Config, spelling: Spelling) -> tuple[Tensors, Config]:
    """`saved` calls the dense layers `block_sparse_moe` too; `transformers` fuses experts and convolutions."""
    if spelling == "saved":
        return {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in tensors.items()}, config
    spelled: Tensors = {}
    for name, tensor in fuse_experts(tensors).items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        for gate in ("f_a_proj", "f_b_proj", "A_log", "dt_bias"):
            name = name.replace(f"self_attn.{gate}", f"self_attn.forget_gate.{gate}")
        if "v_conv1d" in name or "k_conv1d" in name:
            continue
        if "q_conv1d" in name:
            name, tensor = _fuse_convolutions(name, tensors)
        spelled[name] = tensor
    return spelled, config


def _fuse_convolutions(name: str, tensors: Tensors) -> tuple[str, Tensor]:
    parts = [tensors[name.replace("q_conv1d", f"{part}_conv1d")] for part in "qkv"]
    return name.replace("q_conv1d", "conv1d"), torch.cat(parts)
