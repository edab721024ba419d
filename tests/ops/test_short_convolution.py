"""The short convolution against its specification over mixed batches, window widths, layouts and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.short_convolution import naive_short_convolution, shift_window, short_convolution

LENGTHS = [1, 2, 3, 4, 5, 15, 16, 17, 65]


def window(blocks: int, channels: int, columns: int, dtype: torch.dtype, channel_last: bool) -> torch.Tensor:
    """Windows full of another sequence's values, as fields of larger blocks."""
    arena = torch.randn(blocks, channels * columns + 11).to(dtype)[:, 5 : 5 + channels * columns]
    if channel_last:
        return arena.unflatten(1, (columns, channels)).transpose(1, 2)
    return arena.unflatten(1, (channels, columns))


def batch_of(lengths: list[int], starts: list[int], blocks: list[int]) -> Batch:
    return build_batch([Piece(range(n), s, b) for n, s, b in zip(lengths, starts, blocks, strict=True)], 16)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    decodes=st.integers(0, 3),
    prefills=st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from([0, 0, 2, 70])), max_size=4),
    channels=st.sampled_from([1, 7, 40, 600]),
    taps=st.sampled_from([1, 2, 4, 5]),
    spare=st.integers(0, 3),
    channel_last=st.booleans(),
    dtypes=st.sampled_from(
        [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    ),
    seed=st.integers(0, 1000),
)
def test_equals_the_specification(
    decodes: int,
    prefills: list[tuple[int, int]],
    channels: int,
    taps: int,
    spare: int,
    channel_last: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    prefills = [(n, s if n > 1 else 0) for n, s in prefills] or [(3, 0)]
    lengths, starts = [1] * decodes + [n for n, _ in prefills], [9] * decodes + [s for _, s in prefills]
    blocks = torch.randperm(len(lengths) + 2)[: len(lengths)].tolist()
    batch = batch_of(lengths, starts, blocks)
    x = torch.randn(batch.num_rows, channels + 6).to(dtypes[0])[:, 2 : 2 + channels]
    weight = torch.randn(channels, taps)
    state = window(len(lengths) + 2, channels, taps - 1 + spare, dtypes[1], channel_last)
    wanted_state = state.clone()
    wanted = naive_short_convolution(x, weight, wanted_state, batch)
    got = short_convolution(x, weight, state, batch)
    assert got.dtype is x.dtype and got.is_contiguous()
    # Sums of a few products in another order; bfloat16 may round to the other neighbour.
    tolerance = 2e-6 if x.dtype is torch.float32 else 2**-7
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=2e-6)
    assert torch.equal(state, wanted_state)  # raw inputs, and blocks of others untouched


@pytest.mark.parametrize("cuts", [[1] * 20, [1, 2, 3, 14], [7, 13], [19, 1]])
def test_pieces_give_what_one_pass_gives(cuts: list[int]) -> None:
    x, weight = torch.randn(20, 33), torch.randn(33, 4)
    whole, parts = window(1, 33, 3, torch.float32, False), window(1, 33, 3, torch.float32, True)
    wanted = short_convolution(x, weight, whole, batch_of([20], [0], [0]))
    start, got = 0, []
    for size in cuts:
        got.append(short_convolution(x[start : start + size], weight, parts, batch_of([size], [start], [0])))
        start += size
    assert torch.equal(torch.cat(got), wanted) and torch.equal(parts, whole)


def test_many_rows_use_both_cores_and_agree_with_few() -> None:
    x, weight = torch.randn(300, 1200), torch.randn(1200, 4)
    state = torch.zeros(3, 1200, 3)
    together = short_convolution(x, weight, state, batch_of([100] * 3, [0] * 3, [2, 0, 1]))
    torch.testing.assert_close(
        together, naive_short_convolution(x, weight, state.clone(), batch_of([100] * 3, [0] * 3, [2, 0, 1]))
    )
    alone = short_convolution(x[100:200], weight, torch.zeros(1, 1200, 3), batch_of([100], [0], [0]))
    assert torch.equal(together[100:200], alone)


def test_taking_tokens_back_restores_the_window() -> None:
    x, weight = torch.randn(12, 5), torch.randn(5, 4)
    state = torch.randn(3, 5, 3 + 2)
    short_convolution(x[:10], weight, state, batch_of([10], [0], [1]))
    before = state.clone()
    short_convolution(x[10:], weight, state, batch_of([2], [10], [1]))
    shift_window(state, torch.tensor([1, 0]), torch.tensor([2, 0]))
    assert torch.equal(state[1, :, 2:], before[1, :, 2:]) and not state[1, :, :2].any()
    assert torch.equal(state[[0, 2]], before[[0, 2]])


def test_bad_arguments_are_named() -> None:
    batch = batch_of([3], [0], [0])
    x, weight, state = torch.randn(3, 4), torch.randn(4, 4), torch.zeros(1, 4, 3)
    for message, arguments in {
        "x must be": (x[:2], weight, state),
        "weight must be": (x, weight[:3], state),
        "state must be .* or more": (x, weight, state[:, :, :2]),
        "state must be torch.float32": (x, weight, state.bfloat16()),
    }.items():
        with pytest.raises(ValueError, match=message):
            short_convolution(*arguments, batch)
    with pytest.raises(NotImplementedError, match="meta"):
        short_convolution(x.to("meta"), weight, state, batch)
    with pytest.raises(ValueError, match="records and back"):
        shift_window(state, torch.tensor([0]), torch.tensor([0, 1]))
