"""The fp64 references that the other tests lean on: equal to transformers where it has the family, and able to tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import (
    bailing_config,
    kimi_linear_config,
    minimax_config,
    minimax_m2_config,
    reference_logits,
    respell,
    saved_by_transformers,
    write_checkpoint,
)
from tests.references import BailingReference, KimiReference, MiniMaxM2Reference, MiniMaxReference
from tests.references.common import Reference, alibi_slopes, rotate_halves, rotate_pairs

TOKENS = [5, 100, 7, 300, 12, 44, 45, 46, 200, 9] * 4  # longer than a block of transformers' lightning attention
CLOSE = 5e-5  # fp32 against fp64, on logits of about ±6

SHARED_FAMILIES = {
    "kimi": (kimi_linear_config(), KimiReference),
    "minimax": (minimax_config("hf"), MiniMaxReference),
    "minimax-sizes": (
        minimax_config("hf", num_attention_heads=8, num_key_value_heads=1, num_hidden_layers=3, num_experts_per_tok=3),
        MiniMaxReference,
    ),
    "minimax-tied": (minimax_config("hf", tie_word_embeddings=True), MiniMaxReference),
    "m2": (minimax_m2_config(), MiniMaxM2Reference),
    "m2-sizes": (
        minimax_m2_config(num_attention_heads=2, rotary_dim=32, num_experts_per_tok=3, intermediate_size=40),
        MiniMaxM2Reference,
    ),
}


@pytest.mark.parametrize("case", SHARED_FAMILIES)
def test_a_reference_gives_the_logits_of_transformers(tmp_path: Path, case: str) -> None:
    config, reference = SHARED_FAMILIES[case]
    write_checkpoint(tmp_path, config, seed=1)
    logits = reference(tmp_path).logits(TOKENS)
    assert (logits - reference_logits(tmp_path, TOKENS)).abs().max() < CLOSE
    assert 1 < logits.std() < 3


@pytest.mark.parametrize("case", ["kimi", "minimax", "minimax-tied", "m2"])
def test_the_saved_spelling_is_what_transformers_saves(tmp_path: Path, case: str) -> None:
    config = SHARED_FAMILIES[case][0]
    source = write_checkpoint(tmp_path / "hub", config, seed=1)
    saved = saved_by_transformers(source, tmp_path / "saved")
    ours = write_checkpoint(tmp_path / "ours", config, seed=1, spelling="saved")
    expected, written = (load_file(directory / "model.safetensors") for directory in (saved, ours))
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(written[name], tensor, atol=1e-7), name
    if case != "kimi":  # whose configuration comes back with defaults and derived keys added
        settings = json.loads((saved / "config.json").read_text())
        del settings["transformers_version"]
        assert json.loads((ours / "config.json").read_text()) == settings


def test_both_layouts_of_minimax_are_one_model(tmp_path: Path) -> None:
    logits = []
    for layout in ("hf", "text01", "m1"):
        write_checkpoint(tmp_path / layout, minimax_config(layout, rotary_dim=8), seed=3)
        logits.append(MiniMaxReference(tmp_path / layout).logits(TOKENS))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], type[Reference]]] = {
    "postnorm": (minimax_config(), {"postnorm": False}, MiniMaxReference),
    "rotated width": (minimax_config(), {"rotary_dim": 32}, MiniMaxReference),
    "groups of a norm": (bailing_config(), {"group_norm_size": 4}, BailingReference),
    "groups of experts": (bailing_config(), {"n_group": 1, "topk_group": 1}, BailingReference),
    "silu": (bailing_config("v2_5"), {"linear_silu": True}, BailingReference),
    "rotated half": (bailing_config(), {"partial_rotary_factor": 1.0}, BailingReference),
    "qk norm": (minimax_m2_config(), {"use_qk_norm": False}, MiniMaxM2Reference),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_reference_tells_a_setting_from_another(tmp_path: Path, case: str) -> None:
    config, change, reference = DIFFERENCES[case]
    write_checkpoint(tmp_path, config, seed=1)
    model = reference(tmp_path)
    logits = model.logits(TOKENS)
    model.config |= change
    assert (model.logits(TOKENS) - logits).abs().max() > 0.1


@pytest.mark.parametrize("generation", ["linear_v2", "v2_5"])
def test_the_two_slope_formulas_are_one_layer_apart(tmp_path: Path, generation: Any) -> None:
    write_checkpoint(tmp_path, bailing_config(generation), seed=1)
    serving, published = BailingReference(tmp_path), BailingReference(tmp_path, slope_formula="hf")
    assert torch.equal(serving.slopes(0), published.slopes(1))
    assert (serving.logits(TOKENS) - published.logits(TOKENS)).abs().max() > 0.1


@pytest.mark.parametrize("config", [minimax_config("m1"), bailing_config("linear")], ids=["minimax", "bailing"])
def test_what_transformers_lacks_has_no_other_spelling(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="transformers does not have"):
        respell({}, config, "saved")


def test_slopes_of_any_number_of_heads() -> None:
    assert alibi_slopes(6).log2().tolist() == [-2, -4, -6, -8, -1, -3]
    assert alibi_slopes(4).log2().tolist() == [-2, -4, -6, -8]
    assert alibi_slopes(1).log2().tolist() == [-8]


def test_the_two_rotations_differ_in_the_order_of_a_head() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert torch.allclose(rotate_pairs(x, 9, 1e4)[:, order], rotate_halves(x[:, order], 9, 8, 1e4))
    assert torch.equal(rotate_halves(x, 9, 4, 1e4)[:, 4:], x[:, 4:])
