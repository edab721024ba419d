"""How two snapshots differ."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from statewise.memory.snapshot import Snapshot
from statewise.memory.snapshot_transcript import Transcript


@dataclass(frozen=True)
class TensorDifference:
    """What differs in one tensor. Numbers are None where the two cannot be compared number by number."""

    name: str
    elements: int | None  # that were compared
    different: int | None  # in their bits
    largest: float | None  # |a - b|; infinite beside a NaN
    reason: str = ""  # why they were not compared


@dataclass(frozen=True)
class Difference:
    """Two snapshots. Entries of pages are compared for the tokens that both begin with."""

    identity: list[str]  # parts of the identity that are not the same
    tokens: tuple[int, int]
    common_tokens: int  # that both begin with
    compared: int  # tensors
    tensors: list[TensorDifference]  # only those that differ
    transcript: list[str]  # parts of the transcript that are not the same

    @property
    def same(self) -> bool:
        differing = self.identity or self.tensors or self.transcript
        return not differing and self.tokens == (self.common_tokens,) * 2


def compare(first: Snapshot, second: Snapshot) -> Difference:
    """What two snapshots have in common and where they differ. Names and times are not compared."""
    pairs = zip(first.tokens, second.tokens)
    shorter = min(first.num_tokens, second.num_tokens)
    common = next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)
    tensors = []
    ours, theirs = _tensors(first), _tensors(second)
    for name in sorted(ours.keys() | theirs.keys(), key=_position):
        a, b = ours.get(name), theirs.get(name)
        if name.startswith("pages."):
            a, b = (tensor[:common] if tensor is not None else None for tensor in (a, b))
        found = _compare(name, a, b)
        if found is not None:
            tensors.append(found)
    return Difference(
        identity=first.identity.differences(second.identity),
        tokens=(first.num_tokens, second.num_tokens),
        common_tokens=common,
        compared=len(ours.keys() | theirs.keys()),
        tensors=tensors,
        transcript=(first.transcript or Transcript()).differences(second.transcript or Transcript()),
    )


def _tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    return {**snapshot.tensors, **({} if snapshot.hidden is None else {"hidden": snapshot.hidden})}


def _position(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[1]) if len(parts) > 1 else 1 << 30), name


def _compare(name: str, first: Tensor | None, second: Tensor | None) -> TensorDifference | None:
    if first is None or second is None:
        return TensorDifference(name, None, None, None, f"only in the {'second' if first is None else 'first'}")
    if first.dtype != second.dtype or first.shape != second.shape:
        kinds = " and ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (first, second))
        return TensorDifference(name, None, None, None, kinds)
    a, b = (tensor.contiguous().flatten() for tensor in (first, second))
    width = a.element_size()
    differs = (a.view(torch.uint8).view(-1, width) != b.view(torch.uint8).view(-1, width)).any(-1)
    count = int(differs.sum())
    if not count:
        return None
    gap = (a[differs].double() - b[differs].double()).abs().nan_to_num(nan=inf)
    return TensorDifference(name, a.numel(), count, float(gap.max()))
