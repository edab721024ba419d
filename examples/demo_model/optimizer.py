"""Muon for the matrices, AdamW for everything else."""

from collections import defaultdict

import torch
from torch import Tensor


def orthogonal(update: Tensor) -> Tensor:
    """Newton-Schulz iteration: the nearest (semi-)orthogonal matrices to update [N, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.bfloat16() if update.is_cuda else update
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum, orthogonalised; matrices of one shape are treated together.

    The step is scaled to the size of an AdamW step, so that both share a learning rate.
    """

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95, decay: float = 0.02) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for p in parameters:
            self.groups[tuple(p.shape[-2:])].append(p)
        self.buffers = {s: [torch.zeros_like(p) for p in group] for s, group in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            buffers = self.buffers[shape]
            gradients = [p.grad for p in group]
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            looking_ahead = torch._foreach_lerp(gradients, buffers, self.momentum)
            stacked = torch.cat([g.reshape(-1, *shape) for g in looking_ahead])
            updates = orthogonal(stacked).split([p.numel() // (shape[0] * shape[1]) for p in group])
            torch._foreach_mul_(group, 1 - rate * self.decay)
            scale = -rate * 0.2 * max(shape) ** 0.5
            torch._foreach_add_(group, [u.view(p.shape) for u, p in zip(updates, group, strict=True)], alpha=scale)

    def state(self) -> list[list[Tensor]]:
        return list(self.buffers.values())

    def load(self, state: list[list[Tensor]]) -> None:
        for mine, theirs in zip(self.buffers.values(), state, strict=True):
            for buffer, saved in zip(mine, theirs, strict=True):
                buffer.copy_(saved)
