"""The decay of lightning attention: a constant per head and layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statewise.errors import ConfigError

FORMULAS = ("serving", "hf")
"""How the layer factor f_i = 1 - d/(L-1) + 1e-5 counts: `serving` has d = i (counted from 0; every known server, and
MiniMax), `hf` has d = i - 1 (the modelling file published with Ring-2.5)."""


def head_slopes(num_heads: int) -> Tensor:
    """The ALiBi slopes a_h [H] float64 (arXiv 2108.12409): 2^(-8 (h + 1) / H) when H is a power of two.

    Otherwise those of the largest power of two p below H, then every second one of 2 p until there are H.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-8.0 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return torch.tensor(slopes[:num_heads], dtype=torch.float64)


def decay_slopes(num_heads: int, layer: int, num_layers: int, formula: str = "serving") -> Tensor:
    """s [H] float64, all positive: a state decays by e^(-s) per token. `layer` counts all layers from 0.

    Sources: MiniMax-01 (arXiv 2501.08313) and Ring-linear (arXiv 2510.19338). Raises `ConfigError` for an unknown
    formula.
    """
    if formula not in FORMULAS:
        raise ConfigError(f"slope_formula must be one of {', '.join(FORMULAS)}, found {formula!r}")
    depth = layer if formula == "serving" else layer - 1
    factor = 1.0 - (depth / (num_layers - 1) if num_layers > 1 else 0.0) + 1e-5
    assert math.isfinite(factor) and factor > 0
    return head_slopes(num_heads) * factor
