"""The specification of the short convolution, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.batch import Batch


def naive_short_convolution(x: Tensor, weight: Tensor, state: Tensor, batch: Batch) -> Tensor:
    """y_t = silu(sum_j w[:, j] * u_{t - (W - 1) + j}) per channel: causal, depthwise, no bias.

    As in Gated DeltaNet (Yang et al. 2024, `qwen3_next`) and Kimi Delta Attention (`kimi_linear`): the last tap
    multiplies the current input. The window of a sequence is its last raw inputs u, oldest first.
    x [T, C], weight [C, W], state [blocks, C, columns >= W - 1] updated in place; returns [T, C].
    """
    taps, columns = weight.shape[1], state.shape[2]
    output = torch.empty_like(x)
    for i, block in enumerate(batch.records.tolist()):
        window = torch.zeros_like(state[block]) if batch.fresh[i] else state[block].clone()
        for rows, kept in batch.runs(i):
            for row in range(rows.start, rows.stop):
                window = torch.cat((window, x[row, :, None].to(window.dtype)), dim=1)
                product = (window[:, -taps:].to(weight.dtype) * weight).sum(dim=1)
                output[row] = torch.nn.functional.silu(product).to(x.dtype)
                window = window[:, -columns:] if columns else window[:, :0]
            state[kept] = window
    return output
