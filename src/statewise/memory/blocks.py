"""State declared once: fields, the specs made of them, and the pool of equal blocks that holds them.

A layer says what it keeps with a `StateSpec`. Byte sizes, per-rank shapes, zeroing, copying and the views that
kernels work on all follow from it. Records and pages are two instances of `BlockPool`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from statewise.errors import BlockError, OutOfBlocks

ALIGNMENT = 64  # bytes; every field starts on a cache line


@dataclass(frozen=True)
class Shard:
    """How tensor parallelism splits a field: along `axis`, every segment separately.

    Without segments the whole axis is one. With segments `(("q", 512), ("k", 512), ("v", 1024))`, rank r holds the
    r-th part of q, then of k, then of v. `unit` entries (a head) always stay together. Where a segment has fewer
    units than there are ranks, `shared` lets several ranks hold the same unit (key-value heads).
    """

    axis: int
    segments: tuple[tuple[str, int], ...] = ()
    unit: int = 1
    shared: bool = False

    def ranges(self, length: int, rank: int, size: int) -> list[tuple[int, int]]:
        """The half-open ranges of the full axis that one rank holds, in the order in which it holds them."""
        if not 0 <= rank < size:
            raise BlockError(f"rank {rank} is outside a tensor-parallel group of {size}")
        widths = [width for _, width in self.segments] or [length]
        if sum(widths) != length:
            raise BlockError(f"the segments cover {sum(widths)} entries of an axis of {length}")
        parts, begin = [], 0
        for width in widths:
            units, rest = divmod(width, self.unit)
            if self.shared and not rest and units and size % units == 0:
                first, part = rank * units // size, self.unit
            elif rest or units % size:
                raise BlockError(f"an axis segment of {width} cannot be split evenly over {size} ranks")
            else:
                first, part = rank * units // size, units // size * self.unit
            parts.append((begin + first * self.unit, begin + first * self.unit + part))
            begin += width
        return parts


@dataclass(frozen=True)
class Field:
    """One named tensor of a layer's state, of one sequence (record) or one token (page).

    `shape` is the logical shape, not cut by tensor parallelism. `order` is the order of the axes in memory, slowest
    first, where it differs from the logical one: a conv window `[channels, taps]` with order `(1, 0)` lies
    channel-last. `shard` is None for a field that every rank keeps whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: Shard | None = None
    order: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def view(self, blocks: Tensor, offset: int) -> Tensor:
        """The field at a byte offset of every block, in its logical order: uint8 [N, bytes] -> [N, *shape]."""
        order = self.order or tuple(range(len(self.shape)))
        flat = blocks[:, offset : offset + self.nbytes].view(self.dtype)
        stored = flat.view(len(blocks), *(self.shape[axis] for axis in order))
        return stored.permute(0, *(order.index(axis) + 1 for axis in range(len(order))))

    def per_rank(self, rank: int, size: int) -> Field:
        """The field as one rank of `size` holds it."""
        if self.shard is None:
            return self
        ranges = self.shard.ranges(self.shape[self.shard.axis], rank, size)
        shape = list(self.shape)
        widths = [stop - start for start, stop in ranges]
        shape[self.shard.axis] = sum(widths)
        segments = tuple((name, width) for (name, _), width in zip(self.shard.segments, widths, strict=False))
        return replace(self, shape=tuple(shape), shard=replace(self.shard, segments=segments))

    def per_page(self, page_size: int) -> Field:
        """The field of one token repeated for the tokens of a page: `[page_size, *shape]`."""
        order = None if self.order is None else (0, *(axis + 1 for axis in self.order))
        shard = None if self.shard is None else replace(self.shard, axis=self.shard.axis + 1)
        return replace(self, shape=(page_size, *self.shape), shard=shard, order=order)


class StateSpec(Mapping[str, Field]):
    """The named fields that one layer keeps: `StateSpec(conv=Field(...), recurrent=Field(...))`."""

    def __init__(self, **fields: Field) -> None:
        self._fields = dict(fields)

    def __getitem__(self, name: str) -> Field:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def nbytes(self) -> int:
        return sum(field.nbytes for field in self.values())

    def per_rank(self, rank: int, size: int) -> StateSpec:
        return StateSpec(**{name: field.per_rank(rank, size) for name, field in self.items()})

    def per_page(self, page_size: int) -> StateSpec:
        return StateSpec(**{name: field.per_page(page_size) for name, field in self.items()})


class BlockSpec:
    """The layout of one block: the fields of several layers, one after the other, each on a cache line."""

    def __init__(self, layers: Mapping[int, StateSpec]) -> None:
        self.layers = dict(layers)
        self.offsets: dict[tuple[int, str], int] = {}
        end = 0
        for layer, spec in self.layers.items():
            for name, field in spec.items():
                self.offsets[layer, name] = end
                end += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = end

    def described(self) -> list[tuple[object, ...]]:
        """All that the bytes of a block depend on, in plain values."""
        return [
            (layer, name, field.shape, str(field.dtype), field.order)
            for layer, spec in self.layers.items()
            for name, field in spec.items()
        ]

    def per_rank(self, rank: int, size: int) -> BlockSpec:
        return BlockSpec({layer: spec.per_rank(rank, size) for layer, spec in self.layers.items()})


