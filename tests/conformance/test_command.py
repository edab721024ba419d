"""The kit as a command and as a plug-in of pytest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from statewise.cli import main
from statewise.conformance import CHECKS, layers_named
from statewise.errors import PluginError
from statewise.layers.pluggable import PluggableLayer

ROOT = Path(__file__).parents[2]
RETENTION = "tests.conformance.retention:Retention"
LIGHTNING = "statewise.layers.linear_attention.lightning"
BROKEN = '''
from tests.conformance.retention import Retention

class Forgetful(Retention):
    """Never reads its state: every piece starts from nothing."""

    def forward(self, hidden, batch, state):
        state["recurrent"][batch.records] = 0
        return super().forward(hidden, batch, state)
'''


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["conformance", *arguments])


def python(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_a_good_layer_gets_a_table_and_a_curve() -> None:
    result = run(RETENTION, "--long", "128")
    assert result.exit_code == 0, result.output
    for check in CHECKS:
        assert f"\n{check.name} " in result.output
    assert "drift against the fp64 recurrence, bfloat16" in result.output
    assert "FAILED" not in result.output
    assert "38 held, 4 not applicable" in result.output


def test_a_bad_layer_gets_sentences_and_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forgetful.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as the installed command has it
    result = run("forgetful:Forgetful", "--dtype", "float32", "--check", "any split", "--check", "chunk grid")
    assert result.exit_code == 1
    assert "FAILED  any split (float32): the output in pieces (one token at a time) is off by" in result.output
    assert "first at token 1, " in result.output


def test_json() -> None:
    checks = ("--check", "specification", "--check", "long input", "--long", "128")
    result = run(RETENTION, "--json", "--dtype", "float32", *checks)
    printed = json.loads(result.output)
    assert printed["passed"] is True
    layer = printed["layers"][0]
    assert layer["layer"] == RETENTION
    assert [finding["check"] for finding in layer["findings"]] == ["specification", "long input"]
    assert layer["findings"][0]["error"] < layer["findings"][0]["limit"]
    assert [point["tokens"] for point in layer["findings"][1]["curve"]] == [64, 128]


def test_all_means_every_registered_layer() -> None:
    result = run("all", "--json", "--dtype", "float32", "--check", "rank cuts")
    assert [layer["layer"] for layer in json.loads(result.output)["layers"]] == list(PluggableLayer.names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no layer is registered as 'nonsense'; known: "),
        (["no.such.module:Layer"], "there is no module 'no' to take 'Layer' from"),
        (["tests.conformance.retention:Nothing"], "module 'tests.conformance.retention' has no class 'Nothing'"),
        (["tests.conformance.retention:HEADS"], "4 is not a layer: derive a class from LinearAttention or TokenMixer"),
        ([f"{LIGHTNING}:LightningAttention"], "LightningAttention has no example_config(): add a classmethod"),
        ([RETENTION, "--device", "cuda"], "the conformance kit runs on cpu only, not on 'cuda'"),
        ([RETENTION, "--check", "speed"], "no check is called 'speed'; there are: specification, "),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_sentence(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1


def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="'halfway' could not be imported: No module named 'surely_not_installed'"):
        layers_named("halfway:Layer")


def test_pytest_runs_the_checks(tmp_path: Path) -> None:
    (tmp_path / "forgetful.py").write_text(BROKEN)
    (tmp_path / "test_forgetful.py").write_text(
        "from forgetful import Forgetful\nfrom statewise.conformance import LayerContract\n"
        "class TestForgetful(LayerContract):\n    layer = Forgetful\n    dtypes = ('float32',)\n    long = 64\n"
    )
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "statewise.conformance")
    chosen = ("--conformance", "kimi_gated_delta_net_attention", "--conformance-long", "64")
    done = python(*options, *chosen, directory=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"{2 * len(CHECKS)} passed" in done.stdout  # without paths, nothing else is collected
    done = python(*options, "test_forgetful.py", "-k", "split", directory=tmp_path)
    assert done.returncode == 1
    assert "any split (float32): the output in pieces (one token at a time) is off by" in done.stdout
    assert "Traceback" not in done.stdout


def test_importing_the_kit_loads_neither_torch_nor_pytest() -> None:
    code = "import statewise.conformance, sys; print({'torch', 'pytest', 'numba'} & set(sys.modules))"
    assert python("-c", code, directory=ROOT).stdout.strip() == "set()"
