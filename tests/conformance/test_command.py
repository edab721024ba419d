"""The kit as a command and as a plug-in of pytest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from statewise.cli import main
from statewise.conformance import CHECKS, layers_named, targets
from statewise.errors import PluginError
from statewise.layers.mixer import Capabilities
from statewise.layers.pluggable import PluggableLayer
from tests.conformance.retention import Retention

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

MISTAKEN = """
from tests.conformance.retention import Retention

class Mistaken(Retention):
    def __init__(self, config, engine_config, prefix):
        super().__init__(config, engine_config, prefix)
        self.width = config.width

class Slotless(Retention):
    def slots(self, names):
        return None
"""


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
    assert "38 held, 6 not applicable" in result.output


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
        (["tests.conformance.retention:HEADS"], "'HEADS' in module 'tests.conformance.retention' is no class: found"),
        (["pathlib:Path"], "Path is not a layer: derive a class from LinearAttention or TokenMixer"),
        ([":A"], "':A' is not of the form module:Class"),
        (["..:A"], "'..:A' is not of the form module:Class"),
        (["tests.conformance.retention:"], "'tests.conformance.retention:' is not of the form module:Class"),
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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "halfway",
            "import surely_not_installed",
            "module 'halfway' could not be imported: No module named 'surely_not_installed'",
        ),
        (
            "quitting",
            "import sys; sys.exit('bye')",
            "module 'quitting' could not be imported: it ends the program with sys.exit('bye')",
        ),
        (
            "claiming",
            "from statewise.layers.pluggable import PluggableLayer as P; P.register('x')(int)",
            "layer 'x' (builtins.int (registered by builtins)) must derive from LinearAttention or TokenMixer",
        ),
    ],
)
def test_a_module_that_cannot_be_imported(
    name: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=f"^{re.escape(message)}"):
        layers_named(f"{name}:Layer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp32"], "did you mean 'float32'?"),
        (["--seed", str(1 << 32)], "is not in the range 0<=x<=4294967295"),
    ],
)
def test_bad_options_are_explained(arguments: list[str], message: str) -> None:
    result = run(RETENTION, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_the_list_of_verbs_shows_all_of_the_sentence() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    assert re.search(r"conformance +Prove that a layer keeps its contract\.\n", shown)


def test_nothing_checked_does_not_pass() -> None:
    """A window, for layers that have none."""
    result = run("minimax_text_01_attention", "--check", "window order")
    assert result.exit_code == 1
    assert result.output.endswith("nothing was checked, so nothing is proved\n")
    result = run("all", "--json", "--dtype", "float32", "--check", "window order")
    assert result.exit_code == 0
    assert len({layer["passed"] for layer in json.loads(result.output)["layers"]}) == 2


def test_all_goes_on_behind_a_layer_that_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Retention):
        capabilities = Capabilities({"cuda": "triton"})

    monkeypatch.setattr(targets, "layers_named", lambda _: {"first": Elsewhere, "second": Retention})
    result = run("all", "--dtype", "float32", "--check", "rank cuts")
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert "has no kernels for device 'cpu', only for cuda\n" in result.output
    assert "second: 1 held in " in result.output


def test_the_first_failures_are_shown_in_full_and_the_others_in_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forgetful.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    checks = ("specification", "any split", "initial state", "one-token prompt")
    options = [part for name in checks for part in ("--check", name)]
    shown = run("forgetful:Forgetful", "--dtype", "float32", *options).output
    failed = [line for line in shown.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 3  # one pass is right
    assert [line.endswith(" …") for line in failed] == [False, False, True]
    assert "(first at" in failed[0]
    assert re.fullmatch(r"FAILED  one-token prompt \(float32\): [^;(]* is off by [0-9.e+-]+ of its scale …", failed[2])
    assert "Repair the first; many follow from it." in shown


def test_pytest_runs_the_checks(tmp_path: Path) -> None:
    (tmp_path / "forgetful.py").write_text(BROKEN)
    (tmp_path / "test_forgetful.py").write_text(
        "from forgetful import Forgetful\nfrom statewise.conformance import LayerContract\n"
        "class TestForgetful(LayerContract):\n    layer = Forgetful\n    dtypes = ('float32',)\n    long = 64\n"
    )
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "statewise.conformance")
    chosen = ("--conformance", "minimax_text_01_attention", "--conformance-long", "64")
    done = python(*options, *chosen, directory=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"{2 * len(CHECKS)} passed" in done.stdout  # without paths, nothing else is collected
    done = python(*options, "test_forgetful.py", "-k", "split", directory=tmp_path)
    assert done.returncode == 1
    assert "any split (float32): the output in pieces (one token at a time) is off by" in done.stdout
    assert "Traceback" not in done.stdout


def test_pytest_says_once_why_a_layer_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "mistaken.py").write_text(MISTAKEN)
    (tmp_path / "test_mistaken.py").write_text(
        "from mistaken import Mistaken, Slotless\nfrom statewise.conformance import LayerContract\n"
        "class TestMistaken(LayerContract):\n    layer = Mistaken\n"
        "class TestSlotless(LayerContract):\n    layer = Slotless\n"
        "class TestNone(LayerContract):\n    pass\n"
    )
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "statewise.conformance")
    done = python(*options, "test_mistaken.py", "--conformance", "mistaken:Slotless", directory=tmp_path)
    assert done.returncode == 1
    assert "4 failed" in done.stdout
    assert "mistaken:Mistaken cannot be made from its example_config(): it reads 'width'" in done.stdout
    assert "mistaken:Slotless: slots() must yield Slots, found None" in done.stdout
    assert "an object of type NoneType is not a layer" in done.stdout
    assert "Traceback" not in done.stdout


def test_pytest_refuses_what_it_cannot_find(tmp_path: Path) -> None:
    done = python("-m", "pytest", "-q", "-p", "statewise.conformance", "--conformance", "nosuch:X", directory=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --conformance: there is no module 'nosuch' to take 'X' from" in done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr


def test_importing_the_kit_loads_neither_torch_nor_pytest() -> None:
    code = "import statewise.conformance, sys; print({'torch', 'pytest', 'numba'} & set(sys.modules))"
    assert python("-c", code, directory=ROOT).stdout.strip() == "set()"
