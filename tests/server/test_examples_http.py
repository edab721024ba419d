"""The example of a client for sessions, as its reader runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.server.conftest import KEYS
from tests.server.served import Served

EXAMPLE = Path(__file__).parents[2] / "examples" / "http_sessions.py"


def run(served: Served, file: Path, key: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), "--url", str(served.client.base_url), "--api-key", key]
    return subprocess.run([*command, "--file", str(file)], capture_output=True, text=True, timeout=120)


def test_the_example_tells_its_story(shared: Served, tmp_path: Path) -> None:
    before = shared.client.get("/v1/sessions").json()["data"]
    done = run(shared, tmp_path / "talk.state", KEYS["bob"])
    assert done.returncode == 0, done.stderr
    told = [line.split(":", 1) for line in done.stdout.splitlines()]
    names = "created named left right right original rewound right carried again"
    assert [name for name, _ in told] == names.split()
    lengths = [re.findall(r"\d+", told[line][1])[0] for line in (1, 5, 6)]
    assert len(set(lengths)) == 1  # neither the forks nor the rewind have changed it
    assert "4821" in told[2][1]  # the fork knows what its parent was told
    assert "1357" in told[4][1]  # and hears of changes for itself
    assert "4821" in told[7][1]  # which a rewind undoes
    assert "72" in told[9][1]
    assert (tmp_path / "talk.state").stat().st_size < 2_000_000
    assert shared.client.get("/v1/sessions").json()["data"] == before


def test_the_example_says_what_the_server_says(shared: Served, tmp_path: Path) -> None:
    done = run(shared, tmp_path / "talk.state", "no-key-of-this-server")
    assert done.returncode == 1
    assert "401, Invalid API Key" in done.stderr
