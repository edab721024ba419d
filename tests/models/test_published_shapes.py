"""docs/models.md says what a sequence of the published models costs; the layers' declarations say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from statewise.api.summary import inspect_model
from statewise.models.registry import ARCHITECTURES
from tests.models.published import PUBLISHED

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_documented_bytes_are_those_of_the_layers(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    summary = inspect_model(tmp_path, dtype="bfloat16")
    linear = sum(layer.state_bytes > 0 for layer in summary.layers)
    kinds = f"{linear} + {len(summary.layers) - linear}"
    row = f"| {name} | {kinds} | {summary.record_bytes:,} | {summary.page_bytes // summary.page_size:,} |"
    assert row in PAGE


def test_every_architecture_is_documented() -> None:
    assert all(f"`{architecture}`" in PAGE for architecture in ARCHITECTURES)
