"""The trial before the engine starts: layers that keep their word pass unnoticed, every other kind is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from statewise.config import EngineConfig, Ranks
from statewise.engine.probe import check_specs, probe_layers
from statewise.errors import ConfigError, OutOfBlocks, PluginError
from statewise.layers.linear_attention.base import LinearAttention
from statewise.layers.mixer import Capabilities, State, TokenMixer
from statewise.layers.parameters import Component
from statewise.layers.pluggable import PluggableLayer
from statewise.memory.blocks import Field, Shard, StateSpec
from statewise.ops.batch import Batch
from tests.plugin_packages import fresh_registry

CONFIG = SimpleNamespace(hidden_size=8)
ENGINE = EngineConfig(page_size=2)
WHERE = r"layer 'summed' \(.*\) at layers\.0\.mixer: "


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    with fresh_registry():
        yield


class Summed(LinearAttention):
    """y_t = x_0 + ... + x_t, and a count of the tokens."""

    state_kind = "sum"
    capabilities = Capabilities({"cpu": "torch"})
    runs = 0

    def __init__(self, config: Any, engine_config: EngineConfig, prefix: str = "layers.0.mixer") -> None:
        super().__init__(config, engine_config, prefix, num_heads=4, head_dim=2)

    def state_spec(self) -> StateSpec:
        return StateSpec(
            total=Field((4, 2), torch.float32, Shard(axis=0)),
            count=Field((1,), torch.int64),
            old=Field((3,), self.dtype),
        )

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        type(self).runs += 1
        out = torch.empty_like(hidden)
        for i, block in enumerate(batch.records.tolist()):
            rows = slice(int(batch.query_start[i]), int(batch.query_start[i + 1]))
            before = 0 if batch.fresh[i] else state["total"][block].flatten()
            total = hidden[rows].float().cumsum(0) + before
            out[rows] = total.to(hidden.dtype)
            self.keep(state, block, total[-1], int(batch.lengths[i]))
        return out

    def keep(self, state: State, block: int, total: Tensor, length: int) -> None:
        state["total"][block] = total.unflatten(0, (4, 2))
        state["count"][block] = length
        state["old"][block] = 0.0


class Averaged(TokenMixer):
    """y = the mean of the sequence's entries so far."""

    scope: ClassVar[Literal["record", "page"]] = "page"
    state_kind = "mean"
    capabilities = Capabilities({"cpu": "torch"})

    def state_spec(self) -> StateSpec:
        return StateSpec(entry=Field((8,), self.dtype))

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        for row, slot in enumerate(self.slots_of(batch)):
            state["entry"][slot // batch.page_size, slot % batch.page_size] = hidden[row]
        return hidden + state["entry"][batch.pages].mean((0, 1, 2))

    def slots_of(self, batch: Batch) -> list[int]:
        return batch.slots.tolist()


def probe(layer: type[TokenMixer], engine: EngineConfig = ENGINE, **members: Any) -> None:
    """Register a class with other members under the name `summed` and probe it."""
    changed = type("Changed", (layer,), members)
    PluggableLayer.register("summed")(changed)
    probe_layers([changed(CONFIG, engine, "layers.0.mixer")], engine)


@pytest.mark.parametrize("engine", [ENGINE, EngineConfig(), EngineConfig(page_size=1, dtype=torch.bfloat16)])
@pytest.mark.parametrize("layer", [Summed, Averaged])
def test_a_layer_that_keeps_its_word_passes(layer: type[TokenMixer], engine: EngineConfig) -> None:
    probe(layer, engine)
    probe(layer, replace(engine, max_length=2))


@pytest.mark.parametrize("engine", [EngineConfig(), EngineConfig(conv_channels_last=True, num_spec=2, page_size=16)])
def test_the_built_in_layers_pass(engine: EngineConfig) -> None:
    for name in PluggableLayer.names():
        layer = PluggableLayer.get(name)
        try:
            config = layer.example_config()
        except NotImplementedError:
            continue
        mixer = layer(config, engine, "model.layers.1.self_attn")
        for component in mixer.modules():
            if isinstance(component, Component):
                component.materialize("cpu")
                for parameter in component.parameters(recurse=False):
                    parameter.copy_(torch.full_like(parameter, 0.1))
                component.finalize()
        probe_layers([mixer], engine)


def test_a_class_is_tried_once_for_each_state_that_it_declares() -> None:
    class Counted(Summed):
        pass

    probe_layers([Counted(CONFIG, ENGINE, f"layers.{index}") for index in range(5)], ENGINE)
    assert Counted.runs == 2
    bf16 = replace(ENGINE, dtype=torch.bfloat16)
    probe_layers([Counted(CONFIG, ENGINE), Counted(CONFIG, bf16), Counted(CONFIG, ENGINE)], ENGINE)
    assert Counted.runs == 6


# Declarations


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"total": Field((4,), torch.float32)}, "must give a StateSpec, found dict"),
        (((4,), torch.float32), "must give a StateSpec, found tuple"),
        (StateSpec(total=(4, 2)), "field 'total' of its state must be a Field, found tuple"),
        (StateSpec(total=Field((4, 0), torch.float32)), r"'total' .* shape of positive integers, found \(4, 0\)"),
        (StateSpec(total=Field([4, 2], torch.float32)), r"'total' .* shape of positive integers, found \[4, 2\]"),
        (StateSpec(total=Field((), torch.float32)), r"'total' .* shape of positive integers, found \(\)"),
        (StateSpec(total=Field((4,), "float32")), "'total' .* must have a torch dtype, found 'float32'"),
        (StateSpec(total=Field((4, 2), torch.float32, order=(0, 0))), "'total' .* must have an order of its 2 axes"),
        (StateSpec(total=Field((4, 2), torch.float32, Shard(axis=2))), "'total' .* cut along one of its 2 axes"),
    ],
)
def test_a_state_that_cannot_be_laid_out_is_refused(spec: Any, message: str) -> None:
    layer = type("Changed", (Summed,), {"state_spec": lambda self: spec})
    PluggableLayer.register("summed")(layer)
    with pytest.raises(PluginError, match=WHERE + f".*{message}"):
        check_specs([layer(CONFIG, ENGINE, "layers.0.mixer")], ENGINE)


