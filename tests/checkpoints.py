"""Small random Kimi-Linear checkpoints in the published layout, and what transformers answers on them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

Spelling = Literal["hub", "saved", "transformers"]

FP32_ALWAYS = ("A_log", "dt_bias", "e_score_correction_bias")


def kimi_linear_config(**overrides: Any) -> dict[str, Any]:
    """`config.json` of a tiny Kimi-Linear: six layers, MLA at the 1-based places 4 and 6, layer 1 dense.

    Widths differ from each other wherever the architecture allows it, so that a mixed-up axis is a shape error.
    `linear_attn_config` may be given in part; everything else replaces the value here.
    """
    linear = {"kda_layers": [1, 2, 3, 5], "full_attn_layers": [4, 6], "num_heads": 4, "head_dim": 32}
    linear |= {"short_conv_kernel_size": 4} | overrides.pop("linear_attn_config", {})
    config: dict[str, Any] = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "dtype": "float32",
        "vocab_size": 320,
        "hidden_size": 96,
        "head_dim": 24,  # a decoy, as in the published file: no layer has this width
        "intermediate_size": 160,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": 2.446,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "mla_use_nope": True,
        "linear_attn_config": linear,
        "model_max_length": 4096,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    unknown = overrides.keys() - config.keys()
    if unknown:
        raise ValueError(f"not in the configuration: {sorted(unknown)}")
    return config | overrides


class _Random:
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


def kimi_linear_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random fp32 weights by their names on the hub: logits spread over about ±6, decays and gates are lively."""
    random, hidden, vocabulary = _Random(seed), config["hidden_size"], config["vocab_size"]
    tensors = {"model.embed_tokens.weight": random.normal(vocabulary, hidden, std=1.0)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        linear = layer + 1 in config["linear_attn_config"]["kda_layers"]
        mixer = _kda(config, random) if linear else _mla(config, random)
        dense = layer < config["first_k_dense_replace"]
        tensors |= {f"{prefix}self_attn.{name}": tensor for name, tensor in mixer.items()}
        if dense:
            tensors |= {f"{prefix}mlp.{name}": t for name, t in _swiglu(hidden, config["intermediate_size"], random)}
        else:
            tensors |= {f"{prefix}block_sparse_moe.{name}": tensor for name, tensor in _moe(config, random)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = random.norm(hidden)
    tensors["model.norm.weight"] = random.norm(hidden)
    tensors["lm_head.weight"] = random.linear(vocabulary, hidden, gain=1.6)
    return tensors


def _kda(config: dict[str, Any], random: _Random) -> dict[str, Tensor]:
    hidden, linear = config["hidden_size"], config["linear_attn_config"]
    heads, width, taps = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    channels = heads * width
    step = torch.exp(random.uniform(channels, low=math.log(0.001), high=math.log(0.1)))
    tensors = {f"{name}_proj.weight": random.linear(channels, hidden) for name in "qkv"}
    tensors |= {f"{name}_conv1d.weight": random.normal(channels, 1, taps, std=0.5) for name in "qkv"}
    for gate in "fg":
        tensors[f"{gate}_a_proj.weight"] = random.linear(width, hidden)
        tensors[f"{gate}_b_proj.weight"] = random.linear(channels, width)
    return tensors | {
        "dt_bias": step + torch.log(-torch.expm1(-step)),  # softplus(dt_bias) = step
        "A_log": torch.log(random.uniform(1, 1, heads, 1, low=1.0, high=16.0)),
        "b_proj.weight": random.linear(heads, hidden),
        "o_norm.weight": random.norm(width),
        "o_proj.weight": random.linear(hidden, channels),
    }


def _mla(config: dict[str, Any], random: _Random) -> dict[str, Tensor]:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return {
        "q_proj.weight": random.linear(heads * (nope + rope), hidden),
        "kv_a_proj_with_mqa.weight": random.linear(latent + rope, hidden),
        "kv_a_layernorm.weight": random.norm(latent),
        "kv_b_proj.weight": random.linear(heads * (nope + value), latent),
        "o_proj.weight": random.linear(hidden, heads * value),
    }


def _swiglu(hidden: int, width: int, random: _Random) -> Iterator[tuple[str, Tensor]]:
    for name in ("gate", "up"):
        yield f"{name}_proj.weight", random.linear(width, hidden)
    yield "down_proj.weight", random.linear(hidden, width)


def _moe(config: dict[str, Any], random: _Random) -> Iterator[tuple[str, Tensor]]:
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    yield "gate.weight", random.linear(experts, hidden)
    yield "gate.e_score_correction_bias", random.normal(experts, std=0.2)
    for expert in range(experts):
        for name, (_, tensor) in zip(("w1", "w3", "w2"), _swiglu(hidden, width, random), strict=True):
            yield f"experts.{expert}.{name}.weight", tensor
    for name, tensor in _swiglu(hidden, width * config["num_shared_experts"], random):
        yield f"shared_experts.{name}", tensor


def respell(tensors: dict[str, Tensor], config: dict[str, Any], spelling: Spelling) -> dict[str, Tensor]:
    """The same weights under other names: `hub` as published; `saved` as transformers' `save_pretrained` writes
    them (the dense layers as `block_sparse_moe`); `transformers` as its modules call them (experts fused)."""
    if spelling == "hub":
        return tensors
    if spelling == "saved":
        return {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in tensors.items()}
    spelled = {}
    for name, tensor in tensors.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        for gate in ("f_a_proj", "f_b_proj", "A_log", "dt_bias"):
            name = name.replace(f"self_attn.{gate}", f"self_attn.forget_gate.{gate}")
        if ".experts." in name or "v_conv1d" in name or "k_conv1d" in name:
            continue
        if "q_conv1d" in name:
            name, tensor = _fuse_conv(name, tensors)
        spelled[name] = tensor
        if name.endswith("mlp.gate.weight"):
            spelled |= _fuse_experts(name.removesuffix("gate.weight"), tensors, config["num_experts"])
    return spelled


def _fuse_conv(name: str, tensors: dict[str, Tensor]) -> tuple[str, Tensor]:
    parts = [tensors[name.replace("q_conv1d", f"{part}_conv1d")] for part in "qkv"]
    return name.replace("q_conv1d", "conv1d"), torch.cat(parts)


def _fuse_experts(prefix: str, tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    source = prefix.replace(".mlp.", ".block_sparse_moe.") + "experts."
    w1, w2, w3 = (torch.stack([tensors[f"{source}{e}.w{i}.weight"] for e in range(experts)]) for i in (1, 2, 3))
    return {f"{prefix}experts.gate_up_proj": torch.cat([w1, w3], dim=1), f"{prefix}experts.down_proj": w2}


def write_checkpoint(
    directory: Path | str,
    config: dict[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    spelling: Spelling = "hub",
) -> Path:
    """Write random weights and their configuration into `directory`, which is made; returns it as a `Path`.

    Every tensor has `dtype` except those of `FP32_ALWAYS`. More than one shard comes with an index file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = respell(kimi_linear_tensors(config, seed), config, spelling)
    tensors = {n: t if n.endswith(FP32_ALWAYS) else t.to(dtype) for n, t in tensors.items()}
    config = config | {"dtype": str(dtype).removeprefix("torch.")}
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(tensors)
    places: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def reference_logits(directory: Path | str, token_ids: Sequence[int]) -> Tensor:
    """[T, vocabulary] fp32: what transformers answers on a `hub` or `saved` checkpoint, one pass, no cache.

    The model and the answer are kept for the rest of the test session; do not write to the result.
    """
    return _transformers_logits(str(directory), tuple(token_ids))


@functools.cache
def _transformers_logits(directory: str, token_ids: tuple[int, ...]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = _transformers_model(directory)(torch.tensor([token_ids]), use_cache=False).logits
    return logits[0].float().clone()


@functools.cache
def _transformers_model(directory: str) -> Any:
    from transformers import KimiLinearForCausalLM

    return KimiLinearForCausalLM.from_pretrained(  # in evaluation mode
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
