"""Configurations that cannot be right: one sentence that names the key, before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from statewise import LLM
from statewise.api.summary import inspect_model
from statewise.config import EngineConfig, Ranks
from statewise.errors import CheckpointError, ConfigError, PluginError
from statewise.layers.linear_attention.bailing import BailingMoeLinearAttention
from statewise.layers.linear_attention.slopes import decay_slopes
from statewise.models.registry import read_model_config
from tests.checkpoints import bailing_config, minimax_config, minimax_m2_config, write_checkpoint

MINIMAX, RING, LING, M2 = minimax_config(), bailing_config(), bailing_config("v2_5"), minimax_m2_config()
HF = minimax_config("hf")

REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "short list of kinds": (MINIMAX, {"attn_type_list": [0, 1]}, "'attn_type_list' must have 5 entries.* found 2"),
    "long list of kinds": (HF, {"layer_types": ["linear_attention"] * 6}, "'layer_types' must have 5 entries.*found 6"),
    "unknown kind": (MINIMAX, {"attn_type_list": [0, 1, 2, 0, 1]}, "'attn_type_list' must hold 0 or 1, found 2"),
    "unknown word": (
        HF,
        {"layer_types": ["linear_attention"] * 4 + ["sliding_attention"]},
        "'layer_types' must hold 'linear_attention' or 'full_attention', found 'sliding_attention'",
    ),
    "no list of kinds": (MINIMAX, {"attn_type_list": None}, "'attn_type_list' or 'layer_types' is missing"),
    "list of kinds is no list": (MINIMAX, {"attn_type_list": "0101"}, "'attn_type_list' must be a list of integers"),
    "no head_dim": (MINIMAX, {"head_dim": None}, "'head_dim' is missing"),
    "odd rotary_dim": (MINIMAX, {"rotary_dim": 15}, "must give an even number of at most 32 rotated dims, found 15"),
    "wide rotary_dim": (MINIMAX, {"rotary_dim": 64}, "must give an even number of at most 32 rotated dims, found 64"),
    "kv heads": (MINIMAX, {"num_key_value_heads": 3}, "'num_key_value_heads' must divide the 4 heads .* found 3"),
    "top k": (MINIMAX, {"num_experts_per_tok": 9}, "'num_experts_per_tok' must be an integer from 1 to 8, found 9"),
    "shared widths": (
        MINIMAX,
        {"shared_intermediate_size": [8, 8]},
        "must be one width or one for each of the 5 layers",
    ),
    "shared mode": (
        MINIMAX,
        {"shared_intermediate_size": 8, "shared_moe_mode": "softmax"},
        "'shared_moe_mode' = 'softmax' is not supported, only 'sigmoid'",
    ),
    "window": (MINIMAX, {"sliding_window": 4096}, "'sliding_window' = 4096 is not supported"),
    "yarn": (RING, {"rope_scaling": {"type": "yarn", "factor": 2}}, "'rope_scaling': 'type' = 'yarn' is not supported"),
    "yarn of transformers": (
        HF,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        "'rope_parameters': 'rope_type' = 'yarn' is not supported",
    ),
    "rotation by kind": (
        HF,
        {"rope_parameters": {"full_attention": {"rope_theta": 1e7}}},
        "'rope_parameters': parameters per kind of layer are not supported",
    ),
    "two rotated widths": (
        MINIMAX,
        {"partial_rotary_factor": 1.0},
        "'partial_rotary_factor' gives 32 rotated dims and 'rotary_dim' 16; they must agree",
    ),
    "odd rope key": (LING, {"qk_rope_head_dim": 15}, "'qk_rope_head_dim' must be even, found 15"),
    "the key that is there": (RING, {"head_dim": 0}, "'head_dim' must be an integer from 1 to 1024, found 0"),
    "no head_dim in any spelling": (RING, {"head_dim": None}, "'linear_head_dim' or 'head_dim' is missing"),
    "alpha": (MINIMAX, {"layernorm_mlp_alpha": "1"}, "'layernorm_mlp_alpha' must be a number"),
    "slope formula": (RING, {"slope_formula": "vllm"}, "'slope_formula' must be 'serving' or 'hf', found 'vllm'"),
    "norm groups": (RING, {"group_norm_size": 7}, "'group_norm_size' is a number of groups .* found 7"),
    "no group size": (RING, {"layer_group_size": None}, "'layer_group_size' is missing"),
    "group size 0": (LING, {"layer_group_size": 0}, "'layer_group_size' must be an integer from 1"),
    "partial rotation": (RING, {"partial_rotary_factor": 0.3}, "must give an even number of at most 32 rotated dims"),
    "bias": (RING, {"use_qkv_bias": True}, "'use_qkv_bias' = True is not supported, only False"),
    "router": (LING, {"score_function": "softmax"}, "'score_function' = 'softmax' is not supported"),
    "shared experts": (
        bailing_config(moe_shared_expert_intermediate_size=48),
        {"moe_shared_expert_intermediate_size": 50},
        "'moe_shared_expert_intermediate_size' must be a multiple of 'moe_intermediate_size' 48, found 50",
    ),
    "expert groups": (RING, {"n_group": 3, "topk_group": 2}, "8 experts cannot give 2 per token"),
    "half rotation": (LING, {"rope_interleave": False}, "'rope_interleave' = False is not supported"),
    "norm of a head": (M2, {"qk_norm_type": "per_head"}, "'qk_norm_type' = 'per_head' is not supported"),
    "linear layers in M2": (
        M2,
        {"attn_type_list": [0, 1, 1, 1]},
        "'attn_type_list' must be 1 for each of the 4 layers",
    ),
    "replacement is no object": (RING, {"replace_layers": ["a"]}, "'replace_layers' must"),
    "replacement of nothing": (RING, {"replace_layers": {"kimi": "b"}}, "'kimi', which is not a layer of this model"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_right_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    config, change, message = REFUSALS[case]
    write_checkpoint(tmp_path, config, seed=1)
    with pytest.raises(CheckpointError, match=message) as refusal:
        inspect_model(tmp_path, overrides=change)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        # hidden_size / heads and what transformers writes over head_dim: both give tensors of other shapes
        (MINIMAX, {"head_dim": 24}, r"qkv_proj.weight is \[384, 96\], expected \[288, 96\]"),
        (LING, {"head_dim": 16}, r"query_key_value.weight is \[384, 96\], expected \[192, 96\]"),
        (MINIMAX, {"num_hidden_layers": 4, "attn_type_list": [1, 0, 0, 1]}, "tensors are missing"),
    ],
    ids=["minimax-head-dim", "ling-head-dim", "kinds"],
)
def test_a_decoy_shows_in_the_shapes_of_the_weights(
    tmp_path: Path, config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    write_checkpoint(tmp_path, config, seed=1)
    with pytest.raises(CheckpointError, match=message):
        LLM(tmp_path, num_records=1, num_pages=4, overrides=change)


def test_an_override_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, MINIMAX, seed=1)
    with pytest.raises(ConfigError, match="'slope_formulas' cannot be overridden: MiniMaxText01ForCausalLM does not"):
        inspect_model(tmp_path, overrides={"slope_formulas": "hf"})


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (RING, {"model_max_length": 100}),  # max_position_embeddings is there and wins
        (MINIMAX, {"mlp_alpha_factor": 1.0}),
        (bailing_config(linear_head_dim=32), {"head_dim": 16}),
        (MINIMAX, {"torch_dtype": "bfloat16"}),
    ],
)
def test_an_override_behind_a_key_that_wins_is_refused(
    tmp_path: Path, config: dict[str, Any], change: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path, config, seed=1)
    with pytest.raises(ConfigError, match=f"'{next(iter(change))}' cannot be overridden"):
        inspect_model(tmp_path, overrides=change)


def test_a_section_without_theta_leaves_the_key_of_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, MINIMAX, seed=1)
    _, config, _ = read_model_config(tmp_path, {"rope_parameters": {"rope_type": "default"}, "rope_scaling": None})
    assert config.gqa.rope_theta == MINIMAX["rope_theta"]
    assert config.gqa.rotary_dim == MINIMAX["rotary_dim"]


def test_a_replacement_that_nobody_registered_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, MINIMAX, seed=1)
    with pytest.raises(PluginError, match=r"no layer is registered as 'mine'; known: .*minimax_text_01_attention"):
        inspect_model(tmp_path, overrides={"replace_layers": {"minimax_text_01_attention": "mine"}})


def test_the_model_type_decides_nothing(tmp_path: Path) -> None:
    """Two generations of Bailing share one; only the architecture tells them apart."""
    write_checkpoint(tmp_path, LING | {"model_type": "bailing_moe_linear"}, seed=1)
    assert inspect_model(tmp_path).layers[2].kind == "mla"
    write_checkpoint(tmp_path / "none", LING, seed=1)
    with pytest.raises(CheckpointError, match="'architectures' must be a list that names one architecture"):
        inspect_model(tmp_path / "none", overrides={"architectures": None})


class FourRanks(Ranks):
    size = 4


@pytest.mark.parametrize(("groups", "right"), [(2, False), (4, True), (8, True), (1, True)])
def test_the_groups_of_a_norm_must_be_divided_by_the_ranks(groups: int, right: bool) -> None:
    config = BailingMoeLinearAttention.example_config()
    config.linear = type(config.linear)(**(vars(config.linear) | {"norm_groups": groups}))  # type: ignore[misc]
    arguments = (config, EngineConfig(ranks=FourRanks()), "model.layers.3.attention")
    if right:
        BailingMoeLinearAttention(*arguments)
    else:
        with pytest.raises(
            ConfigError, match=r"the 2 groups of the norm \(group_norm_size\) cannot be split over 4 ranks"
        ):
            BailingMoeLinearAttention(*arguments)


def test_slopes_of_an_unknown_formula() -> None:
    with pytest.raises(ConfigError, match="slope_formula must be one of serving, hf, found 'alibi'"):
        decay_slopes(4, 0, 8, "alibi")
