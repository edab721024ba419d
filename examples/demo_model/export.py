"""Writes trained weights as a checkpoint in the published layout.

    python export.py WEIGHTS.safetensors OUT_DIR

OUT_DIR gets config.json, generation_config.json and model.safetensors (bf16; the few tensors that steer decays and
routing stay fp32). The tokenizer files are already there (train_tokenizer.py).
"""

import argparse
import json
from pathlib import Path

import torch
from config import LAYOUTS, BailingConfig, ModelConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

KEEP_FP32 = ("A_log", "dt_bias", "e_score_correction_bias")

# Kimi-Linear's names (the model's own) and those of Ling-2.5; the first pair that fits a name wins
BAILING_NAMES = (
    ("embed_tokens", "word_embeddings"),
    ("self_attn.q_norm", "attention.query_layernorm"),
    ("self_attn.k_norm", "attention.key_layernorm"),
    ("self_attn.o_norm", "attention.g_norm"),
    ("self_attn.o_proj", "attention.dense"),
    ("self_attn.", "attention."),
    ("block_sparse_moe.gate.e_score_correction_bias", "mlp.gate.expert_bias"),
    ("block_sparse_moe.", "mlp."),
)
BAILING_EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def expert_name(block: str, expert: int, part: str, config: ModelConfig) -> str:
    if isinstance(config, BailingConfig):
        return f"{renamed(block, config)}.{expert}.{BAILING_EXPERT[part]}.weight"
    return f"{block}.{expert}.{part}.weight"


def renamed(name: str, config: ModelConfig) -> str:
    if isinstance(config, BailingConfig):
        for mine, theirs in BAILING_NAMES:
            if mine in name:
                return name.replace(mine, theirs)
    return name


def lightning_layers(config: ModelConfig) -> list[str]:
    """Prefixes of the attention tensors whose q, k and v are published as one."""
    if not isinstance(config, BailingConfig):
        return []
    return [f"model.layers.{i}.self_attn." for i in range(config.layers) if not config.is_attention(i)]


def published(
    weights: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """The weights under their published names: one matrix per expert, and lightning's q, k and v in one."""
    weights = dict(weights)
    out: dict[str, Tensor] = {}
    for at in lightning_layers(config):
        fused = torch.cat([weights.pop(f"{at}{n}_proj.weight") for n in "qkv"])
        out[renamed(at + "query_key_value.weight", config)] = fused.to(dtype)
    for name, w in weights.items():
        kept = torch.float32 if name.endswith(KEEP_FP32) else dtype
        if ".experts.w" in name:
            block, part = name.rsplit(".", 1)
            for e in range(w.shape[0]):
                out[expert_name(block, e, part, config)] = w[e].to(kept).contiguous()
        else:
            out[renamed(name, config)] = w.to(kept).contiguous()
    return out


def stacked(tensors: dict[str, Tensor], config: ModelConfig, names: list[str]) -> dict[str, Tensor]:
    """The inverse of `published`, in fp32: the weights that the model calls `names`."""
    tensors = dict(tensors)
    for at in lightning_layers(config):
        fused = tensors.pop(renamed(at + "query_key_value.weight", config))
        for n, part in zip("qkv", fused.chunk(3), strict=True):
            tensors[renamed(f"{at}{n}_proj.weight", config)] = part
    out: dict[str, Tensor] = {}
    for name in names:
        if ".experts.w" in name:
            block, part = name.rsplit(".", 1)
            experts = [tensors[expert_name(block, e, part, config)].float() for e in range(config.experts)]
            out[name] = torch.stack(experts)
        else:
            out[name] = tensors[renamed(name, config)].float()
    return out


def write(weights: dict[str, Tensor], config: ModelConfig, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(published(weights, config, dtype), out / "model.safetensors", metadata={"format": "pt"})
    settings = config.published() | {"dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": [3, 2], "pad_token_id": 0, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def trained_config(weights: Path) -> ModelConfig:
    """The shape that train.py noted in the header of its weights."""
    with safe_open(weights, "pt") as file:
        note = file.metadata() or {}
    return LAYOUTS[note.get("layout", "kimi")](**json.loads(note.get("shape", "{}")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    weights = load_file(args.weights)
    write(weights, trained_config(args.weights), args.out)
    print(f"{sum(w.numel() for w in weights.values()):,} parameters")
    print(f"{(args.out / 'model.safetensors').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
