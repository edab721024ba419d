"""A session in a file: taken up elsewhere without computing a token, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from statewise import LLM, SamplingParams
from statewise.api.session import Session
from statewise.errors import RequestError, SnapshotError
from statewise.memory.snapshot import read_snapshot, write_snapshot
from statewise.memory.snapshot_transcript import Transcript
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


def test_turns_and_names_come_back(make: Engines, tmp_path: Path) -> None:
    llm, other = make(), make()
    session = llm.session().append(prompt(90, seed=2)).checkpoint("start")
    first = session.generate(SHORT).token_ids
    session.append(prompt(33, seed=3)).checkpoint("second question")
    second = session.generate(SHORT).token_ids
    session.save(tmp_path / "a.state")
    loaded = other.load_session(tmp_path / "a.state")
    info = loaded.info
    assert info.turns == session.info.turns == (90, 95, 128, 133)
    assert info.checkpoints == session.info.checkpoints == {"start": 90, "second question": 128}
    assert loaded.fork()[0].rewind(to="second question").generate(SHORT).token_ids == second
    assert loaded.rewind(turn=0).generate(SHORT).token_ids == first
    loaded.rewind(to=0).append(prompt(7)).save(tmp_path / "b.state")
    assert other.load_session(tmp_path / "b.state").info.checkpoints == {}
    other.engine.check_integrity()


def test_a_file_without_a_transcript_is_one_turn(make: Engines, tmp_path: Path) -> None:
    llm = make()
    llm.session().append(prompt(40)).checkpoint("a").append(prompt(5)).save(tmp_path / "a.state")
    write_snapshot(tmp_path / "a.state", replace(read_snapshot(tmp_path / "a.state"), transcript=None))
    info = llm.load_session(tmp_path / "a.state").info
    assert (info.turns, info.checkpoints) == ((45,), {})
    snapshot = read_snapshot(tmp_path / "a.state")
    tensors = {name: t[:0] if name.startswith("pages.") else t for name, t in snapshot.tensors.items()}
    write_snapshot(tmp_path / "empty.state", replace(snapshot, tokens=(), tensors=tensors))
    with pytest.raises(SnapshotError, match=r"'empty.state' has no token, which a session needs"):
        llm.load_session(tmp_path / "empty.state")
    write_snapshot(tmp_path / "row.state", replace(snapshot, hidden=None))
    with pytest.raises(SnapshotError, match=r"'row.state' has no last hidden row, which a session needs"):
        llm.load_session(tmp_path / "row.state")


def test_a_session_that_no_file_can_hold_is_refused_in_one_sentence(tmp_path: Path) -> None:
    llm = LLM("demo", num_records=8, num_pages=8, dtype="float32")
    session = llm.session()
    with pytest.raises(RequestError, match=r"a message of a session holds text, .* objects with text as keys"):
        session.append([{"role": "user", "content": "Hi", "note": {1: "a key that is no text"}}])
    assert session.token_ids == []
    with pytest.raises(RequestError, match="1 to 256 printable characters"):
        session.checkpoint("two\nlines")
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_of_the_demo_model_goes_on_from_its_file(tmp_path: Path) -> None:
    llm, other = (LLM("demo", num_records=80, num_pages=200, dtype="float32") for _ in range(2))
    boxes = " ".join(f"The number of box {i} is {i * i}." for i in range(300))
    session = llm.session().append([{"role": "user", "content": f"My name is Victor. {boxes}"}])
    session.generate(SHORT)
    size = session.save(tmp_path / "demo.state")
    assert session.info.num_tokens > 3500
    assert size <= session.info.nbytes + (64 << 10)
    loaded = other.load_session(tmp_path / "demo.state")
    question = [{"role": "user", "content": "What is my name?"}]
    answers = []
    for one in (session, loaded):
        one.append(question)
        answers.append((one.token_ids, one.generate(SHORT).token_ids))
    assert answers[0] == answers[1]
    assert loaded.info.turns == session.info.turns


def test_where_messages_are_spelled_otherwise_turns_and_names_stay_in_the_tokens(tmp_path: Path) -> None:
    """An answer that the template shortens, or whose tokens are not those of its text."""
    llm = LLM("demo", num_records=16, num_pages=40, dtype="float32")
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
    asked = llm.session().append(messages[:1]).token_ids
    odd = [*asked, *torch.arange(300, 360).tolist()]
    transcript = Transcript((len(asked), len(odd)), {"asked": len(asked), "answered": len(odd)}, messages)
    session = Session(llm, None, odd, transcript).append([{"role": "user", "content": "Bye"}])
    info = session.info
    assert info.turns == (len(asked), len(asked), info.num_tokens)
    assert info.checkpoints == {"asked": len(asked)}
    session.save(tmp_path / "a.state")
    assert llm.load_session(tmp_path / "a.state").info.turns == info.turns
