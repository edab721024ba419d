"""The gated delta rule against its recurrence in float64, over mixed batches, cuts, head ratios, gates and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.delta_rule import gated_delta_rule, log_decay, naive_gated_delta_rule

LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 130]
STARTS = [0, 0, 1, 15, 63, 64, 70]
FLOAT32 = 2e-6  # relative to the largest value; float32 rounds at 6e-8, and sums run over at most 64 terms
BFLOAT16 = 2**-8  # outputs are rounded to bfloat16 once


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def rows(self, start: int, end: int) -> Inputs:
        return Inputs(*(x[start:end] for x in vars(self).values()))


def draw(rows: int, key_heads: int, heads: int, keys: int, width: int, per_channel: bool, dtype: torch.dtype) -> Inputs:
    """q, k, v as slices of one wide projection; decays from none to strong."""
    sizes = [key_heads * keys, key_heads * keys, heads * width]
    q, k, v = torch.randn(rows, sum(sizes) + 3).to(dtype)[:, 3:].split(sizes, dim=1)
    return Inputs(
        q.unflatten(1, (key_heads, keys)),
        k.unflatten(1, (key_heads, keys)),
        v.unflatten(1, (heads, width)),
        -3.0 * torch.rand(rows, heads, *([keys] if per_channel else [])) ** 4,
        torch.rand(rows, heads),
    )


def batch_of(lengths: list[int], starts: list[int], blocks: list[int]) -> Batch:
    return build_batch([Piece(range(n), s, b) for n, s, b in zip(lengths, starts, blocks, strict=True)], 16)


def pool(blocks: int, heads: int, keys: int, width: int) -> Tensor:
    """States full of another sequence's values, as fields of larger blocks."""
    size = heads * keys * width
    return torch.randn(blocks, size + 7)[:, 3 : 3 + size].unflatten(1, (heads, keys, width))


def distance(got: Tensor, wanted: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))


def check(inputs: Inputs, state: Tensor, batch: Batch, normalize: bool = True, tolerance: float = FLOAT32) -> Tensor:
    """Run the operator and compare outputs and states with the recurrence in float64."""
    wanted_state = state.double()
    double = Inputs(*(x.double() for x in vars(inputs).values()))
    wanted = naive_gated_delta_rule(
        **vars(double), state=wanted_state, batch=batch, scale=0.25, normalize=normalize, dtype=torch.float64
    )
    untouched = [b for b in range(state.shape[0]) if b not in batch.records.tolist()]
    before = state[untouched].clone()
    got = gated_delta_rule(**vars(inputs), state=state, batch=batch, scale=0.25, normalize=normalize)
    assert got.dtype is inputs.v.dtype and got.is_contiguous()
    assert distance(got, wanted) < (BFLOAT16 if got.dtype is torch.bfloat16 else tolerance)
    assert distance(state, wanted_state) < (BFLOAT16 if state.dtype is torch.bfloat16 else tolerance)
    assert torch.equal(state[untouched], before)
    return got


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    decodes=st.integers(0, 3),
    prefills=st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(STARTS)), max_size=4),
    heads=st.sampled_from([(1, 1), (3, 3), (1, 4), (2, 6)]),
    sizes=st.sampled_from([(4, 8), (8, 4), (16, 16), (7, 5)]),
    per_channel=st.booleans(),
    normalize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_equals_the_recurrence(
    decodes: int,
    prefills: list[tuple[int, int]],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    per_channel: bool,
    normalize: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    prefills = [(n, s if n > 1 else 0) for n, s in prefills] or [(3, 0)]
    lengths, starts = [1] * decodes + [n for n, _ in prefills], [9] * decodes + [s for _, s in prefills]
    blocks = torch.randperm(len(lengths) + 2)[: len(lengths)].tolist()
    batch = batch_of(lengths, starts, blocks)
    inputs = draw(batch.num_rows, *heads, *sizes, per_channel, dtype)
    if not normalize:
        inputs.k = torch.nn.functional.normalize(inputs.k.float(), dim=-1).to(dtype)
    check(inputs, pool(len(lengths) + 2, heads[1], *sizes), batch, normalize)


@pytest.mark.parametrize("per_channel", [True, False])
def test_full_size_heads(per_channel: bool) -> None:
    torch.manual_seed(1)
    batch = batch_of([1, 1, 200, 1, 64], [5, 300, 0, 0, 64], [4, 1, 0, 2, 3])
    check(draw(batch.num_rows, 2, 4, 128, 128, per_channel, torch.float32), pool(5, 4, 128, 128), batch)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", ["drop", "zero", "minus zero", "random", "alternating", "mixed channels"])
def test_extreme_decays(kind: str, per_channel: bool) -> None:
    torch.manual_seed(2)
    batch = batch_of([1, 150, 40], [5, 0, 7], [2, 1, 0])
    inputs = draw(batch.num_rows, 2, 2, 16, 16, per_channel, torch.float32)
    g = inputs.g
    if kind == "drop":
        g.fill_(-1e4)
    elif kind == "zero":
        g.zero_()
    elif kind == "minus zero":
        g.fill_(-0.0)
    elif kind == "random":
        g.uniform_(-200, 0)
    elif kind == "alternating":  # a drop, then slow decays: a difference of running sums would lose the latter
        g.mul_(0.01)[::5] = -1e4
    else:
        g.mul_(torch.tensor([1e-3, 1e4]).repeat(g.shape[-1] // 2))
    check(inputs, pool(3, 2, 16, 16), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_on_the_grid_give_bitwise_what_one_pass_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    inputs = draw(300, 4, 8, 32, 32, True, dtype)
    whole, parts = pool(1, 8, 32, 32), pool(1, 8, 32, 32)
    wanted = gated_delta_rule(**vars(inputs), state=whole, batch=batch_of([300], [0], [0]), scale=0.25)
    got = []
    for start, end in [(0, 64), (64, 192), (192, 300)]:
        batch = batch_of([end - start], [start], [0])
        got.append(gated_delta_rule(**vars(inputs.rows(start, end)), state=parts, batch=batch, scale=0.25))
    assert torch.equal(torch.cat(got), wanted) and torch.equal(parts, whole)


@pytest.mark.parametrize("cuts", [[1] * 70, [1, 2, 3, 61, 3], [17, 53], [69, 1]])
def test_any_cut_gives_what_one_pass_gives(cuts: list[int]) -> None:
    torch.manual_seed(4)
    inputs, state = draw(70, 1, 2, 16, 8, True, torch.float32), pool(1, 2, 16, 8)
    wanted_state = state.double()
    double = Inputs(*(x.double() for x in vars(inputs).values()))
    batch = batch_of([70], [0], [0])
    wanted = naive_gated_delta_rule(**vars(double), state=wanted_state, batch=batch, scale=1.0, dtype=torch.float64)
    start, got = 0, []
    for size in cuts:
        batch = batch_of([size], [start], [0])
        got.append(gated_delta_rule(**vars(inputs.rows(start, start + size)), state=state, batch=batch, scale=1.0))
        start += size
    assert distance(torch.cat(got), wanted) < FLOAT32 and distance(state, wanted_state) < FLOAT32


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    neighbours=st.lists(st.sampled_from(LENGTHS), max_size=12),
    place=st.integers(0, 12),
    heads=st.sampled_from([(2, 2), (8, 8), (2, 6)]),
    keys=st.sampled_from([16, 128]),
)
def test_neighbours_change_no_bit(neighbours: list[int], place: int, heads: tuple[int, int], keys: int) -> None:
    torch.manual_seed(5)
    place = min(place, len(neighbours))
    lengths = [*neighbours[:place], 130, *neighbours[place:]]
    batch = batch_of(lengths, [0] * len(lengths), list(range(len(lengths))))
    inputs, state = draw(batch.num_rows, *heads, keys, 16, True, torch.float32), pool(len(lengths), heads[1], keys, 16)
    start, alone = sum(neighbours[:place]), pool(1, heads[1], keys, 16)
    together = gated_delta_rule(**vars(inputs), state=state, batch=batch, scale=0.25)[start : start + 130]
    single = batch_of([130], [0], [0])
    wanted = gated_delta_rule(**vars(inputs.rows(start, start + 130)), state=alone, batch=single, scale=0.25)
    assert torch.equal(together, wanted) and torch.equal(state[place], alone[0])


def test_states_may_be_stored_in_bfloat16() -> None:
    torch.manual_seed(6)
    batch = batch_of([1, 1, 33], [4, 70, 3], [0, 1, 2])
    check(draw(batch.num_rows, 2, 2, 8, 8, True, torch.bfloat16), pool(3, 2, 8, 8).bfloat16(), batch)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4)])
