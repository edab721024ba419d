"""The gated delta rule on the CPU: decode rows by the recurrent step, prefill rows chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.delta_rule.chunked_cpu import chunked_prefill
from statewise.ops.delta_rule.recurrent_cpu import recurrent_step


def gated_delta_rule_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    batch: Batch,
    scale: float,
    normalize: bool,
) -> Tensor:
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    if batch.num_decodes:
        recurrent_step(q, k, v, g, beta, state, batch, scale, normalize, output)
    if batch.chunks is not None:
        chunked_prefill(q, k, v, g, beta, state, batch, batch.chunks, scale, normalize, output)
    return output
