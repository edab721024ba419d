"""MiniMax-Text-01 and MiniMax-M1: lightning and softmax attention, softmax-routed experts in every layer.

Two layouts of config.json are published: the original one and that of the `-hf` upload. The tensors are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.errors import CheckpointError
from statewise.layers.attention.gqa import GQA_LAYER, GqaConfig
from statewise.layers.mixer import State
from statewise.layers.moe import MoeConfig, SwiGLU
from statewise.layers.parameters import Component
from statewise.layers.projection import Linear, Rows
from statewise.models.causal_lm import CausalLM, CausalLMConfig, DecoderLayer
from statewise.models.config import Settings
from statewise.ops.batch import Batch

LINEAR_LAYER = "minimax_text_01_attention"
_LINEAR_BY_NUMBER: dict[int | str, bool] = {0: True, 1: False}  # values of attn_type_list: lightning, softmax
_LINEAR_BY_WORD: dict[int | str, bool] = {"linear_attention": True, "full_attention": False}  # of layer_types


@dataclass(frozen=True)
class Mix:
    """The weights of a residual sum: alpha · residual + beta · update."""

    alpha: float
    beta: float


@dataclass(frozen=True, kw_only=True)
class MiniMaxConfig(CausalLMConfig):
    """The fields of config.json that the model follows."""

    num_heads: int  # of both kinds of layers
    head_dim: int
    attention_mix: tuple[Mix, ...]  # per layer
    moe_mix: Mix
    postnorm: bool  # the residual is the normed input of a block, not the input itself
    gqa: GqaConfig
    shared_widths: tuple[int, ...]  # per layer: width of the shared MLP; 0: none

    @classmethod
    def read(cls, settings: Settings) -> MiniMaxConfig:
        layers = settings.integer("num_hidden_layers", high=1000)
        linear = _linear_layers(settings, layers)
        head_dim = settings.integer("head_dim", high=1024)
        heads, kv_heads = settings.head_counts()
        settings.require("sliding_window", (None,), None)
        experts = settings.integer("num_local_experts", "num_experts", high=1 << 16)
        mixes = [_mix(settings, "linear_attention" if is_linear else "full_attention") for is_linear in linear]
        return cls(
            **cls.common(settings, [LINEAR_LAYER if is_linear else GQA_LAYER for is_linear in linear], eps=1e-5),
            num_heads=heads,
            head_dim=head_dim,
            attention_mix=tuple(mixes),
            moe_mix=_mix(settings, "mlp"),
            postnorm=settings.flag("postnorm", default=not settings.present("attn_type_list")),  # `-hf` implies it
            gqa=GqaConfig(heads, kv_heads, head_dim, settings.rotary_dim(head_dim), settings.rope_theta(default=1e6)),
            moe=MoeConfig(
                num_experts=experts,
                top_k=settings.integer("num_experts_per_tok", high=experts),
                expert_width=settings.integer("intermediate_size"),
                shared_width=0,
                renormalize=True,
                scale=1.0,
                scoring="softmax",
                selection_bias=False,
            ),
            shared_widths=_shared_widths(settings, layers),
        )


def _linear_layers(settings: Settings, layers: int) -> list[bool]:
    """Per layer: lightning (True) or softmax attention. The file must say it; there is no sensible default."""
    kinds: Sequence[int | str]
    if settings.present("attn_type_list"):
        key, kinds, linear = "attn_type_list", settings.integers("attn_type_list"), _LINEAR_BY_NUMBER
    else:
        key, kinds, linear = "layer_types", settings.words("attn_type_list", "layer_types"), _LINEAR_BY_WORD
    if len(kinds) != layers:
        raise CheckpointError(
            f"{settings.where}: '{key}' must have {layers} entries, one per layer, found {len(kinds)}"
        )
    unknown = [kind for kind in kinds if kind not in linear]
    if unknown:
        expected = " or ".join(repr(kind) for kind in linear)
        raise CheckpointError(f"{settings.where}: '{key}' must hold {expected}, found {unknown[0]!r}")
    return [linear[kind] for kind in kinds]


def _mix(settings: Settings, block: str) -> Mix:
    """alpha and beta of a kind of block, in either spelling."""
    short = {"linear_attention": "linear_attn", "full_attention": "full_attn"}.get(block, block)
    alpha, beta = (
        settings.number(f"layernorm_{block}_{name}", f"{short}_{name}_factor", default=1.0, low=-1e6, high=1e6)
        for name in ("alpha", "beta")
    )
    return Mix(alpha, beta)


def _shared_widths(settings: Settings, layers: int) -> tuple[int, ...]:
    """`shared_intermediate_size`: one number for all layers, a list of one, or a list with one for each."""
    key = "shared_intermediate_size"
    given = settings.integers(key) if isinstance(settings.values.get(key), list) else None
    widths = given if given is not None else [settings.integer(key, default=0, low=0)]
    if len(widths) == 1:
        widths = widths * layers
    if len(widths) != layers or min(widths) < 0:
        raise CheckpointError(f"{settings.where}: '{key}' must be one width or one for each of the {layers} layers")
    if any(widths):
        settings.require("shared_moe_mode", ("sigmoid",), "sigmoid")
    return tuple(widths)


class MiniMaxFeedForward(Component):
    """Experts; with a shared MLP y = (1 - c) · experts + c · shared, c = σ(w x), in fp32."""

    def __init__(self, experts: Component, hidden: int, shared_width: int, prefix: str, engine: EngineConfig) -> None:
        super().__init__()
        self.experts = experts
        self.shared: SwiGLU | None = None
        if shared_width:
            self.shared = SwiGLU(hidden, shared_width, (f"{prefix}.shared_mlp",), engine)
            self.coefficient = Linear(hidden, Rows(1, f"{prefix}.coefficient"), dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        y = self.experts(x)
        if self.shared is None:
            return y
        share = torch.sigmoid(self.coefficient(x.float()))
        return torch.lerp(y.float(), self.shared(x).float(), share).to(y.dtype)


class MiniMaxDecoderLayer(DecoderLayer):
    """h = norm(x); x <- alpha · (h or x) + beta · block(h), for the attention block and then for the experts."""

    attention_mix: Mix
    moe_mix: Mix
    postnorm: bool

    def forward(self, x: Tensor, batch: Batch, state: State) -> Tensor:
        h = self.input_layernorm(x)
        residual, mix = h if self.postnorm else x, self.attention_mix
        mixed = self.mixer(h, batch, state)
        x, h = residual, self.post_attention_layernorm.add(residual, mixed, mix.alpha, mix.beta)
        residual, mix = h if self.postnorm else x, self.moe_mix
        update = self.feed_forward(h)
        if mix.beta != 1.0:
            update.mul_(mix.beta)
        return update.add_(residual, alpha=mix.alpha)


class MiniMaxText01ForCausalLM(CausalLM):
    """The original layout of config.json and that of the `-hf` upload alike."""

    config: MiniMaxConfig
    config_class = MiniMaxConfig
    # transformers stores the tables of its decays.
    skipped_tensors = (*CausalLM.skipped_tensors, "query_decay", "key_decay", "diagonal_decay")
    suppresses_blank_ids = True  # the embedding has rows behind the vocabulary that are all zero

    def decoder_layer(self, index: int, engine_config: EngineConfig) -> DecoderLayer:
        config, prefix = self.config, f"model.layers.{index}"
        mixer = self.mixer(index, engine_config, f"{prefix}.{self.mixer_name}")
        experts = self.feed_forward(index, engine_config, prefix)
        width = config.shared_widths[index]
        feed_forward = MiniMaxFeedForward(experts, config.hidden_size, width, prefix, engine_config)
        layer = MiniMaxDecoderLayer(config, engine_config, prefix, mixer, feed_forward)
        layer.attention_mix, layer.moe_mix = config.attention_mix[index], config.moe_mix
        layer.postnorm = config.postnorm
        return layer


class MiniMaxM1ForCausalLM(MiniMaxText01ForCausalLM):
    """MiniMax-M1 (arXiv 2506.13585): the same network."""


class MiniMaxForCausalLM(MiniMaxText01ForCausalLM):
    """The `-hf` upload."""
