"""The block pool: layout, ownership, zeroing, and what follows from one declaration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statewise.config import EngineConfig
from statewise.errors import BlockError, OutOfBlocks
from statewise.layers.linear_attention.delta import delta_state_spec
from statewise.memory.blocks import ALIGNMENT, BlockPool, BlockSpec, Field, Shard, StateSpec
from statewise.memory.checkpoint import restore, take


def delta_spec(**changes: object) -> StateSpec:
    segments = changes.pop("segments", (("q", 16), ("k", 16), ("v", 32)))
    engine = EngineConfig(**changes)  # type: ignore[arg-type]
    return delta_state_spec(engine, segments=segments, conv_taps=4, num_heads=4, key_dim=4, value_dim=8)  # type: ignore[arg-type]


def pool(num_blocks: int = 4, spec: BlockSpec | None = None) -> BlockPool:
    return BlockPool("record", spec or BlockSpec({0: delta_spec(), 2: delta_spec(dtype=torch.bfloat16)}), num_blocks)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shapes_and_bytes_follow_the_spec_for_every_rank_count(size: int) -> None:
    spec = delta_spec()
    for rank in range(size):
        part = spec.per_rank(rank, size)
        assert part["conv"].shape == (64 // size, 3)
        assert part["recurrent"].shape == (4 // size, 4, 8)
        assert part["conv"].shard == Shard(0, (("q", 16 // size), ("k", 16 // size), ("v", 32 // size)))
        assert part.nbytes * size == spec.nbytes


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_parts_of_each_segment_make_the_whole(size: int) -> None:
    spec = delta_spec()
    channels = torch.arange(64)
    shard = spec["conv"].shard
    assert shard is not None
    parts = [torch.cat([channels[a:b] for a, b in shard.ranges(64, rank, size)]) for rank in range(size)]
    for name, start, width in (("q", 0, 16), ("k", 16, 16), ("v", 32, 32)):
        begin = start // size
        together = torch.cat([part[begin : begin + width // size] for part in parts])
        assert together.tolist() == list(range(start, start + width)), name


def test_a_segment_that_does_not_divide_is_refused() -> None:
    with pytest.raises(BlockError, match="cannot be split evenly over 3 ranks"):
        delta_spec().per_rank(0, 3)
    with pytest.raises(BlockError, match="outside a tensor-parallel group"):
        delta_spec().per_rank(2, 2)


def test_the_window_is_wider_with_drafts_and_may_lie_channel_last() -> None:
    assert delta_spec(num_spec=3)["conv"].shape == (64, 6)
    one = BlockPool("record", BlockSpec({0: delta_spec(conv_channels_last=True)}), 2)
    window = one.state(0)["conv"]
    assert window.shape == (2, 64, 3)  # the logical shape does not change
    assert window.stride()[1:] == (1, 64)


def test_a_record_is_one_contiguous_block_with_aligned_fields() -> None:
    records = pool()
    first, last = records.state(0), records.state(2)
    assert last["conv"].dtype is torch.bfloat16
    for tensor in (*first.values(), *last.values()):
        assert tensor.data_ptr() % 4 == 0
        assert tensor.stride(0) * tensor.element_size() == records.spec.nbytes
    offsets = list(records.spec.offsets.values())
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert records.arena.shape == (4, records.spec.nbytes)


def test_fields_do_not_overlap() -> None:
    records = pool()
    views = [tensor for layer in (0, 2) for tensor in records.state(layer).values()]
    for value, tensor in enumerate(views, start=1):
        tensor.fill_(value)
    for value, tensor in enumerate(views, start=1):
        assert torch.all(tensor == value)


def test_pages_hold_a_field_per_token() -> None:
    page = StateSpec(latent=Field((24,), torch.float32)).per_page(16)
    pages = BlockPool("page", BlockSpec({3: page}), 3)
    assert pages.state(3)["latent"].shape == (3, 16, 24)
    assert pages.spec.nbytes == 16 * 24 * 4
    heads = StateSpec(k=Field((8, 64), torch.float32, Shard(0))).per_page(16).per_rank(1, 4)
    assert heads["k"].shape == (16, 2, 64)


def test_allocation_zeroes_and_renews_the_generation() -> None:
    records = pool(1)
    block = records.allocate("a")
    records.state(0)["recurrent"][block] = 7.0
    records.release(block)
    again = records.allocate("b")
    assert again == block
    assert records.generations[block] == 2
    assert records.owners[block] == "b"
    assert not records.arena[block].any()


def test_out_of_blocks_is_said_and_harms_nothing() -> None:
    records = pool(2)
    for owner in "ab":
        records.allocate(owner)
    with pytest.raises(OutOfBlocks, match="all 2 blocks of the record pool"):
        records.allocate("c")
    records.check_integrity({0: 1, 1: 1})


def test_shared_blocks_live_until_the_last_reference() -> None:
    records = pool(2)
    block = records.allocate("a")
    records.retain(block)
    records.release(block)
    assert records.num_free == 1
    records.check_integrity({block: 1})
    records.release(block)
    assert records.num_free == 2
    with pytest.raises(BlockError, match="not in use"):
        records.release(block)
    with pytest.raises(BlockError, match="not in use"):
        records.retain(block)


def test_a_leak_shows() -> None:
    records = pool(2)
    block = records.allocate("a")
    with pytest.raises(BlockError, match="has 1 references, 0 are held"):
        records.check_integrity({})
    records._free.append(block)
    with pytest.raises(BlockError, match="lists 2 free blocks, 1 are without references"):
        records.check_integrity()


def test_copy_and_checkpoint_move_every_byte() -> None:
    records, pages = pool(3), BlockPool("page", BlockSpec({1: StateSpec(kv=Field((4, 8), torch.float32))}), 3)
    source, target = records.allocate("a"), records.allocate("b")
    records.arena[source] = torch.randint(0, 255, records.arena[source].shape, dtype=torch.uint8)
    records.copy(source, target)
    assert torch.equal(records.arena[source], records.arena[target])

    held = [pages.allocate("a"), pages.allocate("a")]
    pages.arena[held] = torch.randint(0, 255, pages.arena[held].shape, dtype=torch.uint8)
    point = take(6, records, source, pages, held)
    before = pages.arena[held].clone()
    for page in held:
        pages.release(page)
    fresh = [pages.allocate("c") for _ in range(3)]
    restore(point, records, target, pages, fresh)
    assert torch.equal(pages.arena[fresh[:2]], before)
    assert not pages.arena[fresh[2]].any()
    with pytest.raises(BlockError, match="covers 2 pages"):
        restore(point, records, target, pages, fresh[:1])


@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 7)), max_size=60))
def test_any_history_keeps_the_pool_consistent(history: list[tuple[str, int]]) -> None:
    records = BlockPool("record", BlockSpec({0: StateSpec(s=Field((2,), torch.float32))}), 5)
    held: dict[int, int] = {}
    for action, choice in history:
        if action == "allocate" and records.num_free:
            held[records.allocate("x")] = 1
        elif action != "allocate" and held:
            block = list(held)[choice % len(held)]
            getattr(records, action)(block)
            held[block] += 1 if action == "retain" else -1
            held = {b: n for b, n in held.items() if n}
        records.check_integrity(held)
        assert records.num_free == 5 - len(held)
