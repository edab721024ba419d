"""A layer at work: a pool full of rubbish, sequences in some of its blocks, one call per step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from statewise.layers.mixer import TokenMixer
from statewise.memory.blocks import BlockPool, BlockSpec
from statewise.ops.batch import Batch, Piece, build_batch

LAYER = 1  # of the three whose fields share a block: the one that runs has neighbours on both sides
RECORDS = 12


@dataclass
class Sequence:
    """A sequence in the pool, and how many tokens of it have been processed."""

    record: int
    pages: list[int] = field(default_factory=list)
    length: int = 0


class UndeclaredField(KeyError):
    """A layer asks for a field that it did not declare."""

    def __str__(self) -> str:
        return str(self.args[0])


class Fields(dict[str, Tensor]):
    """The state as a layer gets it."""

    def __missing__(self, name: str) -> Tensor:
        known = ", ".join(self) or "none"
        raise UndeclaredField(f"forward() uses the field '{name}', which state_spec() does not declare ({known})")


class Stage:
    """One layer, on one rank, with the pool that holds its state.

    Every byte of the pool is random from the start, read as numbers of moderate size in the layer's own fields, so
    that what is read without being written shows. Blocks are handed out in a random order.
    """

    def __init__(self, layer: TokenMixer, *, tokens: int = 1_024, seed: int = 0) -> None:
        self.layer = layer
        self.ranks, self.page_size = layer.ranks, layer.engine_config.page_size
        self.paged = layer.scope == "page"
        spec = layer.state_spec().per_rank(self.ranks.rank, self.ranks.size)
        self.spec = spec.per_page(self.page_size) if self.paged else spec
        blocks = RECORDS + (tokens // self.page_size if self.paged else 0)
        self.pool = BlockPool(
            layer.scope, BlockSpec(dict.fromkeys(range(3), self.spec)), blocks, layer.engine_config.device
        )
        for _ in range(blocks):
            self.pool.allocate("conformance")
        self._random = torch.Generator().manual_seed(seed)
        self.pool.arena.copy_(torch.randint(0, 256, self.pool.arena.shape, generator=self._random, dtype=torch.uint8))
        self.views = Fields(self.pool.state(LAYER))
        for view in self.views.values():
            view.copy_(torch.randn(view.shape, generator=self._random) * 3)
        self._free = torch.randperm(blocks, generator=self._random).tolist()
        self._records = 0

    def start(self, record: int | None = None) -> Sequence:
        """A sequence without tokens, in a dirty block."""
        if self.paged:
            self._records += 1
            return Sequence(self._records - 1)
        return Sequence(self._free.pop() if record is None else record)

    def resume(self, state: dict[str, Tensor], length: int) -> Sequence:
        """A sequence whose first `length` tokens left `state` (as `state()` gives it)."""
        sequence = self.start()
        sequence.length = length
        self._cover(sequence, length)
        for name, view in self.views.items():
            if self.paged:
                pages, offsets = self._places(sequence, torch.arange(length))
                view[pages, offsets] = state[name].to(view.dtype)
            else:
                view[sequence.record] = state[name].to(view.dtype)
        return sequence

    def state(self, sequence: Sequence) -> dict[str, Tensor]:
        """A copy of what a sequence keeps: [*field.shape] of a record, [tokens, *field.shape] of pages."""
        if self.paged:
            places = self._places(sequence, torch.arange(sequence.length))
            return {name: view[places].clone() for name, view in self.views.items()}
        return {name: view[sequence.record].clone() for name, view in self.views.items()}

    def batch(self, work: SequenceOf[tuple[Sequence, int]]) -> Batch:
        """The batch of the next so many tokens of some sequences, in this order (decodes first)."""
        pieces = []
        for sequence, count in work:
            self._cover(sequence, sequence.length + count)
            pieces.append(Piece(range(count), sequence.length, sequence.record, tuple(sequence.pages)))
        return build_batch(pieces, self.page_size, self.layer.engine_config.device)

    def step(self, work: SequenceOf[tuple[Sequence, Tensor]]) -> list[Tensor]:
        """One call of the layer on the next rows [count, hidden] of some sequences. Returns their outputs."""
        order = sorted(range(len(work)), key=lambda i: not (len(work[i][1]) == 1 and work[i][0].length > 0))
        batch = self.batch([(work[i][0], len(work[i][1])) for i in order])
        hidden = torch.cat([work[i][1] for i in order])
        with torch.inference_mode():
            output = self.layer(hidden, batch, self.views)
        if not isinstance(output, Tensor) or output.dtype != hidden.dtype:
            found = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"forward() must return {hidden.dtype} rows for {hidden.dtype} hidden, returned {found}")
        if output.shape != hidden.shape:
            shape = list(hidden.shape)
            raise TypeError(f"forward() must return {shape} for hidden {shape}, returned {list(output.shape)}")
        outputs: list[Tensor | None] = [None] * len(work)
        for i, rows in zip(order, output.split([len(work[i][1]) for i in order]), strict=True):
            outputs[i] = rows
            work[i][0].length += len(rows)
        return [rows for rows in outputs if rows is not None]

    def run(self, sequence: Sequence, hidden: Tensor, sizes: SequenceOf[int] = ()) -> Tensor:
        """The rows of one sequence, alone in every batch, in pieces of the given sizes and the rest in one."""
        rest = len(hidden) - sum(sizes)
        pieces = hidden.split([*sizes, rest] if rest else list(sizes))
        return torch.cat([self.step([(sequence, piece)])[0] for piece in pieces])

    def owned(self, work: SequenceOf[tuple[Sequence, int]]) -> Tensor:
        """Mask [blocks, bytes] of what a step over `work` may write: the records, or the entries of its tokens."""
        probe = torch.zeros_like(self.pool.arena)
        for name, spec in self.spec.items():
            flags = torch.zeros(self.views[name].shape, dtype=torch.bool)
            for sequence, count in work:
                if self.paged:
                    self._cover(sequence, sequence.length + count)
                    flags[self._places(sequence, torch.arange(sequence.length, sequence.length + count))] = True
                else:
                    flags[sequence.record] = True
            offset = self.pool.spec.offsets[LAYER, name]
            ordered = flags.permute(0, *(axis + 1 for axis in spec.order)) if spec.order else flags
            probe[:, offset : offset + spec.nbytes] = ordered.flatten(1).repeat_interleave(spec.dtype.itemsize, dim=1)
        return probe.bool()

    def _cover(self, sequence: Sequence, length: int) -> None:
        while self.paged and len(sequence.pages) * self.page_size < length:
            sequence.pages.append(self._free.pop())

    def _places(self, sequence: Sequence, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(page, offset) of some positions."""
        pages = torch.tensor(sequence.pages, dtype=torch.int64)
        return pages[positions // self.page_size], positions % self.page_size
