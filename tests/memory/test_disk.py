"""Checkpoints on the disk: whole or not there, never beyond the limit, whoever dies and whatever fails."""

from __future__ import annotations

import errno
import os
import resource
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.errors import ConfigError
from statewise.memory import disk as module
from statewise.memory import durable
from statewise.memory.disk import DiskTier
from statewise.memory.sharding import same_bits
from tests.memory.disk_files import HIDDEN, PAGE, PAGE_SIZE, RECORD, Directory, files, hidden_of
from tests.memory.test_durable import in_a_child

A, B, C = [1] * 6, [1] * 4 + [2] * 7, [3] * 5  # A and B share their first page


@pytest.mark.parametrize("length", [1, 4, 5, 60])
def test_what_comes_back_has_every_bit(tmp_path: Path, length: int) -> None:
    directory, tokens = Directory(tmp_path), list(range(length))
    directory.store(tokens)
    directory.assert_clean()
    directory.tier.close()
    again = Directory(tmp_path)
    (listing,) = again.found
    assert (listing.tenant, listing.tokens) == ("tenant", tokens)
    assert same_bits(listing.hidden, hidden_of(tokens))
    again.assert_clean()
    again.remove(tokens)
    again.assert_clean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_hidden_row_keeps_its_type_and_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    hidden = torch.tensor([float("nan"), -0.0, 1e-7, float("inf"), 1, 2, 3, 4], dtype=dtype)
    tier = DiskTier(tmp_path, 1 << 20, "model", RECORD, PAGE)
    assert tier.open(PAGE_SIZE) == []
    tier.store("", [5, 6], hidden, [memoryview(bytes(RECORD)), memoryview(bytes(PAGE))], ["0" * 64, "1" * 64], [])
    tier.close()
    (listing,) = DiskTier(tmp_path, 1 << 20, "model", RECORD, PAGE).open(PAGE_SIZE)
    assert same_bits(listing.hidden, hidden)


