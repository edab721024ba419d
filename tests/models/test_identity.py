"""Which model a snapshot belongs to: what changes results changes the identity, what does not leaves it."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from statewise.errors import CheckpointError, ConfigError
from statewise.memory.snapshot_format import Identity
from statewise.models import identity
from statewise.models.identity import MAX_RUNS, RUN, model_identity, sampled_ranges
from tests.checkpoints import bailing_config, kimi_linear_config, write_checkpoint


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def kimi(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "kimi", kimi_linear_config(), seed=1)
    return tmp_path / "kimi"


def test_the_same_checkpoint_is_the_same_anywhere(tmp_path: Path, kimi: Path) -> None:
    write_checkpoint(tmp_path / "copy", kimi_linear_config(), seed=1)
    first = model_identity(kimi)
    assert first == model_identity(tmp_path / "copy")
    write_checkpoint(tmp_path / "shards", kimi_linear_config(), seed=1, shards=3)
    assert first.differences(model_identity(tmp_path / "shards")) == []
    assert {len(digest) for digest in (first.config, first.weights)} == {64}


def test_keys_that_nobody_follows_do_not_matter(kimi: Path) -> None:
    before = model_identity(kimi)
    edit(kimi, transformers_version="9.9", max_position_embeddings=4096, routed_scaling_factor=None)
    after = model_identity(kimi)
    assert after == model_identity(kimi, {"moe_layer_freq": 1})  # what is the default anyway
    assert before.weights == after.weights
    edit(kimi, transformers_version="1.0", max_position_embeddings=64)
    assert model_identity(kimi) == after


def test_overrides_that_change_results_make_another_model(tmp_path: Path, kimi: Path) -> None:
    write_checkpoint(tmp_path / "ring", bailing_config(), seed=1)
    plain = model_identity(tmp_path / "ring")
    assert plain.differences(model_identity(tmp_path / "ring", {"slope_formula": "hf"})) == ["config"]
    assert plain == model_identity(tmp_path / "ring", {"slope_formula": "serving"})
    for overrides in ({"rms_norm_eps": 1e-4}, {"routed_scaling_factor": 3.0}):
        assert model_identity(kimi).differences(model_identity(kimi, overrides)) == ["config"]
    with pytest.raises(ConfigError, match="cannot be overridden"):
        model_identity(kimi, {"nobody_reads_this": 1})


def test_a_layer_that_was_replaced_makes_another_model(kimi: Path) -> None:
    replaced = {"replace_layers": {"kimi_gated_delta_net_attention": "bailing_moe_linear_attention"}}
    assert model_identity(kimi).differences(model_identity(kimi, replaced)) == ["config"]


@pytest.mark.parametrize("change", ["shape", "dtype", "name"])
def test_weights_are_told_apart_by_their_index(kimi: Path, change: str) -> None:
    before = model_identity(kimi)
    tensors = load_file(kimi / "model.safetensors")
    name = "model.layers.0.self_attn.A_log"
    if change == "shape":
        tensors[name] = torch.ones(5)
    elif change == "dtype":
        tensors[name] = tensors[name].bfloat16()
    else:
        tensors["other"] = tensors.pop(name)
    save_file(tensors, kimi / "model.safetensors")
    assert before.differences(model_identity(kimi)) == ["weights"]


def test_a_change_of_any_tensor_shows(kimi: Path) -> None:
    before = model_identity(kimi)
    tensors = load_file(kimi / "model.safetensors")
    assert {tensor.nbytes <= MAX_RUNS * RUN for tensor in tensors.values()} == {False, True}  # sampled and whole ones
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 0.01}, kimi / "model.safetensors")
        assert before.differences(model_identity(kimi)) == ["weights"], name
    for first, last in ((0, 1), (-1, None)):  # the ends of a long tensor
        long = tensors["model.embed_tokens.weight"].clone()
        long.flatten()[first:last] += 1
        save_file({**tensors, "model.embed_tokens.weight": long}, kimi / "model.safetensors")
        assert before.differences(model_identity(kimi)) == ["weights"]
    save_file(tensors, kimi / "model.safetensors")
    assert model_identity(kimi) == before


def test_files_and_the_order_in_them_do_not_matter(tmp_path: Path, kimi: Path) -> None:
    tensors = load_file(kimi / "model.safetensors")
    (kimi / "model.safetensors").rename(tmp_path / "whole.safetensors")
    before = None
    for step in (1, -1):
        names = list(tensors)[::step]
        places = {}
        for part, file in (
            (names[::3], "b.safetensors"),
            (names[1::3], "a.safetensors"),
            (names[2::3], "c.safetensors"),
        ):
            write_in_order({name: tensors[name] for name in part}, kimi / file)
            places |= dict.fromkeys(part, file)
        (kimi / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        before = before or model_identity(kimi)
        assert model_identity(kimi) == before
    for file in ("model.safetensors.index.json", "a.safetensors", "b.safetensors", "c.safetensors"):
        (kimi / file).unlink()
    (tmp_path / "whole.safetensors").rename(kimi / "any name.safetensors")
    assert model_identity(kimi) == before


def write_in_order(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file whose tensors lie in the given order; the library would sort them."""
    table, data = {}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        offsets = [len(data), len(data) + len(content)]
        table[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_the_sample_of_a_tensor_is_bounded_and_spread_over_it() -> None:
    assert sampled_ranges(0, 16) == []
    assert sampled_ranges(RUN * 16, 16) == [(0, RUN * 16)]
    for nbytes in (RUN * 16 + 1, 12_345_678_901):
        for runs in (2, 3, 16):
            ranges = sampled_ranges(nbytes, runs)
            assert len(ranges) == runs
            assert all(stop - start == RUN for start, stop in ranges)
            assert (ranges[0][0], ranges[-1][1]) == (0, nbytes)
            gaps = [after - before for (_, before), (after, _) in pairwise(ranges)]
            assert max(gaps) - min(gaps) <= 1


def test_reads_are_few_however_many_tensors_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "kimi", kimi_linear_config(), seed=1)
    reads: list[int] = []
    pread = os.pread

    def counting(descriptor: int, count: int, offset: int) -> bytes:
        reads.append(count)
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counting)
    monkeypatch.setattr(identity, "MAX_READS", 100)
    model_identity(tmp_path / "kimi")
    tensors = len(load_file(tmp_path / "kimi" / "model.safetensors"))
    assert tensors > 50
    assert len(reads) <= 2 * tensors
    assert max(reads) <= 2 * RUN


def test_the_tokenizer_is_part_of_it(kimi: Path) -> None:
    (kimi / "tokenizer.json").unlink(missing_ok=True)
    without = model_identity(kimi)
    assert without.tokenizer is None
    (kimi / "tokenizer.json").write_text("{}")
    assert without.differences(model_identity(kimi)) == ["tokenizer"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, kimi: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        model_identity(tmp_path)
    (kimi / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        model_identity(kimi)


def test_differences_are_named_in_order() -> None:
    assert Identity("a", "b", None).differences(Identity("x", "b", "c")) == ["config", "tokenizer"]
