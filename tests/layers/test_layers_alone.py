"""A layer runs by itself: weights, a pool with its state, a batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.layers.linear_attention.kda import KdaConfig, KimiDeltaAttention
from statewise.layers.mixer import TokenMixer
from statewise.layers.norm import RMSNorm
from statewise.layers.parameters import Component
from statewise.layers.pluggable import PluggableLayer
from statewise.memory.blocks import BlockPool, BlockSpec
from statewise.ops.batch import Piece, build_batch


@dataclass(frozen=True)
class Config:
    hidden_size: int = 24
    rms_norm_eps: float = 1e-5
    kda: KdaConfig = field(default_factory=lambda: KdaConfig(num_heads=2, head_dim=16, value_dim=16, conv_taps=4))


def layer_of(config: Config, engine_config: EngineConfig | None = None) -> KimiDeltaAttention:
    layer: KimiDeltaAttention = PluggableLayer.get("kimi_gated_delta_net_attention")(
        config, engine_config or EngineConfig(), "model.layers.3.self_attn"
    )
    generator = torch.Generator().manual_seed(0)
    for component in layer.modules():
        if isinstance(component, Component):
            component.materialize("cpu")
            for parameter in component.parameters(recurse=False):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            component.finalize()
    return layer


def pool_of(layer: TokenMixer, blocks: int = 4) -> BlockPool:
    pool = BlockPool("record", BlockSpec({0: layer.state_spec()}), blocks)
    for _ in range(blocks):
        pool.allocate("test")
    return pool


@torch.inference_mode()
def run(layer: KimiDeltaAttention, pool: BlockPool, hidden: Tensor, cuts: list[int]) -> Tensor:
    """One sequence in record 2, in pieces that end at `cuts`."""
    out, start = [], 0
    for end in cuts:
        batch = build_batch([Piece(range(end - start), start, 2)], page_size=16)
        out.append(layer(hidden[start:end], batch, pool.state(0)))
        start = end
    return torch.cat(out)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(100, 24, generator=torch.Generator().manual_seed(5))


def test_a_layer_runs_in_three_lines(hidden: Tensor) -> None:
    layer = layer_of(Config())
    pool = pool_of(layer)
    out = run(layer, pool, hidden, [100])
    assert out.shape == (100, 24)
    assert layer.layer_index == 3
    assert torch.allclose(out, run(layer, pool_of(layer), hidden, list(range(1, 101))), atol=1e-5)
    assert torch.allclose(out, run(layer, pool_of(layer), hidden, [1, 2, 40, 64, 99, 100]), atol=1e-5)


@pytest.mark.parametrize("value_dim", [8, 32])
def test_segments_may_differ_in_width(hidden: Tensor, value_dim: int) -> None:
    config = replace(Config(), kda=replace(Config().kda, value_dim=value_dim))
    layer = layer_of(config)
    assert layer.state_spec()["conv"].shape == (64 + 2 * value_dim, 3)
    assert layer.state_spec()["recurrent"].shape == (2, 16, value_dim)
    one = run(layer, pool_of(layer), hidden, [100])
    assert torch.allclose(one, run(layer, pool_of(layer), hidden, [7, 8, 71, 100]), atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"conv_channels_last": True}, {"num_spec": 3}, {"num_spec": 2, "conv_channels_last": True}]
)
def test_the_layout_of_the_window_changes_nothing(hidden: Tensor, options: dict[str, Any]) -> None:
    plain, other = layer_of(Config()), layer_of(Config(), EngineConfig(**options))
    first, second = pool_of(plain), pool_of(other)
    cuts = [1, 2, 30, 66, 67, 100]
    assert torch.equal(run(plain, first, hidden, cuts), run(other, second, hidden, cuts))
    window = second.state(0)["conv"][2]
    assert window.shape == (96, 3 + options.get("num_spec", 0))
    assert torch.equal(window[:, -3:], first.state(0)["conv"][2])


def test_the_norm_of_a_residual_sum_takes_any_rows() -> None:
    """A token mixer may give back its own input or a transposed view."""
    norm = RMSNorm(8, "norm", 1e-5, torch.float32)
    norm.materialize("cpu")
    norm.weight.copy_(torch.ones(8))
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for delta in (x, torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).T):
        total = x.clone()
        expected = 2 * x + 3 * delta
        normed = norm.add(total, total if delta is x else delta, alpha=2.0, beta=3.0)
        assert torch.allclose(total, expected, atol=1e-6)
        assert torch.allclose(normed, norm(expected), atol=1e-6)
