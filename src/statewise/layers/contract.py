"""What a layer says of itself, checked before anything runs: its state, its devices and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from statewise.config import EngineConfig
from statewise.errors import BlockError, ConfigError, PluginError, StatewiseError
from statewise.layers.mixer import TokenMixer
from statewise.layers.pluggable import PluggableLayer, described
from statewise.memory.blocks import Field, Shard, StateSpec


def check_capabilities(mixers: Sequence[TokenMixer], config: EngineConfig) -> None:
    """Raise `ConfigError` for a layer that cannot run on the device or in the dtype that was asked for."""
    for mixer in mixers:
        able = mixer.capabilities
        if config.device.type not in able.kernels:
            raise ConfigError(
                f"{named(mixer)} has no kernels for device '{config.device.type}', only for {', '.join(able.kernels)}"
            )
        if config.dtype not in able.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in able.dtypes)
            raise ConfigError(f"{named(mixer)} runs in {known} only")


def check_specs(mixers: Sequence[TokenMixer], config: EngineConfig) -> None:
    """Raise `PluginError` unless every layer declares fields that can be laid out and cut for the ranks.

    Needs no weights. The message names the layer and the field.
    """
    for mixer in mixers:
        spec = _declared(mixer)
        for name, field in spec.items():
            problem = _problem(field, config)
            if problem:
                raise PluginError(f"{named(mixer)}: field '{name}' of its state {problem}")
        check_constant(mixer, spec)


def _declared(mixer: TokenMixer) -> StateSpec:
    try:
        spec: Any = mixer.state_spec()
    except StatewiseError:
        raise
    except Exception as error:
        raise PluginError(f"{named(mixer)}: state_spec() failed with {type(error).__name__}: {error}") from error
    if not isinstance(spec, StateSpec):
        raise PluginError(f"{named(mixer)}: state_spec() must give a StateSpec, found {type(spec).__name__}")
    return spec


def _problem(field: Any, config: EngineConfig) -> str:
    """What is wrong with a declared field; empty if nothing is."""
    if not isinstance(field, Field):
        return f"must be a Field, found {type(field).__name__}"
    axes: Any = field.shape
    if not isinstance(axes, tuple) or not axes or not all(type(axis) is int and axis > 0 for axis in axes):
        return f"must have a shape of positive integers, found {axes!r}"
    dtype: Any = field.dtype
    if not isinstance(dtype, torch.dtype):
        return f"must have a torch dtype, found {dtype!r}"
    if field.order is not None and sorted(field.order) != list(range(len(axes))):
        return f"must have an order of its {len(axes)} axes, found {field.order!r}"
    if field.shard is not None and (not isinstance(field.shard, Shard) or not 0 <= field.shard.axis < len(axes)):
        return f"must be cut along one of its {len(axes)} axes, found {field.shard!r}"
    size = config.ranks.size
    try:
        for rank in range(size):
            field.per_rank(rank, size)
    except (BlockError, ValueError) as error:
        return f"cannot be cut for {size} rank{'s' if size > 1 else ''}: {error}"
    return ""


def check_constant(mixer: TokenMixer, spec: StateSpec) -> None:
    """Raise `PluginError` when state_spec() does not give `spec` again."""
    again = _declared(mixer)
    for name in sorted(spec.keys() | again.keys()):
        if spec.get(name) != again.get(name):
            raise PluginError(f"{named(mixer)}: state_spec() gives another field '{name}' at every call")


def named(mixer: TokenMixer) -> str:
    """A layer in a message: its registered name, class, package and place."""
    return f"layer '{PluggableLayer.name_of(type(mixer))}' ({described(type(mixer))}) at {mixer.prefix}"
