"""Kimi-Linear (KimiLinearForCausalLM): KDA and position-free MLA layers, sigmoid-routed experts."""

from __future__ import annotations

from dataclasses import dataclass

from statewise.errors import CheckpointError
from statewise.layers.attention.mla import MLA_LAYER, MlaConfig
from statewise.layers.linear_attention.kda import KdaConfig
from statewise.layers.moe import MoeConfig
from statewise.models.causal_lm import CausalLM, CausalLMConfig
from statewise.models.config import Settings, check_groups

KDA_LAYER = "kimi_gated_delta_net_attention"


@dataclass(frozen=True, kw_only=True)
class KimiLinearConfig(CausalLMConfig):
    """The fields of config.json that the model follows."""

    kda: KdaConfig
    mla: MlaConfig

    @classmethod
    def read(cls, settings: Settings) -> KimiLinearConfig:
        settings.require("mla_use_nope", (True,), True)
        settings.require("q_lora_rank", (None,), None)
        settings.require("moe_router_activation_func", ("sigmoid",), "sigmoid")
        layers = settings.integer("num_hidden_layers", high=1000)
        linear = settings.section("linear_attn_config")
        head_dim = linear.integer("head_dim", high=1024)
        experts = settings.integer("num_experts", default=0, low=0, high=1 << 16)
        dense_first = settings.integer("first_k_dense_replace", default=0, low=0)
        frequency = settings.integer("moe_layer_freq", default=1)
        expert_width = settings.integer("moe_intermediate_size") if experts else 0
        top_k = settings.integer("num_experts_per_token", "num_experts_per_tok") if experts else 0
        groups = settings.integer("num_expert_group", "n_group", default=1)
        top_groups = settings.integer("topk_group", default=1, high=groups)
        if experts:
            check_groups(settings, experts, top_k, groups, top_groups)
        return cls(
            **cls.common(settings, _layer_kinds(linear, layers), eps=1e-5),
            dense_width=settings.integer("intermediate_size"),
            dense_layers=frozenset(i for i in range(layers) if not experts or i < dense_first or i % frequency),
            kda=KdaConfig(
                num_heads=linear.integer("num_heads", high=4096),
                head_dim=head_dim,
                value_dim=linear.integer("v_head_dim", default=head_dim, high=1024),
                conv_taps=linear.integer("short_conv_kernel_size", low=2, high=64),
            ),
            mla=MlaConfig(
                num_heads=settings.integer("num_attention_heads", high=4096),
                latent_dim=settings.integer("kv_lora_rank"),
                nope_dim=settings.integer("qk_nope_head_dim"),
                rope_dim=settings.integer("qk_rope_head_dim"),
                value_dim=settings.integer("v_head_dim"),
            ),
            moe=MoeConfig(
                num_experts=experts,
                top_k=top_k,
                expert_width=expert_width,
                shared_width=expert_width * settings.integer("num_shared_experts", default=0, low=0, high=1024),
                renormalize=settings.flag("moe_renormalize", "norm_topk_prob", default=True),
                scale=settings.number("routed_scaling_factor", default=1.0),
                num_groups=groups,
                top_groups=top_groups,
            ),
        )


def _layer_kinds(linear: Settings, layers: int) -> tuple[str, ...]:
    """The registered name of each layer's mixer. The lists of config.json count layers from 1."""
    kda, full = linear.integers("kda_layers"), linear.integers("full_attn_layers")
    if sorted(kda + full) != list(range(1, layers + 1)):
        raise CheckpointError(
            f"{linear.where}: 'kda_layers' and 'full_attn_layers' must name each of the layers 1 to {layers} once"
        )
    return tuple(KDA_LAYER if index in set(kda) else MLA_LAYER for index in range(1, layers + 1))


class KimiLinearForCausalLM(CausalLM):
    """Pre-norm decoder layers; the first ones have a dense feed-forward layer, the others experts."""

    config_class = KimiLinearConfig
