"""What the GGUF files of all families share: the checkpoint they are made from, and the names of its tensors there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found,unused-ignore]
import numpy as np
from gguf import MODEL_TENSOR as T
from safetensors import safe_open

Array = np.ndarray[Any, np.dtype[np.float32]]
Named = tuple[T, str, Array]  # the tensor, the last part of its GGUF name, its value

FRAME = {"model.embed_tokens": T.TOKEN_EMBD, "model.norm": T.OUTPUT_NORM, "lm_head": T.OUTPUT}
NORMS = {"input_layernorm": T.ATTN_NORM, "post_attention_layernorm": T.FFN_NORM}
EXPERTS = {"w1": T.FFN_GATE_EXP, "w3": T.FFN_UP_EXP, "w2": T.FFN_DOWN_EXP}


class Checkpoint:
    """Tensors of an fp32 checkpoint directory, by their names on the hub."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.files = [safe_open(file, "numpy") for file in sorted(directory.glob("*.safetensors"))]
        self.places = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Array:
        array: Array = self.places[name].get_tensor(name)
        return array

    def renamed(self, prefix: str, names: dict[str, T]) -> Iterator[Named]:
        for name, tensor in names.items():
            yield tensor, "weight", self[f"{prefix}{name}.weight"]

    def experts(self, prefix: str, count: int) -> Iterator[Named]:
        """The router and the experts below `prefix`, each of their matrices as one tensor of all experts."""
        yield T.FFN_GATE_INP, "weight", self[f"{prefix}gate.weight"]
        for name, tensor in EXPERTS.items():
            yield tensor, "weight", np.stack([self[f"{prefix}experts.{e}.{name}.weight"] for e in range(count)])


@dataclass(frozen=True)
class Family:
    architecture: str  # llama.cpp's name
    add_settings: Callable[[gguf.GGUFWriter, dict[str, Any]], None]  # from a configuration
    layer: Callable[[Checkpoint, int], Iterator[Named]]  # all of it but its two norms
    fp32_always: frozenset[T]  # besides every vector
