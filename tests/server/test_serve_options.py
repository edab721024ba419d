"""How options of `statewise serve` come together: the command line, the environment, a file."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from statewise.cli import main
from statewise.errors import ConfigError
from statewise.models.directory import model_directory
from statewise.server.listen import listen, url_of


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """What would have been served: model, engine arguments, options."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    monkeypatch.setattr("statewise.server.launch.launch", lambda *given: found.append(given[:3]) is None)
    return found


def serve(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["serve", *arguments], env=environment)


TOML = """
model = "demo"
port = 9000
host = "127.0.0.2"
max-queued = 7
drain = 5
restart-engine = true
page = false
prefix-cache = false
allowed-host = ["a.example", "b.example"]
cors-origin = "https://a.example"
host-cache = "2GiB"
disk-cache-size = 1000000
[set]
slope_formula = "hf"
postnorm = false
"""
YAML = """
model: demo
port: 9000
host: 127.0.0.2
max_queued: 7
drain: 5
restart-engine: yes
page: no
prefix-cache: false
allowed-host: [a.example, b.example]
cors-origin: https://a.example
host-cache: 2GiB
disk-cache-size: 1000000
set: ["slope_formula=hf", "postnorm=false"]
"""


@pytest.mark.parametrize(("name", "content"), [("a.toml", TOML), ("a.yaml", YAML), ("a.YML", YAML)])
def test_a_file_gives_any_option(tmp_path: Path, launched: list[Any], name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    result = serve("--config", str(path))
    assert result.exit_code == 0, result.output
    ((model, arguments, options),) = launched
    assert (model, options["port"], options["host"], options["max_queued"]) == ("demo", 9000, "127.0.0.2", 7)
    assert (options["drain_seconds"], options["restart_engine"], options["page"]) == (5.0, True, False)
    assert options["hosts"] == ("a.example", "b.example")
    assert options["cors_origins"] == ("https://a.example",)
    assert arguments["overrides"] == {"slope_formula": "hf", "postnorm": False}
    assert (arguments["prefix_cache"], arguments["host_cache"], arguments["disk_cache_bytes"]) == (
        False,
        2 << 30,
        10**6,
    )


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path, launched: list[Any]) -> None:
    path = tmp_path / "a.toml"
    path.write_text('port = 1\nmax-queued = 1\nmax-choices = 1\nallowed-host = "a"\n')
    variables = {
        "STATEWISE_SERVE_CONFIG": str(path),
        "STATEWISE_SERVE_MODEL": "demo",
        "STATEWISE_SERVE_PORT": "2",
        "STATEWISE_SERVE_MAX_QUEUED": "2",
        "STATEWISE_SERVE_ALLOWED_HOST": "b.example c.example",
        "STATEWISE_SERVE_RESTART_ENGINE": "true",
        "STATEWISE_SERVE_SESSION_TTL": "60",
    }
    result = serve("--port", "3", **variables)
    assert result.exit_code == 0, result.output
    ((model, _, options),) = launched
    assert (model, options["port"], options["max_queued"], options["max_choices"]) == ("demo", 3, 2, 1)
    assert (options["hosts"], options["restart_engine"]) == (("b.example", "c.example"), True)
    assert (options["session_ttl"], options["max_sessions"]) == (60.0, 4096)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("prot = 1", "'prot'"),
        ("config = 'a.toml'", "'config'"),
        ("drain_seconds = 1", "'drain_seconds'"),
        ("port = true", "port must be a whole number"),
        ("port = 1.5", "port must be a whole number"),
        ("port = '80'", "port must be a whole number"),
        ("port = 70000", "70000 is not in the range"),
        ("drain = 'soon'", "drain must be a number"),
        ("restart-engine = 1", "restart-engine must be true or false"),
        ("page = 'no'", "page must be true or false"),
        ("host = 5", "host must be a string"),
        ("api-key-file = 5", "api-key-file must be a string"),
        ("allowed-host = [1]", "allowed-host must be a string or a list"),
        ("max-queued = 1\nmax_queued = 2", "'max-queued' twice"),
        ("dtype = 'int3'", "'int3' is not one of"),
        ("host-cache = 'much'", "amount of memory"),
        ("port = ", "cannot be read"),
    ],
)
def test_a_wrong_file_is_told_by_its_key(tmp_path: Path, launched: list[Any], content: str, complaint: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(content)
    result = serve("demo", "--config", str(path))
    assert (result.exit_code, launched) == (2, [])
    assert complaint in " ".join(result.output.split())
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.yaml", b"- a", "must map"),
        ("a.yaml", b"a: [", "cannot be read"),
        ("a.yaml", b"a: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("a.yaml", b"1: 2", "'1'"),
        ("a.toml", b"\xff", "cannot be read"),
        ("a.toml", b"#" * (2 << 20), "more than"),
    ],
)
def test_a_file_that_is_none_is_told(
    tmp_path: Path, launched: list[Any], name: str, content: bytes, complaint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    result = serve("demo", "--config", str(path))
    assert (result.exit_code, launched) == (2, [])
    assert complaint in " ".join(result.output.split())


def test_an_empty_file_changes_nothing(tmp_path: Path, launched: list[Any]) -> None:
    for name in ("a.toml", "a.yaml"):
        (tmp_path / name).write_text("# nothing\n")
        assert serve("demo", "--config", str(tmp_path / name)).exit_code == 0
    assert launched[0] == launched[1]
    assert launched[0][2]["port"] == 8000


def test_a_taken_port_is_told_in_a_sentence() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert url_of(first, "127.0.0.1", tls=False) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match="another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot listen"):
        listen("192.0.2.1", 0)


def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = listen("", 0, path)
    assert url_of(first, "", tls=False) == f"unix:{path}"
    with pytest.raises(ConfigError, match="another program listens"):
        listen("", 0, path)
    first.close()
    with listen("", 0, path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    path.unlink()
    path.write_text("a file of the user's")
    with pytest.raises(ConfigError):
        listen("", 0, path)
    assert path.read_text() == "a file of the user's"
    with pytest.raises(ConfigError, match="cannot listen"):
        listen("", 0, tmp_path / "none" / "socket")


def test_a_server_whose_model_cannot_be_loaded_says_why_and_ends(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_directory("demo") / name, tmp_path / name)
    ended = subprocess.run(
        [sys.executable, "-c", "from statewise.cli import main; main()", "serve", str(tmp_path), "--port", "0"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert "no safetensors file" in ended.stderr
    assert "Traceback" not in ended.stderr
