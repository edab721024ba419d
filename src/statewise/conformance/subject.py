"""The layer under test: its class with one set of random weights, and the fp64 reference over the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from math import prod
from typing import Any

import torch
from torch import Tensor

from statewise.config import ALONE, EngineConfig, Ranks
from statewise.errors import PluginError
from statewise.layers.mixer import TokenMixer
from statewise.layers.parameters import Component
from statewise.memory.blocks import StateSpec

PREFIX = "model.layers.3.self_attn"
PAGE_SIZE = 16  # small, so that short sequences cross pages
REFERENCE_ROWS = 512  # rows that the reference gets at once: bounds the memory of a quadratic one
SPREAD = 0.2  # of the entries of a vector around 1, such as the weight of a norm

# Limits on errors relative to the scale of the reference. bfloat16 has 8 bits: 4e-3 for one rounding.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

Weights = Mapping[str, Tensor]


class ReferenceFailure(Exception):
    """reference() itself is at fault, not the layer."""


class Subject:
    """A layer class in one dtype with its example configuration. Every layer it builds has the same weights.

    Matrices that the kit makes up are rounded to the layer's dtype, as a checkpoint in that dtype has them. Vectors,
    and whatever `example_weight` gives, stay float32: a layer that keeps a decay in less shows a different decay.
    """

    def __init__(
        self, layer: type[TokenMixer], dtype: torch.dtype, *, device: str = "cpu", seed: int = 0, long: int = 65_536
    ) -> None:
        require_contract(layer)
        self.layer_class = layer
        self.config = layer.example_config()
        self.dtype = dtype
        self.device = torch.device(device)
        self.seed = seed
        self.long = long  # tokens of the longest input
        self.limit = LIMITS[dtype]
        # A bfloat16 matrix product may add in another order for another number of rows; a float32 one does not here.
        self.limit_of_rows = 0.0 if dtype == torch.float32 else self.limit
        # The one-rank layer says which tensors there are; it is the one that the reference is called on.
        bare = self._bare(ALONE)
        self.spec: StateSpec = bare.state_spec()
        self.made_up: set[str] = set()  # names of the tensors that example_weight left to the kit
        self.weights = self._draw(bare)
        self.plain = self._load(bare)
        self.double = {below(name): tensor.double() for name, tensor in self.weights.items()}
        self._built: dict[Any, TokenMixer] = {}

    @property
    def scope(self) -> str:
        return self.layer_class.scope

    @property
    def has_reference(self) -> bool:
        return self.layer_class.reference is not TokenMixer.reference

    def layer(self, ranks: Ranks = ALONE, **options: Any) -> TokenMixer:
        """The loaded layer under other options of `EngineConfig`, or one rank's part of it."""
        if ranks is not ALONE:
            return self._load(self._bare(ranks, **options))
        key = tuple(sorted(options.items()))
        if not key:
            return self.plain
        if key not in self._built:
            self._built[key] = self._load(self._bare(ranks, **options))
        return self._built[key]

    def amplified(self, factor: float) -> Subject:
        """The same layer with all matrices that the kit made up times `factor`."""
        other = copy(self)
        other.weights = {
            name: weight * factor if name in self.made_up and weight.squeeze().ndim > 1 else weight
            for name, weight in self.weights.items()
        }
        other.plain, other._built = other._load(other._bare(ALONE)), {}
        other.double = {below(name): tensor.double() for name, tensor in other.weights.items()}
        return other

    def hidden(self, tokens: int, seed: int = 0) -> Tensor:
        """Random input rows [tokens, hidden_size] of variance 1, as a norm before the layer gives them."""
        generator = torch.Generator().manual_seed(1_000 * self.seed + seed + 1)
        return torch.randn(tokens, self.config.hidden_size, generator=generator).to(self.device, self.dtype)

    def fresh(self) -> dict[str, Tensor]:
        """The reference's state of a sequence without history."""
        if self.scope == "page":
            return {name: torch.zeros((0, *field.shape), dtype=torch.float64) for name, field in self.spec.items()}
        return {name: torch.zeros(field.shape, dtype=torch.float64) for name, field in self.spec.items()}

    def reference(self, hidden: Tensor, state: dict[str, Tensor], start: int = 0) -> Tensor:
        """The fp64 outputs of rows that follow `start` tokens; `state` moves on. Raises `ReferenceFailure`."""
        parts = []
        for rows in hidden.to("cpu", torch.float64).split(REFERENCE_ROWS):
            try:
                output = self.plain.reference(rows, self.double, state, start)
            except Exception as error:
                raise ReferenceFailure(f"reference() raises {type(error).__name__}: {error}") from error
            start += len(rows)
            for name, field in self.spec.items():
                entry = state.get(name)
                wanted = (start, *field.shape) if self.scope == "page" else field.shape
                if entry is None or entry.shape != wanted:
                    found = "nothing" if entry is None else list(entry.shape)
                    raise ReferenceFailure(f"reference() leaves {found} as state '{name}', expected {list(wanted)}")
            if output.shape != rows.shape:
                raise ReferenceFailure(f"reference() returns {list(output.shape)}, expected {list(rows.shape)}")
            parts.append(output)
        return torch.cat(parts)

    def _bare(self, ranks: Ranks, **options: Any) -> TokenMixer:
        engine = EngineConfig(dtype=self.dtype, device=self.device, page_size=PAGE_SIZE, ranks=ranks, **options)
        layer = self.layer_class(self.config, engine, PREFIX)
        for name, parameter in layer.named_parameters():
            if not parameter.is_meta:
                raise PluginError(
                    f"{self.layer_class.__name__} allocates its parameter '{name}' in the constructor; "
                    "use declare(), which leaves it on the meta device until it is loaded"
                )
        return layer

    def _draw(self, layer: TokenMixer) -> dict[str, Tensor]:
        """Random tensors of a checkpoint under the first spelling of every slot of the one-rank layer."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = {}
        for component in components(layer):
            for slot in component.slots(frozenset()):
                name = slot.names[0]
                value = layer.example_weight(below(name), tuple(slot.shape), generator)
                if value is None:
                    self.made_up.add(name)
                    value = torch.randn(slot.shape, generator=generator)
                    if len([width for width in slot.shape if width > 1]) > 1:
                        value = (value / prod(slot.shape[1:]) ** 0.5).to(self.dtype)
                    else:
                        value = 1 + SPREAD * value
                if tuple(value.shape) != tuple(slot.shape):
                    raise PluginError(
                        f"example_weight('{below(name)}') is {list(value.shape)}, the slot expects {list(slot.shape)}"
                    )
                weights[name] = value.float()
        return weights

    def _load(self, layer: TokenMixer) -> TokenMixer:
        """Load one component at a time, as a checkpoint is loaded."""
        ranks, names = layer.ranks, frozenset(self.weights)
        for component in components(layer):
            component.materialize(self.device)
            for slot in component.slots(names):
                name = next((name for name in slot.names if name in self.weights), None)
                if name is None or tuple(self.weights[name].shape) != tuple(slot.shape):
                    wants = f"rank {ranks.rank} of {ranks.size} asks for '{slot.names[0]}' {list(slot.shape)}"
                    there = "has no such tensor" if name is None else f"has it as {list(self.weights[name].shape)}"
                    raise PluginError(f"{wants}, one rank alone {there}: a slot's shape is that of the whole tensor")
                try:
                    slot.fill(self.weights[name].to(self.device))
                except RuntimeError as error:
                    raise PluginError(f"'{name}' does not fit rank {ranks.rank} of {ranks.size}: {error}") from error
            component.finalize()
        return layer.eval()


def components(layer: TokenMixer) -> list[Component]:
    return [module for module in layer.modules() if isinstance(module, Component)]


def below(name: str) -> str:
    """A tensor's name below the layer's prefix."""
    return name.removeprefix(f"{PREFIX}.")


def require_contract(layer: Any) -> None:
    """Raise `PluginError` unless `layer` is a class that the kit can run; the message says what to add."""
    if not (isinstance(layer, type) and issubclass(layer, TokenMixer)):
        raise PluginError(f"{layer!r} is not a layer: derive a class from LinearAttention or TokenMixer")
    name = layer.__name__
    for attribute in ("scope", "state_kind", "capabilities"):
        if not hasattr(layer, attribute):
            raise PluginError(f"{name} has no class attribute {attribute}")
    if layer.scope not in ("record", "page"):
        raise PluginError(f"{name}.scope must be 'record' or 'page', found {layer.scope!r}")
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
