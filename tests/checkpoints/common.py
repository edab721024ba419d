"""What the writers of all families share: random draws, the frame around the layers, and experts in one piece."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

Config = dict[str, Any]
Tensors = dict[str, Tensor]
Spelling = Literal["hub", "saved", "transformers"]

HEAD_GAIN = 1.6  # of lm_head on normed rows: logits spread over about ±6
BIAS_SPREAD = 0.2  # of the biases that routers select experts by


class Random:
    """Draws the initial weights; one generator, so that a seed gives the same checkpoint everywhere."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float, mean: float = 0.0) -> Tensor:
        return torch.empty(shape).normal_(mean, std, generator=self.generator)

    def uniform(self, *shape: int, low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=self.generator)

    def linear(self, rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return self.normal(rows, columns, std=gain / math.sqrt(columns))

    def norm(self, width: int) -> Tensor:
        return self.normal(width, mean=1.0, std=0.3)


def overridden(config: Config, overrides: Config, optional: Iterable[str] = ()) -> Config:
    """The configuration with other values; `optional` are keys that it may have but does not by default."""
    unknown = overrides.keys() - config.keys() - set(optional)
    if unknown:
        raise ValueError(f"not in the configuration: {sorted(unknown)}")
    return config | overrides


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def model(
    config: Config, random: Random, layer: Callable[[int], Tensors], embedding: str = "model.embed_tokens"
) -> Tensors:
    """The tensors of `layer(i)` for every layer, its two norms, and what stands before and behind the layers."""
    hidden, vocabulary, tied = config["hidden_size"], config["vocab_size"], config["tie_word_embeddings"]
    spread = HEAD_GAIN / math.sqrt(hidden) if tied else 1.0
    tensors = {f"{embedding}.weight": random.normal(vocabulary, hidden, std=spread)}
    for index in range(config["num_hidden_layers"]):
        tensors |= below(f"model.layers.{index}.", layer(index) | layer_norms(hidden, random))
    tensors["model.norm.weight"] = random.norm(hidden)
    if not tied:
        tensors["lm_head.weight"] = random.linear(vocabulary, hidden, gain=HEAD_GAIN)
    return tensors


def layer_norms(hidden: int, random: Random) -> Tensors:
    return {f"{name}.weight": random.norm(hidden) for name in ("input_layernorm", "post_attention_layernorm")}


def swiglu(
    hidden: int, width: int, random: Random, names: Iterable[str] = ("gate_proj", "up_proj", "down_proj")
) -> Tensors:
    gate, up, down = names
    return {
        f"{gate}.weight": random.linear(width, hidden),
        f"{up}.weight": random.linear(width, hidden),
        f"{down}.weight": random.linear(hidden, width),
    }


def experts(count: int, hidden: int, width: int, random: Random, names: Iterable[str] = ("w1", "w3", "w2")) -> Tensors:
    """`count` SwiGLU experts, each tensor by itself as on the hub; `names` of gate, up and down."""
    tensors: Tensors = {}
    for expert in range(count):
        tensors |= below(f"experts.{expert}.", swiglu(hidden, width, random, names))
    return tensors


def fuse_experts(tensors: Tensors) -> Tensors:
    """The same weights with the experts of a layer in two tensors, as transformers' modules keep them.

    `experts.gate_up_proj` is [E, 2·width, hidden], gate before up; `experts.down_proj` is [E, hidden, width].
    """
    fused: Tensors = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts\.)(\d+)\.w1\.weight", name)
        if found and found[2] == "0":
            count = sum(other.startswith(found[1]) for other in tensors) // 3
            w1, w2, w3 = (torch.stack([tensors[f"{found[1]}{e}.w{i}.weight"] for e in range(count)]) for i in (1, 2, 3))
            fused |= {f"{found[1]}gate_up_proj": torch.cat([w1, w3], dim=1), f"{found[1]}down_proj": w2}
        elif not re.search(r"\.experts\.\d", name):
            fused[name] = tensor
    return fused
