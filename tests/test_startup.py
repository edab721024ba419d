"""What a fresh process loads. The checks are structural: timings belong to the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "numba", "transformers", "tokenizers", "numpy", "jinja2", "rich")


def loaded_after(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter that ran `code`."""
    report = "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code + report], env=environment, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import statewise; statewise.SamplingParams(temperature=0); statewise.StatewiseError",
        "import statewise.cli",
        "from statewise.cli import main; main(['--help'], standalone_mode=False)",
        "from statewise.cli import main; main(['generate', '--help'], standalone_mode=False)",
        "from statewise.cli import main; main(['--version'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code: str) -> None:
    assert loaded_after(code) & set(HEAVY) == set()


def test_the_text_side_needs_no_torch() -> None:
    code = "import statewise.engine.tokenizer, statewise.engine.chat_template, statewise.engine.stop"
    assert not loaded_after(code) & {"torch", "numba", "transformers"}


def test_names_are_exported_lazily_and_unknown_ones_are_refused() -> None:
    import statewise

    assert set(statewise.__all__) >= {"LLM", "SamplingParams", "RequestOutput", "StatewiseError"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = statewise.nothing
