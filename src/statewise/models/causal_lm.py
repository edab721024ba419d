"""What all served models share: embedding, decoder layers, norm, head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from statewise.config import EngineConfig
from statewise.layers.mixer import State, TokenMixer
from statewise.layers.moe import MoeConfig, SparseMoE, SwiGLU
from statewise.layers.norm import RMSNorm
from statewise.layers.parameters import Component
from statewise.layers.pluggable import PluggableLayer, resolve
from statewise.layers.projection import Embedding, Linear, Rows
from statewise.models.config import Settings
from statewise.ops.batch import Batch

Config = TypeVar("Config", bound="CausalLMConfig")


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """The fields of config.json that every model follows. Models add their own."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    max_length: int
    tie_embeddings: bool
    mixers: tuple[str, ...]  # per layer: registered name
    moe: MoeConfig
    dense_layers: frozenset[int] = frozenset()  # those with a dense feed-forward layer instead of experts
    dense_width: int = 0

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Read config.json. Raises `CheckpointError` naming the key that is missing, wrong or not supported."""
        return cls.read(Settings(values))

    @classmethod
    @abstractmethod
    def read(cls: type[Config], settings: Settings) -> Config:
        """`from_dict`; `settings` remembers which keys were looked at."""

    @staticmethod
    def common(settings: Settings, mixers: Sequence[str], *, eps: float) -> dict[str, Any]:
        """The fields of this class. `eps` is the family's default; `mixers` may be exchanged by `replace_layers`."""
        settings.require("hidden_act", ("silu",), "silu")
        return {
            "vocab_size": settings.integer("vocab_size"),
            "hidden_size": settings.integer("hidden_size", high=1 << 20),
            "num_layers": len(mixers),
            "rms_norm_eps": settings.number("rms_norm_eps", default=eps, high=1.0),
            "max_length": settings.integer("max_position_embeddings", "model_max_length", default=1 << 20),
            "tie_embeddings": settings.flag("tie_word_embeddings", default=False),
            "mixers": resolve(tuple(mixers), settings.names("replace_layers")),
        }


class DecoderLayer(Component):
    """x += mixer(norm(x)); x += feed_forward(norm(x)), both in place."""

    def __init__(
        self,
        config: CausalLMConfig,
        engine_config: EngineConfig,
        prefix: str,
        mixer: TokenMixer,
        feed_forward: Component,
    ) -> None:
        super().__init__()
        norm = (config.rms_norm_eps, engine_config.dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, f"{prefix}.input_layernorm", *norm)
        self.mixer = mixer
        self.post_attention_layernorm = RMSNorm(config.hidden_size, f"{prefix}.post_attention_layernorm", *norm)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, batch: Batch, state: State) -> Tensor:
        h = self.post_attention_layernorm.add(x, self.mixer(self.input_layernorm(x), batch, state))
        return x.add_(self.feed_forward(h))


class CausalLM(nn.Module):
    """The whole model. `forward` gives hidden rows, `logits` turns the wanted ones into fp32 logits."""

    config_class: ClassVar[type[CausalLMConfig]]
    # What the parts are called; exporters disagree, so every spelling is accepted, the first one is the usual one.
    embedding: ClassVar[tuple[str, ...]] = ("model.embed_tokens", "model.word_embeddings")
    mixer_name: ClassVar[str] = "self_attn"
    routed_names: ClassVar[tuple[str, ...]] = ("block_sparse_moe", "mlp")
    dense_names: ClassVar[tuple[str, ...]] = ("mlp", "block_sparse_moe")
    # Tensors that some checkpoints have and the model does not read: a part of their names, from a dot on.
    skipped_tensors: ClassVar[tuple[str, ...]] = ("mtp", "visual", "rotary_emb.inv_freq", "slope")
    suppresses_blank_ids: ClassVar[bool] = False  # ids whose embedding is all zero are never sampled

    def __init__(self, config: Any, engine_config: EngineConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, *self.embedding, dtype=engine_config.dtype)
        self.layers = nn.ModuleList(self.decoder_layer(index, engine_config) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, "model.norm", config.rms_norm_eps, engine_config.dtype)
        head = self.embedding if config.tie_embeddings else ("lm_head",)
        self.lm_head = Linear(config.hidden_size, Rows(config.vocab_size, *head), dtype=torch.float32)

    def decoder_layer(self, index: int, engine_config: EngineConfig) -> DecoderLayer:
        """Layer `index`, counted from 0."""
        prefix = f"model.layers.{index}"
        mixer = self.mixer(index, engine_config, f"{prefix}.{self.mixer_name}")
        return DecoderLayer(self.config, engine_config, prefix, mixer, self.feed_forward(index, engine_config, prefix))

    def mixer(self, index: int, engine_config: EngineConfig, prefix: str) -> TokenMixer:
        """The token mixer that the configuration names for a layer."""
        return PluggableLayer.make(self.config.mixers[index], self.config, engine_config, prefix)

    def feed_forward(self, index: int, engine_config: EngineConfig, prefix: str) -> SparseMoE | SwiGLU:
        """The dense or routed layer behind the token mixer."""
        config = self.config
        if index in config.dense_layers:
            names = tuple(f"{prefix}.{name}" for name in self.dense_names)
            return SwiGLU(config.hidden_size, config.dense_width, names, engine_config)
        names = tuple(f"{prefix}.{name}" for name in self.routed_names)
        return SparseMoE(config.moe, config.hidden_size, names, engine_config)

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

    def blank_ids(self) -> list[int]:
        """Token ids that must not be sampled because nothing was trained for them. Call after loading."""
        if not self.suppresses_blank_ids:
            return []
        blank = [block.abs().amax(dim=1) == 0 for block in self.embed_tokens.weight.split(4096)]
        return torch.cat(blank).nonzero().flatten().tolist()
