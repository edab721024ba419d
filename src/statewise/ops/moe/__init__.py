"""Mixture of experts: choosing them, and their gated MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from statewise.ops.moe import cpu

SCORINGS = ("sigmoid", "softmax")


@dataclass(frozen=True)
class Routing:
    """How the experts of a row are chosen from its logits, and how they weigh.

    Scores are sigmoid or softmax of the logits. The choice goes by score + bias and, of equals, takes the lower
    index; with `num_groups` > 1 only the `top_groups` groups of consecutive experts with the largest sum of their two
    best take part. The weights are the scores without bias, divided by their sum (+ 1e-20) if `renormalize`, times
    `scale` (DeepSeek-V3, arXiv 2412.19437, §2.1.2). Everything is float32.
    """

    top_k: int
    scoring: str = "sigmoid"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1

    def check(self, experts: int) -> None:
        """Raises `ValueError` if a count does not fit the number of experts."""
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {SCORINGS}, not {self.scoring!r}")
        if self.num_groups < 1 or experts % self.num_groups:
            raise ValueError(f"num_groups must divide the {experts} experts, but is {self.num_groups}")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups must be from 1 to num_groups = {self.num_groups}, but is {self.top_groups}")
        most = self.top_groups * (experts // self.num_groups)
        if not 1 <= self.top_k <= most:
            raise ValueError(f"top_k must be from 1 to {most}, but is {self.top_k}")

    @cached_property
    def rule(self) -> tuple[bool, bool, int, int]:
        """What the kernels read, besides the scale."""
        return self.scoring == "softmax", self.renormalize, self.num_groups, self.top_groups


@dataclass(frozen=True)
class Experts:
    """The weights of a routed layer of E experts, and A more that every row takes with weight 1.

    router [E, hidden] and bias [E] float32; gate_up [E + A, 2 I, hidden] with the gate's rows first and down
    [E + A, hidden, I], both float32 or both bfloat16. All contiguous and on one device.
    Raises `ValueError` if a shape, dtype or layout does not fit.
    """

    router: Tensor
    bias: Tensor
    gate_up: Tensor
    down: Tensor
    routing: Routing

    def __post_init__(self) -> None:
        router, bias, gate_up, down = self.router, self.bias, self.gate_up, self.down
        if router.dim() != 2 or router.dtype != torch.float32:
            raise ValueError(f"router must be float32 [experts, hidden], not {router.dtype} {list(router.shape)}")
        experts, hidden = router.shape
        if bias.shape != (experts,) or bias.dtype != torch.float32:
            raise ValueError(f"bias must be float32 [{experts}], not {bias.dtype} {list(bias.shape)}")
        if down.dim() != 3 or down.shape[0] < experts or down.shape[1] != hidden:
            raise ValueError(f"down must be [{experts} or more, {hidden}, width], not {list(down.shape)}")
        if gate_up.shape != (down.shape[0], 2 * down.shape[2], hidden):
            shape = [down.shape[0], 2 * down.shape[2], hidden]
            raise ValueError(f"gate_up must be {shape} to fit down, not {list(gate_up.shape)}")
        if gate_up.dtype not in (torch.float32, torch.bfloat16) or down.dtype != gate_up.dtype:
            raise ValueError(f"gate_up must be float32 or bfloat16 like down, not {gate_up.dtype} and {down.dtype}")
        for name in ("router", "bias", "gate_up", "down"):
            tensor = getattr(self, name)
            if not tensor.is_contiguous() or tensor.device != router.device:
                raise ValueError(f"{name} must be contiguous and on the device of the router")
        self.routing.check(experts)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(hidden, I, E, A, experts chosen per row)"""
        experts, hidden = self.router.shape
        return hidden, self.down.shape[2], experts, self.down.shape[0] - experts, self.routing.top_k

    @cached_property
    def addresses(self) -> tuple[int, int, int, int]:
        """Where router, bias, gate_up and down lie in memory."""
        return self.router.data_ptr(), self.bias.data_ptr(), self.gate_up.data_ptr(), self.down.data_ptr()


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Choose experts for each row of `logits` [T, E]: (ids [T, k] int64, weights [T, k] float32).

    logits and bias ([E] or None) are float32; see `Routing`. Raises `ValueError` if a shape, dtype or count does not
    fit.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [rows, experts], not {logits.dtype} {list(logits.shape)}")
    experts = logits.shape[1]
    if bias is not None and (bias.shape != (experts,) or bias.dtype != torch.float32 or bias.device != logits.device):
        raise ValueError(f"bias must be float32 [{experts}] on {logits.device} like the logits")
    routing.check(experts)
    if not logits.is_cpu:
        raise NotImplementedError(f"mixture of experts has no kernels for device {logits.device.type!r}")
    return cpu.route(logits, bias, routing)


def sparse_moe(x: Tensor, experts: Experts) -> Tensor:
    """y = sum_k w_k expert_k(x) + sum of the experts that every row takes, for each row of x [T, hidden].

    expert_e(x) = down_e (silu(gate_e x) * up_e x); the chosen experts and their weights follow from the logits
    router x (`route`). x and y have the dtype of the expert weights; sums are float32 and cast once. Of the expert
    weights only those that are needed are read.
    Raises `ValueError` if the shape or dtype of x does not fit.
    """
    if x.dim() != 2 or x.shape[1] != experts.sizes[0] or x.dtype != experts.down.dtype:
        wanted = f"{experts.down.dtype} [rows, {experts.sizes[0]}]"
        raise ValueError(f"x must be {wanted} like the weights, not {x.dtype} {list(x.shape)}")
    if not x.is_cpu:
        raise NotImplementedError(f"mixture of experts has no kernels for device {x.device.type!r}")
    return cpu.sparse_moe(x, experts)
