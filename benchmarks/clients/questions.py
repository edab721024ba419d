"""The questions that lm-eval asks: drawn from the demo model's own skills, as local JSON beside local tasks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from statewise.evaluation.filler import shipped_prose
from statewise.evaluation.skills import make

TASKS = Path(__file__).parent / "tasks"
SKILLS = ("add", "subtract", "multiply", "sort")
QUESTIONS = 25  # of each skill
PASSAGES = 20  # of prose


def write(directory: Path) -> None:
    """Put tasks and data into a directory; the tasks name the data relative to it."""
    for name, rows in {"sums": _sums(), "answers": _answers(), "prose": _prose()}.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in TASKS.glob("*.yaml"):
        shutil.copy(task, directory)


def _answers() -> Iterator[dict[str, Any]]:
    """Questions with one exact answer."""
    for skill in SKILLS:
        for seed in range(QUESTIONS):
            one = make(skill, 0, seed)
            yield {"question": one.messages[-1]["content"], "answer": one.answer}


def _sums() -> Iterator[dict[str, Any]]:
    """Sums with four results to choose from, one of them right."""
    for seed in range(2 * QUESTIONS):
        one, rng = make("add", 0, seed), Random(seed)
        left, total = one.answer.rsplit(" ", 1)
        offered = [int(total), *(int(total) + step for step in rng.sample([-100, -10, -2, -1, 1, 2, 10, 100], 3))]
        rng.shuffle(offered)
        choices = [f"{left} {value}" for value in offered]
        yield {
            "question": one.messages[-1]["content"],
            "choices": choices,
            "label": choices.index(one.answer),
        }


def _prose() -> Iterator[dict[str, Any]]:
    for passage in shipped_prose()[:PASSAGES]:
        yield {"text": passage}
