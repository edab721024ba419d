"""Grouped-query attention over pages: the fast paths against the specification, and what a neighbour may not do."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.paged_attention import gqa_attention, gqa_decode, naive, prefill, softmax, write_pages

# float32: sums of at most a few hundred products of size one, reordered. bfloat16: the inputs are the same rounded
# numbers on both sides, so what differs is the rounding (2 ** -9 relative) of the result and, in prefill, of the
# softmax weights; outputs have size one, rarely four.
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 2.5e-2}


@dataclasses.dataclass
class Case:
    q: Tensor
    keys: Tensor
    values: Tensor
    batch: Batch
    scale: float

    def run(self) -> Tensor:
        return gqa_attention(self.q, self.keys, self.values, self.batch, self.scale)

    def expected(self) -> Tensor:
        return naive.gqa_attention(self.q.double(), self.keys.double(), self.values.double(), self.batch, self.scale)

    def sequence(self, i: int) -> slice:
        return slice(int(self.batch.query_start[i]), int(self.batch.query_start[i + 1]))


def build(
    pieces: list[tuple[int, int]],  # (tokens already there, tokens of this step), decodes first
    page_size: int = 4,
    sizes: tuple[int, int, int, int] = (6, 2, 8, 12),  # H, Hkv, D, Dv
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A batch over shuffled pages of a pool with gaps; every slot that holds no token holds NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads, shared, width, value_width = sizes
    counts = [-(-(start + size) // page_size) for start, size in pieces]
    total = sum(counts) + 2
    order = torch.randperm(total, generator=generator).tolist()
    taken = [[order.pop() for _ in range(count)] for count in counts]
    batch = build_batch([Piece(range(n), s, 0, p) for (s, n), p in zip(pieces, taken, strict=True)], page_size)
    # One block holds the keys and the values of a page, as in the page pool of an engine.
    cut = page_size * shared * width
    arena = torch.full((total, page_size * shared * (width + value_width) + 7), float("nan"), dtype=dtype)
    keys = arena[:, 3 : 3 + cut].view(total, page_size, shared, width)
    values = arena[:, 3 + cut : -4].view(total, page_size, shared, value_width)
    if value_width == width:
        values = torch.full((total, page_size, shared, width), float("nan"), dtype=dtype)  # another stride in dim 0
    for (start, _), pages in zip(pieces, taken, strict=True):
        table, positions = torch.tensor(pages), torch.arange(start)
        keys[table[positions // page_size], positions % page_size] = normal(start, shared, width)
        values[table[positions // page_size], positions % page_size] = normal(start, shared, value_width)
    write_pages(normal(batch.num_rows, shared, width), keys, batch)
    write_pages(normal(batch.num_rows, shared * value_width), values.flatten(2), batch)
    q = normal(batch.num_rows, heads * width + 5)[:, 2:-3].unflatten(1, (heads, width))
    return Case(q, keys, values, batch, width**-0.5)


def assert_close(result: Tensor, expected: Tensor) -> None:
    assert (result.double() - expected).abs().max() <= TOLERANCE[result.dtype]


@settings(max_examples=40)
@given(
    decodes=st.lists(st.one_of(st.integers(1, 20), st.integers(120, 140), st.just(300)), max_size=3),
    prefills=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 2, 5, 30, 63, 64, 70])), max_size=2),
    page_size=st.sampled_from([1, 3, 16, 64]),
    sizes=st.sampled_from(
        [(1, 1, 8, 8), (4, 1, 16, 16), (5, 5, 8, 12), (6, 2, 24, 8), (8, 2, 128, 128), (9, 1, 10, 7), (12, 4, 9, 16)]
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_specification(decodes, prefills, page_size, sizes, dtype) -> None:  # type: ignore[no-untyped-def]
    prefills = [(start or 0, size) for start, size in prefills if size > 1 or start == 0]  # else it is a decode row
    case = build([(length, 1) for length in decodes] + prefills or [(0, 1)], page_size, sizes, dtype)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(16, 4, 128, 128), (64, 8, 128, 128), (16, 2, 256, 256), (16, 16, 64, 64)])
def test_published_widths(dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    case = build([(150, 1), (40, 1), (70, 10), (0, 16)], 64, sizes, dtype)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [127, 128, 129, 8192, 8193, 8300])
def test_every_way_to_split_a_context(length: int, dtype: torch.dtype) -> None:
    case = build([(length - 1, 1), (3, 1)], 64, (4, 2, 8, 8), dtype)
    assert_close(case.run(), case.expected())


def test_splits_equal_one_pass() -> None:
    """What `merge` makes of any split of a context is what one pass over it gives."""
    generator = torch.Generator().manual_seed(0)
    shape = {"query": (4, 8), "keys": (200, 8), "values": (200, 12)}
    query, keys, values = (torch.randn(*size, generator=generator).numpy() for size in shape.values())
    blocks = torch.empty(softmax.BLOCK, 8).numpy(), torch.empty(softmax.BLOCK, 12).numpy()
    pages = torch.arange(200).numpy()

    def run(bounds: list[int]) -> Tensor:
        largest, total = torch.empty(len(bounds) - 1, 4), torch.empty(len(bounds) - 1, 4)
        partial, result = torch.empty(len(bounds) - 1, 4, 12), torch.empty(4, 12)
        for s, (begin, end) in enumerate(pairwise(bounds)):
            sums = (largest[s].numpy(), total[s].numpy(), partial[s].numpy())
            scores = torch.empty(4, softmax.BLOCK).numpy()
            caches = (keys.reshape(-1), values.reshape(-1))
            gqa_decode._attend(query, caches, (8, 12), pages, (1, 1, 0), begin, end, blocks, scores, *sums)
        for g in range(4):
            columns = (largest[:, g].contiguous().numpy(), total[:, g].contiguous().numpy())
            result[g] /= softmax.merge(*columns, partial[:, g].contiguous().numpy(), result[g].numpy())
        return result

    whole = run([0, 200])
    wanted = torch.softmax(torch.tensor(query).double() @ torch.tensor(keys).double().T, 1)
    assert_close(whole, wanted @ torch.tensor(values).double())
    for bounds in ([0, 1, 200], [0, 199, 200], [0, 16, 32, 100, 101, 200], list(range(0, 201, 5))):
        assert torch.allclose(run(bounds), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sizes", [(6, 2, 8, 12), (4, 4, 12, 8), (4, 1, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_pieces_and_histories_are_cut(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> None:
    monkeypatch.setattr(prefill, "BLOCK", 24)
    case = build([(5, 1), (0, 100), (61, 30), (24, 24), (100, 2)], 16, sizes, dtype=dtype)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    case = build([(200, 1), (0, 40), (50, 30)], dtype=dtype)
    case.q *= 400  # scores in the hundreds: the softmax is nearly a choice of one token
    difference = (case.run().double() - case.expected()).abs()
    assert difference.isfinite().all()
    if dtype is torch.float32:
        assert difference.max() <= 1e-3  # an error of 1e-7 in a score of 1,000 is one of 1e-4 in its weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(6, 2, 8, 12), (8, 2, 128, 128), (5, 5, 40, 40)])
def test_decode_rows_do_not_see_their_neighbours(dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    """Alone, where one thread does it all, or in any company and with any number of threads: the same bits."""
    lengths = [40, 300, 7, 129, 1500]
    case = build([(length, 1) for length in lengths] + [(9, 30)], 16, sizes, dtype)
    together = case.run()
    for i, length in enumerate(lengths):
        pages = case.batch.pages[i, : -(-(length + 1) // 16)].tolist()
        alone = dataclasses.replace(case, q=case.q[i : i + 1], batch=build_batch([Piece([0], length, 0, pages)], 16))
        assert torch.equal(alone.run(), together[i : i + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(case.run()[: len(lengths)], together[: len(lengths)])
    finally:
        torch.set_num_threads(threads)


def test_garbage_of_one_sequence_stays_there() -> None:
    case = build([(40, 1), (50, 1), (20, 30), (0, 12)])
    clean = case.run()
    for broken in range(4):
        spoiled = dataclasses.replace(case, keys=case.keys.clone(), values=case.values.clone())
        for cache in (spoiled.keys, spoiled.values):
            cache[case.batch.pages[broken, 0], 0] = float("nan")
        result = spoiled.run()
        for i in range(4):
            rows = case.sequence(i)
            assert result[rows].isnan().all() if i == broken else torch.equal(result[rows], clean[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_and_single_rows_equal_one_pass(dtype: torch.dtype) -> None:
    """A prompt of 90 tokens in one pass; its last 50 tokens after a history of 40; its last token as a decode row."""
    whole = build([(0, 90)], dtype=dtype)
    pages = whole.batch.pages[0].tolist()
    expected = whole.run()
    for start in (40, 89):
        batch = build_batch([Piece(range(90 - start), start, 0, pages)], 4)
        rest = dataclasses.replace(whole, q=whole.q[start:], batch=batch)
        assert_close(rest.run(), expected[start:].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_pages_touches_its_slots_only(dtype: torch.dtype) -> None:
    batch = build_batch([Piece([1], 6, 0, [3, 1]), Piece([1, 2, 3, 4, 5], 2, 0, [0, 4])], 4)
    arena = torch.randn(5, 4 * 6 + 3).to(dtype)
    before, wide = arena.clone(), torch.randn(6, 2, 5).to(dtype)
    entries = wide[..., 1:4]  # heads that do not touch
    write_pages(entries, arena[:, 2:-1].view(5, 4, 2, 3), batch)
    naive.write_pages(entries, before[:, 2:-1].view(5, 4, 2, 3), batch)
    assert torch.equal(arena, before)


def test_what_does_not_fit_is_refused() -> None:
    case = build([(5, 1), (0, 6)])
    for name, change in [
        ("q", case.q[:, :, 1:]),
        ("q", case.q[:-1]),
        ("q", case.q[:, :5]),
        ("q", case.q[:, :0]),
        ("q", case.q.flatten(1)),
        ("q", case.q.bfloat16()),
        ("q", case.q.transpose(1, 2).contiguous().transpose(1, 2)),
        ("keys", case.keys.double()),
        ("keys", case.keys[:, 1:]),
        ("keys", case.keys.flatten(2)),
        ("keys", case.keys[..., :4]),
        ("values", case.values[:, :, :1]),
        ("values", case.values[1:]),
        ("values", case.values.bfloat16()),
    ]:
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(case, **{name: change}).run()
    with pytest.raises(ValueError, match="pages"):
        dataclasses.replace(case, keys=case.keys[:1], values=case.values[:1]).run()
    for entries in (torch.zeros(7, 2, 7), torch.zeros(6, 2, 8), torch.zeros(7, 16), torch.zeros(7, 2, 8).bfloat16()):
        with pytest.raises(ValueError, match="entries"):
            write_pages(entries, case.keys, case.batch)
    before = case.keys.clone()
    with pytest.raises(ValueError, match="slot"):
        write_pages(torch.zeros(7, 2, 8), case.keys[:1], case.batch)
    with pytest.raises(ValueError, match="contiguous"):
        write_pages(torch.zeros(7, 2, 4), case.keys[..., :4], case.batch)
    assert torch.equal(before.nan_to_num(), case.keys.nan_to_num())
    with pytest.raises(ValueError, match="meta"):
        write_pages(torch.zeros(7, 2, 8, device="meta"), case.keys.to("meta"), case.batch)
