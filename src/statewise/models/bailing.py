"""Ring-linear-2.0 (lightning and grouped-query attention) and Ling/Ring-2.5 (lightning and latent attention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from statewise.errors import CheckpointError
from statewise.layers.attention.gqa import GQA_LAYER, GqaConfig
from statewise.layers.attention.mla import MLA_LAYER, MlaConfig
from statewise.layers.linear_attention.bailing import BailingLinearConfig
from statewise.layers.linear_attention.slopes import FORMULAS
from statewise.layers.moe import MoeConfig
from statewise.models.causal_lm import CausalLM, CausalLMConfig
from statewise.models.config import Settings, check_groups

LINEAR_LAYER = "bailing_moe_linear_attention"
ROPE_THETA = 10_000.0  # where config.json does not say


@dataclass(frozen=True, kw_only=True)
class BailingConfig(CausalLMConfig):
    """The fields of config.json that both generations follow."""

    linear: BailingLinearConfig

    @classmethod
    def shared_fields(cls, settings: Settings, full_layer: str) -> dict[str, Any]:
        """The fields of this class. `full_layer` is the registered name of the layers between the linear ones."""
        for key in ("use_qkv_bias", "use_bias"):
            settings.require(key, (False,), False)
        settings.require("score_function", ("sigmoid",), "sigmoid")
        layers = settings.integer("num_hidden_layers", high=1000)
        group = settings.integer("layer_group_size")
        whole = layers // group * group  # what is left behind the last whole group is full attention throughout
        mixers = [full_layer if (i + 1) % group == 0 or i >= whole else LINEAR_LAYER for i in range(layers)]
        return {
            **cls.common(settings, mixers, eps=1e-6),
            "dense_width": settings.integer("intermediate_size"),
            "dense_layers": frozenset(range(settings.integer("first_k_dense_replace", default=0, low=0, high=1000))),
            "linear": _linear(settings),
            "moe": _moe(settings),
        }


def _linear(settings: Settings) -> BailingLinearConfig:
    heads, head_dim = settings.integer("num_attention_heads", high=4096), _head_dim(settings)
    groups = settings.integer("group_norm_size", default=1)
    if heads * head_dim % groups:
        raise CheckpointError(
            f"{settings.where}: 'group_norm_size' is a number of groups and must divide {heads} heads of {head_dim}, "
            f"found {groups}"
        )
    return BailingLinearConfig(
        num_heads=heads,
        head_dim=head_dim,
        norm_groups=groups,
        silu=settings.flag("use_linear_silu", "linear_silu", default=False),
        qk_norm=settings.flag("use_qk_norm", default=False),
        rotary_dim=settings.rotary_dim(head_dim) if settings.flag("linear_rope", default=True) else 0,
        rope_theta=settings.rope_theta(default=ROPE_THETA),
        slope_formula=settings.choice("slope_formula", FORMULAS, default="serving"),
    )


def _head_dim(settings: Settings) -> int:
    """The width of a lightning or grouped-query head. transformers saves another number as `head_dim` and keeps this
    one in `linear_head_dim`; it is never hidden_size / heads."""
    return settings.integer("linear_head_dim", "head_dim", high=1024)


def _moe(settings: Settings) -> MoeConfig:
    experts = settings.integer("num_experts", "num_local_experts", high=1 << 16)
    top_k = settings.integer("num_experts_per_tok", "num_experts_per_token", high=experts)
    groups = settings.integer("n_group", "num_expert_group", default=1)
    top_groups = settings.integer("topk_group", default=groups, high=groups)
    check_groups(settings, experts, top_k, groups, top_groups)
    width = settings.integer("moe_intermediate_size")
    one_shared = settings.integer("moe_shared_expert_intermediate_size", default=width)
    shared = one_shared * settings.integer("num_shared_experts", "n_shared_experts", default=0, low=0, high=1024)
    if shared % width:
        raise CheckpointError(
            f"{settings.where}: 'moe_shared_expert_intermediate_size' must be a multiple of 'moe_intermediate_size' "
            f"{width}, found {one_shared}"
        )
    return MoeConfig(
        num_experts=experts,
        top_k=top_k,
        expert_width=width,
        shared_width=shared,
        renormalize=settings.flag("norm_topk_prob", "moe_renormalize", default=True),
        scale=settings.number("routed_scaling_factor", default=1.0),
        num_groups=groups,
        top_groups=top_groups,
        selection_bias=settings.flag("moe_router_enable_expert_bias", default=True),
    )


@dataclass(frozen=True, kw_only=True)
class BailingMoeLinearConfig(BailingConfig):
    """Ring-linear-2.0."""

    gqa: GqaConfig

    @classmethod
    def read(cls, settings: Settings) -> BailingMoeLinearConfig:
        heads, kv_heads = settings.head_counts()
        shared = cls.shared_fields(settings, GQA_LAYER)
        return cls(
            **shared,
            gqa=GqaConfig(
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=_head_dim(settings),
                rotary_dim=settings.rotary_dim(_head_dim(settings)),
                rope_theta=settings.rope_theta(default=ROPE_THETA),
                norm="head" if settings.flag("use_qk_norm", default=False) else "none",
                norm_eps=shared["rms_norm_eps"],
                fused=True,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class BailingMoeV2_5Config(BailingConfig):  # noqa: N801 - the generation is called 2.5
    """Ling-2.5 and Ring-2.5."""

    mla: MlaConfig

    @classmethod
    def read(cls, settings: Settings) -> BailingMoeV2_5Config:
        settings.require("rope_interleave", (True,), True)
        low = settings.integer("q_lora_rank") if settings.present("q_lora_rank") else None
        rope_dim = settings.integer("qk_rope_head_dim")  # rotated as a whole: the partial factor is not for it
        if rope_dim % 2:
            raise CheckpointError(f"{settings.where}: 'qk_rope_head_dim' must be even, found {rope_dim}")
        return cls(
            **cls.shared_fields(settings, MLA_LAYER),
            mla=MlaConfig(
                num_heads=settings.integer("num_attention_heads", high=4096),
                latent_dim=settings.integer("kv_lora_rank"),
                nope_dim=settings.integer("qk_nope_head_dim"),
                rope_dim=rope_dim,
                value_dim=settings.integer("v_head_dim"),
                query_rank=low,
                rope_theta=settings.rope_theta(default=ROPE_THETA),
            ),
        )


class BailingForCausalLM(CausalLM):
    """Pre-norm decoder layers; the first ones have a dense feed-forward layer, the others experts."""

    embedding = CausalLM.embedding[::-1]
    mixer_name = "attention"
    routed_names = CausalLM.dense_names
    skipped_tensors = (*CausalLM.skipped_tensors, "v_head")


class BailingMoeLinearForCausalLM(BailingForCausalLM):
    """Ring-mini-linear-2.0, Ring-flash-linear-2.0."""

    config_class = BailingMoeLinearConfig


class BailingMoeLinearV2ForCausalLM(BailingMoeLinearForCausalLM):
    """The same under its second name."""


class BailingMoeV2_5ForCausalLM(BailingForCausalLM):  # noqa: N801
    """Ling-2.5-1T, Ring-2.5-1T, Ling-2.6-flash."""

    config_class = BailingMoeV2_5Config
