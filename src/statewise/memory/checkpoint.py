"""A frozen point of a sequence, and the two operations on it: take and restore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from statewise.errors import BlockError
from statewise.memory.blocks import BlockPool


@dataclass(frozen=True)
class Checkpoint:
    """All memory of a sequence after `num_tokens` tokens, copied to the host. Never written again."""

    num_tokens: int
    record: Tensor  # [1, record bytes] uint8
    pages: Tensor  # [pages that cover num_tokens, page bytes] uint8

    @property
    def nbytes(self) -> int:
        return self.record.nbytes + self.pages.nbytes


def take(num_tokens: int, records: BlockPool, record: int, pages: BlockPool, page_list: Sequence[int]) -> Checkpoint:
    """Copy a sequence's record and pages to the host. The blocks stay with their owner."""
    return Checkpoint(num_tokens, records.read([record]), pages.read(list(page_list)))


def restore(
    checkpoint: Checkpoint, records: BlockPool, record: int, pages: BlockPool, page_list: Sequence[int]
) -> None:
    """Copy a checkpoint into blocks that the caller has allocated. Extra pages keep their zeroes."""
    covered = checkpoint.pages.shape[0]
    if len(page_list) < covered:
        raise BlockError(f"the checkpoint covers {covered} pages, only {len(page_list)} were allocated")
    records.write([record], checkpoint.record)
    if covered:
        pages.write(list(page_list[:covered]), checkpoint.pages)
