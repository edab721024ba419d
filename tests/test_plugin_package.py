"""A layer from another package: the example is installed by pip, chosen by configuration, proved and served."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from statewise import LLM, SamplingParams
from statewise.cli import main
from statewise.errors import PluginError
from statewise.layers.linear_attention.kda import KimiDeltaAttention
from statewise.memory.blocks import BlockPool, BlockSpec
from statewise.ops.batch import Piece, build_batch
from tests.plugin_packages import fresh_registry, layer_source, write_package

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "plugin_layer"
PROMPT = [(7 * i + 3) % 256 for i in range(90)]
KDA = "kimi_gated_delta_net_attention"


def run(code: str, *arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """A process with the packages in `path`: `code`, or the `statewise` command."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT / "src")])}
    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def statewise(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    return run("import sys; sys.argv[0] = 'statewise'; from statewise.cli import main; main()", *arguments, path=path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example package, as pip installs it. Needs no network: the build backend is there."""
    source, target = tmp_path_factory.mktemp("source") / "plugin_layer", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)
    options = "-m pip --disable-pip-version-check install -q --no-index --no-deps --no-build-isolation --target"
    done = run("", *options.split(), str(target), str(source), path=target)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def model(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of the example, written by its own script."""
    directory = tmp_path_factory.mktemp("model")
    done = run("", str(EXAMPLE / "make_model.py"), str(directory), path=installed)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def llm(installed: Path, model: Path) -> LLM:
    with fresh_registry(installed):
        return LLM(model, num_records=4, num_pages=16)


def test_inspect_shows_where_every_layer_comes_from(installed: Path, model: Path) -> None:
    done = statewise("inspect", str(model), "--json", path=installed)
    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout)["layers"]
    retention = ["gated_retention", "statewise_retention.GatedRetention", "statewise-retention 0.1.0"]
    attention = ["grouped_query_attention", "statewise.layers.attention.gqa.GroupedQueryAttention", "built in"]
    found = [[layer["registered_name"], layer["layer_class"], layer["provider"]] for layer in layers]
    assert found == [retention] * 3 + [attention]


def test_it_is_served_and_start_up_says_what_was_chosen(installed: Path, model: Path, llm: LLM) -> None:
    prompt = ",".join(map(str, PROMPT))
    options = ("--max-tokens", "12", "--temperature", "0", "--ignore-eos", "--verbose")
    done = statewise("generate", str(model), "--prompt-token-ids", prompt, *options, path=installed)
    assert done.returncode == 0, done.stderr
    line = "layers 0-2: gated_retention = statewise_retention.GatedRetention (statewise-retention 0.1.0); cpu: "
    assert line in done.stderr
    answer = [int(word) for word in done.stdout.split()]
    best = llm.logits(PROMPT + answer).argmax(-1).tolist()
    assert answer == best[len(PROMPT) - 1 : -1]


def test_the_answer_does_not_depend_on_pieces_or_company(llm: LLM, installed: Path, model: Path) -> None:
    with fresh_registry(installed):
        pieces = LLM(model, num_records=4, num_pages=16, max_prefill_tokens=11)
    assert (pieces.logits(PROMPT) - llm.logits(PROMPT)).abs().max() < 1e-4
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [{"prompt_token_ids": PROMPT[start:]} for start in (0, 30, 60, 80, 85)]  # one waits for a record
    alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    assert [output.outputs[0].token_ids for output in pieces.generate(prompts, params)] == alone


@torch.inference_mode()
def test_the_served_layer_computes_retention(llm: LLM, model: Path) -> None:
    """S ← γ S + k vᵀ, o = Sᵀq / √D in fp64, from the weights in the file."""
    mixer = llm.engine.runner.model.mixers[1]
    weights = load_file(model / "model.safetensors")
    hidden, heads, width = torch.randn(70, 64, generator=torch.Generator().manual_seed(1)), 4, 16
    pool = BlockPool("record", BlockSpec({0: mixer.state_spec()}), 2)
    pieces = [Piece([0] * (end - start), start, 1) for start, end in ((0, 66), (66, 69), (69, 70))]
    bounds = [(piece.start, piece.start + len(piece.tokens)) for piece in pieces]
    state = pool.state(0)
    served = torch.cat([mixer(hidden[a:b], build_batch([p], 64), state) for p, (a, b) in zip(pieces, bounds)])

    def weight(name: str) -> torch.Tensor:
        return weights[f"model.layers.1.self_attn.{name}.weight"].double()

    q, k, v, gate = ((hidden.double() @ weight(f"{name}_proj").T).view(-1, heads, width) for name in "qkvg")
    memory = torch.zeros(heads, width, width, dtype=torch.float64)
    gamma = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256], dtype=torch.float64)
    o = torch.empty_like(v)
    for t in range(len(hidden)):
        memory = gamma[:, None, None] * memory + k[t][:, :, None] * v[t][:, None, :]
        o[t] = torch.einsum("hkv,hk->hv", memory, q[t]) / 4
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight("norm") * gate * gate.sigmoid()
    assert (served - o.flatten(1) @ weight("out_proj").T).abs().max() < 1e-5
    assert (state["recurrent"][1] - memory).abs().max() < 1e-5


