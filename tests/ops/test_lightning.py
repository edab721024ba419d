"""Lightning attention against its recurrence in float64: mixed batches, cuts, widths, slopes, dtypes, ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.lightning import (
    LightningWeights,
    lightning,
    lightning_attention,
    naive_lightning,
    naive_lightning_attention,
    recurrence,
)

LENGTHS = [1, 2, 3, 17, 63, 64, 65, 130]
STARTS = [0, 0, 1, 63, 64, 70]
FLOAT32 = 2e-6  # relative to the largest value; float32 rounds at 6e-8
LAYER = 1e-5  # the same behind two norms, which stretch small rows
BFLOAT16 = 2**-8  # outputs are rounded to bfloat16 once


def batch_of(lengths: list[int], starts: list[int], blocks: list[int]) -> Batch:
    return build_batch([Piece(range(n), s, b) for n, s, b in zip(lengths, starts, blocks, strict=True)], 16)


def one(length: int, start: int = 0, block: int = 0) -> Batch:
    return batch_of([length], [start], [block])


def mixed(decodes: int, prefills: list[tuple[int, int]]) -> Batch:
    """Some decode rows, then prefill pieces (length, start); blocks in any order, two of them not used."""
    prefills = [(n, s if n > 1 else 0) for n, s in prefills] or [(3, 0)] * (decodes == 0)
    lengths, starts = [1] * decodes + [n for n, _ in prefills], [9] * decodes + [s for _, s in prefills]
    return batch_of(lengths, starts, torch.randperm(len(lengths) + 2)[: len(lengths)].tolist())


def pool(batch: Batch, heads: int, keys: int, width: int) -> Tensor:
    """States full of another sequence's values, as fields of larger blocks."""
    size = heads * keys * width
    blocks = int(batch.records.max()) + 3
    return torch.randn(blocks, size + 7)[:, 3 : 3 + size].unflatten(1, (heads, keys, width))


