"""Compares the training model with transformers' Kimi-Linear on a checkpoint written by export.py (fp32, CPU).

    python check_transformers.py [CHECKPOINT]

Without a checkpoint it writes one with random weights. Needs transformers 5.23.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from config import ModelConfig
from export import stacked, write
from model import DemoModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = DemoModel(ModelConfig())
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.checkpoint or Path(scratch)
        if args.checkpoint is None:
            with torch.no_grad():
                for name, w in model.weights.items():
                    if name.endswith("correction_bias"):
                        w.normal_(0.0, 0.1)
                    elif "norm" in name:
                        w.add_(0.2 * torch.randn_like(w))
                    elif "lm_head" in name:
                        w.mul_(5.0)
            write({n: w.detach() for n, w in model.weights.items()}, model.config, folder, torch.float32)
        weights = stacked(load_file(folder / "model.safetensors"), model.config, list(model.weights))
        with torch.no_grad():
            for name, w in model.weights.items():
                w.copy_(weights[name])
        model.prepare()
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(12, 4096, (2, 150))
    with torch.no_grad():
        mine, theirs = model.logits(tokens), reference(tokens).logits
    print(f"largest difference {(mine - theirs).abs().max():.2e}, logits up to {theirs.abs().max():.1f}")


if __name__ == "__main__":
    main()
