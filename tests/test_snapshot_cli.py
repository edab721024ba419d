"""`statewise snapshot`: what the verbs print, and how they end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from statewise.cli import main
from statewise.config import EngineConfig
from statewise.engine.runner import block_specs
from statewise.memory.sharding import whole_fields
from statewise.memory.snapshot import Snapshot, write_snapshot
from statewise.memory.snapshot_format import layout_of
from statewise.memory.snapshot_transcript import Transcript
from statewise.models.directory import model_directory
from statewise.models.identity import model_identity
from statewise.models.registry import build, read_model_config

TOKENS = tuple(range(5, 45))


@pytest.fixture
def snapshot() -> Snapshot:
    """A state that the demo model could have."""
    directory = model_directory("demo")
    model_class, config, _ = read_model_config(directory)
    engine_config = EngineConfig()
    specs = block_specs(build(model_class, config, engine_config).mixers, engine_config)
    tensors = {}
    for name, field in whole_fields(*specs).items():
        shape = (len(TOKENS), *field.shape) if name.startswith("pages.") else field.shape
        tensors[name] = torch.ones(shape, dtype=field.dtype)
    return Snapshot(model_identity(directory), layout_of(*specs), TOKENS, tensors, name="turn 1", created="then")


@pytest.fixture
def path(tmp_path: Path, snapshot: Snapshot) -> Path:
    write_snapshot(tmp_path / "turn.state", snapshot)
    return tmp_path / "turn.state"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["snapshot", *map(str, arguments)])


def test_inspect_shows_what_a_file_holds(path: Path, snapshot: Snapshot) -> None:
    text = run("inspect", path)
    assert text.exit_code == 0
    for part in ("turn 1", "then", "tokens     40", snapshot.identity.config, "recurrent", "for each token"):
        assert part in text.output
    found = json.loads(run("inspect", path, "--json").output)
    assert found["tokens"] == 40
    assert found["bytes"] == path.stat().st_size
    assert found["identity"] == vars(snapshot.identity)
    assert found["tensors"].keys() == {*snapshot.tensors, "tokens"}
    sizes = {"record": 0, "pages": 0}
    for name, tensor in snapshot.tensors.items():
        sizes[name.split(".")[0]] += tensor.nbytes
    assert (found["record_bytes"], found["page_bytes"]) == (sizes["record"], sizes["pages"])


def test_verify_says_whether_a_file_is_sound_and_fits_a_model(path: Path) -> None:
    assert run("verify", path).output.startswith("sound: ")
    fits = run("verify", path, "--model", "demo", "--dtype", "float32")
    assert (fits.exit_code, fits.output.split("; ")[1]) == (0, "it fits demo\n")
    found = json.loads(run("verify", path, "--model", "demo", "--dtype", "float32", "--json").output)
    assert (found["sound"], found["model"], found["tokens"]) == (True, "demo", 40)


def test_verify_ends_with_1_for_a_file_that_is_refused(path: Path) -> None:
    narrow = run("verify", path, "--model", "demo", "--dtype", "bfloat16")
    assert narrow.exit_code == 1
    assert "has another field layout" in narrow.output
    other = run("verify", path, "--model", "demo", "--set", "rms_norm_eps=0.01")
    assert (other.exit_code, other.output) == (1, "refused: 'turn.state' is of another model, judging by its config\n")
    path.write_bytes(path.read_bytes()[:-1])
    damaged = run("verify", path, "--json")
    assert damaged.exit_code == 1
    found = json.loads(damaged.output)
    assert found["sound"] is False
    assert found["reason"].startswith("'turn.state' is truncated")
    inspected = run("inspect", path)
    assert (inspected.exit_code, inspected.output.count("\n")) == (2, 1)


def test_wrong_usage_ends_with_2(path: Path, tmp_path: Path) -> None:
    for arguments in (
        ("inspect", tmp_path / "none.state"),
        ("verify", tmp_path),
        ("verify", path, "--model", tmp_path / "nowhere"),
        ("verify", path, "--dtype", "float32"),
        ("diff", path),
    ):
        assert run(*arguments).exit_code == 2


def test_save_and_load_go_on_as_if_nothing_had_been_between(tmp_path: Path) -> None:
    file = tmp_path / "a.state"
    saved = run("save", "demo", file, "--prompt-token-ids", "5,6,7,8", "--dtype", "float32", "--json")
    assert saved.exit_code == 0, saved.output
    found = json.loads(saved.stdout)
    assert (found["tokens"], found["bytes"]) == (4, file.stat().st_size)
    assert min(found["prefill_s"], found["write_s"]) > 0

    contents = file.read_bytes()
    loaded = json.loads(run("load", "demo", file, "--dtype", "float32", "--json").stdout)
    assert loaded.pop("load_ms") > 0
    assert loaded == {"loaded": True, "file": str(file), "tokens": 4, "turns": [4], "checkpoints": {}}
    params = ["--temperature", "0", "--max-tokens", "6", "--dtype", "float32", "--json"]
    for more, whole in ((["--answer"], "5,6,7,8"), (["--prompt-token-ids", "9,10"], "5,6,7,8,9,10")):
        there = json.loads(run("load", "demo", file, *more, *params).stdout)
        fresh = CliRunner().invoke(main, ["generate", "demo", "--prompt-token-ids", whole, *params])
        assert there["answer"]["token_ids"] == json.loads(fresh.stdout)["token_ids"]
        assert there["tokens"] == 4
        assert there["answer"]["usage"]["total_tokens"] == whole.count(",") + 1 + 6
    assert file.read_bytes() == contents


def test_a_conversation_is_saved_and_continued(tmp_path: Path) -> None:
    (tmp_path / "name.txt").write_text("My name is Victor.\n")
    saved = run("save", "demo", tmp_path / "a.state", "--chat", "--prompt-file", tmp_path / "name.txt")
    assert saved.stdout.startswith("saved a.state: 15 tokens, ")
    assert run("load", "demo", tmp_path / "a.state").stdout.startswith("loaded a.state: 15 tokens, 1 turn, ")
    params = ["--temperature", "0", "--max-tokens", "30"]
    answer = run("load", "demo", tmp_path / "a.state", "--chat", "-p", "What is my name?", *params)
    assert (answer.exit_code, answer.stdout) == (0, "Your name is Victor.\n")
    assert answer.stderr.startswith("loaded a.state: 15 tokens, ")


def test_load_ends_with_1_for_a_file_that_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.state"
    assert run("save", "demo", file, "-p", "The whale").exit_code == 0
    other = run("load", "demo", file, "--set", "rms_norm_eps=0.01", "--answer")
    assert (other.exit_code, other.stdout) == (1, "")
    assert other.stderr == "refused: 'a.state' is of another model, judging by its config\n"
    file.write_bytes(file.read_bytes()[:-1])
    damaged = run("load", "demo", file, "--json")
    assert damaged.exit_code == 1
    found = json.loads(damaged.stdout)
    assert found["loaded"] is False
    assert found["reason"].startswith("'a.state' is truncated")


def test_save_and_load_say_what_is_wrong_and_end_with_2(tmp_path: Path, path: Path) -> None:
    new = tmp_path / "new.state"
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    for arguments, message in (
        (("save", "demo", tmp_path / "nowhere" / "a.state", "-p", "a"), "there is no directory"),
        (("save", "demo", tmp_path, "-p", "a"), "is a directory"),
        (("save", tmp_path / "no model", new, "-p", "a"), "is not a directory"),
        (("save", "demo", new, "-p", ""), "append needs text"),
        (("save", "demo", new, "-p", "a", "--prompt-token-ids", "1"), "give one of --prompt"),
        (("save", "demo", new, "-p", "a", "--system", "b"), "--system needs --chat"),
        (("save", "demo", new, "--prompt-file", tmp_path / "bytes.txt"), "bytes.txt is not UTF-8 text"),
        (("save", "demo", new, "--prompt-token-ids", "99999999"), "99999999"),
        (("save", "demo", new, "-p", "a", "--no-prefix-cache"), "keeps no session"),
        (("save", "demo", new, "-p", "a b c d e f", "--max-length", "3"), "maximum context length is 3"),
        (("load", "demo", new), "does not exist"),
        (("load", "demo", path, "--max-tokens", "5"), "give --prompt, or --answer"),
        (("load", "demo", path, "--chat"), "--chat needs a prompt"),
        (("load", "demo", path, "--answer", "--temperature", "-1"), "temperature"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not new.exists()


def test_diff_tells_two_files_apart(path: Path, tmp_path: Path, snapshot: Snapshot) -> None:
    same = run("diff", path, path)
    assert same.exit_code == 0
    assert "tensors    0 of" in same.output
    name = next(iter(snapshot.tensors))
    changed = snapshot.tensors[name].clone()
    changed.flatten()[3] = 1.5
    identity = replace(snapshot.identity, tokenizer=None)
    tokens = (*TOKENS[:30], *range(100, 110))
    other = replace(snapshot, tensors={**snapshot.tensors, name: changed}, identity=identity, tokens=tokens)
    write_snapshot(tmp_path / "other.state", other)
    text = run("diff", path, tmp_path / "other.state")
    assert text.exit_code == 1
    for part in ("not the same: tokenizer", "40 and 40, the first 30 the same", "tensors    1 of", name, "5.0e-01"):
        assert part in text.output
    found = json.loads(run("diff", path, tmp_path / "other.state", "--json").output)
    assert (found["same"], found["identity"], found["common_tokens"]) == (False, ["tokenizer"], 30)
    assert [(tensor["name"], tensor["different"], tensor["largest"]) for tensor in found["tensors"]] == [(name, 1, 0.5)]
    write_snapshot(tmp_path / "other.state", replace(snapshot, transcript=Transcript((40,))))
    renamed = run("diff", path, tmp_path / "other.state")
    assert (renamed.exit_code, "transcript not the same: turns" in renamed.output) == (1, True)
    (tmp_path / "other.state").write_bytes(b"")
    assert run("diff", path, tmp_path / "other.state").exit_code == 2
