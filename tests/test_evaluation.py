"""The skills of the evaluation: same seed, same instance; right answers; true distances; splits that never meet."""

import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pytest
from tokenizers import Tokenizer

from statewise.evaluation import DISTANCES, SKILLS, evaluate, make
from statewise.evaluation.documents import Message
from statewise.evaluation.facts import RELATIONS
from statewise.evaluation.filler import approximate_tokens, shipped_prose
from statewise.evaluation.skills import held_out, in_split

CELLS = [(name, distance) for name, skill in SKILLS.items() for distance in skill.distances]
NUMBERS = re.compile(r"\d+")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(resources.files("statewise.demo").joinpath("tokenizer.json").read_text("utf-8"))


def said(messages: list[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


@pytest.mark.parametrize(("skill", "distance"), CELLS)
def test_the_same_arguments_give_the_same_instance(skill: str, distance: int) -> None:
    assert make(skill, distance, 5) == make(skill, distance, 5)
    assert make(skill, distance, 5) != make(skill, distance, 6)
    assert make(skill, distance, 5).messages[-1]["role"] == "user"


@pytest.mark.parametrize("seed", range(40))
def test_sums_are_right_and_split_by_their_operands(seed: int) -> None:
    for split in ("train", "eval"):
        one = make("add", 0, seed, split)
        a, b = map(int, NUMBERS.findall(one.messages[0]["content"]))
        assert one.answer == f"{a} + {b} = {a + b}"
        assert held_out("add", f"{min(a, b)}+{max(a, b)}") == (split == "eval")
        one = make("subtract", 0, seed, split)
        small, large = sorted(map(int, NUMBERS.findall(one.messages[0]["content"])))
        assert one.answer == f"{large} - {small} = {large - small}"
        assert held_out("subtract", f"{large}-{small}") == (split == "eval")
        one = make("multiply", 0, seed, split)
        a, b = map(int, NUMBERS.findall(one.messages[0]["content"]))
        assert one.answer.startswith(f"{a} * {b} = ")
        assert one.answer.endswith(f" = {a * b}")
        assert held_out("multiply", f"{a}*{b}") == (split == "eval")


@pytest.mark.parametrize("seed", range(40))
def test_lists_are_copied_sorted_and_counted_rightly(seed: int) -> None:
    for split in ("train", "eval"):
        one = make("copy", 0, seed, split)
        assert one.messages[0]["content"].endswith(": " + one.answer)
        one = make("sort", 0, seed, split)
        given = [int(n) for n in NUMBERS.findall(one.messages[0]["content"])]
        falling = "largest to smallest" in said(one.messages) or "falling" in said(one.messages)
        assert [int(n) for n in one.answer.split(", ")] == sorted(given, reverse=falling)
        one = make("count", 0, seed, split)
        question = one.messages[0]["content"]
        items = [item.strip(" ?") for item in question.split(": ", 1)[1].split(",")]
        assert int(one.answer) == len(items)


def stated_values(instance: Any) -> list[str]:
    """Every value that the conversation gives to what its question asks for, in order."""
    question = instance.messages[-1]["content"].rsplit("\n", 1)[-1]
    for relation in RELATIONS:
        for form in relation.questions:
            match = re.fullmatch(re.escape(form).replace(r"\{e\}", "(.+?)"), question)
            if match:
                forms = [re.escape(text) for text in (*relation.statements, *relation.changes)]
                pattern = "|".join(text.replace(r"\{e\}", re.escape(match[1])) for text in forms)
                found = re.finditer(pattern.replace(r"\{v\}", r"(\w+)"), said(instance.messages))
                return [next(value for value in hit.groups() if value) for hit in found]
    raise AssertionError(f"no relation asks {question!r}")


@pytest.mark.parametrize(("skill", "distance"), [cell for cell in CELLS if cell[1]])
def test_the_answer_is_the_last_value_stated(skill: str, distance: int) -> None:
    for split in ("train", "eval"):
        for seed in range(12):
            one = make(skill, distance, seed, split)
            values = stated_values(one)
            assert values[-1] == one.answer
            assert len(values) == (2 if skill == "update" else 1)


@pytest.mark.parametrize(("skill", "distance"), [cell for cell in CELLS if cell[1]])
def test_the_fact_lies_as_far_back_as_promised(skill: str, distance: int, tokenizer: Tokenizer) -> None:
    measured = []
    for seed in range(12):
        one = make(skill, distance, seed)
        text = said(one.messages)
        question = one.messages[-1]["content"].rsplit("\n", 1)[-1]
        last = max(text.rfind(sentence) for sentence in candidates(one))
        between = text[last : len(text) - len(question)]
        turns = len(one.messages) - 1  # each adds the four tokens of its header and end
        measured.append(len(tokenizer.encode(between).ids) + 4 * turns)
    mean = sum(measured) / len(measured)
    assert abs(mean - distance) <= 0.05 * distance + 10
    assert all(abs(tokens - distance) <= 0.1 * distance + 40 for tokens in measured)


def candidates(instance: Any) -> list[str]:
    """The sentences that may state the answer last."""
    question = instance.messages[-1]["content"].rsplit("\n", 1)[-1]
    for relation in RELATIONS:
        for form in relation.questions:
            match = re.fullmatch(re.escape(form).replace(r"\{e\}", "(.+?)"), question)
            if match:
                forms = (*relation.statements, *relation.changes)
                return [text.format(e=match[1], v=instance.answer) for text in forms]
    raise AssertionError(f"no relation asks {question!r}")


@pytest.mark.parametrize("skill", ["lookup", "update"])
def test_training_never_states_a_held_out_fact(skill: str) -> None:
    for seed in range(20):
        text = said(make(skill, 1024, seed, "train").messages)
        for relation in RELATIONS:
            for form in (*relation.statements, *relation.changes):
                pattern = re.escape(form).replace(r"\{e\}", r"([\w ]+?)").replace(r"\{v\}", r"(\w+)")
                for entity, value in re.findall(rf"(?m)^{pattern}$", text):
                    if "now" not in entity.split():
                        entity = entity.removeprefix("Correction: ")
                        assert not held_out("fact", f"{relation.name}|{entity}|{value}")


def test_a_content_lies_in_exactly_one_split_and_one_in_eight_is_held_out() -> None:
    contents = [str(n) for n in range(4000)]
    assert all(in_split("add", c, "train") != in_split("add", c, "eval") for c in contents)
    assert 0.1 < sum(held_out("add", c) for c in contents) / len(contents) < 0.15
    assert held_out("add", "1+2") == held_out("add", "1+2")


def test_the_estimate_of_tokens_fits_the_tokenizer(tokenizer: Tokenizer) -> None:
    lines = shipped_prose()
    estimated = sum(map(approximate_tokens, lines))
    counted = sum(len(tokenizer.encode(line).ids) for line in lines)
    assert abs(estimated - counted) <= 0.05 * counted


def test_another_counter_may_be_given() -> None:
    words = make("lookup", 256, 0, count_tokens=lambda text: len(text.split()))
    assert len(said(words.messages)) > len(said(make("lookup", 256, 0).messages))


@dataclass
class Said:
    text: str


@dataclass
class Output:
    outputs: list[Said]


class Student:
    """Answers sums rightly and everything else not at all."""

    def chat(self, messages: list[list[Message]], sampling_params: Any) -> list[Output]:
        replies = []
        for conversation in messages:
            numbers = [int(n) for n in NUMBERS.findall(conversation[-1]["content"])]
            replies.append(Output([Said(f" {numbers[0]} + {numbers[1]} = {sum(numbers)}\n" if numbers else "")]))
        return replies


def test_the_report_scores_each_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    import statewise

    monkeypatch.setattr(statewise, "SamplingParams", lambda **arguments: arguments, raising=False)
    seen: list[tuple[str, int, int, int]] = []
    report = evaluate(Student(), 4, skills=["add", "copy"], progress=lambda *cell: seen.append(cell))
    assert seen == [("add", 0, 4, 8), ("copy", 0, 8, 8)]
    as_json = json.loads(report.to_json())
    assert as_json["exact_match"] == 0.5
    assert as_json["skills"] == [
        {"skill": "add", "distance": 0, "n": 4, "exact_match": 1.0},
        {"skill": "copy", "distance": 0, "n": 4, "exact_match": 0.0},
    ]


def test_unknown_skills_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import statewise

    monkeypatch.setattr(statewise, "SamplingParams", lambda **arguments: arguments, raising=False)
    with pytest.raises(ValueError, match="juggle"):
        evaluate(Student(), 4, skills=["juggle"])
    with pytest.raises(ValueError, match="instances_per_cell"):
        evaluate(Student(), 0)


def test_every_skill_has_a_summary_and_its_distances() -> None:
    assert {"add", "copy", "sort", "count", "lookup", "update"} <= set(SKILLS)
    assert SKILLS["lookup"].distances == DISTANCES == SKILLS["update"].distances
    assert all(skill.summary for skill in SKILLS.values())
