"""Compares the training model with the formulas of Ling-2.5, written down token by token in fp64.

    python check_bailing.py [CHECKPOINT]

Nothing here is shared with the training code: the reference reads the published tensors and config.json. Without a
checkpoint random weights are written first. The sources are the model's published code and, for the slopes, the
formula of the serving engines (1 - i/(L-1) + 1e-5, i counted from 0).
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from config import BailingConfig
from export import stacked, write
from lightning import lightning_torch
from model import DemoModel
from safetensors.torch import load_file
from torch import Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def turned(x: Tensor, first: int, second: int, angle: float) -> None:
    """Turns the plane of two dimensions of every row, in place."""
    a, b = x[..., first].clone(), x[..., second].clone()
    x[..., first] = a * math.cos(angle) - b * math.sin(angle)
    x[..., second] = a * math.sin(angle) + b * math.cos(angle)


class Reference:
    """One token at a time: `step` takes a token id and gives the logits of the next one."""

    def __init__(self, folder: Path) -> None:
        self.c: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.w = {n: w.double() for n, w in load_file(folder / "model.safetensors").items()}
        self.position = 0
        heads, dim = self.c["num_attention_heads"], self.c["head_dim"]
        layers = range(self.c["num_hidden_layers"])
        self.states = [torch.zeros(heads, dim, dim, dtype=torch.float64) for _ in layers]
        self.cache: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in layers]

    def step(self, token: int) -> Tensor:
        c, w = self.c, self.w
        x = w["model.word_embeddings.weight"][token]
        group, layers = c["layer_group_size"], c["num_hidden_layers"]
        for i in range(layers):
            at = f"model.layers.{i}."
            h = norm(x, w[at + "input_layernorm.weight"], c["rms_norm_eps"])
            full = (i + 1) % group == 0 or i >= layers // group * group
            x = x + (self.mla if full else self.lightning)(i, h, at + "attention.")
            h = norm(x, w[at + "post_attention_layernorm.weight"], c["rms_norm_eps"])
            x = x + (self.mlp(h, at + "mlp.") if i < c["first_k_dense_replace"] else self.moe(h, at + "mlp."))
        self.position += 1
        x = norm(x, w["model.norm.weight"], c["rms_norm_eps"])
        return w["model.word_embeddings.weight" if c["tie_word_embeddings"] else "lm_head.weight"] @ x

    def lightning(self, i: int, h: Tensor, at: str) -> Tensor:
        c, w = self.c, self.w
        heads, dim, eps = c["num_attention_heads"], c["head_dim"], c["rms_norm_eps"]
        q, k, v = (w[at + "query_key_value.weight"] @ h).view(3, heads, dim)
        q = norm(q, w[at + "query_layernorm.weight"], eps)
        k = norm(k, w[at + "key_layernorm.weight"], eps)
        dims = int(dim * c["partial_rotary_factor"])
        for j in range(dims // 2):
            angle = self.position * c["rope_theta"] ** (-2 * j / dims)
            turned(q, j, j + dims // 2, angle)
            turned(k, j, j + dims // 2, angle)
        for head in range(heads):
            slope = 2 ** (-8 * (head + 1) / heads) * (1 - i / (c["num_hidden_layers"] - 1) + 1e-5)
            self.states[i][head] = math.exp(-slope) * self.states[i][head] + torch.outer(k[head], v[head])
        o = torch.stack([self.states[i][head].T @ q[head] for head in range(heads)]) / math.sqrt(dim)
        groups = c["group_norm_size"]
        o = norm(o.view(groups, -1), w[at + "g_norm.weight"].view(groups, -1), eps).flatten()
        return w[at + "dense.weight"] @ (o * torch.sigmoid(w[at + "g_proj.weight"] @ h))

    def mla(self, i: int, h: Tensor, at: str) -> Tensor:
        c, w = self.c, self.w
        heads, nope, rope, value = (
            c[n] for n in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        q = (w[at + "q_proj.weight"] @ h).view(heads, nope + rope)
        latent, shared = (w[at + "kv_a_proj_with_mqa.weight"] @ h).split([c["kv_lora_rank"], rope])
        latent = norm(latent, w[at + "kv_a_layernorm.weight"], 1e-6)
        q_nope, q_rope = q[:, :nope], q[:, nope:].clone()
        for j in range(rope // 2):
            angle = self.position * c["rope_theta"] ** (-2 * j / rope)
            turned(q_rope, 2 * j, 2 * j + 1, angle)
            turned(shared, 2 * j, 2 * j + 1, angle)
        k_nope, v = (w[at + "kv_b_proj.weight"] @ latent).view(heads, nope + value).split([nope, value], 1)
        self.cache[i].append((k_nope, shared, v))
        keys, turns, values = (torch.stack(part) for part in zip(*self.cache[i], strict=True))
        score = torch.einsum("hd,thd->ht", q_nope, keys) + torch.einsum("hd,td->ht", q_rope, turns)
        o = torch.einsum("ht,thd->hd", torch.softmax(score / math.sqrt(nope + rope), 1), values)
        return w[at + "dense.weight"] @ o.flatten()

    def mlp(self, h: Tensor, at: str) -> Tensor:
        w = self.w
        inner = silu(w[at + "gate_proj.weight"] @ h) * (w[at + "up_proj.weight"] @ h)
        return w[at + "down_proj.weight"] @ inner

    def moe(self, h: Tensor, at: str) -> Tensor:
        c = self.c
        score = torch.sigmoid(self.w[at + "gate.weight"] @ h)
        biased = (score + self.w[at + "gate.expert_bias"]).view(c["n_group"], -1)
        strength = [float(group.sort(descending=True).values[:2].sum()) for group in biased]
        for group in sorted(range(c["n_group"]), key=lambda g: strength[g])[: c["n_group"] - c["topk_group"]]:
            biased[group] = float("-inf")
        chosen = biased.flatten().sort(descending=True).indices[: c["num_experts_per_tok"]].tolist()
        total = sum(float(score[e]) for e in chosen) + 1e-20
        out = self.mlp(h, at + "shared_experts.")
        for e in chosen:
            out = out + c["routed_scaling_factor"] * score[e] / total * self.mlp(h, f"{at}experts.{e}.")
        return out


def random_checkpoint(model: DemoModel, folder: Path) -> None:
    with torch.no_grad():
        for name, w in model.weights.items():
            if name.endswith("correction_bias"):
                w.normal_(0.0, 0.1)
            elif "norm" in name:
                w.add_(0.2 * torch.randn_like(w))
    write({n: w.detach() for n, w in model.weights.items()}, model.config, folder, torch.float32)


def check_operator() -> None:
    """The chunked operator against its recurrence, with a ragged end."""
    config = BailingConfig()
    slopes = torch.tensor(config.slopes(0), dtype=torch.float64)
    q, k, v = torch.randn(3, 2, 150, config.heads, config.head_dim, dtype=torch.float64)
    state, out = torch.zeros(2, config.heads, config.head_dim, config.head_dim, dtype=torch.float64), []
    for t in range(q.shape[1]):
        state = torch.exp(-slopes)[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((q[:, t, :, None] @ state)[:, :, 0] / math.sqrt(config.head_dim))
    print(f"operator: largest difference {(torch.stack(out, 1) - lightning_torch(q, k, v, slopes)).abs().max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=150)
    args = parser.parse_args()
    torch.manual_seed(0)
    check_operator()
    model = DemoModel(BailingConfig())
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.checkpoint or Path(scratch)
        if args.checkpoint is None:
            random_checkpoint(model, folder)
        weights = stacked(load_file(folder / "model.safetensors"), model.config, list(model.weights))
        with torch.no_grad():
            for name, w in model.weights.items():
                w.copy_(weights[name])
        model.prepare()
        reference = Reference(folder)
        tokens = torch.randint(12, 4096, (args.tokens,))
        with torch.no_grad():
            theirs = torch.stack([reference.step(int(token)) for token in tokens])
            mine = model.logits(tokens[None])[0]
    print(f"model: largest difference {(mine - theirs).abs().max():.1e}, logits up to {theirs.abs().max():.1f}")


if __name__ == "__main__":
    main()
