"""Writes trained weights as a checkpoint in the published layout.

    python export.py WEIGHTS.safetensors OUT_DIR

OUT_DIR gets config.json, generation_config.json and model.safetensors (bf16; the few tensors that steer decays and
routing stay fp32). The tokenizer files are already there (train_tokenizer.py).
"""

import argparse
import json
from pathlib import Path

import torch
from config import ModelConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

KEEP_FP32 = ("A_log", "dt_bias", "e_score_correction_bias")


def published(weights: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The weights under their published names: one w1, w2, w3 per expert."""
    out: dict[str, Tensor] = {}
    for name, w in weights.items():
        kept = torch.float32 if name.endswith(KEEP_FP32) else dtype
        if ".experts.w" in name:
            block, part = name.rsplit(".", 1)
            for e in range(w.shape[0]):
                out[f"{block}.{e}.{part}.weight"] = w[e].to(kept).contiguous()
        else:
            out[name] = w.to(kept).contiguous()
    return out


def stacked(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `published`, in fp32."""
    out = {name: w.float() for name, w in tensors.items() if ".experts." not in name}
    for i in range(1, config.layers):
        block = f"model.layers.{i}.block_sparse_moe.experts"
        for part in ("w1", "w2", "w3"):
            experts = [tensors[f"{block}.{e}.{part}.weight"].float() for e in range(config.experts)]
            out[f"{block}.{part}"] = torch.stack(experts)
    return out


def write(weights: dict[str, Tensor], config: ModelConfig, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(published(weights, dtype), out / "model.safetensors", metadata={"format": "pt"})
    settings = config.published() | {"dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": [3, 2], "pad_token_id": 0, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    weights = load_file(args.weights)
    write(weights, ModelConfig(), args.out)
    print(f"{sum(w.numel() for w in weights.values()):,} parameters")
    print(f"{(args.out / 'model.safetensors').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
