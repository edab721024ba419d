"""Ring-linear-2.0 (lightning and grouped-query attention) and Ling/Ring-2.5 (lightning and latent attention)."""

from __future__ import annotations

from typing import Any, Literal

from tests.checkpoints.common import (
    BIAS_SPREAD,
    Config,
    Random,
    Tensors,
    below,
    experts,
    layer_norms,
    model,
    overridden,
    swiglu,
)

Generation = Literal["linear_v2", "linear", "v2_5"]

NAMES = {
    "linear_v2": ("BailingMoeLinearV2ForCausalLM", "bailing_moe_linear"),
    "linear": ("BailingMoeLinearForCausalLM", "bailing_moe_linear"),
    "v2_5": ("BailingMoeV2_5ForCausalLM", "bailing_hybrid"),
}
OPTIONAL_KEYS = (
    "attention_bias",
    "linear_head_dim",  # the width of a lightning head where `head_dim` is a decoy
    "linear_rope",
    "max_window_layers",
    "moe_shared_expert_intermediate_size",
    "qk_head_dim",
    "use_linear_silu",  # wins over `linear_silu`
    "use_rmsnorm",
)
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")
BIAS = 0.5  # spread of the bias of query_key_value


def bailing_config(generation: Generation = "linear_v2", **overrides: Any) -> Config:
    """`config.json` of a tiny Bailing model: groups of three layers, the last of each full attention.

    `linear_v2` and `linear` have seven layers, so that one stands behind the last whole group, and grouped-query
    attention; `v2_5` has six and latent attention, through a latent query unless `q_lora_rank` is None. In `v2_5`
    `num_key_value_heads` and, for the full layers, `partial_rotary_factor` mean nothing. `num_nextn_predict_layers`
    writes as many drafting layers behind the last one. Layers before `first_k_dense_replace` are dense.
    """
    architecture, model_type = NAMES[generation]
    latent = generation == "v2_5"
    config: Config = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 160,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 6 if latent else 7,
        "layer_group_size": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if latent else 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_bias": False,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rope_theta": 6000000 if latent else 600000,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "linear_silu": False,
        "group_norm_size": 2,  # how many groups, not how wide they are; as many as heads would hide wrong decays
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "output_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 2,
        "eos_token_id": 1,
    }
    if latent:
        config |= {
            "rope_interleave": True,
            "q_lora_rank": 28,
            "kv_lora_rank": 40,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "seq_aux": True,
        }
        config["qk_head_dim"] = sum(overrides.get(key, config[key]) for key in ("qk_nope_head_dim", "qk_rope_head_dim"))
    else:
        width = overrides.get("moe_intermediate_size", config["moe_intermediate_size"])
        config |= {"use_rmsnorm": True, "moe_shared_expert_intermediate_size": width}
    return overridden(config, overrides, OPTIONAL_KEYS)


def bailing_is_full(config: Config, index: int) -> bool:
    """Whether a layer has full attention: the last of each group and all behind the last whole group."""
    group = config["layer_group_size"]
    return (index + 1) % group == 0 or index >= config["num_hidden_layers"] // group * group


def bailing_tensors(config: Config, seed: int) -> Tensors:
    """Random fp32 weights by their names on the hub, with the drafting layers that the configuration counts."""
    random, hidden = Random(seed), config["hidden_size"]
    full = _latent if "kv_lora_rank" in config else _grouped

    def layer(index: int) -> Tensors:
        mixer = full if bailing_is_full(config, index) else _lightning
        dense = index < config["first_k_dense_replace"]
        feed_forward = swiglu(hidden, config["intermediate_size"], random) if dense else _moe(config, random)
        return below("attention.", mixer(config, random)) | below("mlp.", feed_forward)

    tensors = model(config, random, layer, embedding="model.word_embeddings")
    first = config["num_hidden_layers"]
    for index in range(first, first + config["num_nextn_predict_layers"]):
        drafting = below("attention.", full(config, random)) | below("mlp.", _moe(config, random))
        drafting |= layer_norms(hidden, random) | {"eh_proj.weight": random.linear(hidden, 2 * hidden)}
        drafting |= {f"{name}.weight": random.norm(hidden) for name in ("enorm", "hnorm", "final_layernorm")}
        tensors |= below(f"model.layers.{index}.", drafting)
    return tensors


def _lightning(config: Config, random: Random) -> Tensors:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("linear_head_dim", config["head_dim"])
    width = heads * head_dim
    return _query_key_value(config, random, 3 * width, head_dim) | {
        "g_proj.weight": random.linear(width, hidden),
        "g_norm.weight": random.norm(width),
        "dense.weight": random.linear(hidden, width),
    }


def _grouped(config: Config, random: Random) -> Tensors:
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    rows = (heads + 2 * config["num_key_value_heads"]) * head_dim
    dense = {"dense.weight": random.linear(hidden, heads * head_dim)}
    return _query_key_value(config, random, rows, head_dim) | dense


def _query_key_value(config: Config, random: Random, rows: int, head_dim: int) -> Tensors:
    tensors = {"query_key_value.weight": random.linear(rows, config["hidden_size"])}
    if config["use_qkv_bias"]:
        tensors["query_key_value.bias"] = random.normal(rows, std=BIAS)
    if config["use_qk_norm"]:
        tensors |= {f"{name}_layernorm.weight": random.norm(head_dim) for name in ("query", "key")}
    return tensors


def _latent(config: Config, random: Random) -> Tensors:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, query_rank = config["kv_lora_rank"], config["q_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    rows = heads * (nope + rope)
    tensors = {
        "kv_a_proj_with_mqa.weight": random.linear(rank + rope, hidden),
        "kv_a_layernorm.weight": random.norm(rank),
        "kv_b_proj.weight": random.linear(heads * (nope + value), rank),
        "dense.weight": random.linear(hidden, heads * value),
    }
    if query_rank is None:
        return tensors | {"q_proj.weight": random.linear(rows, hidden)}
    return tensors | {
        "q_a_proj.weight": random.linear(query_rank, hidden),
        "q_a_layernorm.weight": random.norm(query_rank),
        "q_b_proj.weight": random.linear(rows, query_rank),
    }


def _moe(config: Config, random: Random) -> Tensors:
    hidden, width, count = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    shared = config.get("moe_shared_expert_intermediate_size", width) * config["num_shared_experts"]
    tensors = {"gate.weight": random.linear(count, hidden)}
    if config["moe_router_enable_expert_bias"]:
        tensors["gate.expert_bias"] = random.normal(count, std=BIAS_SPREAD)
    tensors |= experts(count, hidden, width, random, EXPERT_NAMES)
    return tensors | (below("shared_experts.", swiglu(hidden, shared, random)) if shared else {})
