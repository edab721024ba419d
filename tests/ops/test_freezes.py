"""States that prefill pieces leave on their way: bit by bit those of pieces that end there, nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.conformance import Subject
from statewise.layers.pluggable import PluggableLayer
from statewise.memory.blocks import BlockPool, BlockSpec
from statewise.ops.batch import CHUNK, Batch, Piece, build_batch
from statewise.ops.delta_rule import gated_delta_rule, naive_gated_delta_rule
from statewise.ops.kda import kda, naive_kda
from statewise.ops.lightning import lightning, lightning_attention, naive_lightning, naive_lightning_attention
from statewise.ops.short_convolution import naive_short_convolution, short_convolution
from tests.ops.test_kda import weights_of as kda_weights
from tests.ops.test_lightning import weights_of as lightning_weights

LENGTHS = [1, 2, 64, 65, 130, 200, 330]
STARTS = [0, 0, 1, 63, 64, 70]
BLOCKS, SPARE = 30, 0
SINGLE, HALF = torch.float32, torch.bfloat16
FLOAT32, BFLOAT16, COMPOSED = 2e-5, 2**-7, 3e-2  # the last where bfloat16 rows are rounded between operators

Run = Callable[[Batch, list[Tensor]], Tensor]
"""Calculates the rows of a batch, whose tokens number the inputs, with the fields of a record in the given pools."""

batches = st.builds(
    lambda decodes, prefills, seed: pieces_of(decodes, prefills, seed),
    st.integers(0, 2),
    st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(STARTS)), min_size=1, max_size=4),
    st.integers(0, 1000),
)


def pieces_of(decodes: int, prefills: list[tuple[int, int]], seed: int) -> list[Piece]:
    """Decode rows and prefill pieces (length, start) with random freezes in any order, in blocks in any order."""
    chosen = random.Random(seed)
    blocks = chosen.sample(range(1, BLOCKS), BLOCKS - 1)
    pieces = [Piece([i], 9, blocks.pop()) for i in range(decodes)]
    row = decodes
    for length, start in prefills:
        start = start if length > 1 else 0
        grid = range(start - start % CHUNK + CHUNK, start + length, CHUNK)
        freezes = [(position, blocks.pop()) for position in chosen.sample(grid, chosen.randint(0, len(grid)))]
        pieces.append(Piece(range(row, row + length), start, blocks.pop(), freezes=freezes))
        row += length
    return pieces


def total(pieces: list[Piece]) -> int:
    return sum(len(piece.tokens) for piece in pieces)


def check_cuts(run: Run, pool: Callable[[], list[Tensor]], pieces: list[Piece], dtype: torch.dtype = SINGLE) -> None:
    """Every kept state is that of a piece which ends there; outputs, final states and other blocks as without any.

    pool() gives the same fields full of other sequences' values, each [BLOCKS, ...]. The piece that ends keeps its
    place among the others and its rest is run as a new sequence, since a plain matrix product in bfloat16 adds in
    another order for another number of rows. `dtype` is that of the rows.
    """
    plain = [replace(piece, freezes=()) for piece in pieces]
    got, wanted = pool(), pool()
    outputs = run(build_batch(plain, 16), wanted)
    assert torch.equal(run(build_batch(pieces, 16), got), outputs)
    for i, piece in enumerate(pieces):
        for position, block in piece.freezes:
            count, cut = position - piece.start, pool()
            ended, rest = replace(plain[i], tokens=piece.tokens[:count]), Piece(piece.tokens[count:], 0, SPARE)
            decode = count == 1 and piece.start > 0  # its sums run in another order
            run(build_batch([ended] if decode else [*plain[:i], ended, rest, *plain[i + 1 :]], 16), cut)
            for ours, field, there in zip(got, wanted, cut, strict=True):
                field[block] = there[piece.record]
                if decode:
                    tolerance = FLOAT32 if field.dtype is dtype is SINGLE else COMPOSED
                    torch.testing.assert_close(ours[block], field[block], rtol=tolerance, atol=tolerance)
                    field[block] = ours[block]
    for ours, field in zip(got, wanted, strict=True):
        assert torch.equal(ours, field)


def check_specification(run: Run, naive: Run, pool: Callable[[], list[Tensor]], pieces: list[Piece]) -> None:
    got, wanted = pool(), [field.double() for field in pool()]
    batch = build_batch(pieces, 16)
    outputs, goal = run(batch, got), naive(batch, wanted)
    for ours, exact in zip((outputs, *got), (goal, *wanted), strict=True):
        tolerance = FLOAT32 if ours.dtype is SINGLE else BFLOAT16
        assert float((ours.double() - exact).abs().max()) <= tolerance * max(1.0, float(exact.abs().max()))


def states(*shape: int, dtype: torch.dtype = SINGLE, order: tuple[int, ...] | None = None) -> Tensor:
    """[BLOCKS, *shape], as a field of larger blocks; `order` says how its axes lie in memory."""
    generator = torch.Generator().manual_seed(1)
    order = order or tuple(range(len(shape)))
    size = torch.Size(shape).numel()
    arena = torch.randn(BLOCKS, size + 7, generator=generator).to(dtype)[:, 3 : 3 + size]
    return arena.unflatten(1, [shape[axis] for axis in order]).permute(
        0, *(order.index(a) + 1 for a in range(len(order)))
    )


@settings(max_examples=40)
@given(
    pieces=batches,
    channels=st.sampled_from([1, 40, 600]),
    taps=st.sampled_from([1, 4]),
    spare=st.integers(0, 3),
    channel_last=st.booleans(),
    dtypes=st.sampled_from([(SINGLE, SINGLE), (HALF, HALF), (HALF, SINGLE)]),
)
def test_short_convolution(
    pieces: list[Piece], channels: int, taps: int, spare: int, channel_last: bool, dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(total(pieces), channels).to(dtypes[0]), torch.randn(channels, taps)

    def pool() -> list[Tensor]:
        return [states(channels, taps - 1 + spare, dtype=dtypes[1], order=(1, 0) if channel_last else None)]

    def run(batch: Batch, fields: list[Tensor]) -> Tensor:
        return short_convolution(x[batch.tokens], weight, fields[0], batch)

    check_cuts(run, pool, pieces)
    got, wanted = pool(), pool()
    batch = build_batch(pieces, 16)
    run(batch, got), naive_short_convolution(x, weight, wanted[0], batch)
    assert torch.equal(got[0], wanted[0])


@settings(max_examples=40)
@given(
    pieces=batches,
    heads=st.sampled_from([(1, 1), (1, 4), (20, 20)]),
    per_channel=st.booleans(),
    dtypes=st.sampled_from([(SINGLE, SINGLE), (SINGLE, HALF), (HALF, SINGLE), (HALF, HALF)]),
)
def test_gated_delta_rule(
    pieces: list[Piece], heads: tuple[int, int], per_channel: bool, dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(0)
    rows, keys, width = total(pieces), 16, 8
    q, k = (torch.randn(rows, heads[0], keys).to(dtypes[0]) for _ in range(2))
    v = torch.randn(rows, heads[1], width).to(dtypes[0])
    g = -3.0 * torch.rand(rows, heads[1], *([keys] if per_channel else [])) ** 4
    beta = torch.rand(rows, heads[1])

    def pool() -> list[Tensor]:
        return [states(heads[1], keys, width, dtype=dtypes[1])]

    def run(batch: Batch, fields: list[Tensor]) -> Tensor:
        return gated_delta_rule(*(x[batch.tokens] for x in (q, k, v, g, beta)), fields[0], batch, 0.25)

    def naive(batch: Batch, fields: list[Tensor]) -> Tensor:
        wide = (x.double() for x in (q, k, v, g, beta))
        return naive_gated_delta_rule(*wide, fields[0], batch, 0.25, dtype=torch.float64)

    check_cuts(run, pool, pieces)
    check_specification(run, naive, pool, pieces)


@settings(max_examples=40)
@given(
    pieces=batches,
    heads=st.sampled_from([1, 4, 20]),
    dtypes=st.sampled_from([(SINGLE, SINGLE), (SINGLE, HALF), (HALF, SINGLE), (HALF, HALF)]),
)
def test_lightning_attention(pieces: list[Piece], heads: int, dtypes: tuple[torch.dtype, ...]) -> None:
    torch.manual_seed(0)
    rows, keys, width = total(pieces), 16, 8
    q, k = (torch.randn(rows, heads, keys).to(dtypes[0]) for _ in range(2))
    v, slopes = torch.randn(rows, heads, width).to(dtypes[0]), torch.rand(heads) ** 4 + 1e-7

    def pool() -> list[Tensor]:
        return [states(heads, keys, width, dtype=dtypes[1])]

    def run(batch: Batch, fields: list[Tensor]) -> Tensor:
        return lightning_attention(*(x[batch.tokens] for x in (q, k, v)), slopes, fields[0], batch, 0.25)

    def naive(batch: Batch, fields: list[Tensor]) -> Tensor:
        wide = (x.double() for x in (q, k, v))
        return naive_lightning_attention(*wide, slopes, fields[0], batch, 0.25, dtype=torch.float64)

    check_cuts(run, pool, pieces)
    check_specification(run, naive, pool, pieces)


@settings(max_examples=40)
@given(
    pieces=batches,
    sizes=st.sampled_from([(4, 16, 64), (4, 16, 8), (20, 8, 16)]),
    reduced=st.booleans(),
    dtype=st.sampled_from([SINGLE, HALF]),
    state_dtype=st.sampled_from([SINGLE, HALF]),
)
def test_lightning(
    pieces: list[Piece], sizes: tuple[int, int, int], reduced: bool, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weights = lightning_weights(*sizes, dtype)
    projected = torch.randn(total(pieces), 4 * sizes[0] * sizes[1]).to(dtype)

    def pool() -> list[Tensor]:
        return [states(sizes[0], sizes[1], sizes[1], dtype=state_dtype)]

    def run(batch: Batch, fields: list[Tensor]) -> Tensor:
        reduce = (lambda sums: sums) if reduced else None
        return lightning(projected[batch.tokens], weights, fields[0], batch, reduce)

    def naive(batch: Batch, fields: list[Tensor]) -> Tensor:
        return naive_lightning(projected.double(), weights, fields[0], batch, dtype=torch.float64)

    check_cuts(run, pool, pieces)
    check_specification(run, naive, pool, pieces)


@settings(max_examples=40)
@given(
    pieces=batches,
    sizes=st.sampled_from([(2, 16, 8, 12), (4, 16, 16, 16), (20, 8, 8, 7)]),
    num_spec=st.sampled_from([0, 2]),
    channel_last=st.booleans(),
    dtype=st.sampled_from([SINGLE, HALF]),
    state_dtype=st.sampled_from([SINGLE, HALF]),
)
def test_kda(
    pieces: list[Piece],
    sizes: tuple[int, int, int, int],
    num_spec: int,
    channel_last: bool,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    weights = kda_weights(*sizes, dtype, 0)
    projected = torch.randn(total(pieces), weights.width).to(dtype)
    channels, columns = weights.conv.shape[0], weights.conv.shape[1] - 1 + num_spec

    def pool() -> list[Tensor]:
        conv = states(channels, columns, dtype=dtype, order=(1, 0) if channel_last else None)
        return [conv, states(sizes[0], sizes[1], sizes[2], dtype=state_dtype)]

    def run(batch: Batch, fields: list[Tensor]) -> Tensor:
        return kda(projected[batch.tokens], weights, fields[0], fields[1], batch)

    def naive(batch: Batch, fields: list[Tensor]) -> Tensor:
        return naive_kda(projected.double(), weights, fields[0], fields[1], batch, dtype=torch.float64)

    check_cuts(run, pool, pieces, dtype)
    if dtype is SINGLE:  # in bfloat16 the composed operators round in between
        check_specification(run, naive, pool, pieces)


@cache
def subject(name: str, dtype: torch.dtype) -> Subject:
    return Subject(PluggableLayer.get(name), dtype)


@settings(max_examples=20)
@given(
    pieces=batches,
    name=st.sampled_from(
        ["kimi_gated_delta_net_attention", "minimax_text_01_attention", "bailing_moe_linear_attention"]
    ),
    num_spec=st.sampled_from([0, 2]),
    channels_last=st.booleans(),
    dtype=st.sampled_from([SINGLE, HALF]),
    record_dtype=st.sampled_from([SINGLE, HALF]),
)
def test_layers(
    pieces: list[Piece], name: str, num_spec: int, channels_last: bool, dtype: torch.dtype, record_dtype: torch.dtype
) -> None:
    layer = subject(name, dtype).layer(num_spec=num_spec, conv_channels_last=channels_last, record_dtype=record_dtype)
    hidden = subject(name, dtype).hidden(total(pieces))

    def pool() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        fields = BlockPool("record", BlockSpec({0: layer.state_spec()}), BLOCKS).state(0).values()
        return [field.copy_(torch.randn(field.shape, generator=generator)) for field in fields]

    def run(batch: Batch, fields: list[Tensor]) -> Tensor:
        with torch.inference_mode():
            output: Tensor = layer(hidden[batch.tokens], batch, dict(zip(layer.state_spec(), fields, strict=True)))
        return output

    check_cuts(run, pool, pieces, dtype)


# The batch


def test_a_batch_lists_freezes_by_chunk() -> None:
    decode, short = Piece([0], 7, 9), Piece(range(66), 30, 8, freezes=[(64, 3)])
    long = Piece(range(260), 64, 7, freezes=[(256, 5), (128, 4)])
    batch = build_batch([decode, short, long], 16)
    freezes, chunks = batch.freezes, batch.chunks
    assert freezes is not None and chunks is not None
    assert freezes.sequences.tolist() == [2, 1, 2]
    assert freezes.records.tolist() == [4, 3, 5]
    assert freezes.ends.tolist() == [1 + 66 + 64, 1 + 34, 1 + 66 + 192]
    for end, chunk in zip(freezes.ends.tolist(), freezes.chunks, strict=True):
        rows = chunks.rows[chunk]
        assert int(rows[rows < batch.num_rows].max()) == end - 1
    assert [freezes.behind(0, 1), freezes.behind(1, 3), freezes.behind(6, 9)] == [slice(0, 1), slice(1, 2), slice(3, 3)]
    assert batch.runs(0) == [(slice(0, 1), 9)]
    assert batch.runs(1) == [(slice(1, 35), 3), (slice(35, 67), 8)]
    assert batch.runs(2) == [(slice(67, 131), 4), (slice(131, 259), 5), (slice(259, 327), 7)]
    inner = batch.prefills.freezes
    assert inner is not None and inner.chunks == freezes.chunks
    assert inner.sequences.tolist() == [1, 0, 1]
    assert inner.ends.tolist() == [end - 1 for end in freezes.ends.tolist()]
    assert batch.prefills.runs(0) == [(slice(0, 34), 3), (slice(34, 66), 8)]


def test_a_batch_without_freezes_has_none() -> None:
    assert build_batch([Piece([0], 7, 1), Piece(range(200), 0, 0)], 16).freezes is None


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece([0], 63, 1, freezes=[(64, 5)]), "piece 0 is a decode row"),
        (Piece(range(200), 0, 1, freezes=[(100, 5)]), "behind 100 tokens, no multiple of 64"),
        (Piece(range(200), 64, 1, freezes=[(64, 5)]), "has the tokens 64 to 264, it cannot freeze the state behind 64"),
        (Piece(range(192), 0, 1, freezes=[(192, 5)]), "has the tokens 0 to 192"),
        (Piece([0], 0, 1, freezes=[(64, 5)]), "has the tokens 0 to 1"),
        (Piece(range(200), 0, 1, freezes=[(64, 1)]), "block 1, which the batch uses already"),
        (Piece(range(200), 0, 1, freezes=[(64, 5), (128, 5)]), "block 5, which the batch uses already"),
    ],
)
def test_a_freeze_that_cannot_be_is_refused(piece: Piece, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_batch([piece], 16)


def test_a_freeze_over_the_record_of_another_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="piece 0 cannot freeze a state to block 2"):
        build_batch([Piece(range(130), 0, 1, freezes=[(128, 2)]), Piece(range(3), 0, 2)], 16)
