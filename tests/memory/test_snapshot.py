"""Snapshot files: what was saved comes back bit by bit, at any number of ranks; anything else is refused."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from statewise.errors import SnapshotError
from statewise.memory.sharding import cut, gather, same_bits
from statewise.memory.snapshot import Snapshot, read_header, read_snapshot, verify_snapshot, write_snapshot
from statewise.memory.snapshot_diff import compare
from statewise.memory.snapshot_format import Identity, layout_of
from statewise.memory.snapshot_transcript import Transcript
from tests.memory.corruption import damaged, forged, forgeries, inner, metadata, rewritten, sealed, taken_apart
from tests.memory.states import MODEL, Layers, delta, grouped_query, held_by, latent, layers, lightning, random_tensors

IDENTITY = Identity("a" * 64, "b" * 64, "c" * 64)
TOKENS = 37
TRANSCRIPT = Transcript((5, 5, 30), {"read": 5, "näme": 37}, ({"role": "user", "content": "Hi,\n[you]"},))
BOUNDS: dict[str, Any] = {"vocab_size": 5000, "hidden_size": 6}


def saved(path: Path, model: Layers = MODEL, num_tokens: int = TOKENS, **changes: Any) -> Snapshot:
    """A file, and what was written into it."""
    hidden = torch.arange(6, dtype=torch.float32)
    tensors = random_tensors(model, num_tokens)
    layout, tokens = layout_of(*model.specs()), tuple(range(3, 3 + num_tokens))
    transcript = TRANSCRIPT if num_tokens >= TOKENS else None
    snapshot = Snapshot(IDENTITY, layout, tokens, tensors, hidden, "a name", "2026-11-23T12:00:00Z", transcript)
    snapshot = replace(snapshot, **changes)
    write_snapshot(path, snapshot)
    return snapshot


def load(path: Path, model: Layers = MODEL, max_tokens: int = 64) -> Snapshot:
    return read_snapshot(path, IDENTITY, *model.specs(), max_tokens, **BOUNDS)


@given(model=layers(), num_tokens=st.integers(0, 37), size=st.sampled_from([1, 2, 4]), hidden=st.booleans())
def test_a_file_gives_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory, model: Layers, num_tokens: int, size: int, hidden: bool
) -> None:
    path = tmp_path_factory.mktemp("s") / "a.state"
    tensors = random_tensors(model, num_tokens)
    whole = gather(held_by(model, tensors, num_tokens, size), *model.specs())
    row = torch.randn(5, dtype=torch.bfloat16) if hidden else None
    tokens = tuple(range(num_tokens))
    write_snapshot(path, Snapshot(IDENTITY, layout_of(*model.specs()), tokens, whole, row, "näme", "then"))
    found = read_snapshot(path, IDENTITY, *model.specs(page_size=64), max_tokens=num_tokens)
    assert (found.tokens, found.name, found.created) == (tokens, "näme", "then")
    assert found.identity == IDENTITY
    assert (found.hidden is None) == (row is None)
    assert row is None or torch.equal(found.hidden, row)
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in found.tensors.items():
        assert same_bits(tensor, tensors[name])
    assert verify_snapshot(path).num_tokens == num_tokens


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_file_of_one_rank_loads_at_others_and_back(tmp_path: Path, size: int) -> None:
    specs = MODEL.specs()
    parts = held_by(MODEL, random_tensors(MODEL, TOKENS), TOKENS, 1)
    saved(tmp_path / "one.state", tensors=gather(parts, *specs))
    there = load(tmp_path / "one.state")
    others = [cut(there.tensors, TOKENS, *specs, rank, size) for rank in range(size)]
    for found, expected in zip(others, held_by(MODEL, there.tensors, TOKENS, size), strict=True):
        assert torch.equal(found.record, expected.record)
        assert torch.equal(found.pages, expected.pages)
    saved(tmp_path / "back.state", tensors=gather(others, *specs))
    assert (tmp_path / "back.state").read_bytes() == (tmp_path / "one.state").read_bytes()
    back = cut(load(tmp_path / "back.state").tensors, TOKENS, *specs, 0, 1)
    assert torch.equal(back.record, parts[0].record)
    assert torch.equal(back.pages, parts[0].pages)


def test_a_file_has_the_size_of_record_and_pages(tmp_path: Path) -> None:
    deep = Layers(
        {layer: delta() if layer % 2 else lightning() for layer in range(96) if layer % 4},
        {layer: grouped_query() if layer % 8 else latent() for layer in range(0, 96, 4)},
    )
    messages = tuple({"role": "user", "content": f"Turn {turn}: {'words ' * 60}"} for turn in range(40))
    for model, num_tokens in ((MODEL, 1), (MODEL, 4096), (deep, 1), (deep, 2000)):
        turns = tuple(range(0, num_tokens, 50))
        saved(tmp_path / "a.state", model, num_tokens, transcript=Transcript(turns, {"start": 0}, messages))
        record, page = (spec.nbytes for spec in model.specs())
        size = (tmp_path / "a.state").stat().st_size
        assert size < record + -(-num_tokens // 16) * page + (64 << 10)


def test_other_readers_of_safetensors_can_read_it(tmp_path: Path) -> None:
    snapshot = saved(tmp_path / "a.state")
    found = load_file(tmp_path / "a.state")
    assert found.keys() == {*snapshot.tensors, "tokens", "hidden", "transcript"}
    for name, tensor in snapshot.tensors.items():
        assert same_bits(found[name], tensor)
    assert found["tokens"].tolist() == list(snapshot.tokens)
    with safe_open(tmp_path / "a.state", framework="pt") as file:
        assert file.metadata()["format"] == "statewise-state"
        save_file(found, tmp_path / "b.state", file.metadata())
    assert compare(load(tmp_path / "b.state"), snapshot).same  # the library writes the same file


def test_damaged_and_forged_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "turn.state"
    saved(path)
    raw = path.read_bytes()
    cases = [(name, content, "'turn.state'") for name, content in damaged(raw)]
    cases += forgeries(raw)
    assert len(cases) >= 200

    allocated: list[int] = []
    empty = torch.empty

    def counting(*shape: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*shape, **options)
        allocated.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", counting)
    for name, content, reason in cases:
        path.write_bytes(content)
        allocated.clear()
        with pytest.raises(SnapshotError, match=reason) as refusal:
            load(path)
        message = str(refusal.value)
        assert message.startswith("'turn.state' "), name
        assert message.isprintable(), name
        assert len(message) < 400, name
        assert str(tmp_path) not in message, name
        assert sum(allocated) <= max(len(raw), len(content)), name


def test_what_lies_about_itself_is_refused_without_a_model_too(tmp_path: Path) -> None:
    path = tmp_path / "turn.state"
    saved(path)
    raw = path.read_bytes()
    depends = ("other config", "other weights", "other tokenizer", "no tokenizer", "wrong hidden", "ids beyond")
    for _, content in damaged(raw):
        path.write_bytes(content)
        with pytest.raises(SnapshotError, match=r"'turn.state'"):
            verify_snapshot(path)
    for name, content, reason in forgeries(raw):
        path.write_bytes(content)
        if name in depends or name == "layout: other segments":
            verify_snapshot(path)  # sound, but of something else
            continue
        with pytest.raises(SnapshotError, match=reason):
            verify_snapshot(path)


def test_no_file_makes_the_reader_take_more_memory_than_the_model_allows(tmp_path: Path) -> None:
    path = tmp_path / "big.state"
    model = Layers(MODEL.records, {})  # no page says how many tokens there are
    saved(path, model, transcript=None)
    table, data = taken_apart(path.read_bytes())
    huge = 1 << 34  # bytes, as the file promises and has
    begin = table["tokens"]["data_offsets"][0]
    assert begin + 4 * TOKENS == len(data)  # the last one
    table["tokens"] |= {"shape": [huge // 4], "data_offsets": [begin, begin + huge]}
    forged_tokens = sealed(table, data)
    table["tokens"] |= {"shape": [TOKENS], "data_offsets": [begin, begin + 4 * TOKENS]}
    table["transcript"] = {"dtype": "U8", "shape": [huge], "data_offsets": [len(data), len(data) + huge]}
    inner("digests", lambda digests: digests.update(transcript="0" * 64))(table)
    forged_transcript = sealed(table, data)
    for content, length, reason in (
        (forged_tokens, len(forged_tokens) - len(data) + begin + huge, "at most 67108864 token ids"),
        (forged_transcript, len(forged_transcript) + huge, "transcript is .* expected at most 16777216 bytes"),
        ((1 << 20).to_bytes(8, "little") + b'{"a":[' + b"[]," * 349_000, (1 << 20) + 8, "cannot be read"),
        ((huge).to_bytes(8, "little"), huge + 8, "at most 1048576 are read"),
    ):
        path.write_bytes(content)
        os.truncate(path, length)  # sparse: it takes no room
        tracemalloc.start()
        try:
            with pytest.raises(SnapshotError, match=reason):
                load(path, model)
            with pytest.raises(SnapshotError, match=reason):
                verify_snapshot(path)
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()


def test_a_long_file_is_verified_in_little_memory(tmp_path: Path) -> None:
    wide = Layers({0: lightning(1 << 20)}, {})  # 36 MiB
    saved(tmp_path / "a.state", wide)
    tracemalloc.start()
    try:
        verify_snapshot(tmp_path / "a.state", IDENTITY, *wide.specs(), 64)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_file_for_other_layers_says_which_and_how(tmp_path: Path) -> None:
    path = tmp_path / "turn.state"
    saved(path)
    records, pages = dict(MODEL.records), dict(MODEL.pages)
    for model, reason in (
        (Layers({**records, 0: delta(dtype=torch.bfloat16)}, pages), r"record.0.conv is F32 .* here it is BF16"),
        (
            Layers({**records, 0: delta(num_spec=2)}, pages),
            r"record.0.conv is F32 \[32, 3\] .* here it is F32 \[32, 5\]",
        ),
        (Layers({0: records[0], 1: records[1]}, pages), r"record.3.recurrent is F32 .* here it is absent"),
        (Layers(records, {**pages, 7: latent()}), r"pages.7.latent is absent, here it is F32 \[12\]"),
    ):
        with pytest.raises(SnapshotError, match=f"has another field layout: {reason}"):
            load(path, model)
    with pytest.raises(SnapshotError, match="holds 37 tokens, at most 36 are accepted"):
        load(path, max_tokens=36)
    other = replace(IDENTITY, config="0" * 64, tokenizer=None)
    with pytest.raises(SnapshotError, match=r"'turn.state' is of another model, judging by its config and tokenizer"):
        read_snapshot(path, other, *MODEL.specs(), 64)
    assert load(path, Layers({**records, 0: delta(last=True)}, pages)).num_tokens == TOKENS  # memory order is free


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "none.state", "cannot be opened: No such file"),
        (tmp_path, "is not a plain file"),
        (tmp_path / "pipe", "is not a plain file"),
        (tmp_path / "a\0b", "cannot be opened: embedded null"),
    ):
        with pytest.raises(SnapshotError, match=reason):
            read_header(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": (1, 2), "transcript": None}, r"pages.2.key is F32 \[37, 2, 3\], expected F32 \[2, 2, 3\]"),
        ({"tokens": (-1,) * TOKENS}, "a token id is out of range"),
        ({"name": "x" * 257}, "its name is not"),
        ({"created": "\n"}, "its time is not"),
        ({"hidden": torch.ones(2, 2)}, "one row of floats"),
        ({"hidden": torch.ones(2, dtype=torch.complex64)}, "no snapshot can hold torch.complex64"),
        ({"tensors": {}}, "record.0.conv is missing"),
        ({"transcript": Transcript((5, 38))}, "its turns do not rise from 0 to its 37 tokens"),
    ],
)
def test_what_would_not_load_is_not_written(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SnapshotError, match=reason):
        saved(tmp_path / "a.state", **changes)
    assert os.listdir(tmp_path) == []


def test_two_files_are_compared_by_identity_tokens_and_bits(tmp_path: Path) -> None:
    first = saved(tmp_path / "a.state")
    assert compare(first, load(tmp_path / "a.state")).same
    renamed = compare(first, replace(first, transcript=replace(TRANSCRIPT, checkpoints={})))
    assert (renamed.transcript, renamed.same) == (["checkpoints"], False)
    conv = first.tensors["record.0.conv"].clone()
    conv[2, 1], conv[5, 0] = 1.0, float("nan")
    shorter = random_tensors(MODEL, TOKENS)
    shorter |= {name: tensor[:20].clone() for name, tensor in shorter.items() if name.startswith("pages.")}
    shorter["pages.5.latent"][7] = first.tensors["pages.5.latent"][7] = 0.0
    shorter["pages.5.latent"][7, 3] = 0.25
    shorter["pages.5.latent"][19] = 9.0  # behind what both have in common
    tokens = (*first.tokens[:10], 999, *first.tokens[11:20])
    other = replace(IDENTITY, weights="0" * 64)
    second = replace(first, identity=other, tokens=tokens, tensors={**shorter, "record.0.conv": conv}, hidden=None)
    found = compare(first, second)
    assert (found.identity, found.tokens, found.common_tokens) == (["weights"], (37, 20), 10)
    assert [tensor.name for tensor in found.tensors] == ["record.0.conv", "pages.5.latent", "hidden"]
    window, latent_page, hidden = found.tensors
    assert (window.different, window.elements, window.largest) == (2, 96, float("inf"))
    assert (latent_page.different, latent_page.elements, latent_page.largest) == (1, 120, 0.25)
    assert hidden.reason == "only in the first"
    assert found.transcript == []
    assert not found.same


def test_a_header_says_what_the_file_holds_without_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "turn.state"
    saved(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    header = read_header(path)
    assert (header.identity, header.name, header.num_tokens) == (IDENTITY, "a name", TOKENS)
    assert header.layout == layout_of(*MODEL.specs())
    with pytest.raises(SnapshotError, match="is damaged: the bytes of transcript"):
        verify_snapshot(path)
    path.write_bytes(forged(raw, metadata("version", "2")))
    with pytest.raises(SnapshotError, match="newer"):
        read_header(path)
    path.write_bytes(rewritten(raw, "tokens", shape=[TOKENS + 1]))
    with pytest.raises(SnapshotError, match="does not have the bytes"):
        read_header(path)
