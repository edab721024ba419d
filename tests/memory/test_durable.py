"""Files that are whole or not there, whenever their writer dies."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from statewise.errors import SnapshotError
from statewise.memory import durable
from statewise.memory.durable import clean_directory, replacing
from statewise.memory.sharding import same_bits
from statewise.memory.snapshot import Snapshot, read_snapshot, write_snapshot
from statewise.memory.snapshot_format import Identity, StoredField

IDENTITY = Identity("a" * 64, "b" * 64, None)


def snapshot(name: str, floats: int = 1 << 18) -> Snapshot:
    layout = {"record.0.recurrent": StoredField((floats,), "F32")}
    tensor = torch.full((floats,), float(len(name)))
    return Snapshot(IDENTITY, layout, (1, 2, 3), {"record.0.recurrent": tensor}, name=name)


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a process of its own. Returns its id. Torch's threads are not there: it must compute nothing."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            work()
        finally:
            os._exit(1)
    return child


def leftovers(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if durable.PARTIAL.fullmatch(name))


def assert_whole(found: Snapshot, *candidates: Snapshot) -> None:
    match = next(candidate for candidate in candidates if candidate.name == found.name)
    assert same_bits(found.tensors["record.0.recurrent"], match.tensors["record.0.recurrent"])


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, moments = tmp_path / "turn.state", random.Random(7)
    old, new = snapshot("old"), snapshot("newer")

    def write_for_ever() -> None:
        while True:
            write_snapshot(path, new)
            write_snapshot(path, old)

    write_snapshot(path, old)
    halves = 0
    for _ in range(30):
        child = in_a_child(write_for_ever)
        time.sleep(moments.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert_whole(read_snapshot(path), old, new)
        left = leftovers(tmp_path)
        halves += len(left)
        assert clean_directory(tmp_path) == left
        assert os.listdir(tmp_path) == ["turn.state"]
    assert halves > 0  # some were killed half way


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "_sync"])
def test_killed_at_each_step(tmp_path: Path, call: str) -> None:
    expected = "new" if call == "_sync" else "old"
    path = tmp_path / "turn.state"
    new = snapshot("new")
    write_snapshot(path, snapshot("old"))

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        if call == "write":
            with replacing(path) as file:
                file.write(b"half of it")
                file.flush()
                die()
        setattr(durable if call == "_sync" else os, call, die)
        write_snapshot(path, new)

    child = in_a_child(write)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert read_snapshot(path).name == expected
    assert len(clean_directory(tmp_path)) == (expected == "old")
    assert os.listdir(tmp_path) == ["turn.state"]


def test_what_a_living_writer_has_begun_is_left_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "turn.state") as file:
        file.write(b"so far")
        assert clean_directory(tmp_path) == []
        assert len(leftovers(tmp_path)) == 1
        file.write(b", so good")
    assert (tmp_path / "turn.state").read_bytes() == b"so far, so good"
    assert leftovers(tmp_path) == []


def test_cleaning_touches_no_other_name(tmp_path: Path) -> None:
    keep = [".1.state", "turn.state", "x.partial", ".12.0123456789abcdef.partial.state", ".a.0123456789abcdef.partial"]
    for name in keep:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".1.00000000000000aa.partial").mkdir()
    (tmp_path / ".2.00000000000000aa.partial").symlink_to(tmp_path / "turn.state")
    os.mkfifo(tmp_path / ".3.00000000000000aa.partial")
    (tmp_path / ".4.00000000000000aa.partial").write_bytes(b"half")
    assert clean_directory(tmp_path) == [".4.00000000000000aa.partial"]
    assert set(keep) < set(os.listdir(tmp_path))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "turn.state"
    write_snapshot(path, snapshot("old"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SnapshotError, match=r"'turn.state' cannot be written: No space left on device"):
        write_snapshot(path, snapshot("new"))
    assert os.listdir(tmp_path) == ["turn.state"]
    assert read_snapshot(path).name == "old"


def test_places_that_cannot_be_written_are_refused_without_their_path(tmp_path: Path) -> None:
    (tmp_path / "taken.state").mkdir()
    for path, reason in (
        (tmp_path / "none" / "a.state", "No such file or directory"),
        (tmp_path / "taken.state", "Is a directory"),
        (tmp_path / ".1.0123456789abcdef.partial", "kept for unfinished files"),
    ):
        with pytest.raises(SnapshotError, match=reason) as refusal:
            write_snapshot(path, snapshot("new", 4))
        assert str(tmp_path) not in str(refusal.value)
    assert os.listdir(tmp_path) == ["taken.state"]


def test_the_file_is_its_owners_only(tmp_path: Path) -> None:
    path = tmp_path / "turn.state"
    assert write_snapshot(path, snapshot("a", 4)) == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    first = path.read_bytes()
    write_snapshot(path, replace(snapshot("a", 4)))
    assert path.read_bytes() == first  # the same snapshot gives the same bytes