def draw(rows: int, heads: int, keys: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as slices of one wide projection."""
    sizes = [heads * keys, heads * keys, heads * width]
    parts = torch.randn(rows, sum(sizes) + 3).to(dtype)[:, 3:].split(sizes, dim=1)
    q, k, v = (part.unflatten(1, (heads, -1)) for part in parts)
    return q, k, v


def distance(got: Tensor, wanted: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))


def check(qkv: tuple[Tensor, Tensor, Tensor], slopes: Tensor, state: Tensor, batch: Batch) -> None:
    """Run the core and compare outputs and states with the recurrence in float64."""
    wanted_state = state.double()
    wide = [x.double() for x in qkv]
    wanted = naive_lightning_attention(*wide, slopes, wanted_state, batch, 0.25, dtype=torch.float64)
    untouched = [b for b in range(state.shape[0]) if b not in batch.records.tolist()]
    before = state[untouched].clone()
    got = lightning_attention(*qkv, slopes, state, batch, 0.25)
    assert got.dtype is qkv[2].dtype and got.is_contiguous()
    assert distance(got, wanted) < (BFLOAT16 if got.dtype is torch.bfloat16 else FLOAT32)
    assert distance(state, wanted_state) < (BFLOAT16 if state.dtype is torch.bfloat16 else FLOAT32)
    assert torch.equal(state[untouched], before)


def weights_of(
    heads: int,
    width: int,
    group_width: int,
    dtype: torch.dtype = torch.float32,
    silu: bool = False,
    norms: bool = True,
    rotated: int = 4,
) -> LightningWeights:
    def weight(size: int) -> Tensor:
        return (1 + 0.2 * torch.randn(size)).to(dtype)

    return LightningWeights(
        slopes=2.0 ** -torch.arange(1.0, heads + 1) * 0.8,
        norm=weight(heads * width),
        group_width=group_width,
        eps=1e-6,
        scale=width**-0.5,
        silu=silu,
        query_norm=weight(width) if norms else None,
        key_norm=weight(width) if norms else None,
        qk_eps=1e-5,
        frequencies=10.0 ** -torch.arange(rotated / 2) if rotated else None,
    )


@settings(max_examples=50)
@given(
    decodes=st.integers(0, 3),
    prefills=st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(STARTS)), max_size=4),
    heads=st.sampled_from([1, 3, 20]),
    sizes=st.sampled_from([(4, 8), (8, 4), (16, 16), (7, 5)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    state_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_the_core_equals_the_recurrence(
    decodes: int,
    prefills: list[tuple[int, int]],
    heads: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch = mixed(decodes, prefills)
    slopes = torch.rand(heads) ** 4 + 1e-7
    check(draw(batch.num_rows, heads, *sizes, dtype), slopes, pool(batch, heads, *sizes).to(state_dtype), batch)


@settings(max_examples=60)
@given(
    decodes=st.integers(0, 3),
    prefills=st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(STARTS)), max_size=4),
    sizes=st.sampled_from([(1, 8, 8), (4, 16, 64), (4, 16, 32), (4, 16, 8), (2, 12, 6), (6, 10, 20), (4, 6, 8)]),
    silu=st.booleans(),
    norms=st.booleans(),
    rotated=st.sampled_from([0, 2, 6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    state_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_the_layer_equals_its_specification(
    decodes: int,
    prefills: list[tuple[int, int]],
    sizes: tuple[int, int, int],  # heads, width, columns of a group: wider and narrower than a head, and across two
    silu: bool,
    norms: bool,
    rotated: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch = mixed(decodes, prefills)
    weights = weights_of(*sizes, dtype, silu, norms, rotated)
    state = pool(batch, sizes[0], sizes[1], sizes[1]).to(state_dtype)
    projected = torch.randn(batch.num_rows, 4 * sizes[0] * sizes[1]).to(dtype)
    exact_state = state.double()
    wanted = naive_lightning(projected.double(), weights, exact_state, batch, dtype=torch.float64)
    got = lightning(projected, weights, state, batch)
    assert got.dtype is dtype and got.is_contiguous()
    assert distance(got, wanted) < (BFLOAT16 if dtype is torch.bfloat16 else LAYER)
    assert distance(state, exact_state) < (BFLOAT16 if state_dtype is torch.bfloat16 else FLOAT32)


def test_full_size_heads() -> None:
    torch.manual_seed(1)
    batch = batch_of([1, 1, 200, 1, 64], [5, 300, 0, 0, 64], [4, 1, 0, 2, 3])
    check(
        draw(batch.num_rows, 4, 128, 128, torch.float32), 2.0 ** -torch.arange(1.0, 5), pool(batch, 4, 128, 128), batch
    )


@pytest.mark.parametrize("boundary", [64, 256])
def test_the_state_decays_before_it_meets_the_first_token_of_a_chunk(boundary: int) -> None:
    """What the state gives to row t of a chunk has the factor e^(-s (t+1)); e^(-s t) is a known mistake, and shows in
    the rows behind a boundary and in pieces that continue a sequence."""
    torch.manual_seed(2)
    slopes, rows = torch.tensor([0.7, 0.05]), boundary + 3
    q, k, v = draw(rows, 2, 8, 8, torch.float32)
    wanted, final = recurrence(*(x.double() for x in (q, k, v)), slopes.double(), torch.zeros(2, 8, 8).double())
    whole, pieces = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)
    got = lightning_attention(q, k, v, slopes, whole, one(rows), 1.0)
    first = lightning_attention(*(x[:boundary] for x in (q, k, v)), slopes, pieces, one(boundary), 1.0)
    second = lightning_attention(*(x[boundary:] for x in (q, k, v)), slopes, pieces, one(3, boundary), 1.0)
    for o in (got, torch.cat((first, second))):
        assert distance(o[:boundary], wanted[:boundary]) < FLOAT32
        assert distance(o[boundary:], wanted[boundary:]) < FLOAT32
    assert distance(whole[0], final) < FLOAT32 and torch.equal(pieces, whole)


@pytest.mark.parametrize("slope", [3e-8, 1e-7, 1e-3, 1.0, 1.0 + 1e-5, 8.0, 1e4])
def test_extreme_slopes(slope: float) -> None:
    torch.manual_seed(3)
    batch = batch_of([1, 150, 40], [5, 0, 7], [2, 1, 0])
    slopes = torch.tensor([slope, 0.1])
    check(draw(batch.num_rows, 2, 16, 16, torch.float32), slopes, pool(batch, 2, 16, 16), batch)


def test_a_slow_decay_is_exact_over_many_tokens() -> None:
    """e^(-1e-7) in float32 is 2e-8 too small; the tokens of a long generation would add that up."""
    torch.manual_seed(13)
    slopes, tokens = torch.full((1,), 1e-7), 5000
    q, k, v = (torch.randn(tokens, 1, 8) * 0.03 for _ in range(3))
    steps, whole, exact = (torch.ones(1, 1, 8, 8, dtype=dtype) for dtype in (torch.float, torch.float, torch.double))
    for t in range(tokens):
        lightning_attention(q[t : t + 1], k[t : t + 1], v[t : t + 1], slopes, steps, one(1, 1 + t), 1.0)
    lightning_attention(q, k, v, slopes, whole, one(tokens, 1), 1.0)
    naive_lightning_attention(q, k, v, slopes, exact, one(tokens, 1), 1.0, dtype=torch.double)
    assert distance(whole, exact) < 1e-5 and distance(steps, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_decay_to_nothing_stays_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    weights, state = weights_of(2, 16, 32, dtype), torch.randn(1, 2, 16, 16) * 1e30
    projected = torch.zeros(700, 128).to(dtype)
    outputs = [lightning(projected, weights, state, one(700, 64))]
    outputs += [lightning(projected[:1], weights, state, one(1, 764 + i)) for i in range(200)]
    assert all(o.isfinite().all() for o in outputs) and state.isfinite().all()
    assert float(state.abs().max()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_on_the_grid_give_bitwise_what_one_pass_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    weights = weights_of(8, 32, 64, dtype)
    projected = torch.randn(1000, 4 * 8 * 32).to(dtype)
    whole = torch.randn(1, 8, 32, 32)
    wanted = lightning(projected, weights, whole, one(1000))
    for cuts in ([0, 64, 192, 1000], [0, 640, 704, 1000], [0, 960, 1000]):
        state, got = torch.randn(1, 8, 32, 32), []
        for start, end in pairwise(cuts):
            got.append(lightning(projected[start:end], weights, state, one(end - start, start)))
        assert torch.equal(torch.cat(got), wanted) and torch.equal(state, whole)


@pytest.mark.parametrize("cuts", [[1] * 70, [1, 2, 3, 61, 3], [17, 53], [69, 1]])
def test_any_cut_gives_what_one_pass_gives(cuts: list[int]) -> None:
    torch.manual_seed(6)
    weights, projected = weights_of(2, 16, 16), torch.randn(70, 128)
    state = torch.randn(1, 2, 16, 16)
    exact_state, start, got = state.double(), 0, []
    wanted = naive_lightning(projected.double(), weights, exact_state, one(70), dtype=torch.float64)
    for size in cuts:
        got.append(lightning(projected[start : start + size], weights, state, one(size, start)))
        start += size
    assert distance(torch.cat(got), wanted) < LAYER and distance(state, exact_state) < FLOAT32


@settings(max_examples=15)
@given(
    neighbours=st.lists(st.sampled_from(LENGTHS), max_size=12),
    place=st.integers(0, 12),
    sizes=st.sampled_from([(2, 16), (8, 16), (3, 128), (20, 8)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_neighbours_of_a_prompt_change_no_bit(
    neighbours: list[int], place: int, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(7)
    place = min(place, len(neighbours))
    lengths = [*neighbours[:place], 130, *neighbours[place:]]
    batch = batch_of(lengths, [0] * len(lengths), list(range(len(lengths))))
    weights, start = weights_of(*sizes, sizes[0] * sizes[1], dtype), sum(neighbours[:place])
    projected = torch.randn(batch.num_rows, 4 * sizes[0] * sizes[1]).to(dtype)
    state, alone = (pool(b, sizes[0], sizes[1], sizes[1]) for b in (batch, one(130)))
    together = lightning(projected, weights, state, batch)[start : start + 130]
    wanted = lightning(projected[start : start + 130], weights, alone, one(130))
    assert torch.equal(together, wanted) and torch.equal(state[place], alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 16), (1, 128), (5, 12)])
def test_a_decode_row_depends_on_nothing_beside_it(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Neither on other rows, their number, a prefill in the same batch, nor on the number of threads."""
    torch.manual_seed(8)
    heads, width = sizes
    weights, states = weights_of(heads, width, heads * width, dtype), torch.randn(9, heads, width, width)
    projected = torch.randn(79, 4 * heads * width).to(dtype)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        for rows, prefill in (([4], 0), (list(range(8)), 0), ([7, 4, 0], 0), ([0, 4], 70)):
            state = states.clone()
            pieces = [Piece([0], 5 + row, row) for row in rows] + [Piece(range(prefill), 0, 8)] * bool(prefill)
            inputs = torch.cat((projected[rows], projected[9 : 9 + prefill]))
            output = lightning(inputs, weights, state, build_batch(pieces, 16))
            results.append((output[rows.index(4)], state[4]))
    for output, state in results[1:]:
        assert torch.equal(output, results[0][0]) and torch.equal(state, results[0][1])


def test_bfloat16_rows_are_rounded_once() -> None:
    torch.manual_seed(9)
    weights, projected = weights_of(2, 16, 32, torch.bfloat16), torch.randn(75, 128).bfloat16()
    batch = batch_of([1] * 5 + [70], [5, 6, 7, 8, 9, 0], list(range(6)))
    state = torch.randn(6, 2, 16, 16)
    exact = naive_lightning(projected.double(), weights, state.double(), batch, dtype=torch.float64)
    output = lightning(projected, weights, state, batch).double()
    assert ((output - exact).abs() <= exact.abs() * 2**-8 + 3e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 16])  # all of a row, a quarter of it
