"""The directory of the disk cache: who may use it, and who sees what in it."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statewise import LLM, SamplingParams
from statewise.errors import ConfigError
from tests.engine.conftest import Engines, prompt
from tests.engine.test_prefix_cache import ask

ONCE = SamplingParams(temperature=0, max_tokens=1)
TOKENS = prompt(100)


@pytest.fixture
def small(make: Engines) -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def build(**options: object) -> LLM:
        made.append(make(**{"num_records": 3, "num_pages": 24, "page_size": 16} | options))
        return made[-1]

    yield build
    for llm in made:
        llm.close()


def test_models_types_and_page_sizes_share_a_directory_without_seeing_each_other(
    small: Callable[..., LLM], tmp_path: Path
) -> None:
    engines = [small(disk_cache=tmp_path, **own) for own in ({}, {"page_size": 32}, {"dtype": "bfloat16"})]
    for llm in engines:
        assert ask(llm, TOKENS, ONCE).metrics.cached_tokens == 0
    for llm in engines:
        llm.close()
    again = small(disk_cache=tmp_path)
    depot = again.engine.scheduler.cache.depot
    assert depot is not None and depot.disk is not None and len(depot.disk.held) == 1
    assert ask(again, TOKENS, ONCE).metrics.cached_tokens == len(TOKENS)
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {True: 0o700, False: 0o600}


def test_a_directory_in_use_and_one_that_cannot_be_used_are_refused(small: Callable[..., LLM], tmp_path: Path) -> None:
    llm = small(disk_cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="is used by another engine"):
        small(disk_cache=tmp_path / "cache")
    for _ in range(2):
        llm.close()
    small(disk_cache=tmp_path / "cache")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"disk_cache cannot be used \(File exists\)"):
        small(disk_cache=tmp_path / "file")
