"""Any of the families as files: `config.json`, `generation_config.json` and safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.checkpoints.bailing import bailing_tensors
from tests.checkpoints.common import Config, Spelling, Tensors
from tests.checkpoints.kimi_linear import kimi_linear_tensors, respell_kimi_linear
from tests.checkpoints.minimax import minimax_tensors, respell_minimax
from tests.checkpoints.minimax_m2 import minimax_m2_tensors, respell_minimax_m2

FP32_ALWAYS = ("A_log", "dt_bias", "expert_bias", "e_score_correction_bias")


@dataclass(frozen=True)
class Family:
    tensors: Callable[[Config, int], Tensors]  # of a configuration and a seed, by their names on the hub
    respell: Callable[[Tensors, Config, Spelling], tuple[Tensors, Config]] | None = None  # None: not in transformers


MINIMAX = Family(minimax_tensors, respell_minimax)
BAILING = Family(bailing_tensors)
FAMILIES = {
    "KimiLinearForCausalLM": Family(kimi_linear_tensors, respell_kimi_linear),
    "MiniMaxText01ForCausalLM": MINIMAX,
    "MiniMaxM1ForCausalLM": MINIMAX,
    "MiniMaxForCausalLM": MINIMAX,
    "MiniMaxM2ForCausalLM": Family(minimax_m2_tensors, respell_minimax_m2),
    "BailingMoeLinearForCausalLM": BAILING,
    "BailingMoeLinearV2ForCausalLM": BAILING,
    "BailingMoeV2_5ForCausalLM": BAILING,
}


def respell(tensors: Tensors, config: Config, spelling: Spelling) -> tuple[Tensors, Config]:
    """The same weights and configuration in other words: `hub` as published; `saved` as transformers'
    `save_pretrained` writes them; `transformers` as its modules call them (experts fused)."""
    if spelling == "hub":
        return tensors, config
    change = FAMILIES[config["architectures"][0]].respell
    if change is None or config["architectures"][0] in ("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM"):
        raise ValueError(f"transformers does not have {config['architectures'][0]}")
    return change(tensors, config, spelling)


def write_checkpoint(
    directory: Path | str,
    config: Config,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    spelling: Spelling = "hub",
) -> Path:
    """Write random weights and their configuration into `directory`, which is made; returns it as a `Path`.

    Every tensor has `dtype` except those of `FP32_ALWAYS`. More than one shard comes with an index file.
    """
    tensors = FAMILIES[config["architectures"][0]].tensors(config, seed)
    tensors = {n: t if n.endswith(FP32_ALWAYS) else t.to(dtype) for n, t in tensors.items()}
    tensors, config = respell(tensors, config | {"dtype": str(dtype).removeprefix("torch.")}, spelling)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps(generation_config(config), indent=2))
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


def generation_config(config: Config) -> Config:
    """The ids of the configuration that are set; 1 ends a sequence where the configuration does not say."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"eos_token_id": 1} | {name: config[name] for name in names if config.get(name) is not None}
