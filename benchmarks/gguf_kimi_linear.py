"""Writes a Kimi-Linear checkpoint as GGUF, so that llama.cpp runs the very weights that the other engines run.

    python -m benchmarks.gguf_kimi_linear CHECKPOINT FILE.gguf [--dtype float32|bfloat16]

Needs `gguf`, `numpy` and `safetensors`. The file has no vocabulary: token ids are fed directly.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found,unused-ignore]
import numpy as np
from gguf import MODEL_TENSOR as T
from gguf.quants import quantize  # type: ignore[import-not-found,unused-ignore]
from safetensors import safe_open

Array = np.ndarray[Any, np.dtype[np.float32]]
Named = tuple[T, str, Array]  # the tensor, the last part of its GGUF name, its value

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.KIMI_LINEAR]
FP32_ALWAYS = {T.FFN_GATE_INP, T.SSM_CONV1D_Q, T.SSM_CONV1D_K, T.SSM_CONV1D_V, T.SSM_A}  # and every vector
NORMS = {"input_layernorm": T.ATTN_NORM, "post_attention_layernorm": T.FFN_NORM}
KDA = {
    "q_proj": T.ATTN_Q,
    "k_proj": T.ATTN_K,
    "v_proj": T.ATTN_V,
    "o_proj": T.ATTN_OUT,
    "f_a_proj": T.SSM_F_A,
    "f_b_proj": T.SSM_F_B,
    "g_a_proj": T.SSM_G_A,
    "g_b_proj": T.SSM_G_B,
    "b_proj": T.SSM_BETA,
    "o_norm": T.SSM_NORM,
}
CONVOLUTIONS = {"q_conv1d": T.SSM_CONV1D_Q, "k_conv1d": T.SSM_CONV1D_K, "v_conv1d": T.SSM_CONV1D_V}
MLA = {
    "q_proj": T.ATTN_Q,
    "kv_a_proj_with_mqa": T.ATTN_KV_A_MQA,
    "kv_a_layernorm": T.ATTN_KV_A_NORM,
    "o_proj": T.ATTN_OUT,
}
DENSE = {"gate_proj": T.FFN_GATE, "up_proj": T.FFN_UP, "down_proj": T.FFN_DOWN}
SHARED = {"gate_proj": T.FFN_GATE_SHEXP, "up_proj": T.FFN_UP_SHEXP, "down_proj": T.FFN_DOWN_SHEXP}
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

    def tensors(self) -> Iterator[tuple[str, T, Array]]:
        """Everything that the GGUF file holds: name there, tensor, value."""
        layers = self.config["num_hidden_layers"]
        for name, tensor in {
            "model.embed_tokens": T.TOKEN_EMBD,
            "model.norm": T.OUTPUT_NORM,
            "lm_head": T.OUTPUT,
        }.items():
            yield f"{gguf.TENSOR_NAMES[tensor]}.weight", tensor, self[f"{name}.weight"]
        for layer in range(layers):
            for tensor, suffix, value in self.layer(layer):
                stem = gguf.TENSOR_NAMES[tensor].format(bid=layer)
                yield f"{stem}.{suffix}".rstrip("."), tensor, value

    def layer(self, layer: int) -> Iterator[Named]:
        prefix = f"model.layers.{layer}."
        linear = layer + 1 in self.config["linear_attn_config"]["kda_layers"]
        yield from self.renamed(prefix, NORMS)
        yield from (self.kda if linear else self.mla)(f"{prefix}self_attn.")
        if layer < self.config["first_k_dense_replace"]:
            yield from self.renamed(f"{prefix}mlp.", DENSE)
        else:
            yield from self.moe(f"{prefix}block_sparse_moe.")

    def kda(self, prefix: str) -> Iterator[Named]:
        yield from self.renamed(prefix, KDA)
        for name, tensor in CONVOLUTIONS.items():
            yield tensor, "weight", self[f"{prefix}{name}.weight"][None]  # [1, channels, 1, taps]
        yield T.SSM_A, "", -np.exp(self[f"{prefix}A_log"])  # [1, 1, heads, 1]; llama.cpp wants the rate itself
        yield T.SSM_DT, "bias", self[f"{prefix}dt_bias"]

    def mla(self, prefix: str) -> Iterator[Named]:
        """The latent cache of llama.cpp wants `kv_b_proj` in two parts, the key part transposed per head."""
        nope, value = self.config["qk_nope_head_dim"], self.config["v_head_dim"]
        yield from self.renamed(prefix, MLA)
        heads = self[f"{prefix}kv_b_proj.weight"].reshape(-1, nope + value, self.config["kv_lora_rank"])
        yield T.ATTN_K_B, "weight", heads[:, :nope].transpose(0, 2, 1)
        yield T.ATTN_V_B, "weight", heads[:, nope:]

    def moe(self, prefix: str) -> Iterator[Named]:
        yield T.FFN_GATE_INP, "weight", self[f"{prefix}gate.weight"]
        yield T.FFN_EXP_PROBS_B, "bias", self[f"{prefix}gate.e_score_correction_bias"]
        for name, tensor in EXPERTS.items():
            experts = range(self.config["num_experts"])
            yield tensor, "weight", np.stack([self[f"{prefix}experts.{e}.{name}.weight"] for e in experts])
        yield from self.renamed(f"{prefix}shared_experts.", SHARED)


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The metadata of llama.cpp's `kimi-linear`: the latent is one shared key head, KDA layers have none."""
    linear, latent, rope = config["linear_attn_config"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    if linear["num_heads"] != config["num_attention_heads"]:
        raise ValueError("llama.cpp reads one number of heads for KDA and MLA layers")
    layers = range(1, config["num_hidden_layers"] + 1)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["model_max_length"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([int(layer in linear["full_attn_layers"]) for layer in layers])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_ssm_conv_kernel(linear["short_conv_kernel_size"])
    writer.add_kda_head_dim(linear["head_dim"])
    writer.add_kv_lora_rank(latent)
    writer.add_rope_dimension_count(rope)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_token"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_tokenizer_model("none")


def write_gguf(directory: Path, file: Path, dtype: str) -> None:
    """Write the fp32 checkpoint in `directory` to `file`, its matrices in `dtype`, everything else in fp32."""
    checkpoint = Checkpoint(directory)
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    add_settings(writer, checkpoint.config)
    for name, tensor, value in checkpoint.tensors():
        exact = value.ndim == 1 or tensor in FP32_ALWAYS or kind is gguf.GGMLQuantizationType.F32
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
