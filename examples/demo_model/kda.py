"""Kimi Delta Attention as a differentiable operator: plain torch anywhere, fla-core's kernels on a GPU."""

import torch
from torch import Tensor


def kda_torch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int = 16) -> Tensor:
    """The gated delta rule in chunks, from a zero state.

    q, k (l2-normalised), v: [B, T, H, D]; g: [B, T, H, D] log-decays; beta: [B, T, H]. Returns [B, T, H, D].
    Differences of cumulated decays are taken before the exponential, so nothing overflows.
    """
    batch, length, heads, dim = q.shape
    q, k, v, g = (x.float().transpose(1, 2) for x in (q * dim**-0.5, k, v, g))
    beta = beta.float().transpose(1, 2)
    state = q.new_zeros(batch, heads, dim, dim)
    out = []
    for start in range(0, length, chunk):
        part = slice(start, min(start + chunk, length))
        qc, kc, vc, bc = q[:, :, part], k[:, :, part], v[:, :, part], beta[:, :, part, None]
        decay = g[:, :, part].cumsum(2)
        size = qc.shape[2]
        lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
        between = (decay[:, :, :, None] - decay[:, :, None]).masked_fill(~lower[..., None], float("-inf")).exp()
        a = bc * torch.einsum("bhtc,bhjc,bhtjc->bhtj", kc, kc, between).tril(-1)
        target = bc * (vc - (kc * decay.exp()) @ state)
        u = torch.linalg.solve_triangular(a + torch.eye(size, device=q.device), target, upper=False)
        p = torch.einsum("bhtc,bhjc,bhtjc->bhtj", qc, kc, between)
        out.append((qc * decay.exp()) @ state + p @ u)
        last = decay[:, :, -1:]
        state = last.transpose(2, 3).exp() * state + (kc * (last - decay).exp()).transpose(2, 3) @ u
    return torch.cat(out, 2).transpose(1, 2)


def limit_autotuning(candidates: int) -> None:
    """Lets Triton's autotuner try only a few launch configurations, so that the first step takes seconds.

    Call it before fla-core is imported.
    """
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def init(self, fn, arg_names, configs, *args, **kwargs):
        if configs and len(configs) > candidates:
            usual = sorted(configs, key=lambda c: (abs(c.num_warps - 4), abs(c.num_stages - 3)))
            configs = usual[:candidates]
        original(self, fn, arg_names, configs, *args, **kwargs)

    Autotuner.__init__ = init


def kda_fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, g, beta, disable_recompute=True)[0]
