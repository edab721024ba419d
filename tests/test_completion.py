"""Shell completion, asked for as a shell asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from statewise.cli import main
from statewise.cli.completion import PLACES, VARIABLE
from tests.test_startup import HEAVY, ROOT

PROGRAM = """
import atexit, json, sys
from statewise.cli import main
atexit.register(lambda: print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr))
main(prog_name="statewise")
"""


def complete(words: str, folder: Path, shell: str = "bash") -> list[str]:
    """What a shell is told for the last of the words. Nothing heavy may be loaded for it."""
    count = len(words.split()) - (0 if words.endswith(" ") else 1)
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(count), VARIABLE: f"{shell}_complete"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **asked},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not set(json.loads(done.stderr.splitlines()[-1])) & {*HEAVY, "httptools", "msgspec", "uvicorn", "fastapi"}
    return done.stdout.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("kimi", "deep/ring", "deep/plain", "other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("kimi", "deep/ring"):
        (tmp_path / name / "config.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("statewise ser", ["plain,serve"]),
        ("statewise serve --max-q", ["plain,--max-queued"]),
        ("statewise serve demo --dtype flo", ["plain,float32"]),
        ("statewise serve de", ["dir,de", "plain,demo"]),
        ("statewise serve ./k", ["dir,./k", "plain,./kimi"]),
        ("statewise inspect deep/", ["dir,deep/", "plain,deep/ring"]),
        ("statewise inspect nowhere/x", ["dir,nowhere/x"]),
        ("statewise bench k", ["dir,k", "plain,kimi"]),
        ("statewise bench s", ["dir,s", "plain,serve"]),
        ("statewise bench kimi --bat", ["plain,--batch"]),
        ("statewise bench serve URL --endpoint c", ["plain,completions", "plain,chat"]),
        ("statewise completion z", ["plain,zsh"]),
    ],
)
def test_verbs_options_and_models_are_completed(folder: Path, words: str, expected: list[str]) -> None:
    assert complete(words, folder) == expected


@pytest.mark.parametrize("shell", list(PLACES))
def test_a_shell_gets_a_script_that_asks_this_program(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0, result.output
    assert f"{VARIABLE}={shell}_complete" in result.stdout
    assert "statewise" in result.stdout


def test_bash_takes_the_script(folder: Path) -> None:
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout
    command = f"{script}\ncomplete -p statewise"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode == 127:
        pytest.skip("no bash here")
    assert (done.returncode, done.stderr) == (0, "")
    assert "-F _statewise_completion statewise" in done.stdout


def test_an_unknown_shell_is_refused() -> None:
    assert CliRunner().invoke(main, ["completion", "tcsh"]).exit_code == 2