def test_a_declaration_that_fails_or_changes_is_refused() -> None:
    def growing(self: Any) -> StateSpec:
        self.calls = getattr(self, "calls", 0) + 1
        return StateSpec(total=Field((self.calls,), torch.float32), count=Field((1,), torch.int64))

    with pytest.raises(PluginError, match=WHERE + r".* gives another field 'total' at every call"):
        probe(Summed, state_spec=growing)
    with pytest.raises(PluginError, match=WHERE + r"state_spec\(\) failed with AttributeError: .*'missing'"):
        probe(type("Changed", (Summed,), {}), state_spec=lambda self: self.missing)


def test_a_field_that_the_ranks_cannot_share_is_refused() -> None:
    class Three(Ranks):
        size = 3

    engine = EngineConfig(ranks=Three())
    layer = Summed.__new__(Summed)
    TokenMixer.__init__(layer, CONFIG, engine, "layers.0.mixer")
    with pytest.raises(PluginError, match=r"field 'total' .* cannot be cut for 3 ranks: an axis segment of 4"):
        check_specs([layer], engine)


def test_what_a_layer_says_it_cannot_do_is_not_tried() -> None:
    with pytest.raises(ConfigError, match=r"layer .* at layers\.0\.mixer runs in bfloat16 only"):
        probe(Summed, capabilities=Capabilities({"cpu": "torch"}, dtypes=(torch.bfloat16,)))


# Forward passes


def keep(total: Any) -> Any:
    """`Summed.keep` that writes something else into the matrix."""

    def changed(self: Any, state: State, block: int, value: Tensor, length: int) -> None:
        Summed.keep(self, state, block, value, length)
        total(state, block, value.unflatten(0, (4, 2)))

    return changed


def put(state: State, at: Tensor, value: Tensor) -> None:
    state["total"].index_put_((at,), value)


