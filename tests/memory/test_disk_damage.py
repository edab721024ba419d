"""Whatever has happened to a directory of checkpoints, nothing wrong is loaded, and nothing waits, fails or stays."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from statewise.memory import disk as module
from tests.memory.disk_damage import (
    Damage,
    content_damages,
    forged_listings,
    kind_damages,
    name_damages,
    put_in_place,
)
from tests.memory.disk_files import PAGE, RECORD, Directory, files

A, B, C = (1,) * 7, (1,) * 4 + (2,) * 7, (3,) * 5  # A and B share their first page
BLOCKS = {"its record": RECORD, "the page that it shares": PAGE, "its last page": PAGE}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """The directory that is damaged, as an engine has left it."""
    directory = Directory(tmp_path_factory.mktemp("sound"))
    for tokens in (A, B, C):
        directory.store(tokens)
    directory.tier.close()
    return directory


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise AssertionError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def damaged(sound: Directory, path: Path, name: str, damage: Damage) -> Path:
    shutil.copytree(sound.home, path / "model", symlinks=True)
    damage(path / "model" / name)
    return path


def survey(path: Path) -> set[tuple[int, ...]]:
    """What can still be loaded, all of it right. What cannot is given up, as the engine does, and stored again."""
    directory = Directory(path)
    good = {tokens for tokens in list(directory.held) if directory.load(tokens)}
    for tokens in directory.held.keys() - good:
        directory.remove(tokens)
    left = set(directory.held)
    directory.assert_clean()
    for tokens in (A, B, C):
        if tokens not in left:
            assert directory.store(tokens).error is None
    directory.assert_clean()
    directory.tier.close()
    again = Directory(path)
    assert again.held.keys() == {A, B, C}
    again.assert_clean()
    again.tier.close()
    return good


def cases(sound: Directory) -> Iterator[tuple[str, str, Damage, set[tuple[int, ...]]]]:
    """What is damaged, how, and what is lost with it."""
    for number, (what, length) in enumerate(BLOCKS.items()):
        name = f"blocks/{sound.held[A].digests[number]}"
        lost = {A, B} if number == 1 else {A}
        for how, damage in (*content_damages(length), *kind_damages()):
            yield f"{what}: {how}", name, damage, lost
    name = f"checkpoints/{sound.held[A].listing}"
    content = (sound.home / name).read_bytes()
    for how, damage in (*content_damages(len(content), header=300), *kind_damages(), *name_damages()):
        yield f"its listing: {how}", name, damage, {A}
    for how, forged in forged_listings(content):
        yield f"a forged listing: {how}", name, lambda path, forged=forged: put_in_place(forged, path), {A}


def test_what_is_damaged_is_lost_alone_and_the_directory_is_clean(
    sound: Directory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = 0
    for what, name, damage, lost in cases(sound):
        path, count = tmp_path / str(count), count + 1
        damaged(sound, path, name, damage)
        caplog.clear()
        assert survey(path) == {A, B, C} - lost, what
        same_size = "bit of" in what or "zeros" in what  # found when it is loaded
        reported = "the disk cache held" in caplog.text or same_size or what.endswith("listing: missing")
        assert reported, what
        shutil.rmtree(path)
    assert count >= 150


def test_what_does_not_belong_there_is_removed(sound: Directory, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copytree(sound.home, path / "model")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"kept")
    for place in ("blocks", "checkpoints"):
        home = path / "model" / place
        (home / "note.txt").write_bytes(b"text")
        (home / ("0" * 64)).write_bytes(b"text")
        (home / ".1.0123456789abcdef.partial").write_bytes(b"half")
        (home / ".2.0123456789abcdef.partial").mkdir()
        (home / "link").symlink_to(outside)
        os.mkfifo(home / "pipe")
    assert survey(path) == {A, B, C}
    assert files(outside) == {"file": 4}


def test_many_damages_at_once(sound: Directory, tmp_path: Path) -> None:
    chance = random.Random(3)
    changes = [damage for _, damage in (*content_damages(800), *kind_damages())]
    for number in range(20):
        path = tmp_path / str(number)
        shutil.copytree(sound.home, path / "model")
        hit = {name for name in files(path / "model") if name != "lock" and chance.random() < 0.3}
        for name in sorted(hit):
            chance.choice(changes)(path / "model" / name)
        untouched = {
            tokens
            for tokens, stored in sound.held.items()
            if not hit & {f"checkpoints/{stored.listing}", *(f"blocks/{digest}" for digest in stored.digests)}
        }
        assert survey(path) >= untouched


@pytest.mark.parametrize(("how", "damage"), list(kind_damages()))
def test_a_block_that_changes_under_a_running_engine_is_not_loaded_and_is_written_again(
    tmp_path: Path, how: str, damage: Damage
) -> None:
    directory = Directory(tmp_path)
    for tokens in (A, B, C):
        directory.store(tokens)
    damage(directory.home / "blocks" / directory.held[A].digests[1])
    assert not directory.load(A)
    assert not directory.load(B)
    assert directory.load(C)
    directory.remove(A)
    assert directory.store(A).error is None  # B still holds the page that both have
    directory.assert_clean()


def test_a_listing_is_read_up_to_a_size(
    sound: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = damaged(sound, tmp_path, f"checkpoints/{sound.held[A].listing}", lambda path: os.truncate(path, 1 << 40))
    assert survey(path) == {B, C}
    monkeypatch.setattr(module, "MAX_LISTING", 600)
    directory = Directory(path)
    outcome = directory.store((1,) * 200)
    assert (outcome.stored, outcome.error) == (None, "it is too small")
    directory.assert_clean()


def test_what_is_damaged_is_reported_without_its_place(
    sound: Directory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        damaged(sound, tmp_path, f"checkpoints/{sound.held[A].listing}", lambda path: os.truncate(path, 1))
        (tmp_path / "model" / "blocks" / ".1.0123456789abcdef.partial").write_bytes(b"half")
        survey(tmp_path)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the disk cache held 1 damaged checkpoints and 1 unfinished files; they were removed"
    )
