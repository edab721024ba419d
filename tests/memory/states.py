"""Layers of every kind with small sizes, and sequences in the pools of any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from statewise.config import EngineConfig
from statewise.layers.linear_attention.base import recurrent_field
from statewise.layers.linear_attention.delta import delta_state_spec
from statewise.memory.blocks import BlockPool, BlockSpec, Field, Shard, StateSpec
from statewise.memory.checkpoint import Checkpoint, take

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layers:
    """What the layers of a model declare: those with a record, and those with a page entry for each token."""

    records: Mapping[int, StateSpec]
    pages: Mapping[int, StateSpec]

    def specs(self, page_size: int = 16) -> tuple[BlockSpec, BlockSpec]:
        pages = {layer: spec.per_page(page_size) for layer, spec in self.pages.items()}
        return BlockSpec(self.records), BlockSpec(pages)


def delta(widths: Sequence[int] = (8, 8, 16), taps: int = 4, *, last: bool = False, **options: object) -> StateSpec:
    engine = EngineConfig(conv_channels_last=last, **options)  # type: ignore[arg-type]
    segments = tuple(zip("qkv", widths, strict=True))
    return delta_state_spec(engine, segments=segments, conv_taps=taps, num_heads=4, key_dim=3, value_dim=5)


def lightning(heads: int = 4, **options: object) -> StateSpec:
    return StateSpec(recurrent=recurrent_field(EngineConfig(**options), heads, 3, 3))  # type: ignore[arg-type]


def grouped_query(kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> StateSpec:
    field = Field((kv_heads, 3), dtype, Shard(axis=0, shared=True))
    return StateSpec(key=field, value=field)


def latent(width: int = 12, dtype: torch.dtype = torch.float32) -> StateSpec:
    return StateSpec(latent=Field((width,), dtype))


MODEL = Layers({0: delta(), 1: delta(last=True), 3: lightning()}, {2: grouped_query(), 5: latent()})


@st.composite
def layers(draw: st.DrawFn) -> Layers:
    """Some layers of any kind, in any order, that 1, 2 and 4 ranks can share."""
    records: dict[int, StateSpec] = {}
    pages: dict[int, StateSpec] = {}
    kinds = draw(st.lists(st.sampled_from(["delta", "lightning", "units", "gqa", "mla", "turned"]), max_size=5))
    for layer, kind in enumerate(kinds):
        dtype, last = draw(st.sampled_from(DTYPES)), draw(st.booleans())
        fours = st.integers(1, 3).map(lambda n: 4 * n)
        if kind == "delta":
            widths, taps = draw(st.tuples(fours, fours, fours)), draw(st.integers(2, 4))
            records[layer] = delta(widths, taps, last=last, dtype=dtype, num_spec=draw(st.integers(0, 2)))
        elif kind == "lightning":
            records[layer] = lightning(draw(fours), record_dtype=dtype)
        elif kind == "units":  # heads of two entries, shared where there are too few
            shard = Shard(axis=1, segments=(("k", 2), ("v", 8)), unit=2, shared=True)
            records[layer] = StateSpec(window=Field((3, 10), dtype, shard, order=(1, 0) if last else None))
        elif kind == "gqa":
            pages[layer] = grouped_query(draw(st.sampled_from([1, 2, 4, 8])), dtype)
        elif kind == "mla":
            pages[layer] = latent(draw(st.integers(1, 20)), dtype)
        else:
            pages[layer] = StateSpec(key=Field((3, 4), dtype, Shard(axis=1), order=(1, 0)))
    return Layers(records, pages)


def random_tensors(model: Layers, num_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Whole tensors of random bytes: infinities, NaN of many kinds and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"record.{layer}.{n}": (f, f.shape) for layer, spec in model.records.items() for n, f in spec.items()}
    for layer, spec in model.pages.items():
        shapes |= {f"pages.{layer}.{name}": (field, (num_tokens, *field.shape)) for name, field in spec.items()}
    tensors = {}
    for name, (field, shape) in shapes.items():
        count = torch.Size(shape).numel() * field.dtype.itemsize
        content = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        tensors[name] = content.view(field.dtype).reshape(shape)
    return tensors


def held_by(
    model: Layers, tensors: Mapping[str, Tensor], num_tokens: int, size: int, page_size: int = 16
) -> list[Checkpoint]:
    """The checkpoints that `size` ranks take after writing their part of `tensors` through the views of their pools,
    entry by entry, into pages that do not lie in order."""
    parts = []
    for rank in range(size):
        page_spec = {layer: spec.per_rank(rank, size).per_page(page_size) for layer, spec in model.pages.items()}
        records = BlockPool("record", BlockSpec(model.records).per_rank(rank, size), 2)
        pages = BlockPool("page", BlockSpec(page_spec), 40)
        records.allocate("another")
        record = records.allocate("this")
        count = -(-num_tokens // page_size) if model.pages else 0
        blocks = [pages.allocate("this") for _ in range(count)][::-1]
        for layer, spec in model.records.items():
            for name, view in records.state(layer).items():
                view[record] = _own(spec[name], tensors[f"record.{layer}.{name}"], 0, rank, size)
        for layer, spec in model.pages.items():
            for name, view in pages.state(layer).items():
                own = _own(spec[name], tensors[f"pages.{layer}.{name}"], 1, rank, size)
                for position in range(num_tokens):
                    view[blocks[position // page_size], position % page_size] = own[position]
        parts.append(take(num_tokens, records, record, pages, blocks))
    return parts


def _own(field: Field, whole: Tensor, before: int, rank: int, size: int) -> Tensor:
    """`before` counts the axes in front of the field's own."""
    if field.shard is None:
        return whole
    axis = field.shard.axis
    entries = [i for start, stop in field.shard.ranges(field.shape[axis], rank, size) for i in range(start, stop)]
    return whole.index_select(axis + before, torch.tensor(entries))
