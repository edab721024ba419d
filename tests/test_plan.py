"""`statewise plan`: exact bytes against formulas of the published shapes, the report and its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from statewise.api.accounting import Costs, compare
from statewise.api.plan import Plan, plan_model
from statewise.api.summary import inspect_model
from statewise.cli import main
from statewise.errors import CheckpointError, ConfigError
from tests.checkpoints import kimi_linear_config, minimax_config
from tests.models.published import PUBLISHED

GIB = 1 << 30
PAGE = Path(__file__).parents[1] / "docs" / "planning.md"

# Layers, key-value heads and widths as the papers give them, in bytes: fp32 recurrent matrices, bf16 everything else.
# name: (record, of which recurrent, page entries of a token, those of the comparison model)
GQA_8, GQA_4, LATENT = 2 * 8 * 128 * 2, 2 * 4 * 128 * 2, (512 + 64) * 2
WIDE, SQUARE = 64 * 128 * 128 * 4, 128 * 128 * 4
KDA_CONV = 3 * 32 * 128 * 3 * 2  # q, k and v, the last 3 inputs of 4 taps
FORMULAS = {
    "MiniMax-Text-01": (70 * WIDE, 70 * WIDE, 10 * GQA_8, 80 * GQA_8),
    "MiniMax-M1": (70 * WIDE, 70 * WIDE, 10 * GQA_8, 80 * GQA_8),
    "Ring-mini-linear-2.0": (16 * 16 * SQUARE, 16 * 16 * SQUARE, 4 * GQA_4, 20 * GQA_4),
    "Ring-flash-linear-2.0": (28 * 32 * SQUARE, 28 * 32 * SQUARE, 4 * GQA_4, 32 * GQA_4),
    "Ling-2.6-flash": (28 * 32 * SQUARE, 28 * 32 * SQUARE, 4 * LATENT, 32 * LATENT),
    "Kimi-Linear-48B-A3B": (20 * (32 * SQUARE + KDA_CONV), 20 * 32 * SQUARE, 7 * LATENT, 27 * LATENT),
    "MiniMax-M2": (0, 0, 62 * GQA_8, 62 * GQA_8),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a published model: its config.json and nothing else."""
    root = tmp_path_factory.mktemp("published")

    def write(name: str) -> Path:
        (root / name).mkdir(exist_ok=True)
        (root / name / "config.json").write_text(json.dumps(PUBLISHED[name] | {"torch_dtype": "bfloat16"}))
        return root / name

    return write


