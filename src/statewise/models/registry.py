"""Architectures by the name that a checkpoint's config.json gives. No code of a checkpoint is ever run."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statewise.config import EngineConfig
from statewise.errors import CheckpointError, ConfigError
from statewise.models.config import read_json

ARCHITECTURES = {
    "KimiLinearForCausalLM": "statewise.models.kimi_linear",
}
MODEL_TYPES = {"kimi_linear": "KimiLinearForCausalLM"}  # for a config.json that names no architecture
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_directory(model: str | Path) -> Path:
    """The directory that `model` names: a path, or `demo` for the embedded model. Raises `CheckpointError`."""
    if str(model) == "demo":
        return Path(__file__).resolve().parent.parent / "demo"
    if not isinstance(model, str | Path):
        raise CheckpointError(f"model must be a path or 'demo', found {type(model).__name__}")
    directory = Path(model)
    if not directory.is_dir():
        known = "give the directory of a checkpoint, or 'demo' for the embedded model"
        raise CheckpointError(f"model '{model}' is not a directory; {known}")
    return directory


def read_model_config(directory: Path) -> tuple[type[nn.Module], Any, dict[str, Any]]:
    """The model class, its parsed configuration and the raw config.json of a checkpoint directory."""
    values = read_json(directory / "config.json")
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
    return model_class, model_class.config_class.from_dict(values), values


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
