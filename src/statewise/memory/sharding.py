"""Between the blocks of every rank and the whole tensors they are cut from.

A snapshot holds whole tensors in their logical order, so that a file written by some number of ranks, with some page
size and memory order, can be cut for any other. Specs given here are those of the whole model (one rank); a page spec
is that of a page (`StateSpec.per_page`), whose first axis is the page size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from statewise.errors import BlockError
from statewise.memory.blocks import ALIGNMENT, BlockSpec, Field
from statewise.memory.checkpoint import Checkpoint


def whole_fields(record_spec: BlockSpec, page_spec: BlockSpec) -> dict[str, Field]:
    """The fields of a sequence by the name of their tensor: `record.{layer}.{field}`, `pages.{layer}.{field}`.

    A page field is given for one token; its tensor has the axis of tokens in front. Memory order is left out.
    """
    fields = {f"record.{layer}.{name}": replace(field, order=None) for layer, name, field in _fields(record_spec)}
    for layer, name, field in _fields(page_spec):
        shard = field.shard and replace(field.shard, axis=field.shard.axis - 1)
        fields[f"pages.{layer}.{name}"] = replace(field, shape=field.shape[1:], shard=shard, order=None)
    return fields


def gather(parts: Sequence[Checkpoint], record_spec: BlockSpec, page_spec: BlockSpec) -> dict[str, Tensor]:
    """The whole tensors of a sequence from the checkpoints of all ranks, rank 0 first.

    `record.{layer}.{field}` has the field's shape, `pages.{layer}.{field}` is [num_tokens, *shape of a token]; the
    unused rest of the last page is left out. What several ranks hold is taken once. Raises `BlockError` where parts
    do not fit the specs or ranks do not agree on what they share.
    """
    size, counts = len(parts), {part.num_tokens for part in parts}
    if len(counts) != 1:
        raise BlockError(f"the parts of a checkpoint cover {sorted(counts)} tokens; they must cover the same")
    num_tokens = counts.pop()
    pages = _pages_for(num_tokens, page_spec)
    records, entries = [], []
    for rank, part in enumerate(parts):
        records.append(_views(record_spec.per_rank(rank, size), part.record, 1))
        entries.append(_views(page_spec.per_rank(rank, size), part.pages, pages))
    tensors = {}
    for layer, name, field in _fields(record_spec):
        tensor = f"record.{layer}.{name}"
        tensors[tensor] = _join(tensor, field, [views[layer, name][0] for views in records])
    for layer, name, field in _fields(page_spec):
        tensor = f"pages.{layer}.{name}"
        tensors[tensor] = _join(tensor, field, [views[layer, name].flatten(0, 1)[:num_tokens] for views in entries])
    return tensors


def cut(
    tensors: Mapping[str, Tensor], num_tokens: int, record_spec: BlockSpec, page_spec: BlockSpec, rank: int, size: int
) -> Checkpoint:
    """The checkpoint of one rank of `size`, from whole tensors as `gather` gives them.

    Padding and the rest of the last page are zero. Raises `BlockError` for a tensor that is missing or misshapen and
    for a number of ranks that cannot split a field.
    """
    own_records, own_pages = record_spec.per_rank(rank, size), page_spec.per_rank(rank, size)
    record = torch.zeros((1, _width(own_records)), dtype=torch.uint8)
    views = _views(own_records, record, 1)
    for layer, name, field in _fields(record_spec):
        whole = _whole(tensors, f"record.{layer}.{name}", field, field.shape)
        views[layer, name][0].copy_(_part(field, whole, rank, size))
    count = _pages_for(num_tokens, page_spec)
    pages = torch.zeros((count, _width(own_pages)), dtype=torch.uint8)
    views = _views(own_pages, pages, count)
    for layer, name, field in _fields(page_spec):
        page_size = field.shape[0]
        whole = _whole(tensors, f"pages.{layer}.{name}", field, (num_tokens, *field.shape[1:]))
        own, view = _part(field, whole, rank, size), views[layer, name]
        full = num_tokens // page_size
        view[:full].copy_(own[: full * page_size].unflatten(0, (full, page_size)))
        if full < count:
            view[full, : num_tokens - full * page_size].copy_(own[full * page_size :])
    return Checkpoint(num_tokens, record, pages)


def _fields(spec: BlockSpec) -> list[tuple[int, str, Field]]:
    return [(layer, name, spec.layers[layer][name]) for layer, name in spec.offsets]


def _width(spec: BlockSpec) -> int:
    """Bytes of a block as a pool lays it out; one without fields still has a line."""
    return max(spec.nbytes, ALIGNMENT)


def _pages_for(num_tokens: int, page_spec: BlockSpec) -> int:
    sizes = [field.shape[0] for _, _, field in _fields(page_spec)]
    if any(first != second for first, second in pairwise(sizes)):
        raise BlockError(f"the fields of a page are for {sorted(set(sizes))} tokens; they must be for the same number")
    return -(-num_tokens // sizes[0]) if sizes else 0


def _views(spec: BlockSpec, blocks: Tensor, count: int) -> dict[tuple[int, str], Tensor]:
    """The fields of uint8 `[count, bytes]`, in their logical order: `[count, *shape]` by layer and name."""
    if blocks.dtype != torch.uint8 or tuple(blocks.shape) != (count, _width(spec)):
        raise BlockError(f"{tuple(blocks.shape)} {blocks.dtype} is not {count} blocks of {_width(spec)} bytes")
    return {(layer, name): field.view(blocks, spec.offsets[layer, name]) for layer, name, field in _fields(spec)}


def _join(tensor: str, field: Field, pieces: list[Tensor]) -> Tensor:
    """The whole of what each rank holds a piece of, segment by segment."""
    if field.shard is None:
        for rank, piece in enumerate(pieces):
            _agree(tensor, rank, pieces[0], piece)
        return pieces[0].contiguous()
    axis = field.shard.axis
    shape = list(pieces[0].shape)
    shape[axis] = field.shape[axis]
    whole = torch.empty(shape, dtype=field.dtype)
    filled: set[tuple[int, int]] = set()
    for rank, piece in enumerate(pieces):
        ranges = field.shard.ranges(field.shape[axis], rank, len(pieces))
        for (start, stop), source in zip(ranges, piece.split([stop - start for start, stop in ranges], dim=axis)):
            target = whole.narrow(axis, start, stop - start)
            if (start, stop) in filled:
                _agree(tensor, rank, target, source)
            target.copy_(source)
            filled.add((start, stop))
    return whole


def _agree(tensor: str, rank: int, first: Tensor, second: Tensor) -> None:
    if not same_bits(first, second):
        raise BlockError(f"rank {rank} does not agree with the others on what they share of {tensor}")


def _part(field: Field, whole: Tensor, rank: int, size: int) -> Tensor:
    if field.shard is None:
        return whole
    axis = field.shard.axis
    ranges = field.shard.ranges(field.shape[axis], rank, size)
    return torch.cat([whole.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis)


def _whole(tensors: Mapping[str, Tensor], tensor: str, field: Field, shape: tuple[int, ...]) -> Tensor:
    found = tensors.get(tensor)
    if found is None or tuple(found.shape) != shape or found.dtype != field.dtype:
        what = "missing" if found is None else f"{list(found.shape)} {found.dtype}"
        raise BlockError(f"{tensor} is {what}, expected {list(shape)} {field.dtype}")
    return found


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes; unlike `==`, NaN is itself and -0 is not 0."""
    return torch.equal(first.contiguous().flatten().view(torch.uint8), second.contiguous().flatten().view(torch.uint8))
