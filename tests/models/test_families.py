"""Every family through the engine against its fp64 reference or transformers, however the prompt is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from statewise import LLM, SamplingParams
from tests.checkpoints import (
    bailing_config,
    kimi_linear_config,
    minimax_config,
    minimax_m2_config,
    reference_logits,
    saved_by_transformers,
    write_checkpoint,
)
from tests.references import BailingReference, KimiReference, MiniMaxM2Reference, MiniMaxReference
from tests.references.common import Reference

PROMPT = torch.randint(3, 320, (70,), generator=torch.Generator().manual_seed(5)).tolist()
Case = tuple[dict[str, Any], Callable[..., Reference]]

CASES: dict[str, Case] = {
    "kimi": (kimi_linear_config(), KimiReference),
    "minimax": (minimax_config(), MiniMaxReference),
    "minimax-m1": (minimax_config("m1", num_key_value_heads=4, num_experts_per_tok=3), MiniMaxReference),
    "minimax-hf": (minimax_config("hf"), MiniMaxReference),
    "minimax-six-heads": (  # not a power of two: the slopes follow another rule
        minimax_config(num_attention_heads=6, num_key_value_heads=3),
        MiniMaxReference,
    ),
    "minimax-shared-mlp": (minimax_config(shared_intermediate_size=56), MiniMaxReference),
    "minimax-plain-residual": (minimax_config(postnorm=False), MiniMaxReference),
    "minimax-one-layer": (minimax_config(num_hidden_layers=1, attn_type_list=[0]), MiniMaxReference),
    "minimax-tied": (minimax_config(tie_word_embeddings=True), MiniMaxReference),
    "ring-linear": (bailing_config(), BailingReference),  # 7 layers in groups of 3: a tail of one full layer
    "ring-linear-first-name": (bailing_config("linear"), BailingReference),
    "ring-linear-long-tail": (
        bailing_config(num_hidden_layers=5, layer_group_size=3, num_attention_heads=6, num_key_value_heads=2),
        BailingReference,
    ),
    "ring-linear-options": (
        bailing_config(
            use_qk_norm=False, linear_silu=True, group_norm_size=4, num_shared_experts=2, n_group=1, topk_group=1
        ),
        BailingReference,
    ),
    "ring-linear-wide-rotation": (bailing_config(partial_rotary_factor=1.0, first_k_dense_replace=2), BailingReference),
    "ling-2.5": (bailing_config("v2_5"), BailingReference),
    "ling-2.5-plain-query": (bailing_config("v2_5", q_lora_rank=None, tie_word_embeddings=True), BailingReference),
    "ling-2.5-decoy-head-dim": (  # as transformers saves it: the real width has another name
        bailing_config("v2_5", linear_head_dim=32, head_dim=16),
        BailingReference,
    ),
    "ling-2.5-drafting-layer": (bailing_config("v2_5", num_nextn_predict_layers=1), BailingReference),
    "ling-2.5-plain-weights": (
        bailing_config("v2_5", norm_topk_prob=False, moe_router_enable_expert_bias=False, linear_rope=False),
        BailingReference,
    ),
    "ring-linear-silu-wins": (bailing_config(use_linear_silu=True, linear_silu=False), BailingReference),
    "minimax-m2": (minimax_m2_config(), MiniMaxM2Reference),
    "minimax-m2-sizes": (
        minimax_m2_config(num_attention_heads=2, rotary_dim=32, num_experts_per_tok=3, intermediate_size=40),
        MiniMaxM2Reference,
    ),
}


def load(directory: Path, **options: Any) -> LLM:
    return LLM(directory, **{"num_records": 4, "num_pages": 64, "dtype": "float32"} | options)


@pytest.mark.parametrize("case", CASES)
def test_the_engine_equals_the_reference_however_the_prompt_is_cut(tmp_path: Path, case: str) -> None:
    config, reference = CASES[case]
    write_checkpoint(tmp_path, config, seed=7)
    model = reference(tmp_path)
    tokens = model.greedy(PROMPT, 8)
    expected = model.logits(PROMPT + tokens)
    for pieces in (7, 64, 4096):
        llm = load(tmp_path, max_prefill_tokens=pieces)
        assert (llm.logits(PROMPT + tokens) - expected).abs().max() < 1e-3
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, return_logits=True)
        outputs = llm.generate([{"prompt_token_ids": PROMPT}, {"prompt_token_ids": PROMPT[:1]}], params)
        answer = outputs[0].outputs[0]
        assert answer.token_ids == tokens
        assert answer.logits is not None
        assert (answer.logits - expected[len(PROMPT) - 1 : -1]).abs().max() < 1e-3
        # A prompt of one token is a prefill from nothing, whatever its record held before.
        first = outputs[1].outputs[0].logits
        assert first is not None
        assert (first[0] - model.logits(PROMPT[:1])[0]).abs().max() < 1e-3
        llm.engine.check_integrity()


@pytest.mark.parametrize("generation", ["linear_v2", "v2_5"])
def test_the_slope_formula_is_an_option(tmp_path: Path, generation: Any) -> None:
    write_checkpoint(tmp_path, bailing_config(generation), seed=7)
    serving = load(tmp_path).logits(PROMPT)
    published = load(tmp_path, overrides={"slope_formula": "hf"}).logits(PROMPT)
    assert (serving - BailingReference(tmp_path).logits(PROMPT)).abs().max() < 1e-3
    assert (published - BailingReference(tmp_path, slope_formula="hf").logits(PROMPT)).abs().max() < 1e-3
    assert (published - serving).abs().max() > 0.1


ALIASES = {
    "num_experts_per_tok": "num_experts_per_token",
    "n_group": "num_expert_group",
    "norm_topk_prob": "moe_renormalize",
    "num_shared_experts": "n_shared_experts",
    "num_experts": "num_local_experts",
    "max_position_embeddings": "model_max_length",
    "linear_silu": "use_linear_silu",
}


def test_a_bailing_model_under_its_other_keys_is_the_same(tmp_path: Path) -> None:
    config = bailing_config(num_experts_per_tok=3, norm_topk_prob=False, linear_silu=True, max_position_embeddings=333)
    write_checkpoint(tmp_path, config, seed=7)
    plain = load(tmp_path)
    others = {ALIASES[name]: config[name] for name in ALIASES} | dict.fromkeys(ALIASES)
    renamed = load(tmp_path, overrides=others)
    assert renamed.config.max_length == 333
    assert torch.equal(renamed.logits(PROMPT), plain.logits(PROMPT))


@pytest.mark.parametrize("config", [minimax_config(), bailing_config("v2_5")], ids=["minimax", "ling-2.5"])
def test_stored_tables_and_other_heads_are_left_out(tmp_path: Path, config: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, config, seed=7)
    plain = load(tmp_path).logits(PROMPT)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in (
        "layers.0.self_attn.slope_rate",
        "layers.0.attention.slopes",
        "layers.1.self_attn.rotary_emb.inv_freq",
    ):
        tensors[f"model.{name}"] = torch.ones(4)
    tensors["mtp.fc.weight"], tensors["model.mtp_block.0.weight"] = torch.ones(2), torch.ones(2)
    if config["model_type"] == "bailing_hybrid":
        tensors["v_head.summary.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).logits(PROMPT), plain)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (kimi_linear_config(rms_norm_eps=1e-3), KimiReference),
        (bailing_config("v2_5", rms_norm_eps=1e-3), BailingReference),
    ],
    ids=["kimi", "ling-2.5"],
)
def test_the_epsilon_of_the_latent_norms_is_their_own(
    tmp_path: Path, config: dict[str, Any], reference: Callable[..., Reference]
) -> None:
    """It is 1e-6 whatever rms_norm_eps says. Small latents make it show."""
    write_checkpoint(tmp_path, config, seed=7)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if "kv_a_proj" in name or "q_a_proj" in name:
            tensor *= 1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    assert (load(tmp_path).logits(PROMPT) - reference(tmp_path).logits(PROMPT)).abs().max() < 1e-3


@pytest.mark.parametrize("config", [minimax_config("hf"), minimax_m2_config()], ids=["minimax", "minimax-m2"])
def test_what_transformers_saves_is_served(tmp_path: Path, config: dict[str, Any]) -> None:
    """Its configuration has other keys, and MiniMax's file holds the tables of its decays."""
    source = write_checkpoint(tmp_path / "hub", config, seed=7)
    saved = saved_by_transformers(source, tmp_path / "saved")
    expected = reference_logits(source, PROMPT)
    assert (load(saved).logits(PROMPT) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("config", [minimax_config("hf"), minimax_m2_config()], ids=["minimax", "minimax-m2"])
@pytest.mark.parametrize("spelling", ["saved", "transformers"])
def test_every_spelling_is_one_model(tmp_path: Path, config: dict[str, Any], spelling: Any) -> None:
    write_checkpoint(tmp_path / "hub", config, seed=7)
    write_checkpoint(tmp_path / "other", config, seed=7, spelling=spelling)
    assert torch.equal(load(tmp_path / "other").logits(PROMPT), load(tmp_path / "hub").logits(PROMPT))


@pytest.mark.parametrize("case", ["minimax", "ring-linear", "ling-2.5", "minimax-m2"])
def test_lightning_prefill_is_right_behind_the_first_chunks(tmp_path: Path, case: str) -> None:
    """A long prompt in one piece against token by token: a chunk's first token must decay the state before it."""
    config, _ = CASES[case]
    write_checkpoint(tmp_path, config, seed=7)
    long = torch.randint(3, 320, (700,), generator=torch.Generator().manual_seed(6)).tolist()
    whole = load(tmp_path).logits(long)
    steps = load(tmp_path, max_prefill_tokens=1).logits(long)
    assert (whole - steps).abs().max() < 1e-3


@pytest.mark.parametrize("case", ["minimax", "ring-linear", "ling-2.5", "minimax-m2"])
def test_company_and_preemption_change_nothing(tmp_path: Path, case: str) -> None:
    config, _ = CASES[case]
    write_checkpoint(tmp_path, config, seed=7)
    prompts = [{"prompt_token_ids": PROMPT[: 3 * i + 1]} for i in range(9)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    roomy, crowded = load(tmp_path), load(tmp_path, num_records=3, num_pages=5, page_size=16, max_prefill_tokens=16)
    alone = [roomy.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    together = [output.outputs[0].token_ids for output in crowded.generate(prompts, params)]
    assert together == alone
    crowded.engine.check_integrity()


@pytest.mark.parametrize("case", ["minimax", "ring-linear", "ling-2.5", "minimax-m2"])
def test_bfloat16_stays_near_and_keeps_its_states_wide(tmp_path: Path, case: str) -> None:
    config, _ = CASES[case]
    write_checkpoint(tmp_path, config, seed=7)
    full, half = load(tmp_path), load(tmp_path, dtype="bfloat16")
    for mixer, state in zip(half.engine.runner.model.mixers, half.engine.runner.states, strict=True):
        if mixer.scope == "record":
            assert state["recurrent"].dtype is torch.float32
            assert mixer.weights.slopes.dtype is torch.float32
    agreement = (half.logits(PROMPT).argmax(-1) == full.logits(PROMPT).argmax(-1)).float().mean()
    assert agreement > 0.7  # random weights: near ties flip
