"""The norms against plain torch, for both dtypes, any number of rows and slices of wider rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.ops.norm import (
    add_rms_norm,
    gated_rms_norm,
    naive_gated_rms_norm,
    naive_rms_norm,
    rms_norm,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # bfloat16: a rounding may fall on the other neighbour


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype is wanted.dtype and got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype] * 1e-2)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([1, 2, 7, 64, 300]),
    heads=st.sampled_from([None, 1, 3]),
    width=st.sampled_from([1, 5, 16, 128]),
    sliced=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_equals_plain_torch(
    rows: int, heads: int | None, width: int, sliced: bool, dtype: torch.dtype, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def tensor() -> torch.Tensor:
        inner = (heads or 1) * width
        wide = torch.randn(rows, inner + 8, generator=generator).mul_(scale).to(dtype)
        x = wide[:, 3 : 3 + inner] if sliced else wide[:, :inner].contiguous()
        return x.unflatten(1, (heads, width)) if heads else x

    x, other, weight = tensor(), tensor(), torch.randn(width, generator=generator)
    check(rms_norm(x, weight, 1e-5), naive_rms_norm(x, weight, 1e-5))
    for activation in ("sigmoid", "silu"):
        check(
            gated_rms_norm(x, weight, other, 1e-5, activation),
            naive_gated_rms_norm(x, weight, other, 1e-5, activation),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    x, gate, weight = torch.randn(513, 3, 128).to(dtype), torch.randn(513, 3, 128).to(dtype), torch.randn(128)
    together = gated_rms_norm(x, weight, gate, 1e-5)
    for row in (0, 255, 512):
        assert torch.equal(together[row : row + 1], gated_rms_norm(x[row : row + 1], weight, gate[row : row + 1], 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6, 400])
def test_the_norm_of_a_sum_is_that_of_two_operators(dtype: torch.dtype, rows: int) -> None:
    x, delta, weight = torch.randn(rows, 96).to(dtype), torch.randn(rows, 96).to(dtype), torch.randn(96).to(dtype)
    total = x + delta
    normed = add_rms_norm(x, delta, weight, 1e-5)
    assert normed is delta
    assert torch.equal(x, total)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_may_be_weighted(dtype: torch.dtype) -> None:
    x, delta, weight = torch.randn(6, 96).to(dtype), torch.randn(6, 96).to(dtype), torch.randn(96).to(dtype)
    total = (3.5 * x.float() - 0.8 * delta.float()).to(dtype)
    normed = add_rms_norm(x, delta, weight, 1e-5, 3.5, -0.8)
    tolerance = 1e-6 if dtype is torch.float32 else 2**-7  # the two products are rounded once or twice
    torch.testing.assert_close(x, total, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(normed, rms_norm(x, weight, 1e-5), rtol=0, atol=0)


def test_zeros_extremes_and_no_rows() -> None:
    weight = torch.ones(4)
    assert torch.equal(rms_norm(torch.zeros(1, 4), weight, 1e-6), torch.zeros(1, 4))
    x, gate = torch.ones(1, 4), torch.tensor([[-1e30, -100.0, 100.0, 1e30]])
    torch.testing.assert_close(gated_rms_norm(x, weight, gate, 0.0), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert gated_rms_norm(x, weight, torch.full((1, 4), torch.nan), 0.0).isnan().all()
    assert rms_norm(torch.zeros(0, 4), weight, 1e-6).shape == (0, 4)


def test_bad_arguments_are_named() -> None:
    x, weight = torch.randn(2, 4), torch.ones(4)
    for message, call in {
        "x must be": lambda: rms_norm(x.double(), weight, 1e-6),
        "weight must be": lambda: rms_norm(x, weight[:3], 1e-6),
        "weight must be contiguous": lambda: rms_norm(x, torch.ones(8)[::2], 1e-6),
        "delta must be": lambda: add_rms_norm(x, x[:1], weight, 1e-6),
        "must be contiguous": lambda: add_rms_norm(x, torch.randn(4, 2).t(), weight, 1e-6),
        "gate must be": lambda: gated_rms_norm(x, weight, x.bfloat16(), 1e-6),
        "activation must be": lambda: gated_rms_norm(x, weight, x, 1e-6, "relu"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotImplementedError, match="meta"):
        rms_norm(x.to("meta"), weight, 1e-6)
