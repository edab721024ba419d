"""`statewise bench` means this machine unless it is told of a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from statewise.cli import main


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--batch", "0"),
        ("--batch", "0", "demo"),
        ("--batch=0", "demo"),
        ("nowhere", "--prompt-tokens", "8"),
        ("demo", "--no-such-option"),
        ("--dtype", "float32"),
        ("demo", "serve"),
    ],
)
def test_a_model_and_options_need_no_verb(arguments: tuple[str, ...]) -> None:
    short, long = bench(*arguments), bench("offline", *arguments)
    assert (short.exit_code, short.output) == (long.exit_code, long.output)
    assert short.exit_code == 2


def test_a_directory_of_the_name_of_a_verb_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("serve").mkdir()
    result = bench("./serve")
    assert (result.exit_code, "config.json" in result.stderr) == (2, True), result.output


def test_help_shows_both() -> None:
    overview = bench("--help").stdout
    assert "MODEL | serve URL" in overview
    assert "offline" in overview
    assert "--decode-tokens" in bench("demo", "--help").stdout
    assert bench("demo", "-h").stdout == bench("offline", "-h").stdout
    assert "--request-rate" in bench("serve", "--help").stdout
    assert bench().exit_code == 2
