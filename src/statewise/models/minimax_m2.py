"""MiniMax-M2 and M2.5: softmax attention in every layer, sigmoid-routed experts."""

from __future__ import annotations

from dataclasses import dataclass

from statewise.errors import CheckpointError
from statewise.layers.attention.gqa import GQA_LAYER, GqaConfig
from statewise.layers.moe import MoeConfig
from statewise.models.causal_lm import CausalLM, CausalLMConfig
from statewise.models.config import Settings


@dataclass(frozen=True, kw_only=True)
class MiniMaxM2Config(CausalLMConfig):
    """The fields of config.json that the model follows."""

    gqa: GqaConfig

    @classmethod
    def read(cls, settings: Settings) -> MiniMaxM2Config:
        layers = settings.integer("num_hidden_layers", high=1000)
        if settings.present("attn_type_list") and settings.integers("attn_type_list") != [1] * layers:
            raise CheckpointError(f"{settings.where}: 'attn_type_list' must be 1 for each of the {layers} layers")
        settings.require("scoring_func", ("sigmoid",), "sigmoid")
        settings.require("use_qk_norm", (True,), True)
        settings.require("qk_norm_type", ("per_layer",), "per_layer")
        settings.require("shared_intermediate_size", (0, [0]), 0)
        settings.require("sliding_window", (None,), None)
        head_dim = settings.integer("head_dim", high=1024)
        heads, kv_heads = settings.head_counts()
        experts = settings.integer("num_local_experts", "num_experts", high=1 << 16)
        common = cls.common(settings, [GQA_LAYER] * layers, eps=1e-6)
        return cls(
            **common,
            gqa=GqaConfig(
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                rotary_dim=settings.rotary_dim(head_dim),
                rope_theta=settings.rope_theta(default=5e6),
                norm="row",
                norm_eps=common["rms_norm_eps"],
            ),
            moe=MoeConfig(
                num_experts=experts,
                top_k=settings.integer("num_experts_per_tok", high=experts),
                expert_width=settings.integer("intermediate_size"),
                shared_width=0,
                renormalize=True,
                scale=1.0,
                selection_bias=settings.flag("use_routing_bias", default=True),
            ),
        )


class MiniMaxM2ForCausalLM(CausalLM):
    """Pre-norm decoder layers with experts throughout."""

    config_class = MiniMaxM2Config