def test_two_ranks_with_half_the_heads_equal_one(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(10)
    batch = batch_of([1, 1, 70], [5, 6, 0], [0, 1, 2])
    whole, state = weights_of(4, 16, columns, dtype), torch.randn(3, 4, 16, 16)
    projected = torch.randn(batch.num_rows, 4, 4, 16).to(dtype)  # part, head, column
    states = [state[:, half].clone() for half in (slice(0, 2), slice(2, 4))]
    wanted = lightning(projected.flatten(1), whole, state, batch)
    sums: list[Tensor] = []

    def run(rank: int, total: Tensor | None) -> Tensor:
        """One rank; `total` is what the ranks have together, None to find out what this one has."""
        half = slice(2 * rank, 2 * rank + 2)

        def reduce(own: Tensor) -> Tensor:
            assert own.shape == (batch.num_rows, 1) and own.dtype is torch.float32
            sums.append(own.clone())
            return own if total is None else total

        own = replace(whole, slopes=whole.slopes[half], norm=whole.norm[32 * rank : 32 * rank + 32])
        own_rows, own_state = projected[:, :, half].flatten(1).contiguous(), states[rank].clone()
        output = lightning(own_rows, own, own_state, batch, reduce if columns > 32 else None)
        assert torch.equal(own_state, state[:, half])
        return output

    if columns > 32:
        run(0, None), run(1, None)
    total = sums[0] + sums[1] if sums else None
    got = torch.cat([run(rank, total) for rank in (0, 1)], dim=1)
    assert distance(got, wanted.double()) < (BFLOAT16 if dtype is torch.bfloat16 else LAYER)


def test_one_rank_may_reduce_too() -> None:
    torch.manual_seed(11)
    batch, weights = batch_of([1, 70], [5, 0], [0, 1]), weights_of(4, 16, 32)
    projected, state = torch.randn(71, 256), torch.randn(2, 4, 16, 16)
    again = state.clone()
    wanted = lightning(projected, weights, state, batch)
    assert torch.equal(lightning(projected, weights, again, batch, lambda sums: sums), wanted)
    assert torch.equal(state, again)


def test_a_layer_may_move_to_another_pool() -> None:
    torch.manual_seed(12)
    weights, projected = weights_of(2, 16, 32), torch.randn(1, 128)
    first, second = torch.randn(1, 2, 16, 16), torch.randn(2, 2, 16, 16).bfloat16()
    lightning(projected, weights, first, one(1, 5))
    before, exact = first.clone(), second.double()
    wanted = naive_lightning(projected.double(), weights, exact, one(1, 5, 1), dtype=torch.float64)
    assert distance(lightning(projected, weights, second, one(1, 5, 1)), wanted) < LAYER
    assert torch.equal(first, before) and distance(second, exact) < BFLOAT16


def test_bad_arguments_are_named() -> None:
    q, k, v = draw(3, 2, 8, 4, torch.float32)
    core = {"q": q, "k": k, "v": v, "slopes": torch.ones(2), "state": torch.zeros(1, 2, 8, 4)}
    for message, change in {
        "q and k must be": {"k": k[:2]},
        "v must be": {"v": v[:, :1]},
        "all be float32 or": {"q": q.bfloat16()},
        "slopes must be .2. float32": {"slopes": torch.ones(2).double()},
        "slopes must be .2. float32 and positive": {"slopes": torch.zeros(2)},
        "state must be .blocks": {"state": torch.zeros(1, 2, 4, 8)},
        "contiguous within": {"state": torch.zeros(1, 2, 4, 8).mT},
    }.items():
        with pytest.raises(ValueError, match=message):
            lightning_attention(**{**core, **change}, batch=one(3), scale=1.0)


def test_bad_layers_are_refused() -> None:
    weights, rows, state = weights_of(2, 16, 32), torch.zeros(2, 128), torch.zeros(1, 2, 16, 16)
    for message, arguments in {
        "projected must be contiguous": (torch.zeros(2, 129)[:, 1:], weights, state),
        "projected must be torch.float32": (rows.bfloat16(), weights, state),
        "state must be .blocks": (rows, weights, state[:, :1]),
        "contiguous within": (rows, weights, state.mT),
        "group_width 24 must divide": (rows, replace(weights, group_width=24), state),
        "group_width 64 must divide": (rows, replace(weights, group_width=64), state),
    }.items():
        with pytest.raises(ValueError, match=message):
            lightning(*arguments, one(2))
    for name, value in {
        "slopes": -torch.ones(2),
        "norm": torch.ones(2, 16),
        "query_norm": torch.ones(8),
        "key_norm": torch.ones(16, dtype=torch.int64),
        "frequencies": torch.ones(9),
        "group_width": 0,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            replace(weights, **{name: value})
