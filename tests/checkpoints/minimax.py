"""MiniMax-Text-01 and M1, and their `-hf` upload: lightning attention, softmax attention, experts in every layer."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tests.checkpoints.common import (
    HEAD_GAIN,
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

Layout = Literal["text01", "m1", "hf"]

NAMES = {
    "text01": ("MiniMaxText01ForCausalLM", "minimax_text_01"),
    "m1": ("MiniMaxM1ForCausalLM", "minimax_m1"),
    "hf": ("MiniMaxForCausalLM", "minimax"),
}
RESIDUAL_KEYS = {
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
}
"""The factors of the residual connections: key of the `-hf` layout to key of the original layout."""

QKV_GAIN = 0.3  # small, so that the epsilon of the norm behind a lightning layer shows in the logits


def minimax_config(layout: Layout = "text01", **overrides: Any) -> Config:
    """`config.json` of a tiny MiniMax: five layers, softmax attention at every third and the last one.

    `text01` and `m1` have the original keys, `hf` those of the `-hf` upload, which may also have `rotary_dim`
    (transformers rotates whole heads whatever it says) and `postnorm`. Half of each head is rotated by default in
    the original layouts. `shared_intermediate_size` above 0 adds the shared MLP and its coefficient. Another
    `num_hidden_layers` comes with a list of layer kinds of that length unless one is given.
    """
    architecture, model_type = NAMES[layout]
    layers = overrides.get("num_hidden_layers", 5)
    kinds = [int((index + 1) % 3 == 0 or index == layers - 1) for index in range(layers)]
    factors = dict(zip(RESIDUAL_KEYS, (1.9, 0.8, 1.6, 1.1, 1.4, 0.9), strict=True))
    config: Config = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 80,  # of an expert
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000000,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,  # as published: the generation configuration and the tokenizer know it
        "pad_token_id": None,
    }
    if layout == "hf":
        names = ["full_attention" if kind else "linear_attention" for kind in kinds]
        config |= {"layer_types": names, "block_size": 32} | factors
        return overridden(config, overrides, optional=("rotary_dim", "postnorm"))
    config |= {
        "attn_type_list": kinds,
        **{RESIDUAL_KEYS[name]: factor for name, factor in factors.items()},
        "postnorm": True,
        "rotary_dim": overrides.get("head_dim", 32) // 2,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
    }
    return overridden(config, overrides)


def minimax_layer_kinds(config: Config) -> list[bool]:
    """True for softmax attention, of each layer, in either layout."""
    if "layer_types" in config:
        return [kind == "full_attention" for kind in config["layer_types"]]
    return [kind == 1 for kind in config["attn_type_list"]]


def minimax_tensors(config: Config, seed: int) -> Tensors:
    """Random fp32 weights by their names on the hub, the same in both layouts."""
    random, kinds = Random(seed), minimax_layer_kinds(config)

    def layer(index: int) -> Tensors:
        mixer = below("self_attn.", (_softmax if kinds[index] else _lightning)(config, random))
        return mixer | _feed_forward(config, random)

    return model(config, random, layer)


def _lightning(config: Config, random: Random) -> Tensors:
    hidden, width = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    return {
        "qkv_proj.weight": random.linear(3 * width, hidden, gain=QKV_GAIN),  # per head: q, k, v
        "output_gate.weight": random.linear(width, hidden),
        "out_proj.weight": random.linear(hidden, width),
        "norm.weight": random.norm(width),
    }


def _softmax(config: Config, random: Random) -> Tensors:
    hidden, width = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    narrow = config["num_key_value_heads"] * config["head_dim"]
    return {
        "q_proj.weight": random.linear(width, hidden),
        "k_proj.weight": random.linear(narrow, hidden),
        "v_proj.weight": random.linear(narrow, hidden),
        "o_proj.weight": random.linear(hidden, width),
    }


def _feed_forward(config: Config, random: Random) -> Tensors:
    hidden, count = config["hidden_size"], config["num_local_experts"]
    tensors = {"block_sparse_moe.gate.weight": random.linear(count, hidden, gain=HEAD_GAIN)}
    tensors |= below("block_sparse_moe.", experts(count, hidden, config["intermediate_size"], random))
    shared = config.get("shared_intermediate_size", 0)
    width = shared[0] if isinstance(shared, list) else shared
    if width:
        tensors |= below("shared_mlp.", swiglu(hidden, width, random))
        tensors["coefficient.weight"] = random.linear(1, hidden)
    return tensors


def respell_minimax(tensors: Tensors, config: Config, spelling: Spelling) -> tuple[Tensors, Config]:
    """`saved` adds the decays that transformers stores and says `rope_parameters`; `transformers` fuses the experts."""
    config = dict(config)
    theta = config.pop("rope_theta")
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    if spelling == "transformers":
        fused = fuse_experts(tensors)
        return {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in fused.items()}, config
    spelled = dict(tensors)
    for index, full in enumerate(minimax_layer_kinds(config)):
        if not full:
            spelled |= below(f"model.layers.{index}.self_attn.", _stored_decays(config, index))
    return spelled, config


def _stored_decays(config: Config, index: int) -> Tensors:
    """The buffers of a lightning layer that transformers saves with its parameters; a loader leaves them out."""
    heads, block = config["num_attention_heads"], config["block_size"]
    factor = 1 - index / (config["num_hidden_layers"] - 1 + 1e-5) + 1e-5
    slopes = factor * torch.exp2(-8 / heads * torch.arange(1, heads + 1)).view(heads, 1, 1)
    rows = torch.arange(1, block + 1).view(block, 1)
    return {
        "slope_rate": slopes,
        "query_decay": torch.exp(-slopes * rows),
        "key_decay": torch.exp(-slopes * (block - rows)),
        "diagonal_decay": torch.exp(-slopes * (rows - rows.T)).tril()[None],
    }