def beyond(state: State, name: str, offset: int) -> None:
    """Write a number `offset` entries from the start of a field in block 1, as a kernel with a wrong stride would."""
    field = state[name][1]
    torch.as_strided(field, (1,), (1,), field.storage_offset() + offset).fill_(7)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (  # another shape than declared
            {"keep": keep(lambda state, block, value: state["total"][block].copy_(value.new_zeros(5, 2)))},
            r"a prefill of 3 tokens on the declared fields 'total' \[blocks, 4, 2\] float32, .* RuntimeError: .*size",
        ),
        (  # another dtype
            {"keep": keep(lambda state, block, value: put(state, torch.tensor([block]), value.double()[None]))},
            r"'total' \[blocks, 4, 2\] float32, .* failed with RuntimeError: .*Double",
        ),
        (
            {"keep": lambda self, state, block, value, length: state["sum"].copy_(value)},
            r"uses the field 'sum', which state_spec\(\) does not declare \(total, count, old\)",
        ),
        (
            {"keep": lambda self, state, block, value, length: state["total"][block].copy_(value.view(4, 2))},
            r"field 'count' is declared by state_spec\(\) but not written; .* write state\['count'\] in place",
        ),
        (  # bound to another tensor instead of written
            {"keep": lambda self, state, block, value, length: state.update(total=value, count=value, old=value)},
            r"field 'total' is declared .* not written; .* in place",
        ),
        (
            {"keep": keep(lambda state, block, value: state["total"][block - 1].copy_(value))},
            "writes the field 'total' of a block that belongs to another sequence",
        ),
        (
            {"keep": keep(lambda state, block, value: state["total"].copy_(value.expand(3, 4, 2)))},
            "writes the field 'total' of a block that belongs to another sequence",
        ),
        (
            {"keep": keep(lambda state, block, value: beyond(state, "count", 2))},  # the padding behind it
            "writes beyond its field 'count', over what other layers keep",
        ),
        (
            {"keep": keep(lambda state, block, value: beyond(state, "old", 20))},
            "writes beyond its field 'old', over what other layers keep",
        ),
        (
            {"keep": keep(lambda state, block, value: beyond(state, "total", -3))},
            "writes beyond its field 'total', over what other layers keep",
        ),
        ({"forward": lambda self, hidden, batch, state: None}, r"must give rows \[3, 8\] float32, found NoneType"),
        (
            {"forward": lambda self, hidden, batch, state: hidden[:, :4]},
            r"a prefill of 3 tokens must give rows \[3, 8\] float32, found \[3, 4\] float32",
        ),
        (
            {"forward": lambda self, hidden, batch, state: hidden if batch.num_decodes == 0 else hidden.double()},
            r"a decode step must give rows \[1, 8\] float32, found \[1, 8\] float64",
        ),
        (
            {"forward": lambda self, hidden, batch, state: hidden @ hidden},
            r"failed with RuntimeError: .* \(before it used its state\)",
        ),
        (
            {"forward": lambda self, hidden, batch, state: hidden[:, ["x"]] if batch.num_decodes else hidden},
            "a decode step failed with ",
        ),
    ],
)
def test_a_layer_that_breaks_its_word_is_named(members: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=WHERE + f".*({message})"):
        probe(Summed, **members)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (lambda self, batch: batch.slots.tolist()[:1], r"'entry' .* not written; .* for every token of a page"),
        (lambda self, batch: [slot - 2 for slot in batch.slots.tolist()], "'entry' of a block .* another sequence"),
        (lambda self, batch: [slot + 8 for slot in batch.slots.tolist()], r"'entry' \[blocks, 2, 8\] .* IndexError"),
        (lambda self, batch: [2] * batch.num_rows, r"'entry' .* not written; .* for every token of a page"),
    ],
)
def test_a_page_layer_writes_its_slots(slots: Any, message: str) -> None:
    with pytest.raises(PluginError, match=WHERE + f".*({message})"):
        probe(Averaged, slots_of=slots)


def test_an_error_of_the_engine_keeps_its_type() -> None:
    def full(self: Any, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        raise OutOfBlocks("none left")

    with pytest.raises(OutOfBlocks, match="none left"):
        probe(Summed, forward=full)
