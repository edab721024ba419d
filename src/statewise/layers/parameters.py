"""Modules whose weights come from a checkpoint: what they are called there and where they go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint and its place.

    The tensor must have `shape` once axes of length 1 are left out. Of `axis` only `ranges` are kept, one after the
    other (all of it if there are none). What is kept is read as the shape of the target, which has as many elements
    in the same order, and converted to its dtype.
    """

    names: tuple[str, ...]  # accepted spellings, the usual one first
    target: Tensor  # view of a parameter
    shape: tuple[int, ...] = ()  # in the checkpoint; if left out, that of the target
    axis: int = 0
    ranges: tuple[tuple[int, int], ...] = ()  # half-open; what one rank of several keeps

    def __post_init__(self) -> None:
        if not isinstance(self.names, tuple) or not all(isinstance(name, str) for name in self.names) or not self.names:
            raise TypeError(f"the names of a Slot must be a tuple of words, found {self.names!r}")
        if not isinstance(self.target, Tensor):
            raise TypeError(f"the target of a Slot must be a tensor, found {type(self.target).__name__}")
        if not self.shape:
            object.__setattr__(self, "shape", tuple(self.target.shape))

    def fill(self, source: Tensor) -> None:
        """Copy the checkpoint's tensor, or this rank's part of it, into the target."""
        if self.ranges:
            source = source.reshape(self.shape)
            parts = [source.narrow(self.axis, start, stop - start) for start, stop in self.ranges]
            source = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axis)
        self.target.copy_(source.reshape(self.target.shape))


class Component(nn.Module):
    """A module that owns parameters. It is built on the meta device, then loaded one component at a time.

    The loader calls `materialize`, fills the `slots` and calls `finalize`, so that no more than one component
    exists twice at any moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self._derived: set[str] = set()

    def __call__(self, *inputs: Any) -> Any:
        # Without nn.Module's hooks, which no one uses here: a decode step makes a hundred of these calls.
        return self.forward(*inputs)

    def declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, loaded: bool = True) -> None:
        """Add a parameter without memory. Not `loaded`: `finalize` fills it, no tensor of a checkpoint does."""
        if not loaded:
            self._derived.add(name)
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))

    def unfilled(self, slots: Iterable[Slot]) -> list[str]:
        """The declared parameters that `slots`, the component's own, leave at least in part without contents."""
        filled: Counter[int] = Counter()
        for slot in slots:
            filled[slot.target.untyped_storage()._cdata] += slot.target.numel()
        return [
            name
            for name, parameter in self._parameters.items()
            if parameter is not None
            and name not in self._derived
            and filled[parameter.untyped_storage()._cdata] < parameter.numel()
        ]

    def materialize(self, device: torch.device | str) -> None:
        """Give the parameters of this component (not of its children) uninitialised memory."""
        for name, parameter in list(self._parameters.items()):
            if parameter is not None and parameter.is_meta:
                setattr(self, name, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        """The tensors to load, given the names that the checkpoint has (layouts differ between exporters)."""
        return iter(())

    def finalize(self) -> None:
        """Called once after the slots are filled: derive what the forward pass needs."""
