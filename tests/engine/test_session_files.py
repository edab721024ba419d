"""A session in a file: taken up elsewhere without computing a token, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from statewise import LLM, SamplingParams
from statewise.errors import RequestError, SnapshotError
from tests.checkpoints import bailing_config, minimax_config, minimax_m2_config, write_checkpoint
from tests.engine.conftest import Engines, prompt
from tests.engine.test_prefix_cache import counted

SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def test_a_saved_session_goes_on_in_another_engine(make: Engines, tmp_path: Path) -> None:
    llm = make()
    session = llm.session().append(prompt(130, seed=1))
    session.generate(SHORT)
    size = session.save(tmp_path / "one.state")
    assert size == (tmp_path / "one.state").stat().st_size <= session.info.nbytes + (64 << 10)
    other = make(page_size=16)  # pages of another size
    with counted(other) as rows:
        loaded = other.load_session(tmp_path / "one.state")
        assert loaded.token_ids == session.token_ids
        answer = loaded.generate(SHORT).token_ids
        assert rows() == SHORT.max_tokens - 1
    assert answer == session.generate(SHORT).token_ids
    other.engine.check_integrity()


@pytest.mark.parametrize("config", [minimax_config(), bailing_config(), bailing_config("v2_5"), minimax_m2_config()])
def test_every_family_saves_and_loads(tmp_path: Path, config: dict[str, object]) -> None:
    write_checkpoint(tmp_path / "model", config, seed=2)
    one, two = (LLM(tmp_path / "model", num_records=4, num_pages=16, dtype="float32") for _ in range(2))
    session = one.session().append(prompt(70))
    session.save(tmp_path / "s.state")
    assert two.load_session(tmp_path / "s.state").generate(SHORT).token_ids == session.generate(SHORT).token_ids


def test_what_cannot_be_loaded_is_refused(make: Engines, tmp_path: Path) -> None:
    llm = make()
    path = tmp_path / "a.state"
    llm.session().append(prompt(100)).save(path)
    contents = path.read_bytes()
    damaged = bytearray(contents)
    damaged[len(contents) // 2] ^= 1
    (tmp_path / "damaged.state").write_bytes(damaged)
    (tmp_path / "short.state").write_bytes(contents[:-100])
    for name in ("damaged.state", "short.state", "missing.state"):
        with pytest.raises(SnapshotError, match=name):
            llm.load_session(tmp_path / name)
    write_checkpoint(tmp_path / "other", minimax_config(), seed=1)
    with pytest.raises(SnapshotError, match="model"):
        LLM(tmp_path / "other", num_records=4, num_pages=16).load_session(path)
    with pytest.raises(SnapshotError):
        make(max_length=50).load_session(path)
    with pytest.raises(RequestError, match="the prefix cache is disabled"):
        make(prefix_cache=False).load_session(path)
    with pytest.raises(RequestError, match="the session is empty"):
        llm.session().save(path)
    llm.engine.check_integrity()


def test_a_conversation_of_the_demo_model_goes_on_from_its_file(tmp_path: Path) -> None:
    llm, other = (LLM("demo", num_records=80, num_pages=200, dtype="float32") for _ in range(2))
    session = llm.session().append(" ".join(f"The number of box {i} is {i * i}." for i in range(300)))
    session.save(tmp_path / "demo.state")
    loaded = other.load_session(tmp_path / "demo.state")
    assert loaded.generate(SHORT).token_ids == session.generate(SHORT).token_ids
