"""Mixture of experts, token by token: the specification."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def route(
    logits: Tensor,  # [T, E]
    bias: Tensor | None,  # [E]
    top_k: int,
    *,
    scoring: str = "sigmoid",
    renormalize: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Experts and their weights, (ids [T, k] int64, weights [T, k]): DeepSeek-V3, arXiv 2412.19437, §2.1.2.

    s = sigmoid(logits) or softmax(logits),   c = s + bias
    only the `top_groups` groups with the largest sum of their two largest c take part
    ids = the k largest c, of equals the first,   w = s[ids]   w <- w / (sum w + 1e-20) * scale
    """
    ids, weights = [], []
    for row in logits:
        score = torch.sigmoid(row) if scoring == "sigmoid" else torch.softmax(row, dim=-1)
        choice = score if bias is None else score + bias
        groups = choice.view(num_groups, -1)
        strength = groups.sort(descending=True).values[:, :2].sum(dim=1)
        kept = strength.sort(descending=True, stable=True).indices[:top_groups]
        masked = torch.full_like(groups, float("-inf"))
        masked[kept] = groups[kept]
        chosen = masked.view(-1).sort(descending=True, stable=True).indices[:top_k]
        weight = score[chosen]
        if renormalize:
            weight = weight / (weight.sum() + 1e-20)
        ids.append(chosen)
        weights.append(weight * scale)
    return torch.stack(ids), torch.stack(weights)


def expert_mlp(
    x: Tensor,  # [T, hidden]
    ids: Tensor,  # [T, k]
    weights: Tensor,  # [T, k]
    gate_up: Tensor,  # [E, 2 I, hidden], the gate's rows first
    down: Tensor,  # [E, hidden, I]
) -> Tensor:
    """y = sum_k weights[k] down_e (silu(gate_e x) * up_e x) with e = ids[k]. Returns [T, hidden]."""
    output = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            output[row] += weight * (down[expert] @ (F.silu(gate) * up))
    return output


def sparse_moe(
    x: Tensor,  # [T, hidden]
    router: Tensor,  # [E, hidden]
    bias: Tensor,  # [E]
    gate_up: Tensor,  # [E + A, 2 I, hidden]
    down: Tensor,  # [E + A, hidden, I]
    top_k: int,
    **options: Any,
) -> Tensor:
    """`expert_mlp` with the experts that `route` chooses and the A last ones at weight 1. Returns [T, hidden]."""
    ids, weights = route(x @ router.T, bias, top_k, **options)
    always = torch.arange(len(router), len(down)).expand(len(x), -1)
    ids, weights = torch.cat([ids, always], dim=1), torch.cat([weights, torch.ones_like(always)], dim=1)
    return expert_mlp(x, ids, weights, gate_up, down)
