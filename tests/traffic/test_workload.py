"""What is asked, and what a prompt file may hold."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from statewise.errors import RequestError
from statewise.traffic.arrivals import Pattern
from statewise.traffic.workload import Span, Synthetic, Turn, Vocabulary, read_prompts

IDS = Vocabulary(ids=(3, 5, 8, 13))


def some(workload: Synthetic, count: int = 200) -> list[list[Turn]]:
    return list(islice(workload.conversations(), count))


def test_random_prompts_have_the_lengths_that_were_asked() -> None:
    talks = some(Synthetic(IDS, Span(4, 9), Span(20, 30), shared_prefix_tokens=6, turns=2))
    first, second = ([talk[at] for talk in talks] for at in (0, 1))
    assert {len(turn.content) for turn in first} == set(range(10, 16))
    assert {len(turn.content) for turn in second} == set(range(4, 10))
    assert {turn.max_tokens for turn in first + second} == set(range(20, 31))
    assert len({tuple(turn.content[:6]) for turn in first}) == 1
    assert {token for turn in first for token in turn.content} == {3, 5, 8, 13}


def test_words_are_as_many_as_their_tokens_allow() -> None:
    (talk,) = some(Synthetic(Vocabulary(tokens_per_word=2.0), Span(100, 100), Span(1, 1), shared_prefix_tokens=40), 1)
    assert isinstance(talk[0].content, str)
    assert len(talk[0].content.split()) == 20 + 50


def test_the_same_seed_asks_the_same() -> None:
    def ask(seed: int) -> list[list[Turn]]:
        return some(Synthetic(IDS, Span(4, 9), Span(20, 30), seed=seed), 20)

    assert ask(4) == ask(4) != ask(5)


def test_a_prompt_file_is_read_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": [1, 2], "max_tokens": 9}\n', encoding="utf-8")
    listed, endpoint = read_prompts(path, 5)
    assert endpoint == "completions"
    assert [talk[0] for talk in islice(listed.conversations(), 3)] == [
        Turn("a\u2028b", 5),
        Turn([1, 2], 9),
        Turn("a\u2028b", 5),
    ]
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    listed, endpoint = read_prompts(path)
    assert (endpoint, listed.turns[0].max_tokens) == ("chat", None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no prompts"),
        (b'{"prompt": "a"}\n{', "line 2"),
        (b"[" * 5000, "line 1"),
        (b'{"prompt": ""}', "line 1"),
        (b'{"prompt": [1, true]}', "line 1"),
        (b'{"prompt": [1.5]}', "line 1"),
        (b'{"messages": "a"}', "line 1"),
        (b'{"messages": []}', "line 1"),
        (b'{"text": "a"}', "prompt or messages"),
        (b'{"prompt": "a", "messages": [{}]}', "prompt or messages"),
        (b"5", "line 1"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens"),
        (b'{"prompt": "a"}\n{"messages": [{}]}', "mixes"),
        (b"\xff", "UTF-8"),
    ],
)
def test_a_bad_prompt_file_is_refused_by_its_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=complaint) as raised:
        read_prompts(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"requests": 1},
        {"concurrency": 1},
        {"rate": 0.0, "requests": 1},
        {"rate": float("nan"), "requests": 1},
        {"rate": 1.0, "burstiness": 0.0, "requests": 1},
    ],
)
def test_a_pattern_without_sense_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(RequestError):
        Pattern(**fields)  # type: ignore[arg-type]
