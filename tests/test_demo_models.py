"""The trained models answer from facts thousands of tokens back, so a state that is slightly wrong shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from statewise import LLM
from statewise.evaluation import evaluate

SECOND = Path(__file__).parents[1] / "examples" / "demo_lightning" / "checkpoint"


@pytest.mark.parametrize("model", ["demo", SECOND], ids=["kimi", "lightning"])
def test_facts_are_found_however_far_back_they_lie(model: str | Path) -> None:
    # Small pieces: the state is frozen and taken up again many times on the way, beside other requests.
    llm = LLM(model, dtype="float32", num_records=4, num_pages=160, max_prefill_tokens=320)
    report = evaluate(llm, 2, skills=["add", "copy", "lookup", "update"])
    wrong = [f"{row.skill} at {row.distance}" for row in report.skills if row.exact_match < 1]
    assert not wrong
    llm.engine.check_integrity()
