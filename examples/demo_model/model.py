"""A trainable model of either layout.

Every row of a batch is one document: states start at zero and nothing leaks between rows. The work that is done token
by token runs over the flattened batch [B*L, ...], so that compiled code sees one shape whatever the row length.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from config import BailingConfig, ModelConfig
from kda import kda_torch
from layers import (
    kda_inputs,
    kda_then_dense,
    kda_then_moe,
    lightning_inputs,
    lightning_then_dense,
    lightning_then_moe,
    linear,
    mla_inputs,
    mla_then_moe,
    rms_norm,
    token_loss,
)
from lightning import lightning_torch
from torch import Tensor, nn


class DemoModel(nn.Module):
    """Parameters under Kimi-Linear's published names, the experts of a layer stacked: export.py splits and renames."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.kda: Callable[..., Tensor] = kda_torch
        self.lightning: Callable[..., Tensor] = lightning_torch
        self.compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
        c, w = config, config.heads * config.head_dim
        self.weights: dict[str, nn.Parameter] = {}
        self.add("model.embed_tokens.weight", c.vocabulary, c.hidden)
        for i in range(c.layers):
            at = f"model.layers.{i}."
            self.add(at + "input_layernorm.weight", c.hidden)
            self.add(at + "post_attention_layernorm.weight", c.hidden)
            attention = at + "self_attn."
            if c.is_attention(i):
                self.add(attention + "q_proj.weight", c.heads * (c.nope_dim + c.rope_dim), c.hidden)
                self.add(attention + "kv_a_proj_with_mqa.weight", c.kv_lora + c.rope_dim, c.hidden)
                self.add(attention + "kv_a_layernorm.weight", c.kv_lora)
                self.add(attention + "kv_b_proj.weight", c.heads * (c.nope_dim + c.value_dim), c.kv_lora)
                self.add(attention + "o_proj.weight", c.hidden, c.heads * c.value_dim)
            elif isinstance(c, BailingConfig):
                for n in "qkvg":
                    self.add(f"{attention}{n}_proj.weight", w, c.hidden)
                for n in "qk":
                    self.add(f"{attention}{n}_norm.weight", c.head_dim)
                self.add(attention + "o_norm.weight", w)
                self.add(attention + "o_proj.weight", c.hidden, w)
            else:
                for n in "qkv":
                    self.add(f"{attention}{n}_proj.weight", w, c.hidden)
                    self.add(f"{attention}{n}_conv1d.weight", w, 1, 4)
                for n in "fg":
                    self.add(f"{attention}{n}_a_proj.weight", c.head_dim, c.hidden)
                    self.add(f"{attention}{n}_b_proj.weight", w, c.head_dim)
                self.add(attention + "b_proj.weight", c.heads, c.hidden)
                self.add(attention + "A_log", 1, 1, c.heads, 1)
                self.add(attention + "dt_bias", w)
                self.add(attention + "o_norm.weight", c.head_dim)
                self.add(attention + "o_proj.weight", c.hidden, w)
            if i == 0:
                self.add_mlp(at + "mlp.", c.dense_width)
            else:
                block = at + "block_sparse_moe."
                self.add(block + "gate.weight", c.experts, c.hidden)
                self.add(block + "experts.w1", c.experts, c.expert_width, c.hidden)
                self.add(block + "experts.w3", c.experts, c.expert_width, c.hidden)
                self.add(block + "experts.w2", c.experts, c.hidden, c.expert_width)
                self.add_mlp(block + "shared_experts.", c.expert_width)
                self.add(block + "gate.e_score_correction_bias", c.experts).requires_grad_(False)
        self.add("model.norm.weight", c.hidden)
        if not c.tied:
            self.add("lm_head.weight", c.vocabulary, c.hidden)
        self.initialise()

    def add(self, name: str, *shape: int) -> nn.Parameter:
        self.weights[name] = parameter = nn.Parameter(torch.empty(*shape))
        self.register_parameter(name.replace(".", "|"), parameter)
        return parameter

    def add_mlp(self, at: str, width: int) -> None:
        self.add(at + "gate_proj.weight", width, self.config.hidden)
        self.add(at + "up_proj.weight", width, self.config.hidden)
        self.add(at + "down_proj.weight", self.config.hidden, width)

    @torch.no_grad()
    def initialise(self) -> None:
        depth = (2 * self.config.layers) ** -0.5
        for name, w in self.weights.items():
            if "norm" in name:
                w.fill_(1.0)
            elif name.endswith("A_log"):
                w.uniform_(1.0, 16.0).log_()
            elif name.endswith("dt_bias"):  # softplus(dt_bias) from 0.001 to 0.1
                step = torch.exp(torch.rand_like(w) * 4.605 - 6.908)
                w.copy_(step + torch.log(-torch.expm1(-step)))
            elif name.endswith("correction_bias"):
                w.zero_()
            elif "conv1d" in name:
                w.uniform_(-0.5, 0.5)
            elif name.endswith("lm_head.weight") or "gate.weight" in name:
                w.normal_(0.0, 0.02)
            elif "embed" in name:
                w.normal_(0.0, 0.1 if self.config.tied else 0.5)
            else:
                out = depth if name.endswith(("o_proj.weight", "down_proj.weight", "experts.w2")) else 1.0
                w.normal_(0.0, out * w.shape[-1] ** -0.5)
        if self.config.tied:  # the logits begin small although the embedding does not
            self.weights["model.norm.weight"].fill_(0.3)

    def prepare(self) -> None:
        """Per-layer views of the weights; again after the module was moved to a device."""
        self.weights = {name.replace("|", "."): w for name, w in self.named_parameters()}
        self.layers = [
            {
                name.removeprefix(f"model.layers.{i}."): w
                for name, w in self.weights.items()
                if name.startswith(f"model.layers.{i}.")
            }
            for i in range(self.config.layers)
        ]
        late = ("self_attn.o_", "post_attention", "mlp", "block_sparse_moe")
        self.inputs = [{n: w for n, w in p.items() if not n.startswith(late)} for p in self.layers]
        self.outputs = [{n: w for n, w in p.items() if n.startswith(late)} for p in self.layers]
        self.run = {
            f.__name__: self.compiled(f)
            for f in (
                *(kda_inputs, kda_then_dense, kda_then_moe),
                *(lightning_inputs, lightning_then_dense, lightning_then_moe),
                *(mla_inputs, mla_then_moe, token_loss),
            )
        }
        self.head = self.weights["model.embed_tokens.weight" if self.config.tied else "lm_head.weight"]
        if isinstance(self.config, BailingConfig):
            device = self.head.device
            self.slopes = [torch.tensor(self.config.slopes(i), device=device) for i in range(self.config.layers)]

    def hidden(self, tokens: Tensor, real: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """tokens [B, L] to the last residual stream [B*L, hidden] and the expert counts of each MoE layer."""
        c, dtype, run = self.config, self.dtype, self.run
        batch, length = tokens.shape
        position = torch.arange(length, device=tokens.device).repeat(batch)
        flat_real = (torch.ones_like(tokens) if real is None else real).flatten().float()
        x = F.embedding(tokens.flatten(), self.weights["model.embed_tokens.weight"]).float()
        counts: list[Tensor] = []
        for i, (before, after) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            if c.is_attention(i):
                parts = run["mla_inputs"](x, position, before, c, dtype)
                q, k, v = (t.view(batch, length, *t.shape[1:]).transpose(1, 2) for t in parts)
                v = F.pad(v, (0, q.shape[3] - c.value_dim))  # the fast kernels want one width
                o = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : c.value_dim]
                o = o.transpose(1, 2).reshape(batch * length, c.heads, c.value_dim)
                x, count = run["mla_then_moe"](x, o, flat_real, after, c, dtype)
                counts.append(count)
                continue
            kind = "lightning" if isinstance(c, BailingConfig) else "kda"
            *parts, gate = run[f"{kind}_inputs"](x, position, before, c, dtype)
            parts = [t.view(batch, length, *t.shape[1:]) for t in parts]
            o = self.lightning(*parts, self.slopes[i]) if kind == "lightning" else self.kda(*parts)
            o = o.reshape(batch * length, c.heads, c.head_dim)
            if i == 0:
                x = run[f"{kind}_then_dense"](x, o, gate, after, c, dtype)
            else:
                x, count = run[f"{kind}_then_moe"](x, o, gate, flat_real, after, c, dtype)
                counts.append(count)
        return x, counts

    def loss(self, tokens: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """tokens, target, weight: [B, L]. Returns the loss, right [B, L] bool and the expert counts."""
        x, counts = self.hidden(tokens, tokens != 0)
        w = self.weights
        loss, right = self.run["token_loss"](
            x,
            target.flatten(),
            weight.flatten(),
            w["model.norm.weight"],
            self.head,
            self.config.eps,
            self.dtype,
        )
        return loss, right.view(tokens.shape), counts

    def logits(self, tokens: Tensor) -> Tensor:
        x, _ = self.hidden(tokens)
        x = rms_norm(x, self.weights["model.norm.weight"], self.config.eps).to(self.dtype)
        return linear(x, self.head).float().view(*tokens.shape, -1)

    @torch.no_grad()
    def balance(self, counts: list[Tensor], step: float) -> None:
        """Moves each router's selection bias a step towards equal load (no auxiliary loss)."""
        routers = [p["block_sparse_moe.gate.e_score_correction_bias"] for p in self.layers[1:]]
        for bias, count in zip(routers, counts, strict=True):
            bias += step * torch.sign(count.mean() - count)
            bias -= bias.mean()
