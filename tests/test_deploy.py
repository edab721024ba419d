"""The files of `deploy/` against the command line that they use."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from statewise.cli.config_file import key_of
from statewise.cli.serve import VARIABLES, serve

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
if not DEPLOY.is_dir():
    pytest.skip("not in a checkout", allow_module_level=True)

OPTIONS = {key_of(one): one for one in serve.params}
FLAGS = {flag for one in serve.params for flag in (*one.opts, *one.secondary_opts) if flag.startswith("-")}


class Repeated(dict[str, str]):
    """A section of a unit, in which a key may come again."""

    def __setitem__(self, key: str, value: object) -> None:
        if isinstance(value, list) and key in self and isinstance(self[key], list):
            self[key].extend(value)
        else:
            super().__setitem__(key, value)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def unit() -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(dict_type=Repeated, strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(DEPLOY / "statewise.service")
    assert parser["Install"]["WantedBy"] == "multi-user.target"
    return parser["Service"]


def instructions() -> Iterator[tuple[str, str]]:
    """Of the Containerfile: a name and its arguments, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, _, rest = line.partition(" ")
        yield name, rest.strip()


def environment() -> dict[str, str]:
    given = (pair for name, rest in instructions() if name == "ENV" for pair in shlex.split(rest))
    return dict(pair.split("=", 1) for pair in given)


def settings() -> dict[str, object]:
    return tomllib.loads((DEPLOY / "statewise.toml").read_text())


def test_the_example_configuration_is_taken_and_repeats_the_defaults(tmp_path: Path) -> None:
    with serve.make_context("serve", ["--config", str(DEPLOY / "statewise.toml")]) as context:
        given = context.params
    with serve.make_context("serve", ["demo"]) as context:
        defaults = context.params
    assert given == {**defaults, "restart_engine": True}


def test_every_option_that_the_configuration_shows_exists(tmp_path: Path) -> None:
    text = (DEPLOY / "statewise.toml").read_text()
    shown = "\n".join(
        re.sub(r"^# (?=[a-z-]+ = )", "", line) for line in text.splitlines() if re.match(r"(# )?[a-z-]+ = ", line)
    )
    assert shown.count("\n") > 15
    path = tmp_path / "all.toml"
    for name in ("server.crt", "server.key"):
        (tmp_path / name).touch()
        shown = shown.replace(f"/etc/statewise/{name}", str(tmp_path / name))
    path.write_text(shown)
    with serve.make_context("serve", ["--config", str(path)]) as context:
        assert context.params["served_model_name"] == "kimi-linear"


def test_the_unit_starts_what_exists(unit: configparser.SectionProxy) -> None:
    program, verb, *arguments = shlex.split(unit["ExecStart"])
    assert (Path(program).name, verb) == ("statewise", "serve")
    assert {one for one in arguments if one.startswith("-")} <= FLAGS
    assert "${CREDENTIALS_DIRECTORY}/" + unit["LoadCredential"].split(":")[0] in arguments
    assert arguments[arguments.index("--config") + 1] == "/etc/statewise/statewise.toml"
    assert "model" in settings()


def test_the_unit_waits_longer_than_requests_are_drained(unit: configparser.SectionProxy) -> None:
    assert float(unit["TimeoutStopSec"]) >= float(str(settings()["drain"])) + 15
    # The engine must outlive the signal, or nothing could be drained.
    assert (unit["KillMode"], unit["KillSignal"], unit["Restart"]) == ("mixed", "SIGTERM", "on-failure")


def test_the_unit_is_shut_in_but_may_compile(unit: configparser.SectionProxy) -> None:
    for key in ("DynamicUser", "NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictNamespaces", "LockPersonality"):
        assert unit[key] == "yes"
    assert (unit["ProtectSystem"], unit["CapabilityBoundingSet"]) == ("strict", "")
    assert "MemoryDenyWriteExecute" not in unit
    assert f"NUMBA_CACHE_DIR=%C/{unit['CacheDirectory']}" in (DEPLOY / "statewise.service").read_text()


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here")
    text = (DEPLOY / "statewise.service").read_text()
    (tmp_path / "statewise.service").write_text(text.replace("/opt/statewise/bin/statewise", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "statewise.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "statewise.service" in line] == []


def test_the_container_is_what_a_careful_host_runs() -> None:
    found = list(instructions())
    names = [name for name, _ in found]
    assert dict(found)["USER"] == "10001:10001"
    assert names.index("USER") > max(at for at, name in enumerate(names) if name in ("RUN", "COPY"))
    assert dict(found)["STOPSIGNAL"] == "SIGTERM"
    assert dict(found)["ENTRYPOINT"] == '["statewise", "serve"]'
    assert dict(found)["CMD"] == '["demo"]'
    assert not any(name == "ADD" for name in names)
    assert "/health" in dict(found)["HEALTHCHECK"]


def test_the_containers_variables_are_options_and_leave_time_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.touch()
    variables = {name: value for name, value in environment().items() if name.startswith(VARIABLES)}
    assert {name.removeprefix(f"{VARIABLES}_").lower().replace("_", "-") for name in variables} <= OPTIONS.keys()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(click.BadParameter, match="does not exist"):
        serve.make_context("serve", ["demo"])  # an open server on every address would be worse than none
    monkeypatch.setenv("STATEWISE_SERVE_API_KEY_FILE", str(keys))
    with serve.make_context("serve", ["demo"]) as context:
        options = context.params
    assert (options["host"], options["port"], options["api_key_file"]) == ("0.0.0.0", 8000, keys)
    assert options["drain_seconds"] < 10  # what engines for containers wait by default


def test_the_container_is_built_from_what_is_here() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    assert f"ARG TORCH={torch[1]}\n" in text


def test_the_health_check_is_python() -> None:
    check = dict(instructions())["HEALTHCHECK"]
    command = re.search(r"CMD (\[.*\])$", check)
    assert command is not None
    program, flags, _, code = json.loads(command[1])
    assert (program, flags) == ("python", "-IS")
    compile(code, "check", "exec")
