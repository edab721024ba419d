"""Kimi-Linear (KimiLinearForCausalLM): KDA and position-free MLA layers, sigmoid-routed experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statewise.config import EngineConfig
from statewise.errors import CheckpointError
from statewise.layers.attention.mla import MlaConfig
from statewise.layers.linear_attention.kda import KdaConfig
from statewise.layers.mixer import State, TokenMixer
from statewise.layers.moe import MoeConfig, SparseMoE, SwiGLU
from statewise.layers.norm import RMSNorm
from statewise.layers.parameters import Component
from statewise.layers.pluggable import PluggableLayer
from statewise.layers.projection import Embedding, Linear, Rows
from statewise.models.config import Settings
from statewise.ops.batch import Batch

KDA_LAYER = "kimi_gated_delta_net_attention"
MLA_LAYER = "multi_head_latent_attention"


@dataclass(frozen=True)
class KimiLinearConfig:
    """The fields of config.json that the model follows."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    max_length: int
    tie_embeddings: bool
    dense_width: int
    moe_layers: tuple[bool, ...]  # per layer: routed (True) or dense
    mixers: tuple[str, ...]  # per layer: registered name
    kda: KdaConfig
    mla: MlaConfig
    moe: MoeConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KimiLinearConfig:
        """Read config.json. Raises `CheckpointError` naming the key that is missing, wrong or not supported."""
        settings = Settings(values)
        settings.require("hidden_act", ("silu",), "silu")
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
        if experts and (experts % groups or top_k > experts // groups * top_groups):
            raise CheckpointError(
                f"config.json: {experts} experts cannot give {top_k} per token, {top_groups} of {groups} equal groups"
            )
        return cls(
            vocab_size=settings.integer("vocab_size"),
            hidden_size=settings.integer("hidden_size", high=1 << 20),
            num_layers=layers,
            rms_norm_eps=settings.number("rms_norm_eps", default=1e-5, high=1.0),
            max_length=settings.integer("model_max_length", "max_position_embeddings", default=1 << 20),
            tie_embeddings=settings.flag("tie_word_embeddings", default=False),
            dense_width=settings.integer("intermediate_size"),
            moe_layers=tuple(bool(experts) and i >= dense_first and i % frequency == 0 for i in range(layers)),
            mixers=_layer_kinds(linear, layers),
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


class KimiDecoderLayer(Component):
    """x += mixer(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: KimiLinearConfig, engine_config: EngineConfig, index: int) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        norm = (config.rms_norm_eps, engine_config.dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, f"{prefix}.input_layernorm", *norm)
        self.mixer: TokenMixer = PluggableLayer.get(config.mixers[index])(config, engine_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, f"{prefix}.post_attention_layernorm", *norm)
        # Exporters disagree on the name of the feed-forward block, for dense and for routed layers.
        names = (f"{prefix}.block_sparse_moe", f"{prefix}.mlp")
        self.feed_forward: SparseMoE | SwiGLU
        if config.moe_layers[index]:
            self.feed_forward = SparseMoE(config.moe, config.hidden_size, names, engine_config)
        else:
            self.feed_forward = SwiGLU(config.hidden_size, config.dense_width, names[::-1], engine_config)

    def forward(self, x: Tensor, batch: Batch, state: State) -> Tensor:
        x = x + self.mixer(self.input_layernorm(x), batch, state)
        return x + self.feed_forward(self.post_attention_layernorm(x))


class KimiLinearForCausalLM(nn.Module):
    """The whole model. `forward` gives hidden rows, `logits` turns the wanted ones into fp32 logits."""

    config_class = KimiLinearConfig
    skipped_tensors = ("model.mtp", "mtp.", "rotary_emb.inv_freq")  # present in some checkpoints, not part of it

    def __init__(self, config: KimiLinearConfig, engine_config: EngineConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, "model.embed_tokens", dtype=engine_config.dtype
        )
        self.layers = nn.ModuleList(KimiDecoderLayer(config, engine_config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, "model.norm", config.rms_norm_eps, engine_config.dtype)
        head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
        self.lm_head = Linear(config.hidden_size, Rows(config.vocab_size, head), dtype=torch.float32)

    @property
    def mixers(self) -> list[TokenMixer]:
        """The state-keeping layer of each decoder layer, in order."""
        return [layer.mixer for layer in self.layers]  # type: ignore[misc]

    def forward(self, batch: Batch, states: Sequence[State]) -> Tensor:  # -> [T, hidden]
        x = self.embed_tokens(batch.tokens)
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, batch, state)
        return x

    def logits(self, hidden: Tensor) -> Tensor:  # [R, hidden] -> [R, vocab] fp32
        return self.lm_head(self.norm(hidden).float())