def test_log_decay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(7)
    f, a_log, bias = torch.randn(shape).bfloat16() * 30, torch.randn(3), torch.randn(shape[1:]).flatten()
    wide, rate = f.double() + bias.double().view(shape[1:]), a_log.double().exp().view(-1, *[1] * (len(shape) - 2))
    plain, safe = log_decay(f, a_log, bias), log_decay(f, a_log, bias, lower_bound=-5.0)
    assert plain.dtype is safe.dtype is torch.float32
    torch.testing.assert_close(plain.double(), -rate * torch.logaddexp(wide, wide.new_zeros(())), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(safe.double(), -5.0 * torch.sigmoid(rate * wide), rtol=1e-5, atol=1e-6)
    assert (plain <= 0).all() and (safe >= -5).all()
    with pytest.raises(ValueError, match="lower_bound"):
        log_decay(f, a_log, bias, lower_bound=1.0)
    with pytest.raises(ValueError, match="a_log"):
        log_decay(f, a_log[:2], bias)
    with pytest.raises(ValueError, match="dt_bias"):
        log_decay(f, a_log, bias[:2])


def test_bad_arguments_are_named() -> None:
    batch, x = batch_of([3], [0], [0]), draw(3, 2, 4, 8, 8, True, torch.float32)
    state = torch.zeros(1, 4, 8, 8)
    for message, change in {
        "q and k must be": {"k": x.k[:2]},
        "v must be": {"v": x.v[:, :3]},
        "all be float32 or": {"q": x.q.bfloat16()},
        "g must be": {"g": x.g[:, :, :2]},
        "beta must be": {"beta": x.beta.double()},
        "state must be .blocks": {"state": state[:, :2]},
        "contiguous within": {"state": state.transpose(2, 3)},
    }.items():
        with pytest.raises(ValueError, match=message):
            gated_delta_rule(**{**vars(x), "state": state, **change}, batch=batch, scale=1.0)
