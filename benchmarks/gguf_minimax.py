"""MiniMax, in the `-hf` layout, as llama.cpp wants it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf  # type: ignore[import-not-found,unused-ignore]
from gguf import MODEL_TENSOR as T

from benchmarks.gguf_checkpoint import Checkpoint, Family, Named

ARCHITECTURE = "minimax-01"  # newer than the package `gguf`, which does not list it
LIGHTNING = {"qkv_proj": T.ATTN_QKV, "output_gate": T.ATTN_GATE, "norm": T.ATTN_NORM_2, "out_proj": T.ATTN_OUT}
SOFTMAX = {"q_proj": T.ATTN_Q, "k_proj": T.ATTN_K, "v_proj": T.ATTN_V, "o_proj": T.ATTN_OUT}
LIGHTNING_NORM_EPS = 1e-6  # of the model; llama.cpp has one epsilon for all norms
BLOCKS = ("full_attn", "linear_attn", "mlp")


def layer(checkpoint: Checkpoint, index: int) -> Iterator[Named]:
    prefix, config = f"model.layers.{index}.", checkpoint.config
    linear = config["layer_types"][index] == "linear_attention"
    yield from checkpoint.renamed(f"{prefix}self_attn.", LIGHTNING if linear else SOFTMAX)
    yield from checkpoint.experts(f"{prefix}block_sparse_moe.", config["num_local_experts"])


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """llama.cpp has one alpha for all residual sums and no beta, and a softmax layer at a fixed interval."""
    alphas = {config[f"{block}_alpha_factor"] for block in BLOCKS}
    if len(alphas) != 1 or any(config[f"{block}_beta_factor"] != 1.0 for block in BLOCKS):
        raise ValueError("llama.cpp reads one alpha for all blocks, and no beta")
    if config["rms_norm_eps"] != LIGHTNING_NORM_EPS:
        raise ValueError(f"llama.cpp would not take {LIGHTNING_NORM_EPS} for the norm behind lightning attention")
    kinds = config["layer_types"]
    interval = kinds.index("full_attention") + 1
    if any((kind == "full_attention") != ((i + 1) % interval == 0) for i, kind in enumerate(kinds)):
        raise ValueError("softmax layers must come at a fixed interval")
    writer.add_full_attention_interval(interval)
    writer.add_residual_scale(alphas.pop())
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["rotary_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


FAMILY = Family(ARCHITECTURE, add_settings, layer, frozenset({T.FFN_GATE_INP}))
