"""A layer is made, given weights and made ready, as the engine does it; what goes wrong becomes one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.errors import PluginError, StatewiseError
from statewise.layers.mixer import Capabilities, TokenMixer
from statewise.layers.parameters import Component, Slot

PREFIX = "model.layers.3.self_attn"


def label(layer: type) -> str:
    """A class as `statewise conformance` takes it: `module:Class`."""
    return f"{layer.__module__}:{layer.__qualname__}"


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn whatever is raised into a `PluginError` that begins with `what`; Statewise's own errors stay."""
    try:
        yield
    except StatewiseError:
        raise
    except Exception as error:
        raise PluginError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def require_contract(layer: Any) -> None:
    """Raise `PluginError` unless `layer` is a class that the kit can run; the message says what to add."""
    if not (isinstance(layer, type) and issubclass(layer, TokenMixer)):
        found = label(layer) if isinstance(layer, type) else f"an object of type {type(layer).__name__}"
        raise PluginError(f"{found} is not a layer: derive a class from LinearAttention or TokenMixer")
    name = layer.__name__
    for attribute in ("scope", "state_kind", "capabilities"):
        if not hasattr(layer, attribute):
            raise PluginError(f"{name} has no class attribute {attribute}")
    if layer.scope not in ("record", "page"):
        raise PluginError(f"{name}.scope must be 'record' or 'page', found {layer.scope!r}")
    able: Any = layer.capabilities
    if not isinstance(able, Capabilities):
        said = "Capabilities({'cpu': 'what serves it there'})"
        raise PluginError(f"{name}.capabilities must be {said}, found {type(able).__name__}")
    listed = able.dtypes if isinstance(able.dtypes, tuple | list | set | frozenset) else ()
    if not listed or not all(isinstance(dtype, torch.dtype) for dtype in listed):
        raise PluginError(f"{name}.capabilities must list torch dtypes, found {able.dtypes!r}")
    missing = sorted(getattr(layer, "__abstractmethods__", ()))
    for method in ("state_spec", "forward"):
        if getattr(getattr(layer, method), "__isabstractmethod__", False):
            missing.append(method)
    if missing:
        raise PluginError(f"{name} has no method {sorted(set(missing))[0]}()")
    if getattr(layer.example_config, "__func__", None) is getattr(TokenMixer.example_config, "__func__", 0):
        raise PluginError(
            f"{name} has no example_config(): add a classmethod that returns a small configuration, hidden_size and "
            "whatever the constructor reads, with heads that 2 and 4 ranks can share"
        )
    if not isinstance(getattr_static(layer, "example_config"), classmethod | staticmethod):
        raise PluginError(f"{name}.example_config() must be a classmethod: the kit calls it before there is a layer")


def example_config(layer: type[TokenMixer]) -> Any:
    """The layer's example. Raises `PluginError` where it fails or has no width."""
    with blaming(f"{label(layer)}: example_config() failed"):
        config = layer.example_config()
    width = getattr(config, "hidden_size", None)
    if type(width) is not int or width < 1:
        found = "nothing" if width is None else repr(width)
        raise PluginError(
            f"{label(layer)}: the configuration that example_config() gives needs a hidden_size, a positive integer, "
            f"found {found}"
        )
    return config


def make(layer: type[TokenMixer], config: Any, engine: EngineConfig) -> TokenMixer:
    """The layer without weights. Raises `PluginError` when its constructor does not do what the engine needs."""
    name = label(layer)
    try:
        with blaming(f"{name} cannot be made from its example_config()"):
            made = layer(config, engine, PREFIX)
    except PluginError as error:
        cause = error.__cause__
        if isinstance(cause, AttributeError) and cause.obj is config:
            raise PluginError(
                f"{name} cannot be made from its example_config(): it reads '{cause.name}', which that does not have"
            ) from cause
        raise
    if not hasattr(made, "engine_config"):
        raise PluginError(f"{name}: its constructor must call super().__init__(config, engine_config, prefix)")
    for below, module in made.named_modules():
        for own, parameter in module.named_parameters(below, recurse=False):
            if not isinstance(module, Component):
                raise PluginError(
                    f"{name}: its parameter '{own}' is that of a {type(module).__name__}, which no one loads: "
                    "use Linear, or declare() it in the layer"
                )
            if not parameter.is_meta:
                raise PluginError(
                    f"{name} allocates its parameter '{own}' in the constructor; "
                    "use declare(), which leaves it on the meta device until it is loaded"
                )
    return made


def slots_of(layer: TokenMixer, component: Component, names: Set[str]) -> list[Slot]:
    """What a component asks a checkpoint for: at least every parameter that it declares."""
    said = _named(layer, component)
    with blaming(f"{said}: slots() failed"):
        found: Any = component.slots(names)
        slots = [] if found is None else list(found)
    if found is None:
        raise PluginError(f"{said}: slots() must yield Slots, found None")
    for slot in slots:
        if not isinstance(slot, Slot):
            raise PluginError(f"{said}: slots() must yield Slots, found {type(slot).__name__}")
    unfilled = component.unfilled(slots)
    if unfilled:
        raise PluginError(f"{said}: no slot fills its parameter '{unfilled[0]}'; yield one from slots()")
    return slots


def example_weight(layer: TokenMixer, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """What the layer suggests for a tensor of that name, None if nothing."""
    said = f"{label(type(layer))}: example_weight('{name}')"
    with blaming(f"{said} failed"):
        value: Any = layer.example_weight(name, shape, generator)
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise PluginError(f"{said} must give a tensor or None, found {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise PluginError(f"{said} is {list(value.shape)}, the slot expects {list(shape)}")
    return value.float()


def load(layer: TokenMixer, weights: Mapping[str, Tensor], device: torch.device) -> TokenMixer:
    """Load one component at a time, as a checkpoint is loaded."""
    ranks, names = layer.ranks, frozenset(weights)
    for component in components(layer):
        component.materialize(device)
        for slot in slots_of(layer, component, names):
            name = next((name for name in slot.names if name in weights), None)
            if name is None or tuple(weights[name].shape) != tuple(slot.shape):
                wants = f"rank {ranks.rank} of {ranks.size} asks for '{slot.names[0]}' {list(slot.shape)}"
                there = "has no such tensor" if name is None else f"has it as {list(weights[name].shape)}"
                raise PluginError(f"{wants}, one rank alone {there}: a slot's shape is that of the whole tensor")
            with blaming(f"'{name}' does not fit rank {ranks.rank} of {ranks.size}"):
                slot.fill(weights[name].to(device))
        with blaming(f"{_named(layer, component)}: finalize() failed"):
            component.finalize()
    return layer.eval()


def components(layer: TokenMixer) -> list[Component]:
    return [module for module in layer.modules() if isinstance(module, Component)]


def _named(layer: TokenMixer, component: Component) -> str:
    """The layer, and which part of it."""
    below = next((name for name, module in layer.named_modules() if module is component), "")
    return f"{label(type(layer))}{f', its {below!r}' if below else ''}"
