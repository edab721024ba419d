"""Messages of a session that is gone back in: they go on where a turn ends, in forks and from files too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from statewise import LLM, SamplingParams
from statewise.api import conversation
from statewise.api.conversation import Conversation
from statewise.api.session import Session
from statewise.engine.tokenizer import Tokenizer
from statewise.errors import RequestError, SnapshotError
from statewise.memory.snapshot_transcript import (
    MAX_MARKS,
    MAX_TRANSCRIPT,
    Transcript,
    decode_transcript,
    encode_transcript,
    message_extent,
)

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


# Without a model


class Spelled(Tokenizer):
    """A token for each character of a chat, whose template leaves thoughts out of earlier answers."""

    def __init__(self) -> None:
        pass

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(map(ord, text))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *_: Any, **__: Any) -> list[int]:
        return self.encode("".join(f"[{one['role']}]{one['content'] or ''}" for one in messages) + "[assistant]")


def append(talk: Conversation, *messages: Mapping[str, Any]) -> None:
    talk.become(*talk.extended(messages, Spelled(), list))


def answer(talk: Conversation, text: str, thoughts: str = "") -> None:
    talk.answer(list(map(ord, thoughts + text)), text)


def thinking() -> Conversation:
    """Two questions; the thoughts before the first answer are gone from the second prompt."""
    talk = Conversation()
    append(talk, says("one"))
    answer(talk, "first", "hm")
    append(talk, says("two"))
    answer(talk, "second", "well")
    return talk


def again(talk: Conversation) -> Conversation:
    """From its file."""
    block = encode_transcript(talk.transcript, len(talk.tokens))
    return Conversation.of(talk.tokens, decode_transcript(block, len(talk.tokens)))


@pytest.mark.parametrize("made", [thinking, lambda: thinking().copy(), lambda: again(thinking())])
def test_going_back_leaves_no_answer_that_was_rewound(made: Callable[[], Conversation]) -> None:
    first = made().turns[0]
    assert made().turns[1] == first, "the answer's thoughts are rendered no more"
    for to, turn in ((None, 0), (first, None)):
        talk = made()
        talk.rewind(to, turn)
        assert (talk.messages, talk.turns, talk.spoken) == ([says("one")], [first], [1])
    talk = made()
    talk.rewind(None, 1)
    assert [one["content"] for one in talk.messages] == ["one", "first"]
    assert (talk.turns, talk.spoken) == ([first, first], [1, 2])
    for to, turn in ((None, -1), (len(made().tokens), None)):
        talk = made()
        talk.rewind(to, turn)
        assert talk.transcript == made().transcript


def test_copies_share_what_they_have_until_one_goes_on() -> None:
    talk = thinking()
    before = again(talk)
    changes: list[Callable[[Conversation], Any]] = [
        lambda one: answer(one, "more"),
        lambda one: append(one, says("three")),
        lambda one: one.rewind(None, 1),
        lambda one: one.name("here"),
        lambda one: one.become(*one.extended([1, 2], None, list)),
    ]
    for change in changes:
        branch = talk.copy()
        assert branch.tokens is talk.tokens and branch.messages is talk.messages
        change(branch)
        assert talk.transcript == before.transcript and talk.tokens == before.tokens
        assert branch.transcript != before.transcript


def test_an_answer_that_goes_on_is_one_message() -> None:
    talk = thinking()
    ends = list(talk.turns)
    answer(talk, " and")
    answer(talk, " more")
    assert [one["content"] for one in talk.messages] == ["one", "first", "two", "second and more"]
    assert talk.turns[:4] == ends and talk.spoken == [1, 2, 3, 0, 0, 4]
    assert again(talk).transcript == talk.transcript
    append(talk, says("three"))
    answer(talk, "third")
    assert len(talk.messages) == 6
    talk.rewind(ends[-1], None)  # where the message ended before it went on
    assert talk.messages == []


def test_an_assistants_message_that_was_sent_is_not_the_answer() -> None:
    talk = Conversation()
    append(talk, says("one"), {"role": "assistant", "content": "sent"})
    answer(talk, "said")
    assert [one["content"] for one in talk.messages] == ["one", "sent", "said"]


def test_nothing_generated_is_no_answer() -> None:
    talk = thinking()
    talk.answer([], "")
    assert talk.transcript == thinking().transcript and talk.tokens == thinking().tokens


def test_the_first_system_message_is_said_once() -> None:
    talk = Conversation()
    for number in range(3):
        append(talk, SYSTEM, says(str(number)))
        answer(talk, "yes")
    assert [one["role"] for one in talk.messages] == ["system", *["user", "assistant"] * 3]
    append(talk, {**SYSTEM, "content": "Otherwise."}, says("3"))
    assert [one["role"] for one in talk.messages[-2:]] == ["system", "user"]


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else "end"


@pytest.mark.parametrize(
    "extra",
    [nested(40), "\ud800", float("inf"), 1 << 64, {1: "a"}, "a" * MAX_TRANSCRIPT, [0] * MAX_MARKS],
    ids=["deep", "surrogate", "infinite", "large", "key", "long", "marks"],
)
def test_messages_that_no_file_holds_are_refused(extra: Any) -> None:
    talk = thinking()
    with pytest.raises(RequestError) as caught:
        append(talk, {**says("three"), "extra": extra})
    assert caught.value.field == "messages"
    assert talk.transcript == thinking().transcript and talk.tokens == thinking().tokens


def test_a_transcript_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, measured = 4000, list[Mapping[str, Any]]()

    def counted(message: Mapping[str, Any]) -> tuple[int, int]:
        measured.append(message)
        return message_extent(message)

    monkeypatch.setattr(conversation, "MAX_TRANSCRIPT", limit)
    monkeypatch.setattr(conversation, "message_extent", counted)
    talk = Conversation()

    def go_on() -> None:
        for number in range(1000):
            append(talk, {**says(f"\n{number}\u00e9"), "extra": "e" * 50})
            answer(talk, "yes")
            assert len(encode_transcript(talk.transcript, len(talk.tokens))) <= limit

    def give_names() -> None:
        for number in range(1000):
            talk.name(f"n{number}")

    with pytest.raises(RequestError, match=f"at most {limit}"):
        go_on()
    assert len(talk.messages) > 20
    assert len(measured) <= 2 * len(talk.messages) + 1  # and not all of them at every turn
    with pytest.raises(RequestError, match="are kept"):
        give_names()
    talk.rewind(None, 0)
    append(talk, says("three"))
