"""The models of the comparison: their shapes, what a decode step of each must move, and what is asked of Statewise.

Only the standard library: the engines' interpreters import this too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.workload import VOCABULARY

BYTES = {"float32": 4, "bfloat16": 2}
STATE_BYTES = 4  # recurrent states are fp32 in every number format


@dataclass(frozen=True)
class Model:
    """`shape` is what differs from the tiny configuration of `tests/checkpoints/`."""

    title: str
    shape: dict[str, Any]
    step_values: Callable[[dict[str, Any]], tuple[int, int]]  # of a shape: weights that a token needs, state values
    over_transformers: tuple[float, float, float]  # times faster: decode at batch 1 and 16, prefill
    # ms per step, tokens/s of 16 sequences and of the prefill, by number format; only where such figures were asked
    absolute: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def step_bytes(self, dtype: str) -> int:
        """Bytes that a decode step at batch 1 must move: the weights in use once, the recurrent state in and out."""
        weights, state = self.step_values(self.shape)
        return weights * BYTES[dtype] + 2 * state * STATE_BYTES


def kimi_linear_step(shape: dict[str, Any]) -> tuple[int, int]:
    hidden, linear, layers = shape["hidden_size"], shape["linear_attn_config"], shape["num_hidden_layers"]
    heads, width = linear["num_heads"], linear["head_dim"]
    kda = 4 * heads * width * hidden + 2 * width * (hidden + heads * width) + heads * hidden
    nope, rope, value = shape["qk_nope_head_dim"], shape["qk_rope_head_dim"], shape["v_head_dim"]
    latent, queries = shape["kv_lora_rank"], shape["num_attention_heads"]
    mla = hidden * (queries * (nope + rope + value) + latent + rope) + latent * queries * (nope + value)
    expert = 3 * hidden * shape["moe_intermediate_size"]
    moe = (shape["num_experts_per_token"] + 1) * expert + shape["num_experts"] * hidden
    weights = len(linear["kda_layers"]) * kda + len(linear["full_attn_layers"]) * mla + (layers - 1) * moe
    weights += 3 * hidden * shape["intermediate_size"] + shape["vocab_size"] * hidden
    return weights, len(linear["kda_layers"]) * heads * width * width


def minimax_step(shape: dict[str, Any]) -> tuple[int, int]:
    hidden, heads, width = shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]
    kinds = shape["layer_types"]
    linear, full = kinds.count("linear_attention"), kinds.count("full_attention")
    lightning = 5 * heads * width * hidden
    softmax = 2 * (heads + shape["num_key_value_heads"]) * width * hidden
    moe = 3 * shape["num_experts_per_tok"] * shape["intermediate_size"] * hidden + shape["num_local_experts"] * hidden
    weights = linear * lightning + full * softmax + len(kinds) * moe + shape["vocab_size"] * hidden
    return weights, linear * heads * width * width


KIMI_LINEAR = Model(
    "Kimi-Linear, 110 M",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_token": 2,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "linear_attn_config": {
            "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11],
            "full_attn_layers": [4, 8, 12],
            "num_heads": 8,
            "head_dim": 128,
        },
        "model_max_length": 65536,
    },
    kimi_linear_step,
    over_transformers=(3, 5, 10),
    absolute={"float32": (9.0, 800.0, 1500.0), "bfloat16": (6.0, 1000.0, 4000.0)},
)

RESIDUAL = 3.5565588200778455  # as published; llama.cpp has one alpha for all blocks and no beta

MINIMAX = Model(
    "MiniMax, 112 M",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_hidden_layers": 12,
        "layer_types": 3 * [*3 * ["linear_attention"], "full_attention"],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rotary_dim": 128,  # transformers rotates whole heads whatever this says
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-6,  # that of the norm behind lightning attention, for which llama.cpp takes the model's
        "block_size": 256,
        "full_attn_alpha_factor": RESIDUAL,
        "full_attn_beta_factor": 1.0,
        "linear_attn_alpha_factor": RESIDUAL,
        "linear_attn_beta_factor": 1.0,
        "mlp_alpha_factor": RESIDUAL,
        "mlp_beta_factor": 1.0,
        "max_position_embeddings": 65536,
    },
    minimax_step,
    over_transformers=(3, 5, 5),
)

MODELS = {"kimi_linear": KIMI_LINEAR, "minimax": MINIMAX}