def test_it_keeps_the_contract_of_a_layer(installed: Path) -> None:
    with fresh_registry(installed):
        options = ("--dtype", "float32", "--long", "512", "--json")
        result = CliRunner().invoke(main, ["conformance", "statewise_retention:GatedRetention", *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"]


def test_start_up_logs_what_was_chosen(installed: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="statewise"), fresh_registry(installed):
        LLM(model, num_records=1, num_pages=4)
    assert [record.message.partition(" = ")[0] for record in caplog.records if record.name.startswith("statewise")] == [
        "layers 0-2: gated_retention",
        "layer 3: grouped_query_attention",
    ]


def test_a_package_may_take_the_place_of_a_layer_that_a_model_asks_for(tmp_path: Path) -> None:
    source = "from statewise.layers.linear_attention.kda import KimiDeltaAttention\n"
    source += "from statewise.layers.pluggable import PluggableLayer\n"
    source += f"@PluggableLayer.register('{KDA}', replace=True)\nclass Kda(KimiDeltaAttention):\n    pass\n"
    with fresh_registry(write_package(tmp_path, "package_a", source)):
        llm = LLM("demo")
        chosen = {layer.provider for layer in llm.summary().layers if layer.registered_name == KDA}
        name = f"{KimiDeltaAttention.__module__}.KimiDeltaAttention"
        assert chosen == {f"package-a 1.0, in place of {name}"}
        assert type(llm.engine.runner.model.mixers[0]).__name__ == "Kda"


# What goes wrong, in one line


def failure(*arguments: str, paths: list[Path]) -> str:
    with fresh_registry(*paths):
        result = CliRunner().invoke(main, list(arguments))
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_second_package_with_the_same_name(installed: Path, tmp_path: Path) -> None:
    write_package(tmp_path, "package_b", layer_source("Retention", "'gated_retention'"))
    both = ("package_b.Retention (package-b 1.0)", "statewise_retention.GatedRetention (statewise-retention 0.1.0)")
    for arguments in (["inspect", "demo"], ["generate", "demo", "-p", "a"]):
        message = failure(*arguments, paths=[installed, tmp_path])
        assert "layer name 'gated_retention' is claimed by both" in message
        assert all(name in message for name in both)
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True)
    done = statewise("inspect", "demo", path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert all(name in done.stderr for name in both)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (layer_source("Sum", "'running_sum'", **{"def forward": "def forwards"}), "has no method forward()"),
        (layer_source("Sum", "'running_sum'", **{"def state_spec": "def state"}), "has no method state_spec()"),
        (layer_source("Sum", "'running_sum'", **{'state_kind = "sum"': "pass"}), "has no state_kind"),
        (
            layer_source("Sum", "'running_sum'", **{'Capabilities({"cpu": "torch"})': 'Capabilities({"cpu"})'}),
            "needs a mapping",
        ),
        ("import a_package_that_is_not_there", "plug-in 'package_b' (package_b, package-b 1.0) could not be loaded"),
    ],
)
def test_a_package_that_cannot_be_used(tmp_path: Path, source: str, message: str) -> None:
    found = failure("inspect", "demo", paths=[write_package(tmp_path, "package_b", source)])
    assert message in found
    assert "package-b 1.0" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"(self.hidden_size,)": "(self.hidden_size + 1,)"}, r"on the declared field 'total' [blocks, 65] float32"),
        ({"else state[": "else state['sum'] + state["}, "a decode step uses the field 'sum', which state_spec() does"),
        ({"return StateSpec(total": "return dict(total"}, "state_spec() must give a StateSpec, found dict"),
        ({"return StateSpec(": "return StateSpec(spare=Field((3,), torch.float32), "}, "the field 'spare' is declared"),
        ({"num_heads=4": "num_heads=config.heads"}, "cannot be made: it reads 'heads', which the configuration of"),
        (
            {"head_dim=4)": "head_dim=4)\n        self.declare('scale', (3,), torch.float32)"},
            "no slot fills its parameter 'scale'; yield one from slots()",
        ),
        (
            {"def forward": "def slots(self, names):\n        return None\n\n    def forward"},
            "slots() failed with TypeError",
        ),
        (
            {"def forward": "def slots(self, names):\n        yield ('scale', 3)\n\n    def forward"},
            "slots() failed with TypeError: it must yield Slots",
        ),
        (
            {"def forward": "def finalize(self):\n        self.missing()\n\n    def forward"},
            "finalize() failed with Attr",
        ),
        (
            {"out = torch.empty_like(hidden)": "out = hidden.double()"},
            "must give rows [3, 64] float32, found [3, 64]",
        ),
    ],
)
def test_a_spec_that_does_not_match_what_the_layer_does(
    installed: Path, model: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    package = write_package(tmp_path / "site", "package_b", layer_source("Sum", "'running_sum'", **changes))
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["replace_layers"] = {"minimax_text_01_attention": "running_sum"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "self_attn" not in name or "layers.3." in name}
    save_file(kept, tmp_path / "model" / "model.safetensors")
    arguments = ("generate", str(tmp_path / "model"), "--prompt-token-ids", "1,2")
    found = failure(*arguments, paths=[installed, package])
    assert found.startswith("error: layer 'running_sum' (package_b.Sum")
    assert "model.layers.0.self_attn" in found
    assert message in found


def test_a_choice_that_does_not_exist(installed: Path, model: Path) -> None:
    assert "no layer is registered as 'gated_retention'; known: bailing" in failure("inspect", str(model), paths=[])
    with fresh_registry(installed):
        overrides = {"replace_layers": {"minimax_text_01_attention": "multi_head_latent_attention"}}
        with pytest.raises(PluginError, match=r"multi_head_latent_attention.* cannot be made: .*'mla'"):
            LLM(model, overrides=overrides)
