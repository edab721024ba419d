"""Messages of a session that is gone back in: they go on where a turn ends, in forks and from files too."""

from __future__ import annotations

from pathlib import Path

import pytest

from statewise import LLM, SamplingParams
from statewise.api.session import Session
from statewise.errors import RequestError, SnapshotError
from statewise.memory.snapshot_transcript import Transcript, decode_transcript, encode_transcript

GREEDY = SamplingParams(temperature=0, max_tokens=24)
SYSTEM = {"role": "system", "content": "Answer in short."}


def says(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", dtype="float32")


@pytest.fixture
def talk(llm: LLM) -> Session:
    session = llm.session()
    session.append([SYSTEM, says("What is 27 + 45?")]).generate(GREEDY)
    session.append([says("What is 58 - 19?")]).generate(GREEDY)
    return session


def test_messages_go_on_at_the_end_of_every_turn(llm: LLM, talk: Session) -> None:
    for turn, kept in enumerate((2, 3, 4)):
        (branch,) = talk.fork()
        branch.rewind(turn=turn)
        messages = [*talk.transcript.messages[:kept], says("Multiply 43 by 7.")]
        assert branch.transcript.messages == tuple(messages[:-1])
        answer = branch.append(messages[-1:]).generate(GREEDY)
        assert answer.text == llm.chat(messages, GREEDY)[0].outputs[0].text
        assert branch.transcript.spoken[-2:] == (kept + 1, kept + 2)


def test_a_file_keeps_where_messages_end(llm: LLM, talk: Session, tmp_path: Path) -> None:
    talk.save(tmp_path / "talk.state")
    loaded = llm.load_session(tmp_path / "talk.state")
    assert loaded.transcript == talk.transcript
    loaded.rewind(turn=1).append([says("Multiply 43 by 7.")])
    assert len(loaded.transcript.messages) == 4


def test_within_a_turn_messages_do_not_go_on(talk: Session, tmp_path: Path) -> None:
    talk.rewind(to=talk.info.turns[1] - 1)
    assert talk.transcript.messages == () and talk.transcript.spoken == (0,)
    with pytest.raises(RequestError, match="messages can only follow messages"):
        talk.append([says("Hello")])
    talk.append("Hello").save(tmp_path / "talk.state")


def test_a_file_from_before_that_was_counted_is_read(talk: Session) -> None:
    transcript = talk.transcript
    tokens = len(talk.token_ids)
    old = encode_transcript(Transcript(transcript.turns, {}, transcript.messages), tokens)
    assert b"spoken" not in old
    assert decode_transcript(old, tokens).spoken == ()


@pytest.mark.parametrize("spoken", [(1,), (1, 3), (-1, 2), (True, 2)])
def test_counts_that_do_not_fit_are_refused(spoken: tuple[int, ...]) -> None:
    with pytest.raises(SnapshotError, match="how many of its messages"):
        encode_transcript(Transcript((1, 2), {}, (SYSTEM, SYSTEM), spoken), 2)
