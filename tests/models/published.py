"""The shapes of published checkpoints, as their config.json gives them: what decides the bytes of a sequence.

Keys that do not bear on layers and state are left out, and vocabularies are the real ones. Where a width is not known
here (Ring-flash-linear-2.0's experts, Ling-2.6-flash's) a stand-in is used; it does not change state or pages.
"""

from __future__ import annotations

from typing import Any

_BAILING: dict[str, Any] = {
    "vocab_size": 157184,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "group_norm_size": 4,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
}
_MINIMAX: dict[str, Any] = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "vocab_size": 200064,
    "hidden_size": 6144,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9216,
    "num_local_experts": 32,
    "num_experts_per_tok": 2,
    "attn_type_list": ([0] * 7 + [1]) * 10,
    "rotary_dim": 64,
    "rope_theta": 1e7,
    "max_position_embeddings": 10240000,
}
_RANGE = range(1, 28)
_KIMI_FULL = [4, 8, 12, 16, 20, 24, 27]

PUBLISHED: dict[str, dict[str, Any]] = {
    "MiniMax-Text-01": _MINIMAX,
    "MiniMax-M1": _MINIMAX | {"architectures": ["MiniMaxM1ForCausalLM"]},
    "Ring-mini-linear-2.0": _BAILING
    | {
        "architectures": ["BailingMoeLinearV2ForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 20,
        "layer_group_size": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "rope_theta": 1e6,
    },
    "Ring-flash-linear-2.0": _BAILING
    | {
        "architectures": ["BailingMoeLinearV2ForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "layer_group_size": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
    },
    "Ling-2.6-flash": _BAILING
    | {
        "architectures": ["BailingMoeV2_5ForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "layer_group_size": 8,
        "num_attention_heads": 32,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 6e6,
    },
    "Kimi-Linear-48B-A3B": {
        "architectures": ["KimiLinearForCausalLM"],
        "vocab_size": 163840,
        "hidden_size": 2304,
        "num_hidden_layers": 27,
        "num_attention_heads": 32,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "mla_use_nope": True,
        "model_max_length": 1048576,
        "linear_attn_config": {
            "kda_layers": [i for i in _RANGE if i not in _KIMI_FULL],
            "full_attn_layers": _KIMI_FULL,
            "num_heads": 32,
            "head_dim": 128,
            "short_conv_kernel_size": 4,
        },
    },
    "MiniMax-M2": {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "vocab_size": 200064,
        "hidden_size": 3072,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 1536,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "rotary_dim": 64,
        "rope_theta": 5e6,
        "max_position_embeddings": 196608,
    },
}
