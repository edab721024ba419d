"""Linear maps and the embedding."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewise.layers.parameters import Component, Slot

_PACKED_LINEAR = torch.ops.mkldnn._linear_pointwise.default  # resolved once: the name look-up costs as much as a call
PACK_ROWS = 16  # batch size that the packed layout is tuned for; it serves every other size well


@dataclass(frozen=True)
class Rows:
    """A run of output rows of a linear map and the names of its weight (without `.weight`) in checkpoints."""

    width: int
    names: tuple[str, ...]

    def __init__(self, width: int, *names: str) -> None:
        object.__setattr__(self, "width", width)
        object.__setattr__(self, "names", names)


class Linear(Component):
    """y = x Wᵀ, without bias. Several checkpoint matrices that read the same input are stacked into one W.

    On a CPU the weight is kept in oneDNN's packed layout (about twice as fast at 16 rows as the plain one).
    """

    weight: Tensor

    def __init__(self, in_features: int, *rows: Rows, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.rows = rows
        self.widths = [part.width for part in rows]
        self.declare("weight", (sum(self.widths), in_features), dtype)
        self._packed: Tensor | None = None

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        begin = 0
        for part in self.rows:
            target = self.weight[begin : begin + part.width]
            yield Slot(tuple(f"{name}.weight" for name in part.names), target)
            begin += part.width

    def finalize(self) -> None:
        if self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, PACK_ROWS)
            # The plain copy is dropped; its shape stays for reports.
            self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        if self._packed is not None:
            return _PACKED_LINEAR(x, self._packed, None, "none", [], "")
        return F.linear(x, self.weight)


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
