"""Latent attention over pages: the fast paths against the specification, and what a neighbour may not do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.paged_attention import mla_attention, naive, prefill, write_pages

# float32: sums of at most a few hundred products of size one, reordered. bfloat16: the inputs are the same rounded
# numbers on both sides, so what differs is the rounding (2 ** -9 relative) of the result and, in prefill, of expanded
# keys, values and softmax weights; outputs have size one.
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 2.5e-2}  # about twice the largest error seen


@dataclasses.dataclass
class Case:
    q_nope: Tensor
    q_rope: Tensor
    key_up: Tensor
    value_up: Tensor
    cache: Tensor
    batch: Batch
    scale: float

    def run(self) -> Tensor:
        return mla_attention(self.q_nope, self.q_rope, self.key_up, self.value_up, self.cache, self.batch, self.scale)

    def expected(self) -> Tensor:
        wide = (tensor.double() for tensor in (self.q_nope, self.q_rope, self.key_up, self.value_up, self.cache))
        return naive.mla_attention(*wide, self.batch, self.scale)


def build(
    pieces: list[tuple[int, int]],  # (tokens already there, tokens of this step), decodes first
    page_size: int = 4,
    heads: int = 3,
    widths: tuple[int, int, int, int] = (6, 4, 5, 8),  # Dn, Dr, Dv, R
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A batch over shuffled pages of a pool with gaps; every slot that holds no token holds NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    nope, rope, value, rank = widths
    counts = [-(-(start + size) // page_size) for start, size in pieces]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    taken = [[order.pop() for _ in range(count)] for count in counts]
    batch = build_batch([Piece(range(n), s, 0, p) for (s, n), p in zip(pieces, taken, strict=True)], page_size)
    arena = torch.full((sum(counts) + 2, page_size * (rank + rope) + 7), float("nan"), dtype=dtype)
    cache = arena[:, 3:-4].view(-1, page_size, rank + rope)
    for (start, _), pages in zip(pieces, taken, strict=True):
        for position in range(start):
            cache[pages[position // page_size], position % page_size] = normal(rank + rope)
    write_pages(normal(batch.num_rows, rank + rope), cache, batch)
    up = normal(heads, nope + value, rank) * rank**-0.5
    return Case(
        normal(batch.num_rows, heads, nope),
        normal(batch.num_rows, heads, rope),
        up[:, :nope],
        up[:, nope:],
        cache,
        batch,
        (nope + rope) ** -0.5,
    )


def assert_close(result: Tensor, expected: Tensor) -> None:
    assert (result.double() - expected).abs().max() <= TOLERANCE[result.dtype]


lengths = st.lists(st.one_of(st.integers(1, 20), st.integers(120, 140), st.just(300)), max_size=3)
prefills = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([2, 5, 30, 63, 64, 70])), max_size=2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    decodes=lengths,
    prefills=prefills,
    page_size=st.sampled_from([1, 4, 16, 64]),
    heads=st.integers(1, 5),
    widths=st.sampled_from([(6, 4, 5, 8), (16, 8, 16, 32), (5, 3, 12, 7)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_specification(decodes, prefills, page_size, heads, widths, dtype) -> None:  # type: ignore[no-untyped-def]
    pieces = [(length, 1) for length in decodes] + prefills or [(0, 1)]
    case = build(pieces, page_size, heads, widths, dtype)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_widths(dtype: torch.dtype) -> None:
    case = build([(150, 1), (40, 1), (70, 80), (0, 66)], 64, 8, (64, 32, 64, 128), dtype)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [127, 128, 129, 8192, 8193, 8300])
def test_every_way_to_split_a_context(length: int, dtype: torch.dtype) -> None:
    case = build([(length - 1, 1), (3, 1)], 64, 2, (4, 2, 4, 8), dtype)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("absorb_rows", [0, 1000], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_pieces_and_histories_are_cut(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, absorb_rows: int
) -> None:
    monkeypatch.setattr(prefill, "BLOCK", 24)
    monkeypatch.setattr(prefill, "ABSORB_ROWS", absorb_rows)
    case = build([(5, 1), (0, 100), (61, 30), (24, 24), (100, 2)], 16, dtype=dtype)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    case = build([(200, 1), (0, 40), (50, 30)], dtype=dtype)
    case.q_nope *= 400  # scores in the hundreds: the softmax is nearly a choice of one token
    difference = (case.run().double() - case.expected()).abs()
    assert difference.isfinite().all()
    if dtype is torch.float32:
        assert difference.max() <= 1e-3  # an error of 1e-7 in a score of 1,000 is one of 1e-4 in its weight


def test_decode_rows_do_not_see_their_neighbours() -> None:
    """Alone or in any company: the same bits."""
    sizes = [40, 300, 7, 129]
    case = build([(size, 1) for size in sizes] + [(9, 30)])
    together = case.run()
    starts = case.batch.query_start
    for i, size in enumerate(sizes):
        row = slice(int(starts[i]), int(starts[i + 1]))
        pages = case.batch.pages[i, : -(-(size + 1) // 4)].tolist()
        alone = dataclasses.replace(
            case,
            q_nope=case.q_nope[row],
            q_rope=case.q_rope[row],
            batch=build_batch([Piece([0], size, 0, pages)], 4),
        )
        assert torch.equal(alone.run(), together[row])


def test_garbage_of_one_sequence_stays_there() -> None:
    case = build([(40, 1), (50, 1), (20, 30), (0, 12)])
    clean = case.run()
    for broken in range(4):
        spoiled = dataclasses.replace(case, cache=case.cache.clone())
        spoiled.cache[case.batch.pages[broken, 0], 0] = float("nan")
        result = spoiled.run()
        for i in range(4):
            rows = slice(int(case.batch.query_start[i]), int(case.batch.query_start[i + 1]))
            assert result[rows].isnan().all() if i == broken else torch.equal(result[rows], clean[rows])


def test_pieces_equal_one_pass() -> None:
    """A prompt of 90 tokens in one pass, and its last 50 tokens as a piece after a history of 40."""
    whole = build([(0, 90)])
    pages = whole.batch.pages[0].tolist()
    rest = dataclasses.replace(
        whole,
        q_nope=whole.q_nope[40:],
        q_rope=whole.q_rope[40:],
        batch=build_batch([Piece(range(50), 40, 0, pages)], 4),
    )
    assert torch.allclose(rest.run(), whole.run()[40:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_pages_touches_its_slots_only(dtype: torch.dtype) -> None:
    batch = build_batch([Piece([1], 6, 0, [3, 1]), Piece([1, 2, 3, 4, 5], 2, 0, [0, 4])], 4)
    arena = torch.randn(5, 4 * 6 + 3).to(dtype)
    before, entries = arena.clone(), torch.randn(6, 6).to(dtype)
    write_pages(entries, arena[:, 2:-1].view(5, 4, 6), batch)
    naive.write_pages(entries, before[:, 2:-1].view(5, 4, 6), batch)
    assert torch.equal(arena, before)


def test_what_does_not_fit_is_refused() -> None:
    case = build([(5, 1), (0, 6)])
    for name, change in [
        ("q_nope", case.q_nope[:, :, 1:]),
        ("q_rope", case.q_rope[:-1]),
        ("key_up", case.key_up.bfloat16()),
        ("value_up", case.value_up[1:]),
        ("q_nope", case.q_nope.transpose(1, 2).contiguous().transpose(1, 2)),
        ("key_up", torch.cat([case.key_up] * 2, dim=2)[:, :, :8]),
        ("cache", case.cache.double()),
        ("cache", case.cache[:, 1:]),
        ("cache", case.cache.transpose(1, 2).contiguous().transpose(1, 2)),
    ]:
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(case, **{name: change}).run()
    with pytest.raises(ValueError, match="pages"):
        dataclasses.replace(case, cache=case.cache[:1]).run()
    with pytest.raises(ValueError, match="entries"):
        write_pages(torch.zeros(2, 12), case.cache, case.batch)
    before = case.cache[:1].clone()
    with pytest.raises(ValueError, match="slot"):
        write_pages(torch.zeros(7, 12), case.cache[:1], case.batch)
    assert torch.equal(before.nan_to_num(), case.cache[:1].nan_to_num())
    with pytest.raises(ValueError, match="meta"):
        write_pages(torch.zeros(7, 12, device="meta"), case.cache.to("meta"), case.batch)
