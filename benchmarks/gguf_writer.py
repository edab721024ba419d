"""Writes a checkpoint as GGUF, so that llama.cpp runs the very weights that the other engines run.

    python -m benchmarks.gguf_writer CHECKPOINT FILE.gguf [--dtype float32|bfloat16]

Needs `gguf`, `numpy` and `safetensors`. The file has no vocabulary: token ids are fed directly.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf  # type: ignore[import-not-found,unused-ignore]
import numpy as np
from gguf.quants import quantize  # type: ignore[import-not-found,unused-ignore]

from benchmarks import gguf_kimi_linear, gguf_minimax
from benchmarks.gguf_checkpoint import FRAME, NORMS, Checkpoint, Family, Named

FAMILIES = {"KimiLinearForCausalLM": gguf_kimi_linear.FAMILY, "MiniMaxForCausalLM": gguf_minimax.FAMILY}


def named_tensors(checkpoint: Checkpoint, family: Family) -> Iterator[tuple[str, Named]]:
    """Everything that the GGUF file holds, with its name there."""
    for entry in checkpoint.renamed("", FRAME):
        yield f"{gguf.TENSOR_NAMES[entry[0]]}.weight", entry
    for index in range(checkpoint.config["num_hidden_layers"]):
        norms = checkpoint.renamed(f"model.layers.{index}.", NORMS)
        for entry in (*norms, *family.layer(checkpoint, index)):
            tensor, suffix, _ = entry
            yield f"{gguf.TENSOR_NAMES[tensor].format(bid=index)}.{suffix}".rstrip("."), entry


def write_gguf(directory: Path, file: Path, dtype: str) -> None:
    """Write the fp32 checkpoint in `directory` to `file`, its matrices in `dtype`, everything else in fp32."""
    checkpoint = Checkpoint(directory)
    config = checkpoint.config
    family = FAMILIES[config["architectures"][0]]
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    writer = gguf.GGUFWriter(file, family.architecture)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")
    family.add_settings(writer, config)
    for name, (tensor, _, value) in named_tensors(checkpoint, family):
        exact = value.ndim == 1 or tensor in family.fp32_always or kind is gguf.GGMLQuantizationType.F32
        value = np.ascontiguousarray(value, dtype=np.float32)
        if exact:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, help="directory of an fp32 checkpoint")
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    write_gguf(arguments.checkpoint, arguments.file, arguments.dtype)


if __name__ == "__main__":
    main()
