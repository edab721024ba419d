"""The shapes of the two demo models, and their config.json."""

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class ModelConfig:
    """A Kimi-Linear: Kimi Delta Attention, and MLA without positions in every fourth layer."""

    layout: ClassVar[str] = "kimi"
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    head_dim: int = 64
    kv_lora: int = 128
    nope_dim: int = 48
    rope_dim: int = 16  # un-rotated in Kimi-Linear: no position enters the model
    value_dim: int = 64
    dense_width: int = 512  # layer 0
    expert_width: int = 80
    experts: int = 8
    experts_per_token: int = 2
    groups: int = 1  # of experts
    groups_per_token: int = 1
    routed_scale: float = 2.446
    eps: float = 1e-5
    context: int = 8192
    rope_theta: float = 10000.0
    tied: bool = False  # whether the output layer is the embedding

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
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": self.tied,
            "num_experts": self.experts,
            "num_experts_per_token": self.experts_per_token,
            "num_shared_experts": 1,
            "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid",
            "routed_scaling_factor": self.routed_scale,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "use_grouped_topk": True,
            "num_expert_group": self.groups,
            "topk_group": self.groups_per_token,
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


@dataclass(frozen=True)
class BailingConfig(ModelConfig):
    """Lightning attention in the layout of Ling-2.5, and MLA with rotated positions in every fourth layer."""

    layout: ClassVar[str] = "bailing"
    expert_width: int = 40
    experts_per_token: int = 4
    groups: int = 4
    groups_per_token: int = 3
    routed_scale: float = 2.5
    eps: float = 1e-6
    tied: bool = True
    layer_group: int = 4
    norm_groups: int = 4  # groups of the norm over a lightning layer's output
    rotated_share: float = 0.5  # of a lightning head; MLA rotates all of rope_dim

    def is_attention(self, layer: int) -> bool:
        whole = self.layers // self.layer_group * self.layer_group
        return (layer + 1) % self.layer_group == 0 or layer >= whole

    def slopes(self, layer: int) -> list[float]:
        """The decay of each head: exp(-slope) a token. `heads` must be a power of two."""
        factor = 1 - layer / (self.layers - 1) + 1e-5
        return [2 ** (-8 * (h + 1) / self.heads) * factor for h in range(self.heads)]

    def published(self) -> dict[str, Any]:
        return {
            "architectures": ["BailingMoeV2_5ForCausalLM"],
            "model_type": "bailing_hybrid",
            "dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "head_dim": self.head_dim,
            "intermediate_size": self.dense_width,
            "moe_intermediate_size": self.expert_width,
            "moe_shared_expert_intermediate_size": self.expert_width,
            "num_hidden_layers": self.layers,
            "layer_group_size": self.layer_group,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "group_norm_size": self.norm_groups,
            "linear_silu": False,
            "use_qk_norm": True,
            "use_bias": False,
            "use_qkv_bias": False,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "partial_rotary_factor": self.rotated_share,
            "rope_interleave": True,
            "tie_word_embeddings": self.tied,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "num_shared_experts": 1,
            "norm_topk_prob": True,
            "score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "router_dtype": "fp32",
            "routed_scaling_factor": self.routed_scale,
            "first_k_dense_replace": 1,
            "n_group": self.groups,
            "topk_group": self.groups_per_token,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": None,
            "kv_lora_rank": self.kv_lora,
            "qk_nope_head_dim": self.nope_dim,
            "qk_rope_head_dim": self.rope_dim,
            "v_head_dim": self.value_dim,
            "max_position_embeddings": self.context,
            "initializer_range": 0.02,
            "use_cache": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 3,
        }


LAYOUTS: dict[str, type[ModelConfig]] = {c.layout: c for c in (ModelConfig, BailingConfig)}
TINY = {"hidden": 64, "heads": 2, "head_dim": 16, "kv_lora": 32, "dense_width": 64, "expert_width": 16}
