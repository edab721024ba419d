"""What a model is made of and what its state costs, without reading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statewise.api.model_summary import LayerSummary, ModelSummary
from statewise.config import EngineConfig
from statewise.engine.runner import block_specs
from statewise.layers.contract import check_capabilities, check_specs
from statewise.layers.mixer import TokenMixer
from statewise.layers.moe import SparseMoE, SwiGLU
from statewise.layers.pluggable import PluggableLayer
from statewise.models.directory import model_directory
from statewise.models.registry import build, read_model_config, resolve_dtype
from statewise.models.weights import check_slots


def inspect_model(
    model: str | Path,
    dtype: str | torch.dtype = "auto",
    page_size: int = 64,
    max_length: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    record_dtype: torch.dtype = torch.float32,
) -> ModelSummary:
    """Describe a checkpoint from its config.json alone, with keys of it replaced by `overrides`.

    Raises `CheckpointError`, `ConfigError` for an override that the architecture does not read, and `PluginError`.
    """
    directory = model_directory(model)
    model_class, config, values = read_model_config(directory, overrides)
    engine_config = EngineConfig(
        dtype=resolve_dtype(dtype, values),
        page_size=page_size,
        max_length=max_length or 0,
        record_dtype=record_dtype,
    )
    module = build(model_class, config, engine_config)
    return summarize(str(model), directory, values, module, engine_config)


def summarize(
    name: str, directory: Path, values: Mapping[str, Any], module: Any, engine_config: EngineConfig
) -> ModelSummary:
    """Describe a model that was built but not yet loaded.

    Raises `PluginError` for a layer that is badly declared, `ConfigError` for one that cannot run as asked.
    """
    check_specs(module.mixers, engine_config)
    check_capabilities(module.mixers, engine_config)
    check_slots(module)
    record, page = block_specs(module.mixers, engine_config)
    names = module.config.mixers
    layers = [_layer(index, layer, names[index], engine_config) for index, layer in enumerate(module.layers)]
    return ModelSummary(
        name=name,
        path=str(directory),
        architecture=type(module).__name__,
        dtype=str(engine_config.dtype).removeprefix("torch."),
        parameters=_count(module) - (_count(module.lm_head) if module.config.tie_embeddings else 0),
        weight_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
        layers=layers,
        record_bytes=record.nbytes,
        page_bytes=page.nbytes,
        page_size=engine_config.page_size,
        max_length=min(engine_config.max_length or module.config.max_length, module.config.max_length),
    )


def _layer(index: int, layer: Any, registered_name: str, engine_config: EngineConfig) -> LayerSummary:
    mixer: TokenMixer = layer.mixer
    spec = mixer.state_spec().per_rank(engine_config.ranks.rank, engine_config.ranks.size)
    return LayerSummary(
        index=index,
        kind=mixer.state_kind,
        registered_name=registered_name,
        layer_class=f"{type(mixer).__module__}.{type(mixer).__qualname__}",
        provider=PluggableLayer.origin(registered_name),
        feed_forward=_feed_forward(layer.feed_forward),
        parameters=_count(layer),
        state_bytes=spec.nbytes if mixer.scope == "record" else 0,
        page_bytes_per_token=spec.nbytes if mixer.scope == "page" else 0,
        kernels="; ".join(f"{device}: {words}" for device, words in mixer.capabilities.kernels.items()),
        details=mixer.details,
    )


def _feed_forward(module: nn.Module) -> str:
    parts = list(module.modules())
    routed = next((part for part in parts if isinstance(part, SparseMoE)), None)
    if routed is None:
        return "dense"
    # A shared expert runs among the routed ones or beside them.
    shared = " + shared" if routed.config.shared_width or any(isinstance(part, SwiGLU) for part in parts) else ""
    return f"{routed.config.num_experts} experts, top {routed.config.top_k}{shared}"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
