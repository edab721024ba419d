"""Architectures by the name that a checkpoint's config.json gives. No code of a checkpoint is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statewise.config import EngineConfig
from statewise.errors import CheckpointError, ConfigError
from statewise.models.config import Settings, read_json

ARCHITECTURES = {
    "KimiLinearForCausalLM": "statewise.models.kimi_linear",
    "MiniMaxText01ForCausalLM": "statewise.models.minimax",
    "MiniMaxM1ForCausalLM": "statewise.models.minimax",
    "MiniMaxForCausalLM": "statewise.models.minimax",
    "MiniMaxM2ForCausalLM": "statewise.models.minimax_m2",
    "BailingMoeLinearForCausalLM": "statewise.models.bailing",
    "BailingMoeLinearV2ForCausalLM": "statewise.models.bailing",
    "BailingMoeV2_5ForCausalLM": "statewise.models.bailing",
}
# For a config.json that names no architecture. Two generations call themselves `bailing_hybrid`: it decides nothing.
MODEL_TYPES = {
    "kimi_linear": "KimiLinearForCausalLM",
    "minimax_text_01": "MiniMaxText01ForCausalLM",
    "minimax_m1": "MiniMaxM1ForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "bailing_moe_linear": "BailingMoeLinearV2ForCausalLM",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_model_config(
    directory: Path, overrides: Mapping[str, Any] | None = None
) -> tuple[type[nn.Module], Any, dict[str, Any]]:
    """The model class, its parsed configuration and the raw config.json of a checkpoint directory.

    `overrides` replaces keys of config.json. Raises `CheckpointError`, and `ConfigError` for an override that the
    architecture does not read.
    """
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise ConfigError(f"overrides must map keys of config.json to values, found {overrides!r}")
    values = {**read_json(directory / "config.json"), **overrides}
    names = values.get("architectures")
    if names is None and str(values.get("model_type")) in MODEL_TYPES:
        names = [MODEL_TYPES[values["model_type"]]]
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config.json: 'architectures' must be a list that names one architecture")
    if names[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"architecture '{names[0]}' is not supported; supported are: {', '.join(sorted(ARCHITECTURES))}"
        )
    model_class = getattr(import_module(ARCHITECTURES[names[0]]), names[0])
    settings = Settings(values)
    config = model_class.config_class.read(settings)
    given = {key for key, value in overrides.items() if value is not None}  # null takes a key away
    idle = sorted(given - settings.read - {"architectures", "model_type"})
    if idle:
        raise ConfigError(f"'{idle[0]}' cannot be overridden: {names[0]} does not read it in this config.json")
    return model_class, config, values


def resolve_dtype(requested: str | torch.dtype, values: dict[str, Any]) -> torch.dtype:
    """The dtype to compute in. `auto` follows the checkpoint; bf16 where the processor multiplies it natively."""
    if isinstance(requested, torch.dtype):
        requested = str(requested).removeprefix("torch.")
    if requested == "auto":
        stored = values.get("dtype", values.get("torch_dtype", "float32"))
        native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return torch.bfloat16 if stored == "bfloat16" and native else torch.float32
    if requested not in DTYPES:
        raise ConfigError(f"dtype '{requested}' is not supported; choose auto, float32 or bfloat16")
    return DTYPES[requested]


def build(model_class: type[nn.Module], config: Any, engine_config: EngineConfig) -> Any:
    """The model without weights, on the meta device."""
    return model_class(config, engine_config).eval().requires_grad_(False)
