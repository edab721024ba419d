"""The shape of the demo model, and its config.json."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    head_dim: int = 64
    kv_lora: int = 128
    nope_dim: int = 48
    rope_dim: int = 16  # un-rotated: no position enters the model
    value_dim: int = 64
    dense_width: int = 512  # layer 0
    expert_width: int = 80
    experts: int = 8
    experts_per_token: int = 2
    routed_scale: float = 2.446
    eps: float = 1e-5
    context: int = 8192

    def is_attention(self, layer: int) -> bool:
        return layer % 4 == 3

    def published(self) -> dict[str, Any]:
        """config.json in the published layout."""
        layers = range(self.layers)
        return {
            "architectures": ["KimiLinearForCausalLM"],
            "model_type": "kimi_linear",
            "dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "head_dim": self.head_dim,
            "intermediate_size": self.dense_width,
            "moe_intermediate_size": self.expert_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "num_experts": self.experts,
            "num_experts_per_token": self.experts_per_token,
            "num_shared_experts": 1,
            "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid",
            "routed_scaling_factor": self.routed_scale,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "use_grouped_topk": True,
            "num_expert_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": None,
            "kv_lora_rank": self.kv_lora,
            "qk_nope_head_dim": self.nope_dim,
            "qk_rope_head_dim": self.rope_dim,
            "v_head_dim": self.value_dim,
            "mla_use_nope": True,
            "linear_attn_config": {
                "full_attn_layers": [i + 1 for i in layers if self.is_attention(i)],
                "kda_layers": [i + 1 for i in layers if not self.is_attention(i)],
                "head_dim": self.head_dim,
                "num_heads": self.heads,
                "short_conv_kernel_size": 4,
            },
            "model_max_length": self.context,
            "initializer_range": 0.02,
            "use_cache": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 3,
        }
