"""What a model needs of an amount of memory, and what fits into it. Reads config.json, no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statewise.api.accounting import Budget, Costs, Frozen, Mix, SequenceCost, compare, frozen, mixes, share_out
from statewise.api.model_summary import ModelSummary
from statewise.api.summary import summarize
from statewise.config import EngineConfig
from statewise.engine.runner import available_memory, block_specs
from statewise.errors import ConfigError
from statewise.layers.linear_attention.base import LinearAttention
from statewise.layers.mixer import TokenMixer
from statewise.memory.blocks import BlockSpec, Field, StateSpec
from statewise.models.directory import model_directory
from statewise.models.registry import build, read_model_config, resolve_dtype

RECORD_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_CONTEXT = 131072
STAND_IN_HEADS = 8  # key-value heads of the comparison model where the model has no full layer of its own


@dataclass(frozen=True)
class StoredField:
    """One named tensor of the record, in all layers together."""

    name: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class FullAttention:
    """The model of the same size that keeps every token in every layer."""

    description: str
    page_bytes: int
    cheaper_from: int | None  # tokens from which a sequence of the model takes less than there


@dataclass(frozen=True)
class Plan:
    """What a model needs and what fits. All amounts are exact, on one rank."""

    model: str
    architecture: str
    parameters: int
    num_layers: int
    num_linear_layers: int
    dtype: str
    record_dtype: str
    max_length: int  # the model's limit, in tokens
    context: int  # longest sequence that is planned for
    fits: bool
    memory: Budget
    record_bytes: int
    record_fields: list[StoredField]
    page_size: int
    page_bytes: int
    page_bytes_per_token: int
    sequences: list[SequenceCost]
    mixes: list[Mix]
    frozen: Frozen
    full_attention: FullAttention
    notes: list[str]


def plan_model(
    model: str | Path,
    memory: int | None = None,
    context: int | None = None,
    dtype: str | torch.dtype = "auto",
    record_dtype: str = "fp32",
    page_size: int = 64,
    overrides: Mapping[str, Any] | None = None,
    reserve: int | None = None,
) -> Plan:
    """Account for a checkpoint directory, or its config.json, in `memory` bytes (default: what is free here).

    `context` is the longest sequence in tokens (default: 131,072, or the model's limit where that is less), `reserve`
    what is kept for activations and the runtime in bytes (default: a tenth of the memory). With dtype `auto` the
    checkpoint's own is planned, whatever this processor is good at. Raises `ConfigError` for a number out of range or
    an unknown dtype, and what `inspect_model` raises.
    """
    if record_dtype not in RECORD_DTYPES:
        raise ConfigError(f"record_dtype '{record_dtype}' is not supported; choose {' or '.join(RECORD_DTYPES)}")
    memory = available_memory() if memory is None else _whole("memory", memory, 1, "byte")
    reserve = None if reserve is None else _whole("reserve", reserve, 0, "bytes")
    path = Path(model) if isinstance(model, str) else model
    is_config = isinstance(path, Path) and path.name == "config.json" and path.is_file()
    directory = path.parent if is_config else model_directory(model)
    model_class, config, values = read_model_config(directory, overrides)
    engine_config = EngineConfig(
        dtype=_planned_dtype(dtype, values),
        page_size=_whole("page_size", page_size, 1, "token"),
        record_dtype=RECORD_DTYPES[record_dtype],
    )
    module = build(model_class, config, engine_config)
    summary = summarize(str(model), directory, values, module, engine_config)
    context = min(DEFAULT_CONTEXT, summary.max_length) if context is None else _whole("context", context, 1, "token")
    if context > summary.max_length:
        raise ConfigError(f"context {context:,} is above the model's limit of {summary.max_length:,} tokens")
    record, page = block_specs(module.mixers, engine_config)
    full_page, description = full_attention_page(module.mixers, summary, engine_config)
    costs = Costs(summary.weight_bytes, record.nbytes, page.nbytes, full_page.nbytes, page_size)
    budget = share_out(costs, memory, context, reserve)
    return Plan(
        model=summary.name,
        architecture=summary.architecture,
        parameters=summary.parameters,
        num_layers=len(summary.layers),
        num_linear_layers=len(record.layers),
        dtype=summary.dtype,
        record_dtype=record_dtype,
        max_length=summary.max_length,
        context=context,
        fits=budget.missing_bytes == 0,
        memory=budget,
        record_bytes=record.nbytes,
        record_fields=stored_fields(record),
        page_size=page_size,
        page_bytes=page.nbytes,
        page_bytes_per_token=sum(layer.page_bytes_per_token for layer in summary.layers),
        sequences=compare(costs, context),
        mixes=mixes(costs, budget.room_bytes, context),
        frozen=frozen(costs, budget.room_bytes, summary.max_length),
        full_attention=FullAttention(description, full_page.nbytes, costs.cheaper_from),
        notes=_notes(dtype, values, summary.dtype),
    )


def stored_fields(record: BlockSpec) -> list[StoredField]:
    """What a record consists of: bytes by the name and dtype of the fields."""
    amounts: Counter[tuple[str, torch.dtype]] = Counter()
    for spec in record.layers.values():
        for name, field in spec.items():
            amounts[name, field.dtype] += BlockSpec({0: StateSpec(**{name: field})}).nbytes
    return [StoredField(name, str(dtype).removeprefix("torch."), size) for (name, dtype), size in amounts.items()]


def full_attention_page(
    mixers: Sequence[TokenMixer], summary: ModelSummary, config: EngineConfig
) -> tuple[BlockSpec, str]:
    """A page of the comparison model, and what that model is: every linear layer becomes a full one of the model."""
    linear = [index for index, mixer in enumerate(mixers) if mixer.scope == "record"]
    full = next((index for index, mixer in enumerate(mixers) if mixer.scope == "page"), None)
    if full is not None:
        stand_in = mixers[full].state_spec()
        kind = f"the model's own {summary.layers[full].registered_name}"
    else:
        width = next((mixer.head_dim for mixer in mixers if isinstance(mixer, LinearAttention)), 128)
        entry = Field((STAND_IN_HEADS, width), config.dtype)
        stand_in, kind = StateSpec(key=entry, value=entry), "grouped-query attention"
    specs = {index: stand_in if index in linear else mixer.state_spec() for index, mixer in enumerate(mixers)}
    per_token = ", ".join(f"{name} {' x '.join(map(str, field.shape))}" for name, field in stand_in.items())
    description = (
        f"the same {len(mixers)} layers, the {len(linear)} linear ones replaced by {kind} ({per_token} per token)"
        if linear
        else "the model itself, which has no linear layers"
    )
    rank, size = config.ranks.rank, config.ranks.size
    pages = {index: spec.per_rank(rank, size).per_page(config.page_size) for index, spec in specs.items()}
    return BlockSpec(pages), description


def _whole(name: str, value: Any, low: int, unit: str) -> int:
    if type(value) is not int or value < low:
        raise ConfigError(f"{name} must be a whole number of at least {low} {unit}, found {value!r}")
    return value


def _stored_dtype(values: Mapping[str, Any]) -> str | None:
    stored = values.get("dtype") or values.get("torch_dtype")
    return None if stored is None else str(stored).removeprefix("torch.")


def _planned_dtype(requested: str | torch.dtype, values: dict[str, Any]) -> torch.dtype:
    """`auto` does not ask this processor, as the engine does: a plan is often made for another machine."""
    if requested != "auto":
        return resolve_dtype(requested, values)
    return torch.bfloat16 if _stored_dtype(values) == "bfloat16" else torch.float32


def _notes(requested: str | torch.dtype, values: Mapping[str, Any], dtype: str) -> list[str]:
    """What a reader of config.json should know about the weights."""
    notes, stored = [], _stored_dtype(values)
    if requested == "auto" and stored not in ("bfloat16", "float32"):
        said = f"config.json says {stored}" if stored else "config.json names no dtype"
        notes.append(f"{said}: {dtype} is planned; --dtype bfloat16 plans about half")
    if values.get("quantization_config"):
        notes.append(f"the weights are published quantised and must be converted: they count in {dtype} here")
    return notes
