"""Mixture of experts: routing and both forms of the expert MLP against the specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops.moe import cpu, expert_mlp, naive, route

# float32: reordered sums of at most 100 products. bfloat16: inputs and weights are the same rounded numbers on both
# sides; the result is rounded once (2 ** -9 relative), and with many rows so are the values between the products.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative to the largest element, or to 1
EITHER_FORM = pytest.mark.parametrize("few", [0, 10**9], ids=["many rows", "few rows"])
EITHER_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


def experts(count: int, hidden: int, inner: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(count, 2 * inner, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(count, hidden, inner, generator=generator) * inner**-0.5
    return gate_up.to(dtype), down.to(dtype)


def assert_equals_naive(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    expected = naive.expert_mlp(x.double(), ids, weights.double(), gate_up.double(), down.double())
    result = expert_mlp(x, ids, weights, gate_up, down)
    assert result.dtype == x.dtype
    error = (result.double() - expected).abs().max()
    assert error <= TOLERANCE[x.dtype] * max(1.0, float(expected.abs().max()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 12),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 9),
    data=st.data(),
    scoring=st.sampled_from(["sigmoid", "softmax"]),
    renormalize=st.booleans(),
    biased=st.booleans(),
    levels=st.sampled_from([2, 1000]),  # 2: nearly every score is tied with another
)
def test_route_equals_the_specification(  # type: ignore[no-untyped-def]
    rows, groups, group_size, data, scoring, renormalize, biased, levels
) -> None:
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * group_size))
    generator = torch.Generator().manual_seed(rows * 100 + groups)
    size = groups * group_size
    logits = torch.randint(0, levels, (rows, size), generator=generator) * (4 / levels) - 2
    bias = torch.randint(0, 2, (size,), generator=generator) - 1.25 if biased else None  # negative scores occur
    options = {"scoring": scoring, "renormalize": renormalize, "scale": 2.5}
    options |= {"num_groups": groups, "top_groups": top_groups}
    ids, weights = route(logits, bias, top_k, **options)
    expected_ids, expected_weights = naive.route(logits, bias, top_k, **options)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7)


def test_route_takes_the_first_of_equals_and_weighs_without_bias() -> None:
    ids, weights = route(torch.zeros(1, 8), None, 3)
    assert ids.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))
    ids, weights = route(torch.zeros(2, 4), torch.tensor([0.0, 9.0, 0.0, 5.0]), 2, renormalize=False)
    assert ids.tolist() == [[1, 3], [1, 3]]
    torch.testing.assert_close(weights, torch.full((2, 2), 0.5))


def test_route_survives_extreme_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, 200.0, -200.0], [float("nan")] * 4, [float("-inf")] * 4])
    ids, weights = route(logits, None, 2)
    assert ids.tolist()[0] == [0, 2]
    assert weights[0].tolist() == [0.5, 0.5]
    assert all(0 <= first < 4 and 0 <= second < 4 and first != second for first, second in ids.tolist())
    assert weights[1].isnan().all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 5, 17, 70]),
    count=st.sampled_from([1, 2, 5, 16]),
    widths=st.sampled_from([(8, 4), (33, 7), (64, 32)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_experts_equal_the_specification(rows, count, widths, dtype, data) -> None:  # type: ignore[no-untyped-def]
    top_k = data.draw(st.integers(1, min(count, 4)))
    gate_up, down = experts(count, *widths, dtype)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, widths[0], generator=generator).to(dtype)
    ids, weights = route(torch.randn(rows, count, generator=generator), None, top_k)
    assert_equals_naive(x, ids, weights, gate_up, down)


@EITHER_FORM
@EITHER_DTYPE
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_uneven_loads(monkeypatch: pytest.MonkeyPatch, few: int, dtype: torch.dtype, rows: int) -> None:
    """Every row to the same two of nine experts, and one row elsewhere: seven or six experts get nothing."""
    monkeypatch.setattr(cpu, "FEW", few)
    gate_up, down = experts(9, 24, 10, dtype)
    ids = torch.tensor([[7, 2]]).repeat(rows, 1)
    ids[-1] = torch.tensor([0, 7])
    for unused in (1, 3, 4, 5, 6, 8):
        gate_up[unused] = float("nan")
        down[unused] = float("nan")
    assert_equals_naive(torch.randn(rows, 24).to(dtype), ids, torch.rand(rows, 2), gate_up, down)


@EITHER_FORM
@EITHER_DTYPE
def test_an_expert_named_twice_counts_twice(monkeypatch: pytest.MonkeyPatch, few: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cpu, "FEW", few)
    gate_up, down = experts(3, 12, 6, dtype)
    ids = torch.tensor([[1, 1, 0], [2, 2, 2]])
    assert_equals_naive(torch.randn(2, 12).to(dtype), ids, torch.rand(2, 3), gate_up, down)


@EITHER_DTYPE
def test_rows_of_a_decode_step_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Alone or in any company: the same bits."""
    monkeypatch.setattr(cpu, "FEW", 10**9)
    gate_up, down = experts(5, 32, 12, dtype)
    x = torch.randn(11, 32).to(dtype)
    x[4] = float("nan")
    ids, weights = route(torch.randn(11, 5), None, 2)
    together = expert_mlp(x, ids, weights, gate_up, down)
    for row in range(11):
        alone = expert_mlp(x[row : row + 1], ids[row : row + 1], weights[row : row + 1], gate_up, down)
        assert torch.equal(alone[0].nan_to_num(7), together[row].nan_to_num(7))
        assert alone.isnan().any() == (row == 4)


@EITHER_FORM
@EITHER_DTYPE
def test_inputs_may_be_views(monkeypatch: pytest.MonkeyPatch, few: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cpu, "FEW", few)
    gate_up, down = experts(4, 16, 8, dtype)
    x = torch.randn(6, 40).to(dtype)[:, 3:19]
    ids, weights = route(torch.randn(6, 9)[:, 2:6], torch.randn(8)[::2], 3)
    assert_equals_naive(x, ids[:, 1:], weights[:, 1:], gate_up, down)


def test_what_does_not_fit_is_refused() -> None:
    logits = torch.zeros(2, 8)
    for field, call in {
        "logits": lambda: route(logits.double(), None, 2),
        "bias": lambda: route(logits, torch.zeros(7), 2),
        "scoring": lambda: route(logits, None, 2, scoring="linear"),
        "num_groups": lambda: route(logits, None, 2, num_groups=3),
        "top_groups": lambda: route(logits, None, 2, num_groups=4, top_groups=5),
        "top_k must be from 1 to 4": lambda: route(logits, None, 5, num_groups=4, top_groups=2),
        "'meta'": lambda: route(logits.to("meta"), None, 2),
    }.items():
        with pytest.raises(ValueError, match=field):
            call()
    gate_up, down = experts(3, 12, 6, torch.float32)
    good = {"x": torch.zeros(2, 12), "ids": torch.zeros(2, 1, dtype=torch.int64), "weights": torch.ones(2, 1)}
    good |= {"gate_up": gate_up, "down": down}
    for field, change in [
        ("x", good["x"].double()),
        ("ids", good["ids"].int()),
        ("ids", good["ids"] + 3),
        ("ids", good["ids"] - 1),
        ("weights", good["weights"].double()),
        ("gate_up", gate_up[:2]),
        ("gate_up", gate_up.bfloat16()),
        ("down", down[:, :11]),
        ("down", down.transpose(1, 2).contiguous().transpose(1, 2)),
    ]:
        with pytest.raises(ValueError, match=f"^{field} must"):
            expert_mlp(**{**good, field: change})
