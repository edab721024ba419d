"""Mixture of experts: choosing them, and their gated MLPs."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

SCORINGS = ("sigmoid", "softmax")


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    scoring: str = "sigmoid",
    renormalize: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each row of `logits` [T, E]: (ids [T, k] int64, weights [T, k] float32).

    Scores are sigmoid or softmax of the logits. The choice goes by score + `bias` ([E] or None) and, of equals, takes
    the lower index; with `num_groups` > 1 only the `top_groups` groups of consecutive experts with the largest sum of
    their two best take part. The weights are the scores without bias, divided by their sum (+ 1e-20) if
    `renormalize`, times `scale` (DeepSeek-V3, arXiv 2412.19437, §2.1.2). Everything is float32.
    Raises `ValueError` if a shape, dtype or count does not fit.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [rows, experts], not {logits.dtype} {list(logits.shape)}")
    experts = logits.shape[1]
    if bias is not None and (bias.shape != (experts,) or bias.dtype != torch.float32 or bias.device != logits.device):
        raise ValueError(f"bias must be float32 [{experts}] on {logits.device} like the logits")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {SCORINGS}, not {scoring!r}")
    if num_groups < 1 or experts % num_groups:
        raise ValueError(f"num_groups must divide the {experts} experts, but is {num_groups}")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups must be from 1 to num_groups = {num_groups}, but is {top_groups}")
    if not 1 <= top_k <= top_groups * (experts // num_groups):
        raise ValueError(f"top_k must be from 1 to {top_groups * (experts // num_groups)}, but is {top_k}")
    ids: Tensor
    weights: Tensor
    ids, weights = _backend(logits).route(
        logits, bias, top_k, scoring == "softmax", renormalize, scale, num_groups, top_groups
    )
    return ids, weights


def expert_mlp(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """y = sum_k weights[k] down_e (silu(gate_e x) * up_e x) with e = ids[k], for each row of x. Returns [T, hidden].

    x [T, hidden]; ids [T, k] int64 and weights [T, k] float32 from `route`; gate_up [E, 2 I, hidden] with the gate's
    rows first; down [E, hidden, I]. x and the expert weights are all float32 or all bfloat16, the latter contiguous;
    sums are float32 and cast once. Only experts that are hit are read.
    Raises `ValueError` if a shape, dtype or layout does not fit or an id is outside 0 .. E - 1.
    """
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x must be float32 or bfloat16 [rows, hidden], not {x.dtype} {list(x.shape)}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [{x.shape[0]}, k], not {ids.dtype} {list(ids.shape)}")
    if weights.shape != ids.shape or weights.dtype != torch.float32:
        raise ValueError(f"weights must be float32 {list(ids.shape)}, not {weights.dtype} {list(weights.shape)}")
    if down.dim() != 3 or down.shape[1] != x.shape[1]:
        raise ValueError(f"down must be [experts, {x.shape[1]}, width], not {list(down.shape)}")
    if gate_up.shape != (down.shape[0], 2 * down.shape[2], x.shape[1]):
        shape = [down.shape[0], 2 * down.shape[2], x.shape[1]]
        raise ValueError(f"gate_up must be {shape} to fit x and down, not {list(gate_up.shape)}")
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} must be {x.dtype} like x, and contiguous")
    if not x.device == ids.device == weights.device == gate_up.device == down.device:
        raise ValueError("x, ids, weights, gate_up and down must be on one device")
    output: Tensor = _backend(x).expert_mlp(x, ids, weights, gate_up, down)
    return output


def _backend(tensor: Tensor) -> ModuleType:
    """The module that holds the operators for the device of `tensor`."""
    if tensor.device.type == "cpu":
        from statewise.ops.moe import cpu

        return cpu
    raise ValueError(f"mixture of experts has no kernels for device {tensor.device.type!r}")
