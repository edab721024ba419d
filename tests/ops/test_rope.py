"""Rotary embedding against the specification in float64, and the one property it exists for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.rope import inverse_frequencies, naive_rotary, rotary, rotary_tables

# float32: a few roundings of numbers of size one to ten. bfloat16: one rounding, to 2 ** -9 of a number.
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (2**-8, 1e-6)}  # (relative, absolute)


def check(got: Tensor, wanted: Tensor) -> None:
    """`wanted` in float64."""
    relative, absolute = TOLERANCE[got.dtype]
    assert got.shape == wanted.shape and got.is_contiguous()
    torch.testing.assert_close(got.double(), wanted, rtol=relative, atol=absolute)


def at(*positions: int) -> Batch:
    """One decode row at each position."""
    return build_batch([Piece([0], position, 0) for position in positions], 64)


@settings(max_examples=60)
@given(
    rows=st.sampled_from([1, 2, 7, 130]),
    heads=st.sampled_from([None, 1, 3, 16]),
    sizes=st.sampled_from([(2, 2), (8, 4), (24, 24), (64, 16), (128, 64), (12, 10), (5, 4), (16, 0)]),  # D, R
    start=st.sampled_from([0, 1, 63, 5000]),
    interleaved=st.booleans(),
    weighted=st.booleans(),
    layout=st.sampled_from(["contiguous", "slice of a row", "gap behind each head", "heads first"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_equals_the_specification(rows, heads, sizes, start, interleaved, weighted, layout, dtype, seed) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    width, turned = sizes
    wide = torch.randn(rows, heads or 1, width + 6, generator=generator).to(dtype)
    if layout == "contiguous":
        x = wide[..., :width].contiguous()
    elif layout == "slice of a row":
        x = wide.flatten(1)[:, 3 : 3 + (heads or 1) * width].unflatten(1, (heads or 1, width))
    elif layout == "gap behind each head":
        x = wide[..., 4 : 4 + width]
    else:
        x = wide[..., :width].transpose(0, 1).contiguous().transpose(0, 1)
    x = x if heads else x[:, 0]
    weight = torch.randn(width, generator=generator).to(dtype) if weighted else None
    frequencies = inverse_frequencies(turned, 10_000.0) if turned else None
    batch = build_batch([Piece(range(rows), start, 0)], 64)
    before = x.clone()
    got = rotary(x, frequencies, batch, interleaved=interleaved, weight=weight, eps=1e-5)
    wanted = naive_rotary(x.double(), frequencies, batch.positions, interleaved=interleaved, weight=weight, eps=1e-5)
    assert got.dtype is dtype and got.data_ptr() != x.data_ptr()
    check(got, wanted)
    assert torch.equal(x, before)
    plain = naive_rotary(x, frequencies, batch.positions, interleaved=interleaved, weight=weight, eps=1e-5)
    check(plain.contiguous(), wanted)
    if not weighted:
        assert torch.equal(got[..., turned:], x[..., turned:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_dot_product_depends_on_the_distance_alone(interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(64, generator=generator), torch.randn(64, generator=generator)
    frequencies = inverse_frequencies(64, 10_000.0)
    for distance in (0, 1, 7, 100):
        products = []
        for start in (1, 2, 50, 3000):
            pair = rotary(torch.stack((q, k)), frequencies, at(start + distance, start), interleaved=interleaved)
            products.append(pair[0].double() @ pair[1].double())
        spread = max(products) - min(products)
        assert spread < 2e-3  # an angle of 3,000 is known to 1e-4 in float32


def test_the_two_pairings_are_one_rotation_of_permuted_dims() -> None:
    x, frequencies, batch = torch.randn(3, 16), inverse_frequencies(16, 100.0), at(5, 6, 700)
    order = torch.arange(16).view(8, 2).t().flatten()  # even dims, then odd ones
    half = rotary(x[:, order].contiguous(), frequencies, batch)
    assert torch.equal(rotary(x, frequencies, batch, interleaved=True)[:, order], half)


def test_large_positions() -> None:
    batch, frequencies = at(1, 4095, 131_071, 1_000_000), inverse_frequencies(64, 5e6)
    cos, sin = rotary_tables(frequencies, batch)
    angles = (batch.positions.float()[:, None] * frequencies).double()
    for got, wanted in ((cos, angles.cos()), (sin, angles.sin())):
        assert got.dtype is torch.float32 and got.is_contiguous()
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-7)
    x = torch.randn(4, 2, 64)
    check(rotary(x, frequencies, batch), naive_rotary(x.double(), frequencies, batch.positions))


@pytest.mark.parametrize(("dim", "theta"), [(2, 10_000.0), (64, 10_000.0), (64, 1e7), (32, 600_000.0), (128, 5e6)])
def test_frequencies(dim: int, theta: float) -> None:
    got = inverse_frequencies(dim, theta)
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    assert torch.equal(got, (theta**-exponents).float())
    assert got[0] == 1
    in_float32 = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)  # how the published models calculate it
    torch.testing.assert_close(got, in_float32, rtol=1e-6, atol=0)


def test_tables_are_calculated_once_per_batch_and_frequencies() -> None:
    batch = build_batch([Piece([0], 3, 0), Piece(range(4), 0, 0)], 64)
    first, other = inverse_frequencies(8, 100.0), inverse_frequencies(8, 200.0)
    tables = rotary_tables(first, batch)
    assert all(a is b for a, b in zip(rotary_tables(first, batch), tables, strict=True))
    assert not torch.equal(rotary_tables(other, batch)[0], tables[0])
    assert rotary_tables(first[:2], batch)[0].shape == (5, 2)
    for theta in range(300, 400):  # tables that are gone do not hand their entry to what comes to lie in their place
        fresh = inverse_frequencies(8, float(theta)).clone()
        assert torch.equal(rotary_tables(fresh, batch)[1], (batch.positions.float()[:, None] * fresh).sin())
    assert torch.equal(rotary_tables(first, batch.prefills)[0], tables[0][1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    x, weight, frequencies = torch.randn(400, 3, 128).to(dtype), torch.randn(128), inverse_frequencies(64, 1e4)
    together = rotary(x, frequencies, build_batch([Piece(range(400), 9, 0)], 64), weight=weight, eps=1e-6)
    for row in (0, 199, 200, 399):
        assert torch.equal(rotary(x[row, None], frequencies, at(row + 9), weight=weight, eps=1e-6)[0], together[row])


def test_a_bad_value_stays_in_its_head() -> None:
    x = torch.randn(2, 3, 8)
    x[1, 1, 2] = torch.nan
    result = rotary(x, inverse_frequencies(8, 100.0), at(4, 5), weight=torch.ones(8), eps=1e-6)
    assert result[1, 1].isnan().all() and result.isnan().sum() == 8


def test_bad_arguments_are_named() -> None:
    x, f, batch = torch.randn(2, 3, 8), inverse_frequencies(8, 100.0), at(4, 5)
    for message, call in {
        "x must be \\[T": lambda: rotary(x.double(), f, batch),
        "x must have the 2 rows": lambda: rotary(x[:1], f, batch),
        "x must be contiguous": lambda: rotary(torch.randn(2, 8, 3).transpose(1, 2), f, batch),
        "weight must be": lambda: rotary(x, f, batch, weight=torch.ones(4)),
        "weight must be contiguous": lambda: rotary(x, f, batch, weight=torch.ones(16)[::2]),
        "frequencies must be at most 4": lambda: rotary(x, inverse_frequencies(10, 100.0), batch),
        "frequencies must be contiguous": lambda: rotary(x, f[::2], batch),
        "float32, got": lambda: rotary(x, f.double(), batch),
        "rotary_dim": lambda: inverse_frequencies(7, 100.0),
        "theta": lambda: inverse_frequencies(8, 0.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotImplementedError, match="meta"):
        rotary(x.to("meta"), f, batch)
