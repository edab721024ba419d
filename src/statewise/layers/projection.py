"""Linear maps and the embedding."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewise.config import ALONE, Ranks
from statewise.layers.parameters import Component, Slot
from statewise.memory.blocks import Shard

_PACKED_LINEAR = torch.ops.mkldnn._linear_pointwise.default  # resolved once: the name look-up costs as much as a call
PACK_ROWS = 16  # batch size that the packed layout is tuned for; it serves every other size well


@dataclass(frozen=True)
class Rows:
    """A run of output rows of a linear map and the names of its weight (without `.weight`) in checkpoints.

    `width` counts the rows for all ranks together; `shard` (of axis 0) says which of them a rank keeps, None: all.
    With `parts` > 1 the checkpoint goes head by head, `heads` of them, and within a head part by part; the rows of
    the map go part by part.
    """

    width: int
    names: tuple[str, ...]
    shard: Shard | None
    heads: int
    parts: int

    def __init__(self, width: int, *names: str, shard: Shard | None = None, heads: int = 1, parts: int = 1) -> None:
        for name, value in (("width", width), ("names", names), ("shard", shard), ("heads", heads), ("parts", parts)):
            object.__setattr__(self, name, value)

    def ranges(self, ranks: Ranks) -> tuple[tuple[int, int], ...]:
        """The half-open ranges of the checkpoint's rows that a rank keeps."""
        if self.shard is None:
            return ((0, self.width),)
        return tuple(self.shard.ranges(self.width, ranks.rank, ranks.size))


class Linear(Component):
    """y = x Wᵀ, without bias. Several checkpoint matrices that read the same input are stacked into one W.

    On a CPU the weight is kept in oneDNN's packed layout (about twice as fast at 16 rows as the plain one). With
    `split_input` every rank has its equal part of the input columns, and the results are summed over the ranks.
    """

    weight: Tensor

    def __init__(
        self, in_features: int, *rows: Rows, dtype: torch.dtype, ranks: Ranks = ALONE, split_input: bool = False
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.rows = rows
        self.ranks = ranks
        self.split_input = split_input and ranks.size > 1
        self.widths = [sum(stop - start for start, stop in part.ranges(ranks)) for part in rows]
        columns = in_features // ranks.size if self.split_input else in_features
        self.declare("weight", (sum(self.widths), columns), dtype)
        self._packed: Tensor | None = None

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        begin = 0
        columns = self.weight.shape[1]
        for part, width in zip(self.rows, self.widths, strict=True):
            target = self.weight[begin : begin + width]
            begin += width
            if part.parts > 1:
                heads = part.heads // self.ranks.size if part.shard else part.heads
                target = target.view(part.parts, heads, -1, columns).transpose(0, 1)
            axis, ranges = 0, part.ranges(self.ranks)
            if self.split_input:
                axis, ranges = 1, ((self.ranks.rank * columns, (self.ranks.rank + 1) * columns),)
            shape = (part.width, self.in_features)
            yield Slot(tuple(f"{name}.weight" for name in part.names), target, shape, axis, ranges)

    def finalize(self) -> None:
        if self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, PACK_ROWS)
            # The plain copy is dropped; its shape stays for reports.
            self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        try:
            if self._packed is not None:
                y = _PACKED_LINEAR(x, self._packed, None, "none", [], "")
            else:
                y = F.linear(x, self.weight)
        except RuntimeError as error:  # the library's own words do not say what is wrong
            columns = self.weight.shape[1]
            if x.shape[-1] == columns:
                raise
            whole = not self.split_input and x.shape[-1] * self.ranks.size == columns
            hint = "; a map that reads one rank's heads needs split_input=True" if whole else ""
            raise ValueError(
                f"'{self.rows[0].names[0]}' expects rows of {columns} columns, found {x.shape[-1]}{hint}"
            ) from error
        return self.ranks.all_reduce(y) if self.split_input else y


class Embedding(Component):
    """Rows of a table, by token id."""

    weight: Tensor

    def __init__(self, vocab_size: int, width: int, *names: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.names = names
        self.declare("weight", (vocab_size, width), dtype)

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        yield Slot(tuple(f"{name}.weight" for name in self.names), self.weight)

    def forward(self, tokens: Tensor) -> Tensor:  # [T] -> [T, width]
        return F.embedding(tokens, self.weight)
