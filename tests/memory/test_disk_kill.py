"""Checkpoints on the disk are whole or not there, whenever their writer is killed."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.memory.disk_files import PAGE, RECORD, Directory, blocks_of, files
from tests.memory.test_durable import in_a_child

A, B, C = [1] * 6, [1] * 4 + [2] * 7, [3] * 5
STORED = [(token,) * length for token in range(4) for length in range(1, 14)]


def change_for_ever(path: Path, **sizes: int) -> None:
    """Store checkpoints and let older ones go for them, and never come to an end."""
    directory, chance = Directory(path, **sizes), random.Random(time.monotonic_ns())
    while True:
        tokens = chance.choice(STORED)
        if tokens not in directory.held:
            for _ in directory.store(tokens, directory.victims()).removed:
                del directory.held[next(iter(directory.held))]


def test_a_writer_killed_at_any_moment_leaves_whole_checkpoints(tmp_path: Path) -> None:
    sizes, moments = {"record": 1 << 18, "page": 1 << 16, "limit": 3 << 20}, random.Random(5)
    for tokens in STORED:  # the child finds them made
        blocks_of(tokens, sizes["record"], sizes["page"])
    halves = survivors = 0
    for _ in range(25):
        child = in_a_child(lambda: change_for_ever(tmp_path, **sizes))
        time.sleep(moments.uniform(0.005, 0.04))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        left = files(tmp_path)
        directory = Directory(tmp_path, **sizes)
        halves += left.keys() != files(tmp_path).keys()
        survivors += len(directory.found)
        directory.assert_clean()
        directory.tier.close()
    assert halves > 0 and survivors > 25  # some were killed half way, and not all was lost


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("call", "steps"), [("open", 5), ("replace", 5), ("unlink", 8)])
def test_a_writer_killed_at_each_step_leaves_whole_checkpoints(
    tmp_path: Path, call: str, steps: int, before: bool
) -> None:
    """Before or behind each file that is begun, named or deleted while one checkpoint takes the place of two."""
    limit = 2 * RECORD + 4 * PAGE + 1500

    def work(path: Path, step: int) -> None:
        directory, genuine, calls = Directory(path, limit), getattr(os, call), itertools.count()

        def die(*inputs: object) -> object:
            now = next(calls) == step
            result = None if now and before else genuine(*inputs)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, call, die)
        directory.store(B, directory.victims())
        os._exit(0)

    for step in range(steps + 1):
        path = tmp_path / str(step)
        directory = Directory(path, limit)
        directory.store(A), directory.store(C)
        directory.tier.close()
        killed = os.waitpid(in_a_child(partial(work, path, step)), 0)[1] != 0
        after = Directory(path, limit)
        after.assert_clean()
        assert killed == (step < steps)
        if not killed or (call, step, before) == ("replace", steps - 1, False):  # its listing, the last of its files
            assert after.held.keys() == {tuple(B)}
        else:
            assert after.held.keys() <= {tuple(A), tuple(C)}