def test_a_block_of_several_checkpoints_is_one_file_and_goes_with_the_last(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    for tokens in (A, B):
        directory.store(tokens)
    shared = set(directory.held[tuple(A)].digests) & set(directory.held[tuple(B)].digests)
    assert len(shared) == 1
    assert len(os.listdir(directory.home / "blocks")) == 3 + 4 - 1
    directory.assert_clean()
    directory.remove(A)
    directory.assert_clean()
    assert shared < set(os.listdir(directory.home / "blocks"))
    directory.remove(B)
    assert os.listdir(directory.home / "blocks") == []


def test_the_same_again_and_what_is_gone_already_change_nothing(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    first = directory.store(A).stored
    assert first is not None
    assert directory.store(A).stored == first
    directory.assert_clean()
    directory.store(B)
    directory.remove(A)
    directory.tier.remove(first)
    directory.assert_clean()


def test_two_models_share_a_directory_without_seeing_each_other(tmp_path: Path) -> None:
    one, other = Directory(tmp_path, belongs_to="one"), Directory(tmp_path, belongs_to="other", page=2 * PAGE)
    one.store(A)
    other.store(A)
    other.store(B)
    one.remove(A)
    other.assert_clean()
    for directory in (one, other):
        directory.tier.close()
    assert Directory(tmp_path, belongs_to="one").found == []
    assert len(Directory(tmp_path, belongs_to="other", page=2 * PAGE).found) == 2


@settings(max_examples=25)
@given(
    limit=st.integers(8_000, 40_000),
    lengths=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 60)), min_size=1, max_size=20),
)
def test_the_limit_holds_at_every_moment(limit: int, lengths: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        directory = Directory(Path(name), limit)
        replace = os.replace

        def watched(*paths: Path) -> None:
            assert sum(files(directory.home).values()) <= limit
            replace(*paths)
            assert sum(files(directory.home).values()) <= limit

        patch.setattr(durable.os, "replace", watched)
        for token, length in lengths:
            tokens = [token] * length
            if tuple(tokens) in directory.held:
                continue
            before, going = dict(directory.held), directory.victims()
            outcome = directory.store(tokens, going)
            assert outcome.removed == [victim for victim, _ in going[: len(outcome.removed)]]  # the first, in order
            for one in list(before)[: len(outcome.removed)]:
                del directory.held[one]
            # Only what can never fit is refused, and then nothing has gone for it.
            assert (outcome.error is None) == (outcome.stored is not None)
            assert outcome.error is None or outcome.removed == []
            needed = RECORD + -(-length // PAGE_SIZE) * (PAGE + 65) + 4 * length + 400
            assert outcome.stored is not None or needed > limit
            directory.assert_clean()
        directory.tier.close()


def test_a_lower_limit_holds_from_the_start_and_the_longest_unused_goes(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    for number in range(6):
        directory.store([number] * 4)
        os.utime(directory.home / "checkpoints" / directory.held[(number,) * 4].listing, (number, number))
    used = directory.tier.used_bytes
    assert directory.load([0] * 4)  # is a use
    directory.tier.close()
    lower = Directory(tmp_path, limit=used // 2)
    assert [listing.tokens[0] for listing in lower.found] == [4, 5, 0]
    lower.assert_clean()


# What fails


def full_after(count: int) -> type[OSError]:
    """Files that take `count` writes more, in all."""
    left = [count]

    class Full:
        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, content: memoryview) -> None:
            left[0] -= 1
            if left[0] < 0:
                self.file.write(content[: len(content) // 2])  # type: ignore[attr-defined]
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.write(content)  # type: ignore[attr-defined]

    return Full  # type: ignore[return-value]


@pytest.mark.parametrize("count", range(5))
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    directory = Directory(tmp_path)
    directory.store(A)
    before, genuine, full = files(tmp_path), module.replacing, full_after(count)

    @durable.contextmanager
    def replacing(path: Path, sync: bool = True):  # type: ignore[no-untyped-def]
        with genuine(path, sync) as file:
            yield full(file)

    monkeypatch.setattr(module, "replacing", replacing)
    outcome = directory.store(B)  # three blocks of its own and a listing
    if count < 4:
        assert (outcome.stored, outcome.error) == (None, "No space left on device")
        assert files(tmp_path) == before
        assert directory.tier.used_bytes == sum(before.values())
        monkeypatch.setattr(module, "replacing", genuine)
        assert directory.store(B).error is None
    directory.assert_clean()


@pytest.mark.parametrize("size", [100, 1500, 4095])
def test_files_that_must_not_grow_leave_nothing_half_written(tmp_path: Path, size: int) -> None:
    def work() -> None:
        directory = Directory(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        outcome = directory.store(A)
        assert (outcome.stored, outcome.error) == (None, "File too large")
        assert list(files(tmp_path)) == ["model/lock"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        directory.store(A)
        directory.assert_clean()
        os._exit(0)

    assert os.waitpid(in_a_child(work), 0)[1] == 0


# Who may use it


def test_a_directory_belongs_to_one_engine_at_a_time(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    directory.store(A)
    with pytest.raises(ConfigError, match="is used by another engine") as refusal:
        Directory(tmp_path)
    assert str(tmp_path) not in str(refusal.value)
    directory.assert_clean()
    directory.tier.close()
    Directory(tmp_path).assert_clean()


def test_it_is_its_owners_only(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        Directory(tmp_path / "cache").store(A)
    finally:
        os.umask(mask)
    modes = {path: path.lstat().st_mode for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*"))}
    assert {stat.S_IMODE(mode) for mode in modes.values() if stat.S_ISDIR(mode)} == {0o700}
    assert {stat.S_IMODE(mode) for mode in modes.values() if not stat.S_ISDIR(mode)} == {0o600}
    assert len(modes) == 1 + 3 + 1 + 4


@pytest.mark.parametrize("place", ["file", "file/below", "dangling", "nul\0", "shut"])
def test_places_that_cannot_be_used_are_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "shut").mkdir(mode=0o500)

    def work() -> None:
        if place == "shut" and os.getuid() == 0:
            os.chmod(tmp_path, 0o755)
            os.setuid(65534)
        with pytest.raises(ConfigError, match=r"disk_cache cannot be used \(.+\): name a directory") as refusal:
            DiskTier(tmp_path / place, 1 << 20, "model", RECORD, PAGE, HIDDEN)
        assert str(tmp_path) not in str(refusal.value)
        os._exit(0)

    assert os.waitpid(in_a_child(work), 0)[1] == 0
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "shut"]
