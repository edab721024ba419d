"""KDA between its projections: the fused decode launch and the composed prefill against the fp64 specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops.batch import Piece, build_batch
from statewise.ops.kda import KdaWeights, kda, naive_kda


def weights_of(heads: int, keys: int, values: int, rank: int, dtype: torch.dtype, seed: int) -> KdaWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    return KdaWeights(
        conv=normal(heads * (2 * keys + values), 4, scale=0.5),
        decay_up=normal(heads * keys, rank, scale=0.4).to(dtype),
        a_log=torch.rand(heads, generator=generator) * 2.5,
        dt_bias=normal(heads * keys) - 2,
        gate_up=normal(heads * values, rank, scale=0.4).to(dtype),
        norm=(1 + normal(values, scale=0.2)).to(dtype),
        eps=1e-5,
        scale=keys**-0.5,
    )


def states_of(weights: KdaWeights, blocks: int, columns: int, last: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Dirty states: a fresh sequence must not see them."""
    heads, keys, values, _ = weights.sizes
    generator = torch.Generator().manual_seed(9)
    channels = weights.conv.shape[0]
    conv = torch.randn(blocks, columns, channels, generator=generator).to(dtype).mT
    conv = conv if last else conv.contiguous()
    return conv, torch.randn(blocks, heads, keys, values, generator=generator) * 0.3


@settings(max_examples=40)
@given(
    pieces=st.lists(
        st.tuples(st.sampled_from([1, 1, 1, 2, 5, 70]), st.sampled_from([0, 1, 30])), min_size=1, max_size=6
    ),
    sizes=st.sampled_from([(1, 16, 16, 16), (2, 16, 8, 12), (4, 16, 32, 16), (3, 8, 8, 7)]),
    channel_last=st.booleans(),
    num_spec=st.sampled_from([0, 2]),
    seed=st.integers(0, 5),
)
def test_any_batch_equals_the_specification(
    pieces: list[tuple[int, int]], sizes: tuple[int, int, int, int], channel_last: bool, num_spec: int, seed: int
) -> None:
    weights = weights_of(*sizes, torch.float32, seed)
    pieces.sort(key=lambda piece: not (piece[0] == 1 and piece[1] > 0))
    batch = build_batch([Piece(range(n), start, 2 * i + 1) for i, (n, start) in enumerate(pieces)], 16)
    projected = torch.randn(batch.num_rows, weights.width, generator=torch.Generator().manual_seed(seed))
    conv, recurrent = states_of(weights, 13, 3 + num_spec, channel_last, torch.float32)
    exact_conv, exact_recurrent = conv.double(), recurrent.double()
    expected = naive_kda(projected.double(), weights, exact_conv, exact_recurrent, batch, dtype=torch.float64)
    output = kda(projected, weights, conv, recurrent, batch)
    assert (output - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
    assert torch.equal(conv, exact_conv.float())
    assert (recurrent - exact_recurrent).abs().max() < 2e-5 * max(1.0, float(exact_recurrent.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    weights = weights_of(4, 16, 16, 16, dtype, 0)
    projected = torch.randn(9, weights.width, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = []
    for rows in ([4], list(range(9)), [8, 4, 0]):
        conv, recurrent = states_of(weights, 9, 3, True, dtype)
        batch = build_batch([Piece([0], 5, row) for row in rows], 16)
        outputs.append(kda(projected[rows].contiguous(), weights, conv, recurrent, batch)[rows.index(4)])
        outputs.append(recurrent[4].flatten())
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[0], outputs[4])
    assert torch.equal(outputs[1], outputs[3])
    assert torch.equal(outputs[1], outputs[5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_row_does_not_depend_on_a_prefill_beside_it(dtype: torch.dtype) -> None:
    weights = weights_of(4, 16, 16, 16, dtype, 0)
    projected = torch.randn(72, weights.width, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for pieces in ([Piece([0], 5, 3), Piece([0], 9, 1)], [Piece([0], 5, 3), Piece([0], 9, 1), Piece(range(70), 0, 2)]):
        conv, recurrent = states_of(weights, 4, 3, True, dtype)
        batch = build_batch(pieces, 16)
        output = kda(projected[: batch.num_rows].contiguous(), weights, conv, recurrent, batch)
        results.append((output[:2], recurrent[[1, 3]], conv[[1, 3]]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_bfloat16_rows_are_rounded_once() -> None:
    weights = weights_of(2, 16, 16, 16, torch.bfloat16, 3)
    projected = torch.randn(5, weights.width, generator=torch.Generator().manual_seed(2)).bfloat16()
    batch = build_batch([Piece([0], 5, row) for row in range(5)], 16)
    conv, recurrent = states_of(weights, 5, 3, True, torch.bfloat16)
    exact = naive_kda(projected.double(), weights, conv.double(), recurrent.double(), batch, dtype=torch.float64)
    output = kda(projected, weights, conv, recurrent, batch).double()
    assert ((output - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("f", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_extreme_gates_stay_finite(f: float) -> None:
    weights = weights_of(2, 16, 16, 16, torch.float32, 3)
    projected = torch.randn(70, weights.width, generator=torch.Generator().manual_seed(2))
    projected[:, weights.widths[0] : weights.widths[0] + 16] = f
    for pieces in ([Piece(range(70), 5, 0)], [Piece([0], 5, row) for row in range(70)]):
        batch = build_batch(pieces, 16)
        conv, recurrent = states_of(weights, 70, 3, True, torch.float32)
        exact_conv, exact_recurrent = conv.double(), recurrent.double()
        expected = naive_kda(projected.double(), weights, exact_conv, exact_recurrent, batch, dtype=torch.float64)
        assert torch.isfinite(expected).all()
        assert (kda(projected, weights, conv, recurrent, batch) - expected).abs().max() < 1e-4


def test_wrong_shapes_are_refused() -> None:
    weights = weights_of(2, 16, 16, 16, torch.float32, 3)
    batch = build_batch([Piece([0], 5, 0)], 16)
    conv, recurrent = states_of(weights, 2, 3, True, torch.float32)
    rows = torch.zeros(1, weights.width)
    with pytest.raises(ValueError, match="projected must be contiguous"):
        kda(rows[:, 1:], weights, conv, recurrent, batch)
    with pytest.raises(ValueError, match="recurrent must be"):
        kda(rows, weights, conv, recurrent.mT, batch)
    with pytest.raises(ValueError, match="conv must be"):
        kda(rows, weights, conv[:, :, 1:], recurrent, batch)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        kda(rows.half(), weights, conv, recurrent, batch)
