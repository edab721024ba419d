"""MiniMax-M2: grouped-query attention with norms over whole query and key rows, experts in every layer."""

from __future__ import annotations

from typing import Any

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
)


def minimax_m2_config(**overrides: Any) -> Config:
    """`config.json` of a tiny MiniMax-M2 with the published keys: four layers, half of each head rotated.

    `qk_norm_type` is "per_layer" (one norm over all heads of a row, as published) or "per_head".
    """
    layers = overrides.get("num_hidden_layers", 4)
    config: Config = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "dtype": "float32",
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 48,  # of an expert
        "mlp_intermediate_size": 112,  # a decoy, as in the published file: no layer has this width
        "num_hidden_layers": layers,
        "attn_type_list": [1] * layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rotary_dim": overrides.get("head_dim", 32) // 2,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "layernorm_full_attention_beta": 1.0,  # left over from MiniMax-Text-01, as are the next two
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_mtp": True,  # no drafting layer is published although these say so
        "num_mtp_modules": 3,
        "mtp_transformer_layers": 1,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return overridden(config, overrides)


def minimax_m2_tensors(config: Config, seed: int) -> Tensors:
    """Random fp32 weights by their names on the hub."""
    random, hidden, count = Random(seed), config["hidden_size"], config["num_local_experts"]
    head_dim, per_layer = config["head_dim"], config["qk_norm_type"] == "per_layer"
    width, narrow = (config[key] * head_dim for key in ("num_attention_heads", "num_key_value_heads"))

    def layer(_: int) -> Tensors:
        mixer = {
            f"{name}_proj.weight": random.linear(rows, hidden) for name, rows in zip("qkv", (width, narrow, narrow))
        }
        mixer["o_proj.weight"] = random.linear(hidden, width)
        if config["use_qk_norm"]:
            mixer["q_norm.weight"] = random.norm(width if per_layer else head_dim)
            mixer["k_norm.weight"] = random.norm(narrow if per_layer else head_dim)
        moe = {"gate.weight": random.linear(count, hidden)}
        if config["use_routing_bias"]:
            moe["e_score_correction_bias"] = random.normal(count, std=BIAS_SPREAD)
        moe |= experts(count, hidden, config["intermediate_size"], random)
        return below("self_attn.", mixer) | below("block_sparse_moe.", moe)

    return model(config, random, layer)


def respell_minimax_m2(tensors: Tensors, config: Config, spelling: Spelling) -> tuple[Tensors, Config]:
    """`saved` says `rope_parameters`; `transformers` fuses the experts and calls the block `mlp`."""
    config = dict(config)
    partial = config["rotary_dim"] / config["head_dim"]
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config["rope_parameters"]["partial_rotary_factor"] = partial
    if spelling == "saved":
        return tensors, config
    fused = fuse_experts(tensors)
    return {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in fused.items()}, config
