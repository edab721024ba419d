"""The layer under test: its class with one set of random weights, and the fp64 reference over the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from math import prod
from typing import Any

import torch
from torch import Tensor

from statewise.config import ALONE, EngineConfig, Ranks
from statewise.conformance.making import (
    PREFIX,
    components,
    example_config,
    example_weight,
    load,
    make,
    require_contract,
    slots_of,
)
from statewise.layers.contract import check_capabilities, check_specs
from statewise.layers.mixer import TokenMixer
from statewise.memory.blocks import StateSpec

PAGE_SIZE = 16  # small, so that short sequences cross pages
REFERENCE_ROWS = 512  # rows that the reference gets at once: bounds the memory of a quadratic one
SPREAD = 0.2  # of the entries of a vector around 1, such as the weight of a norm

# Limits on errors relative to the scale of the reference. bfloat16 has 8 bits: 4e-3 for one rounding.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
# Of a float32 row beside another number of rows: a plain matrix product may add in another order, `Linear` does not.
ROUNDING = 1e-6

Weights = Mapping[str, Tensor]


class ReferenceFailure(Exception):
    """reference() itself is at fault, not the layer."""


class Subject:
    """A layer class in one dtype with its example configuration. Every layer it builds has the same weights.

    Matrices that the kit makes up are rounded to the layer's dtype, as a checkpoint in that dtype has them. Vectors,
    and whatever `example_weight` gives, stay float32: a layer that keeps a decay in less shows a different decay.
    """

    def __init__(
        self,
        layer: type[TokenMixer],
        dtype: torch.dtype,
        *,
        device: str = "cpu",
        seed: int = 0,
        long: int = 65_536,
        exact: bool = False,
    ) -> None:
        """`exact`: float32 rows must be the same to the bit whatever the number of rows beside them.

        Raises `PluginError` when the layer cannot be made, loaded and finalized or declares no sound state, and
        `ConfigError` when it does not run on the device or in the dtype.
        """
        require_contract(layer)
        self.layer_class = layer
        self.config = example_config(layer)
        self.dtype = dtype
        self.device = torch.device(device)
        self.seed = seed
        self.long = long  # tokens of the longest input
        self.limit = LIMITS[dtype]
        self.limit_of_rows = (0.0 if exact else ROUNDING) if dtype == torch.float32 else self.limit
        # The one-rank layer says which tensors there are; it is the one that the reference is called on.
        bare = self.bare()
        check_capabilities([bare], self._engine())
        check_specs([bare], self._engine())
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
            return self._load(self.bare(ranks, **options))
        key = tuple(sorted(options.items()))
        if not key:
            return self.plain
        if key not in self._built:
            self._built[key] = self._load(self.bare(ranks, **options))
        return self._built[key]

    def amplified(self, factor: float) -> Subject:
        """The same layer with all matrices that the kit made up times `factor`."""
        other = copy(self)
        other.weights = {
            name: weight * factor if name in self.made_up and weight.squeeze().ndim > 1 else weight
            for name, weight in self.weights.items()
        }
        other.plain, other._built = other._load(other.bare()), {}
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
                output: Any = self.plain.reference(rows, self.double, state, start)
            except KeyError as error:
                known = f"weights has: {', '.join(self.double)}; state has: {', '.join(state)}"
                raise ReferenceFailure(f"reference() raises KeyError: {error}; {known}") from error
            except Exception as error:
                raise ReferenceFailure(f"reference() raises {type(error).__name__}: {error}") from error
            start += len(rows)
            if not isinstance(output, Tensor):
                raise ReferenceFailure(f"reference() returns {_shape(output)}, expected rows [tokens, hidden_size]")
            if output.shape != rows.shape:
                raise ReferenceFailure(f"reference() returns {_shape(output)}, expected {list(rows.shape)}")
            for name, field in self.spec.items():
                entry: Any = state.get(name)
                wanted = (start, *field.shape) if self.scope == "page" else field.shape
                if not isinstance(entry, Tensor) or entry.shape != wanted:
                    raise ReferenceFailure(
                        f"reference() leaves {_shape(entry)} as state '{name}', expected {list(wanted)}"
                    )
            parts.append(output)
        return torch.cat(parts)

    def bare(self, ranks: Ranks = ALONE, **options: Any) -> TokenMixer:
        """The layer without weights."""
        return make(self.layer_class, self.config, self._engine(ranks, **options))

    def _engine(self, ranks: Ranks = ALONE, **options: Any) -> EngineConfig:
        return EngineConfig(dtype=self.dtype, device=self.device, page_size=PAGE_SIZE, ranks=ranks, **options)

    def _load(self, layer: TokenMixer) -> TokenMixer:
        return load(layer, self.weights, self.device)

    def _draw(self, layer: TokenMixer) -> dict[str, Tensor]:
        """Random tensors of a checkpoint under the first spelling of every slot of the one-rank layer."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = {}
        for component in components(layer):
            for slot in slots_of(layer, component, frozenset()):
                name, shape = slot.names[0], tuple(slot.shape)
                value = example_weight(layer, below(name), shape, generator)
                if value is None:
                    self.made_up.add(name)
                    value = torch.randn(shape, generator=generator)
                    if len([width for width in shape if width > 1]) > 1:
                        value = (value / prod(shape[1:]) ** 0.5).to(self.dtype)
                    else:
                        value = 1 + SPREAD * value
                weights[name] = value.float()
        return weights


def below(name: str) -> str:
    """A tensor's name below the layer's prefix."""
    return name.removeprefix(f"{PREFIX}.")


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else "None" if value is None else type(value).__name__
