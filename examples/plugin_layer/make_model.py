"""Write a tiny model with random weights whose linear layers are gated retention: python make_model.py DIRECTORY"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from statewise.config import EngineConfig
from statewise.layers.parameters import Component
from statewise.models.registry import build, read_model_config

CONFIG = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "replace_layers": {"minimax_text_01_attention": "gated_retention"},
    "dtype": "float32",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "attn_type_list": [0, 0, 0, 1],  # three linear layers, then one of softmax attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}


def write_model(directory: Path, seed: int = 0) -> None:
    """config.json and model.safetensors. The model itself says which tensors it reads."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    model_class, config, _ = read_model_config(directory)
    model = build(model_class, config, EngineConfig())
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for component in model.modules():
        if isinstance(component, Component):
            for slot in component.slots(frozenset()):
                drawn = torch.randn(slot.shape, generator=random)
                # One axis is the weight of a norm.
                tensors[slot.names[0]] = 1 + drawn / 10 if drawn.ndim == 1 else drawn / math.sqrt(drawn.shape[-1])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_model(Path(sys.argv[1]))
    print(f"written to {sys.argv[1]}")