class BlockPool:
    """An arena of `num_blocks` equal blocks with owners, generations and reference counts.

    Not thread-safe: the engine's step loop owns it. A block is zeroed when it is allocated, so that nothing of an
    earlier owner can be seen, and it gets a new generation, so that a stale reference can be told from a live one.
    """

    def __init__(self, name: str, spec: BlockSpec, num_blocks: int, device: torch.device | str = "cpu") -> None:
        if num_blocks < 1:
            raise BlockError(f"the {name} pool needs at least one block")
        self.name = name
        self.spec = spec
        self.num_blocks = num_blocks
        # Zeroes that the system gives when a block is first touched: untouched memory costs nothing.
        shape = (num_blocks, max(spec.nbytes, ALIGNMENT))
        if torch.device(device).type == "cpu":
            self.arena = torch.from_numpy(np.zeros(shape, np.uint8))
        else:
            self.arena = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.owners: list[str | None] = [None] * num_blocks
        self.generations = [0] * num_blocks
        self.references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def block_bytes(self) -> int:
        return self.arena.shape[1]

    def state(self, layer: int) -> dict[str, Tensor]:
        """The fields of one layer in all blocks: `[num_blocks, *shape]` views into the arena, by name."""
        return {name: field.view(self.arena, self.spec.offsets[layer, name]) for name, field in self._fields(layer)}

    def _fields(self, layer: int) -> list[tuple[str, Field]]:
        return list(self.spec.layers[layer].items())

    def allocate(self, owner: str, *, zeroed: bool = True) -> int:
        """A block with one reference, zeroed unless its every field is written before it is read. Raises
        `OutOfBlocks` when none is free."""
        if not self._free:
            raise OutOfBlocks(f"all {self.num_blocks} blocks of the {self.name} pool are in use")
        block = self._free.pop()
        if zeroed:
            self.arena[block].zero_()
        self.owners[block] = owner
        self.generations[block] += 1
        self.references[block] = 1
        return block

    def retain(self, block: int) -> None:
        """Add a reference to a block in use."""
        self._require_live(block)
        self.references[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference; the last one frees the block."""
        self._require_live(block)
        self.references[block] -= 1
        if self.references[block] == 0:
            self.owners[block] = None
            self._free.append(block)

    def duplicate(self, owner: str, source: int, of: BlockPool | None = None) -> int:
        """A new block with the contents of a block of this pool, or `of` another one of the same layout."""
        block = self.allocate(owner, zeroed=False)
        (of or self)._require_live(source)
        self.arena[block].copy_((of or self).arena[source])
        return block

    def copy(self, source: int, target: int) -> None:
        """Overwrite the block `target` with the contents of `source`."""
        self._require_live(source)
        self._require_live(target)
        self.arena[target].copy_(self.arena[source])

    def copy_from(self, other: BlockPool, source: int, target: int) -> None:
        """Overwrite the block `target` with a block of another pool of the same layout."""
        other._require_live(source)
        self._require_live(target)
        self.arena[target].copy_(other.arena[source])

    def read(self, blocks: list[int]) -> Tensor:
        """A host copy of some blocks: uint8 `[len(blocks), bytes]`."""
        for block in blocks:
            self._require_live(block)
        return self.arena[blocks].cpu()

    def write(self, blocks: list[int], contents: Tensor) -> None:
        """Overwrite some blocks with uint8 `[len(blocks), bytes]`, as `read` gave them."""
        for block in blocks:
            self._require_live(block)
        if contents.shape != (len(blocks), self.arena.shape[1]):
            raise BlockError(f"{tuple(contents.shape)} does not fit {len(blocks)} blocks of the {self.name} pool")
        self.arena[blocks] = contents.to(self.arena.device)

    def _require_live(self, block: int) -> None:
        if not 0 <= block < self.num_blocks or self.references[block] < 1:
            raise BlockError(f"block {block} of the {self.name} pool is not in use")

    def check_integrity(self, expected: Mapping[int, int] | None = None) -> None:
        """Raise `BlockError` unless every block is either free or owned, and counted once.

        `expected` gives the references that the callers believe to hold, block by block; a leak or a double use
        shows as a difference.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise BlockError(f"the {self.name} pool lists a free block twice")
        unused = self.references.count(0)
        if unused != len(free) or self.owners.count(None) != unused or any(self.references[b] for b in free):
            raise BlockError(f"the {self.name} pool lists {len(free)} free blocks, {unused} are without references")
        if expected is None:
            return
        live = sum(self.references)
        if live == sum(expected.values()) and all(self.references[b] == held for b, held in expected.items()):
            return
        for block in range(self.num_blocks):
            references, held = self.references[block], expected.get(block, 0)
            if references != held:
                raise BlockError(f"block {block} of the {self.name} pool has {references} references, {held} are held")
