"""Scoring a model on the skills: greedy answers through the engine, exact match."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from statewise.errors import StatewiseError
from statewise.evaluation.skills import SKILLS, Instance, make

MAX_ANSWER_TOKENS = 192  # the longest answers are copies of 24 items
Progress = Callable[[str, int, int, int], None]  # skill, distance, instances done, instances in all


class ChatModel(Protocol):
    """What scoring needs of `statewise.LLM`."""

    def chat(self, messages: Any, sampling_params: Any, /) -> Any: ...


@dataclass(frozen=True)
class SkillScore:
    skill: str
    distance: int
    n: int
    exact_match: float  # share of instances answered exactly, 0 to 1


@dataclass(frozen=True)
class Report:
    exact_match: float  # over all instances
    skills: list[SkillScore]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def is_exact(text: str, instance: Instance) -> bool:
    """Whether `text` is the instance's answer; only blanks around it are forgiven."""
    return text.strip() == instance.answer


def evaluate(
    llm: ChatModel,
    instances_per_cell: int = 50,
    skills: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Greedy exact-match scores of `llm` on held-out instances, a cell per skill and distance.

    `progress` is called after each cell. Raises ValueError for an unknown skill or a number of instances below one.
    """
    from statewise import SamplingParams

    names = list(SKILLS) if skills is None else list(skills)
    unknown = [name for name in names if name not in SKILLS]
    if unknown:
        raise ValueError(f"skills: unknown {', '.join(unknown)}; known are {', '.join(SKILLS)}")
    if instances_per_cell < 1:
        raise ValueError("instances_per_cell must be at least 1")
    cells = [(name, distance) for name in names for distance in SKILLS[name].distances]
    total = len(cells) * instances_per_cell
    params = SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS)
    scores: list[SkillScore] = []
    for name, distance in cells:
        instances = [make(name, distance, seed * 1_000_000 + i) for i in range(instances_per_cell)]
        outputs = llm.chat([instance.messages for instance in instances], params)
        failed = [output.error for output in outputs if getattr(output, "error", None)]
        if failed:  # a broken engine must not look like a model that does not know
            raise StatewiseError(f"{len(failed)} of {len(outputs)} requests failed: {failed[0]}")
        right = sum(is_exact(out.outputs[0].text, inst) for out, inst in zip(outputs, instances, strict=True))
        scores.append(SkillScore(name, distance, len(instances), right / len(instances)))
        if progress is not None:
            progress(name, distance, len(scores) * instances_per_cell, total)
    matched = sum(score.exact_match * score.n for score in scores)
    return Report(matched / total, scores)