def small(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


# Bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_are_those_of_the_published_shapes(directory: Callable[[str], Path], name: str) -> None:
    record, recurrent, token, full_token = FORMULAS[name]
    plan = plan_model(directory(name), memory=2000 * GIB, context=100_000)
    assert plan.dtype == "bfloat16"
    assert (plan.record_bytes, plan.page_bytes_per_token, plan.page_bytes) == (record, token, 64 * token)
    assert sum(field.bytes for field in plan.record_fields) == record
    assert sum(field.bytes for field in plan.record_fields if field.name == "recurrent") == recurrent
    assert plan.full_attention.page_bytes == 64 * full_token
    for row in plan.sequences:
        pages = (row.tokens + 63) // 64
        assert row.bytes == record + pages * 64 * token
        assert row.full_attention_bytes == pages * 64 * full_token
    room = 2000 * GIB - plan.memory.weight_bytes - 200 * GIB
    assert plan.memory.room_bytes == room
    fit = {mix.name: mix.sequences for mix in plan.mixes}
    assert fit["all 8,192 tokens"] == room // (record + 8192 * token)
    assert fit["all 100,000 tokens"] == room // (record + 1563 * 64 * token)


def test_recurrent_matrices_in_bf16_take_half_and_conv_windows_stay(directory: Callable[[str], Path]) -> None:
    wide, narrow = (plan_model(directory("Kimi-Linear-48B-A3B"), 2**40, record_dtype=kind) for kind in ("fp32", "bf16"))
    found = {(field.name, field.dtype): field.bytes for plan in (wide, narrow) for field in plan.record_fields}
    assert found == {
        ("recurrent", "float32"): 20 * 32 * SQUARE,
        ("recurrent", "bfloat16"): 10 * 32 * SQUARE,
        ("conv", "bfloat16"): 20 * KDA_CONV,
    }
    assert narrow.record_bytes == 10 * 32 * SQUARE + 20 * KDA_CONV
    assert (narrow.memory.weight_bytes, narrow.page_bytes) == (wide.memory.weight_bytes, wide.page_bytes)


def test_weights_of_ring_mini(directory: Callable[[str], Path]) -> None:
    hidden, vocabulary, head = 2048, 157184, 128
    linear = (3 + 1 + 1) * hidden * hidden + hidden + 2 * head  # q, k, v, gate, output; norms
    full = (16 + 2 * 4) * head * hidden + hidden * hidden + 2 * head
    experts, dense = 257 * 3 * 512 * hidden, 3 * 5120 * hidden
    narrow = 16 * linear + 4 * full + 19 * experts + dense + (2 * 20 + 1) * hidden + vocabulary * hidden
    wide = 19 * (256 * hidden + 256) + vocabulary * hidden  # routers and the head are fp32
    plan = plan_model(directory("Ring-mini-linear-2.0"), 80 * GIB)
    assert plan.parameters == narrow + wide
    assert plan.memory.weight_bytes == 2 * narrow + 4 * wide


def test_it_agrees_with_inspect(tmp_path: Path) -> None:
    model = small(tmp_path, kimi_linear_config())
    summary = inspect_model(model, dtype="bfloat16", page_size=16, record_dtype=torch.bfloat16)
    plan = plan_model(model, GIB, dtype="bfloat16", page_size=16, record_dtype="bf16")
    assert (plan.record_bytes, plan.page_bytes) == (summary.record_bytes, summary.page_bytes)
    assert (plan.memory.weight_bytes, plan.parameters) == (summary.weight_bytes, summary.parameters)
    assert summary.record_bytes < inspect_model(model, dtype="bfloat16").record_bytes


def test_fields_count_with_their_alignment(tmp_path: Path) -> None:
    model = small(tmp_path, kimi_linear_config(kv_lora_rank=20))  # rows of 36 entries: 72 bytes in two cache lines
    plan = plan_model(model, GIB, dtype="bfloat16", page_size=1)
    assert (plan.page_bytes_per_token, plan.page_bytes) == (2 * 72, 2 * 128)
    assert plan.full_attention.page_bytes == 6 * 128
    assert plan.sequences[-1].bytes == plan.record_bytes + plan.context * 2 * 128


def test_a_model_of_linear_layers_only(tmp_path: Path) -> None:
    model = small(tmp_path, minimax_config() | {"attn_type_list": [0] * 5})
    plan = plan_model(model, GIB, dtype="bfloat16", context=1000)
    assert plan.page_bytes == 0
    assert {row.bytes for row in plan.sequences} == {plan.record_bytes}
    assert plan.full_attention.page_bytes == 64 * 5 * 2 * 8 * 32 * 2  # 8 key-value heads of the linear heads' width
    assert "grouped-query attention (key 8 x 32, value 8 x 32 per token)" in plan.full_attention.description


def test_what_the_comparison_model_is(directory: Callable[[str], Path]) -> None:
    said = {name: plan_model(directory(name), 2**40).full_attention for name in FORMULAS}
    ring, kimi, m2 = said["Ring-mini-linear-2.0"], said["Kimi-Linear-48B-A3B"], said["MiniMax-M2"]
    own = "the same 20 layers, the 16 linear ones replaced by the model's own grouped_query_attention"
    assert ring.description == f"{own} (key 4 x 128, value 4 x 128 per token)"
    assert "own multi_head_latent_attention (latent 576 per token)" in kimi.description
    assert (m2.description, m2.cheaper_from) == ("the model itself, which has no linear layers", None)
    assert ring.cheaper_from == 513  # 16 MiB are 8 pages of the 16 layers
    assert said["MiniMax-Text-01"].cheaper_from == 1025


def test_auto_is_the_checkpoints_dtype_whatever_this_processor_is(tmp_path: Path) -> None:
    config = {key: value for key, value in minimax_config().items() if key not in ("dtype", "torch_dtype")}
    for extra, dtype, note in (
        ({"torch_dtype": "bfloat16"}, "bfloat16", None),
        ({"dtype": "float32"}, "float32", None),
        ({"torch_dtype": "float16"}, "float32", "config.json says float16"),
        ({}, "float32", "config.json names no dtype"),
        ({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}, "bfloat16", "quantised"),
    ):
        plan = plan_model(small(tmp_path, config | extra), GIB)
        assert plan.dtype == dtype
        assert [True for said in plan.notes if note and note in said] == [True] * bool(note)
        assert len(plan.notes) == bool(note)
    assert plan_model(tmp_path, GIB, dtype=torch.float32).dtype == "float32"


def test_keys_of_the_configuration_can_be_replaced(tmp_path: Path) -> None:
    model = small(tmp_path, minimax_config())
    fewer = plan_model(model, GIB, overrides={"num_key_value_heads": 1})
    assert fewer.page_bytes < plan_model(model, GIB).page_bytes
    answer = json.loads(run(model, "--json", "--set", "num_key_value_heads=1").stdout)
    assert answer["page_bytes"] == fewer.page_bytes


# The command


def test_the_documented_example_is_what_is_printed(directory: Callable[[str], Path]) -> None:
    result = run(directory("Ring-mini-linear-2.0"), "--memory", "80GiB")
    assert result.exit_code == 0
    printed = "\n".join(line.rstrip() for line in result.stdout.splitlines())
    assert f"```\n{printed}\n```" in PAGE.read_text()


@pytest.mark.parametrize("memory", ["1GiB", "90GiB", "3000GiB"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_report_is_plain_text_in_80_columns(directory: Callable[[str], Path], name: str, memory: str) -> None:
    result = run(directory(name), "--memory", memory)
    assert result.exit_code == 0
    assert result.stdout.isascii() and "\x1b" not in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    chart = [line for line in result.stdout.splitlines() if line.endswith(("o", "x", "*")) and "iB  " in line]
    assert 5 <= len(chart) <= 8


def test_the_chart_places_amounts_on_one_logarithmic_axis() -> None:
    from statewise.cli.plan import chart_lines

    costs = Costs(0, record_bytes=2**24, page_bytes=2**19, full_attention_page_bytes=5 * 2**19)
    head, *lines = chart_lines(compare(costs, 131072))
    assert head.split() == ["tokens", "this", "model", "full", "attention", "10.0", "MiB", "5.0", "GiB"]
    assert lines[0].index("x") < lines[0].index("o")  # 256 tokens
    assert all(line.index("o") < line.index("x") for line in lines[1:])
    gaps = [line.index("x") - line.index("o") for line in lines[1:]]
    assert gaps == sorted(gaps)
    assert len(lines[-1]) == 79
    same = chart_lines(compare(Costs(0, 0, 64, 64), 4096))
    assert all(line.endswith("*") for line in same[1:])


def test_weights_that_do_not_fit_are_said_in_one_sentence(directory: Callable[[str], Path]) -> None:
    model = directory("MiniMax-Text-01")
    result = run(model, "--memory", "80GiB")
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    plan = plan_model(model, 80 * GIB)
    assert "DOES NOT FIT: the weights alone take" in words
    assert f"({plan.memory.missing_bytes:,} bytes) are missing." in words
    assert "sequences at once" not in words
    answer = json.loads(run(model, "--memory", "80GiB", "--json").stdout)
    assert answer["fits"] is False
    smallest_sequence = plan.record_bytes + plan.page_bytes
    missing = plan.memory.weight_bytes + 8 * GIB + smallest_sequence - 80 * GIB
    assert answer["memory"]["missing_bytes"] == missing
    assert {mix["sequences"] for mix in answer["mixes"]} == {0}


def test_weights_that_fit_without_their_reserve_do_not_fit(directory: Callable[[str], Path]) -> None:
    model = directory("Ring-mini-linear-2.0")
    weights = plan_model(model, GIB).memory.weight_bytes
    result = run(model, "--memory", str(weights + GIB), "--reserve", "1GiB")
    words = " ".join(result.stdout.split())
    assert "DOES NOT FIT: beside the weights, reserve and one short sequence are 16.5 MiB" in words
    assert plan_model(model, weights + GIB, reserve=GIB // 2).fits


SCHEMA = {
    "model": str,
    "architecture": str,
    "parameters": int,
    "num_layers": int,
    "num_linear_layers": int,
    "dtype": str,
    "record_dtype": str,
    "max_length": int,
    "context": int,
    "fits": bool,
    "memory": {
        "total_bytes": int,
        "weight_bytes": int,
        "reserve_bytes": int,
        "room_bytes": int,
        "missing_bytes": int,
        "smallest_bytes": int,
    },
    "record_bytes": int,
    "record_fields": [{"name": str, "dtype": str, "bytes": int}],
    "page_size": int,
    "page_bytes": int,
    "page_bytes_per_token": int,
    "sequences": [{"tokens": int, "bytes": int, "full_attention_bytes": int, "next_checkpoint_bytes": int}],
    "mixes": [
        {
            "name": str,
            "shares": [{"percent": int, "tokens": int}],
            "mean_bytes": int,
            "sequences": int,
            "cached_tokens": int,
            "full_attention_sequences": int,
        }
    ],
    "frozen": {
        "turns": int,
        "turn_tokens": int,
        "every_turn_bytes": int,
        "every_turn_conversations": int,
        "last_turn_bytes": int,
        "last_turn_conversations": int,
    },
    "full_attention": {"description": str, "page_bytes": int, "cheaper_from": int},
    "notes": [str],
}


def schema(value: Any) -> Any:
    """The keys and types of JSON data; a list has the schema of its first entry."""
    if isinstance(value, dict):
        return {key: schema(inner) for key, inner in value.items()}
    return [schema(value[0])] if isinstance(value, list) else type(value)


def test_the_json_keeps_its_keys_and_types(tmp_path: Path) -> None:
    model = small(tmp_path, kimi_linear_config() | {"torch_dtype": "float16", "dtype": None})
    result = run(model, "--memory", "4GiB", "--context", "128", "--json")
    assert schema(json.loads(result.stdout)) == SCHEMA


def test_only_config_json_is_needed(tmp_path: Path) -> None:
    model = small(tmp_path, kimi_linear_config())
    by_file, by_directory = (plan_model(path, GIB) for path in (model / "config.json", str(model)))
    assert vars(by_file) | {"model": ""} == vars(by_directory) | {"model": ""}
    assert run(model / "config.json", "--memory", "1GiB").stdout.startswith(f"{model.name}: KimiLinear")


def test_without_memory_the_free_one_is_planned() -> None:
    result = run("demo", "--reserve", "1MiB")
    assert result.exit_code == 0
    assert "that are free here are left for sequences" in " ".join(result.stdout.split())
    plan: Plan = plan_model("demo")
    assert plan.fits
    assert plan.context == plan.max_length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "0"], "memory must be a whole number of at least 1 byte, found 0"),
        (["--context", "0"], "context must be a whole number of at least 1 token, found 0"),
        (["--context", "9000"], "context 9,000 is above the model's limit of 8,192 tokens"),
        (["--set", "nothing=1"], "'nothing' cannot be overridden"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str) -> None:
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_bad_arguments_are_typed_errors() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"memory": 0}, "memory .* found 0"),
        ({"memory": 1.5}, "memory .* found 1.5"),
        ({"context": True}, "context .* found True"),
        ({"reserve": -1}, "reserve .* found -1"),
        ({"page_size": 0}, "page_size .* found 0"),
        ({"dtype": "int4"}, "dtype 'int4' is not supported"),
        ({"record_dtype": "fp8"}, "record_dtype 'fp8' is not supported; choose fp32 or bf16"),
    ]
    for arguments, message in bad:
        with pytest.raises(ConfigError, match=message):
            plan_model("demo", **({"memory": GIB} | arguments))
    with pytest.raises(CheckpointError, match="is not a directory"):
        plan_model("no/such/model", GIB)
    assert run("demo", "--dtype", "int4").exit_code == 2
