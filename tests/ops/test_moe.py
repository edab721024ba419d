"""Mixture of experts: routing and both forms of the whole layer against the specification."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops.moe import Experts, Routing, cpu, naive, route, sparse_moe

# float32: reordered sums of at most 100 products. bfloat16: inputs and weights are the same rounded numbers on both
# sides; the result is rounded once (2 ** -9 relative), and with many rows so are the five values between the products.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # relative to the largest element, or to 1
EITHER_FORM = pytest.mark.parametrize("few", [0, 10**9], ids=["many rows", "few rows"])
EITHER_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


def experts(
    count: int, hidden: int, inner: int, dtype: torch.dtype, routing: Routing, always: int = 0, seed: int = 0
) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(count, hidden, generator=generator) * hidden**-0.5
    bias = torch.randn(count, generator=generator) * 0.1
    gate_up = torch.randn(count + always, 2 * inner, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(count + always, hidden, inner, generator=generator) * inner**-0.5
    return Experts(router, bias, gate_up.to(dtype), down.to(dtype), routing)


def assert_equals_naive(x: Tensor, layer: Experts) -> None:
    tensors = (layer.router, layer.bias, layer.gate_up, layer.down)
    expected = naive.sparse_moe(x.double(), *(tensor.double() for tensor in tensors), **asdict(layer.routing))
    result = sparse_moe(x, layer)
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
    ids, weights = route(logits, bias, Routing(top_k, **options))
    expected_ids, expected_weights = naive.route(logits, bias, top_k, **options)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7)


def test_route_takes_the_first_of_equals_and_weighs_without_bias() -> None:
    ids, weights = route(torch.zeros(1, 8), None, Routing(3))
    assert ids.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))
    ids, weights = route(torch.zeros(2, 4), torch.tensor([0.0, 9.0, 0.0, 5.0]), Routing(2, renormalize=False))
    assert ids.tolist() == [[1, 3], [1, 3]]
    torch.testing.assert_close(weights, torch.full((2, 2), 0.5))


def test_route_survives_extreme_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, 200.0, -200.0], [float("nan")] * 4, [float("-inf")] * 4])
    ids, weights = route(logits, None, Routing(2))
    assert ids.tolist()[0] == [0, 2]
    assert weights[0].tolist() == [0.5, 0.5]
    assert all(0 <= first < 4 and 0 <= second < 4 and first != second for first, second in ids.tolist())
    assert weights[1].isnan().all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 5, 17, 70]),
    count=st.sampled_from([1, 2, 5, 16]),
    always=st.integers(0, 2),
    widths=st.sampled_from([(8, 4), (33, 7), (64, 32)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_the_layer_equals_the_specification(rows, count, always, widths, dtype, data) -> None:  # type: ignore[no-untyped-def]
    top_k = data.draw(st.integers(1, min(count, 4)))
    scoring = data.draw(st.sampled_from(["sigmoid", "softmax"]))
    routing = Routing(top_k, scoring=scoring, renormalize=data.draw(st.booleans()), scale=1.5)
    x = torch.randn(rows, widths[0], generator=torch.Generator().manual_seed(rows)).to(dtype)
    assert_equals_naive(x, experts(count, *widths, dtype, routing, always))


@EITHER_FORM
@EITHER_DTYPE
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@pytest.mark.parametrize("always", [0, 1])
def test_uneven_loads(monkeypatch: pytest.MonkeyPatch, few: int, dtype: torch.dtype, rows: int, always: int) -> None:
    """Every row to the same two of nine experts: the other seven are not read."""
    monkeypatch.setattr(cpu, "FEW", few)
    layer = experts(9, 24, 10, dtype, Routing(2), always)
    layer.bias[[7, 2]] += 10
    for unused in (0, 1, 3, 4, 5, 6, 8):
        layer.gate_up[unused] = float("nan")
        layer.down[unused] = float("nan")
    assert_equals_naive(torch.randn(rows, 24).to(dtype), layer)


@EITHER_FORM
def test_many_experts_in_groups(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(cpu, "FEW", few)
    layer = experts(256, 16, 3, torch.float32, Routing(8, num_groups=8, top_groups=4))
    assert_equals_naive(torch.randn(12, 16), layer)


@EITHER_DTYPE
def test_rows_of_a_decode_step_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Alone or in any company: the same bits."""
    monkeypatch.setattr(cpu, "FEW", 10**9)
    layer = experts(5, 32, 12, dtype, Routing(2), always=1)
    x = torch.randn(11, 32).to(dtype)
    x[4] = float("nan")
    together = sparse_moe(x, layer)
    for row in range(11):
        alone = sparse_moe(x[row : row + 1], layer)
        assert torch.equal(alone[0].nan_to_num(7), together[row].nan_to_num(7))
        assert alone.isnan().any() == (row == 4)


@EITHER_FORM
@EITHER_DTYPE
def test_rows_may_be_a_view(monkeypatch: pytest.MonkeyPatch, few: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cpu, "FEW", few)
    layer = experts(4, 16, 8, dtype, Routing(3), always=1)
    assert_equals_naive(torch.randn(6, 40).to(dtype)[:, 3:19], layer)


def test_what_does_not_fit_is_refused() -> None:
    logits = torch.zeros(2, 8)
    for field, call in {
        "logits": lambda: route(logits.double(), None, Routing(2)),
        "bias": lambda: route(logits, torch.zeros(7), Routing(2)),
        "scoring": lambda: route(logits, None, Routing(2, scoring="linear")),
        "num_groups": lambda: route(logits, None, Routing(2, num_groups=3)),
        "top_groups": lambda: route(logits, None, Routing(2, num_groups=4, top_groups=5)),
        "top_k must be from 1 to 4": lambda: route(logits, None, Routing(5, num_groups=4, top_groups=2)),
    }.items():
        with pytest.raises(ValueError, match=field):
            call()
    with pytest.raises(NotImplementedError, match="'meta'"):
        route(logits.to("meta"), None, Routing(2))
    layer = experts(3, 12, 6, torch.float32, Routing(1), always=1)
    for field, change in [
        ("router", layer.router.bfloat16()),
        ("bias", layer.bias[:2]),
        ("gate_up", layer.gate_up[:2]),
        ("gate_up", layer.gate_up.bfloat16()),
        ("down", layer.down[:2]),
        ("down", layer.down[:, :11]),
        ("down", layer.down.transpose(1, 2).contiguous().transpose(1, 2)),
    ]:
        with pytest.raises(ValueError, match=f"^{field} must"):
            replace(layer, **{field: change})
    for x in (torch.zeros(2, 11), torch.zeros(12), torch.zeros(2, 12).bfloat16()):
        with pytest.raises(ValueError, match=r"^x must"):
            sparse_moe(x, layer)
