"""What the references share: weights in fp64, the frame around the layers, and the pieces common to families."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

LATENT_NORM_EPSILON = 1e-6  # of the norms of latents and of the l2 norms: not the epsilon of the configuration

Memory = list[dict[str, Any]]  # what each layer of a sequence remembers


class Weights:
    """The tensors of a checkpoint below a name prefix, in fp64."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def below(self, prefix: str) -> Weights:
        return Weights(self.tensors, f"{self.prefix}{prefix}.")

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self[f"{name}.weight"] @ x
        return y + self[f"{name}.bias"] if f"{name}.bias" in self else y

    def swiglu(self, x: Tensor, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Tensor:
        return self.linear(down, F.silu(self.linear(gate, x)) * self.linear(up, x))


class Reference:
    """The model of a checkpoint directory, one token at a time.

    A family says in `start` what its layers remember of a sequence, and in `layer` what they do.
    """

    embedding = "model.embed_tokens"

    def __init__(self, directory: Path | str) -> None:
        directory = Path(directory)
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        files = sorted(directory.glob("*.safetensors"))
        self.weights = Weights({name: t.double() for file in files for name, t in load_file(file).items()})

    def start(self) -> Memory:
        """The memory of a sequence without tokens."""
        raise NotImplementedError

    def layer(self, index: int, x: Tensor, weights: Weights, remembered: dict[str, Any]) -> Tensor:
        """[hidden] behind a layer, from [hidden] before it; `remembered` is brought up to this token."""
        raise NotImplementedError

    def step(self, token: int, memory: Memory) -> Tensor:
        """[vocabulary] fp64: the logits after one more token; `memory` is brought up to it."""
        x = self.weights[f"{self.embedding}.weight"][token]
        for index, remembered in enumerate(memory):
            x = self.layer(index, x, self.weights.below(f"model.layers.{index}"), remembered)
        head = self.embedding if self.config["tie_word_embeddings"] else "lm_head"
        return self.weights.linear(head, rms_norm(x, self.weights["model.norm.weight"], self.config["rms_norm_eps"]))

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[T, vocabulary] fp64 of a sequence from its start."""
        memory = self.start()
        return torch.stack([self.step(token, memory) for token in tokens])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after a prompt, one after the other; no token ends it."""
        memory, tokens = self.start(), []
        row = torch.stack([self.step(token, memory) for token in prompt])[-1]
        for _ in range(count):
            tokens.append(int(row.argmax()))
            row = self.step(tokens[-1], memory)
        return tokens


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LATENT_NORM_EPSILON)


def rope_angles(position: int, width: int, theta: float) -> Tensor:
    """[width / 2]: position · theta^(-2j / width)."""
    return position * theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def rotate_halves(x: Tensor, position: int, width: int, theta: float) -> Tensor:
    """Rotate the pairs (j, j + width/2) of the first `width` entries of x [..., D]; the others pass."""
    cos, sin = (f(rope_angles(position, width, theta)) for f in (torch.cos, torch.sin))
    a, b, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rotate_pairs(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate the pairs (2j, 2j + 1) of x [..., D]."""
    cos, sin = (f(rope_angles(position, x.shape[-1], theta)) for f in (torch.cos, torch.sin))
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def alibi_slopes(heads: int) -> Tensor:
    """[heads]: 2^(-8(h+1)/heads) for a power of two; else those of the next smaller power of two, followed by every
    second one of twice that many heads."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return torch.tensor(slopes[:heads], dtype=torch.float64)


def lightning_read(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, remembered: dict[str, Any]) -> Tensor:
    """[H, V]: S ← e^(-s) S + k vᵀ, then qᵀ S."""
    state = remembered["state"] * torch.exp(-slopes)[:, None, None] + torch.einsum("hk,hv->hkv", k, v)
    remembered["state"] = state
    return torch.einsum("hkv,hk->hv", state, q)


def softmax_read(q: Tensor, k: Tensor, v: Tensor, remembered: dict[str, Any]) -> Tensor:
    """[H, D] of a query [H, D] on all keys and values [Hkv, D] so far; head h reads the pair ⌊h·Hkv/H⌋."""
    remembered["keys"].append(k)
    remembered["values"].append(v)
    repeats = q.shape[0] // k.shape[0]
    keys, values = (torch.stack(remembered[name]).repeat_interleave(repeats, dim=1) for name in ("keys", "values"))
    probabilities = torch.softmax(torch.einsum("hd,thd->ht", q, keys) * q.shape[-1] ** -0.5, dim=-1)
    return torch.einsum("ht,thd->hd", probabilities, values)


def latent_read(q: Tensor, nope: int, remembered: dict[str, Any]) -> Tensor:
    """[H, V] of a query [H, nope + rope] on all latents so far: per token ([H, nope + V], rope key [rope])."""
    expanded, shared_keys = (torch.stack(part) for part in zip(*remembered["latents"], strict=True))
    keys, values = expanded[..., :nope], expanded[..., nope:]  # [T, H, nope], [T, H, V]
    scores = torch.einsum("hd,thd->ht", q[:, :nope], keys) + q[:, nope:] @ shared_keys.T
    return torch.einsum("ht,thd->hd", torch.softmax(scores * q.shape[-1] ** -0.5, dim=-1), values)


def grouped_choice(biased: Tensor, groups: int, kept: int, count: int) -> Tensor:
    """[count] expert indices: the best by `biased` [E] among the `kept` groups whose two best sum up highest."""
    grouped = biased.view(groups, -1)
    best = grouped.topk(min(2, grouped.shape[1]), dim=-1).values.sum(-1).topk(kept).indices
    allowed = torch.full_like(grouped, -torch.inf).index_copy(0, best, grouped[best]).flatten()
    return allowed.topk(count).indices


def mixture(x: Tensor, weights: Weights, chosen: Tensor, share: Tensor, names: Sequence[str]) -> Tensor:
    """Σ share · expert(x) over the chosen experts; `names` of their gate, up and down projections."""
    out = torch.zeros_like(x)
    for weight, expert in zip(share, chosen.tolist(), strict=True):
        out = out + weight * weights.below(f"experts.{expert}").swiglu(x, *names)
    return out
