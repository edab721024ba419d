"""Mistakes that keep a layer from being checked at all: one sentence each, before any check runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Set
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.conformance import Subject, prove, run_check
from statewise.errors import ConfigError, PluginError
from statewise.layers.mixer import Capabilities, State, TokenMixer
from statewise.layers.parameters import Slot
from statewise.layers.projection import Linear, Rows
from statewise.memory.blocks import Field, Shard, StateSpec
from statewise.ops.batch import Batch
from tests.conformance.red import red
from tests.conformance.retention import HEADS, WIDTH, Retention


class Gated(Retention):
    """Multiplies what it puts out by a gate of a plain matrix product, with a bias."""

    def __init__(self, config: Any, engine_config: EngineConfig, prefix: str) -> None:
        super().__init__(config, engine_config, prefix)
        self.declare("gate", (self.hidden_size, self.hidden_size), torch.float32)
        self.declare("gate_bias", (self.hidden_size,), torch.float32)

    def slots(self, names: Set[str]) -> Iterator[Slot]:
        yield Slot((f"{self.prefix}.gate.weight",), self.gate)
        yield Slot((f"{self.prefix}.gate.bias",), self.gate_bias)

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        gate = torch.sigmoid(hidden.float() @ self.gate.T + self.gate_bias)
        return (super().forward(hidden, batch, state) * gate).to(hidden.dtype)

    def reference(
        self, hidden: Tensor, weights: Mapping[str, Tensor], state: MutableMapping[str, Tensor], start: int
    ) -> Tensor:
        gate = torch.sigmoid(hidden @ weights["gate.weight"].T + weights["gate.bias"])
        return super().reference(hidden, weights, state, start) * gate


def layer(base: type = Gated, **members: Any) -> type:
    return type("Layer", (base,), {"__module__": "m", "__qualname__": "Layer", **members})


def raising(error: Exception) -> Callable[..., Any]:
    def method(*_: Any, **__: Any) -> Any:
        raise error

    return method


def reading(self: Any, config: Any, engine_config: EngineConfig, prefix: str) -> None:
    Gated.__init__(self, config, engine_config, prefix)
    self.width = config.width


def plain_child(self: Any, config: Any, engine_config: EngineConfig, prefix: str) -> None:
    Gated.__init__(self, config, engine_config, prefix)
    self.extra = torch.nn.Linear(4, 4, device="meta")


def one_slot(self: Any, names: Set[str]) -> Iterator[Slot]:
    yield Slot((f"{self.prefix}.gate.weight",), self.gate)


def half_slot(self: Any, names: Set[str]) -> Iterator[Slot]:
    yield Slot((f"{self.prefix}.gate.weight",), self.gate)
    yield Slot((f"{self.prefix}.gate.bias",), self.gate_bias[:4])


UNMADE = "m:Layer cannot be made from its example_config(): "
NO_SLOT = "m:Layer: no slot fills its parameter 'gate_bias'; yield one from slots()"
FIELD = "field 'recurrent' of its state must"
FLAT = StateSpec(recurrent=Field((4, 0), torch.float32))
TUPLE: Any = (4, 8)
MISTAKES = {
    "config field": ({"__init__": reading}, f"{UNMADE}it reads 'width', which that does not have"),
    "signature": ({"__init__": lambda self, config: None}, f"{UNMADE}TypeError: "),
    "super left out": ({"__init__": lambda self, *_: None}, "m:Layer: its constructor must call super().__init__("),
    "super misused": ({"__init__": lambda self, *_: Gated.__init__(self)}, f"{UNMADE}TypeError: "),
    "plain child": ({"__init__": plain_child}, "m:Layer: its parameter 'extra.weight' is that of a Linear, which no"),
    "finalize": ({"finalize": raising(KeyError("x"))}, "m:Layer: finalize() failed: KeyError: 'x'"),
    "slots raise": ({"slots": raising(KeyError("x"))}, "m:Layer: slots() failed: KeyError: 'x'"),
    "slots none": ({"slots": lambda *_: None}, "m:Layer: slots() must yield Slots, found None"),
    "slots other": ({"slots": lambda *_: [("a", 1)]}, "m:Layer: slots() must yield Slots, found tuple"),
    "no slot": ({"slots": one_slot}, NO_SLOT),
    "half a slot": ({"slots": half_slot}, NO_SLOT),
    "example bound": ({"example_config": lambda self: None}, "Layer.example_config() must be a classmethod"),
    "example raises": ({"example_config": classmethod(raising(KeyError("x")))}, "m:Layer: example_config() failed: "),
    "no width": (
        {"example_config": classmethod(lambda cls: SimpleNamespace())},
        "m:Layer: the configuration that example_config() gives needs a hidden_size, a positive integer, found nothing",
    ),
    "weight raises": (
        {"example_weight": raising(NameError("x"))},
        "m:Layer: example_weight('gate.weight') failed: NameError: x",
    ),
    "weight is a number": (
        {"example_weight": lambda *_: 3.0},
        "m:Layer: example_weight('gate.weight') must give a tensor or None, found float",
    ),
    "capabilities": ({"capabilities": {"cpu"}}, "Layer.capabilities must be Capabilities({'cpu': "),
    "dtypes": ({"capabilities": Capabilities({"cpu": "torch"}, dtypes=("float32",))}, "Layer.capabilities must list"),
    "spec": ({"state_spec": lambda self: {}}, "state_spec() must give a StateSpec, found dict"),
    "spec raises": ({"state_spec": raising(KeyError("x"))}, "state_spec() failed with KeyError: 'x'"),
    "field": ({"state_spec": lambda self: StateSpec(recurrent=TUPLE)}, f"{FIELD} be a Field, found tuple"),
    "shape": ({"state_spec": lambda self: FLAT}, f"{FIELD} have a shape of positive integers, found (4, 0)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_layer_that_cannot_be_made(mistake: str) -> None:
    members, message = MISTAKES[mistake]
    with pytest.raises(PluginError, match=re.escape(message)) as caught:
        prove(layer(**members), ["float32"], only=["rank cuts"])
    assert "\n" not in str(caught.value)


def test_segments_that_do_not_cover_the_axis() -> None:
    spec = StateSpec(recurrent=Field((4, 8, 8), torch.float32, shard=Shard(0, (("a", 3),))))
    with pytest.raises(PluginError, match="the segments cover 3 entries of an axis of 4"):
        prove(layer(state_spec=lambda self: spec))


# What a layer does not list


def test_a_dtype_that_was_asked_for_must_be_listed() -> None:
    half = layer(capabilities=Capabilities({"cpu": "torch"}, dtypes=(torch.bfloat16,)))
    with pytest.raises(ConfigError, match="runs in bfloat16 only"):
        prove(half, ["float32"], only=["rank cuts"])
    assert [finding.status for finding in prove(half, only=["rank cuts"]).findings] == ["not applicable", "held"]
    other = layer(capabilities=Capabilities({"cpu": "torch"}, dtypes=(torch.float16,)))
    with pytest.raises(ConfigError, match="m:Layer runs in float16 only; the conformance kit knows float32, bfloat16"):
        prove(other)


def test_a_device_that_the_layer_does_not_list() -> None:
    with pytest.raises(ConfigError, match="has no kernels for device 'cpu', only for cuda"):
        prove(layer(capabilities=Capabilities({"cuda": "triton"})))


def test_nothing_held_is_not_passed() -> None:
    report = prove(layer(reference=TokenMixer.reference), ["float32"], only=["specification"])
    assert [finding.status for finding in report.findings] == ["not checked"]
    assert not report.passed


# Sentences of the checks


def message(made: type, check: str) -> str:
    return red(made, only=[check])[check].message


def test_a_field_that_was_not_declared() -> None:
    def forward(self: Any, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        return state["memory"]

    said = message(layer(forward=forward), "any split")
    assert re.fullmatch(
        r"forward\(\) uses the field 'memory', which state_spec\(\) does not declare \(recurrent\) \(.*, line \d+\)",
        said,
    )


def asking(self: Any, hidden: Tensor, weights: Any, state: Any, start: int) -> Tensor:
    return weights["g.bias"] + hidden


def clearing(self: Any, hidden: Tensor, weights: Any, state: Any, start: int) -> Tensor:
    state.clear()
    return hidden


KNOWN = "gate.weight, gate.bias, q_proj.weight, k_proj.weight, v_proj.weight, o_proj.weight; state has: recurrent"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (asking, f"reference() raises KeyError: 'g.bias'; weights has: {KNOWN}"),
        (lambda *_: None, "reference() returns None, expected rows [tokens, hidden_size]"),
        (lambda self, hidden, *_: hidden[:, :3], "reference() returns [150, 3], expected [150, 24]"),
        (clearing, "reference() leaves None as state 'recurrent', expected [4, 8, 8]"),
    ],
)
def test_a_reference_at_fault_is_named(reference: Any, said: str) -> None:
    found = message(layer(reference=reference), "specification")
    assert found.startswith(said)
    assert "axes swapped?" not in found


def test_a_map_that_reads_its_heads_without_split_input() -> None:
    def unsplit(self: Any, config: Any, engine_config: EngineConfig, prefix: str) -> None:
        Gated.__init__(self, config, engine_config, prefix)
        rows = Rows(self.hidden_size, f"{prefix}.o_proj")
        self.o_proj = Linear(HEADS * WIDTH, rows, dtype=self.dtype, ranks=self.ranks)

    said = message(layer(__init__=unsplit), "2 ranks")
    assert said.startswith(
        "ValueError: 'model.layers.3.self_attn.o_proj' expects rows of 32 columns, found 16; a map that reads one "
        "rank's heads needs split_input=True (conformance/retention.py, line"
    )
    assert "the output projection sums over the ranks once." in said  # the hint of the check


@pytest.mark.parametrize("packed", [True, False])
def test_a_linear_map_names_the_widths_that_do_not_fit(packed: bool) -> None:
    linear = Linear(32, Rows(8, "gate"), dtype=torch.float32)
    linear.materialize("cpu")
    if packed:
        linear.finalize()
    with pytest.raises(ValueError, match=r"^'gate' expects rows of 32 columns, found 16$"):
        linear(torch.zeros(3, 16))
    with pytest.raises(RuntimeError):  # of another kind, in its own words
        linear(torch.zeros(3, 32, dtype=torch.float64))


# Rounding


def test_a_plain_matrix_product_may_round_differently_beside_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    report = prove(Gated, long=256, only=["specification", "batch order", "chunk grid", "2 ranks", "window order"])
    assert report.passed, report.failed

    plain = torch.sigmoid

    def rounding(x: Tensor) -> Tensor:
        return plain(x) * (1 + 3e-7 * (len(x) > 1))  # as if the number of rows decided on the order of a sum

    monkeypatch.setattr(torch, "sigmoid", rounding)
    finding = run_check("batch order", Subject(Gated, torch.float32))
    assert finding.status == "held"
    assert finding.limit == 1e-6
    assert finding.error is not None
    assert 1e-7 < finding.error < 1e-6
    assert "Linear does not" in finding.remark
    exact = run_check("batch order", Subject(Gated, torch.float32, exact=True))
    assert exact.status == "failed"
    assert "it must be the same to the bit" in exact.message
