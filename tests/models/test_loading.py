"""Checkpoints as people have them: layouts, spellings, dtypes, shards; and what is refused, in one sentence."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from statewise import LLM
from statewise.errors import CheckpointError
from tests.checkpoints import kimi_linear_config, reference_logits, write_checkpoint
from tests.references import KimiReference

TOKENS = [5, 100, 7, 300, 12, 44, 45, 46, 200, 9] * 8


def load(directory: Path, **options: Any) -> LLM:
    return LLM(directory, **{"num_records": 2, "num_pages": 16, "dtype": "float32"} | options)


@pytest.mark.parametrize("spelling", ["hub", "saved", "transformers"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_gives_the_logits_of_transformers(tmp_path: Path, spelling: Any, shards: int) -> None:
    write_checkpoint(tmp_path / "hub", kimi_linear_config(), seed=4)
    write_checkpoint(tmp_path / "other", kimi_linear_config(), seed=4, spelling=spelling, shards=shards)
    expected = reference_logits(tmp_path / "hub", TOKENS)
    assert (load(tmp_path / "other").logits(TOKENS) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"linear_attn_config": {"num_heads": 2, "head_dim": 16}},
        {"linear_attn_config": {"short_conv_kernel_size": 3}},
        {"linear_attn_config": {"kda_layers": [1, 2, 3, 4, 5, 6], "full_attn_layers": []}},
        {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 40},
        {"num_experts_per_token": 3, "num_shared_experts": 2, "moe_renormalize": False, "routed_scaling_factor": 1.5},
        {"first_k_dense_replace": 2, "num_attention_heads": 3, "num_key_value_heads": 3},
    ],
    ids=["narrow", "taps", "no-attention", "latent", "routing", "dense"],
)
def test_every_size_of_the_family_matches_an_fp64_reference(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, kimi_linear_config(**changes), seed=2)
    expected = KimiReference(tmp_path).logits(TOKENS)
    assert (load(tmp_path).logits(TOKENS) - expected).abs().max() < 1e-3


def test_tied_embeddings(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, kimi_linear_config(), seed=2)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    untied = load(tmp_path).logits(TOKENS)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, tie_word_embeddings=True)
    assert torch.equal(load(tmp_path).logits(TOKENS), untied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_into_either_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, kimi_linear_config(), seed=3, dtype=dtype)
    full = load(tmp_path)
    assert (full.logits(TOKENS) - KimiReference(tmp_path).logits(TOKENS)).abs().max() < 1e-3
    half = load(tmp_path, dtype="bfloat16")
    assert half.engine.runner.model.layers[0].mixer.A_log.dtype is torch.float32
    assert half.engine.runner.states[0]["recurrent"].dtype is torch.float32
    assert half.engine.runner.states[0]["conv"].dtype is torch.bfloat16
    agreement = (half.logits(TOKENS).argmax(-1) == full.logits(TOKENS).argmax(-1)).float().mean()
    assert agreement > 0.8  # random weights: near ties flip


def test_a_drafting_layer_behind_the_last_one_is_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, kimi_linear_config(), seed=2)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.6.enorm.weight"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def corrupt(directory: Path, change: Callable[[bytes], bytes]) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


A_LOG = "model.layers.0.self_attn.A_log"
REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(A_LOG)), f"1 tensors are missing: {A_LOG}"),
    "misshapen tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({A_LOG: torch.ones(5)})),
        rf"{A_LOG} is \[5\], expected \[4\]",
    ),
    "extra tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.surprise": torch.ones(1)})),
        "1 tensors are not part of the architecture: model.surprise",
    ),
    "integer tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({A_LOG: torch.ones(4, dtype=torch.int64)})),
        f"{A_LOG} is stored as I64, supported are F32, BF16, F16",
    ),
    "truncated": (lambda d: corrupt(d, lambda b: b[: len(b) // 2]), "is not a complete safetensors file"),
    "empty": (lambda d: corrupt(d, lambda b: b""), "is not a complete safetensors file"),
    "huge header": (
        lambda d: corrupt(d, lambda b: struct.pack("<Q", 1 << 62) + b[8:]),
        "is not a complete safetensors file",
    ),
    "garbage": (lambda d: corrupt(d, lambda b: bytes(reversed(b))), "is not a complete safetensors file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no safetensors file"),
    "pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "is a pickle .* convert it to safetensors",
    ),
    "two files": (
        lambda d: (d / "b.safetensors").write_bytes((d / "model.safetensors").read_bytes()),
        "2 safetensors files but no model.safetensors.index.json",
    ),
    "index without file": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
        "names the file 'gone.safetensors', which is not in the model directory",
    ),
    "index escapes": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "which is not in the model directory",
    ),
    "index lies": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a.b": "model.safetensors"}}'),
        "model.safetensors lacks a.b",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json must hold a JSON object"),
    "deep config": (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json cannot be read as JSON"),
    "unknown architecture": (
        lambda d: edit_config(d, architectures=["LlamaForCausalLM"]),
        "'LlamaForCausalLM' is not supported; supported are: .*KimiLinearForCausalLM",
    ),
    "no architecture": (lambda d: edit_config(d, architectures=[]), "'architectures' must be a list"),
    "missing key": (lambda d: edit_config(d, hidden_size=None), "'hidden_size' is missing"),
    "wrong type": (lambda d: edit_config(d, hidden_size="96"), "'hidden_size' must be an integer from 1"),
    "negative": (lambda d: edit_config(d, kv_lora_rank=-1), "'kv_lora_rank' must be an integer from 1"),
    "rope": (lambda d: edit_config(d, mla_use_nope=False), "'mla_use_nope' = False is not supported"),
    "too many per token": (lambda d: edit_config(d, num_experts_per_token=9), "8 experts cannot give 9 per token"),
    "layer lists": (lambda d: edit_config(d, num_hidden_layers=7), "must name each of the layers 1 to 7 once"),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
    "eos": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "x"}'),
        "generation_config.json: eos_token_id must be a token id",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_served_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    write_checkpoint(tmp_path, kimi_linear_config(), seed=1)
    change, message = REFUSALS[case]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


def test_a_path_that_is_no_directory() -> None:
    with pytest.raises(
        CheckpointError, match="model '/nowhere' is not a directory; give the directory of a checkpoint"
    ):
        LLM("/nowhere")
