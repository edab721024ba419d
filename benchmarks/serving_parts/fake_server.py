"""`statewise serve demo` with everything that belongs to it, and the fake engine in the place of the real one.

python -m benchmarks.serving_parts.fake_server PACE OPTION ...
"""

from __future__ import annotations

import sys
from typing import Any

from statewise.cli import main
from statewise.server import launch
from statewise.server.engine_client import EngineClient


class FakeClient(EngineClient):
    """Starts the fake engine."""

    program = "benchmarks.serving_parts.fake_engine"
    pace = 0.0  # steps a second

    def __init__(self, model: str, _: dict[str, Any], **more: Any) -> None:
        super().__init__(model, {"pace": self.pace}, **more)


if __name__ == "__main__":
    FakeClient.pace = float(sys.argv.pop(1))
    launch.EngineClient = FakeClient  # type: ignore[misc]
    main(["serve", "demo", "--port", "0", *sys.argv[1:]])
