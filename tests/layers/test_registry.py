"""The registry of layers: who may have a name, what an entry point may be, and what is said when it is not so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import statewise.layers.attention as attention
import statewise.layers.linear_attention as linear_attention
from statewise.config import EngineConfig
from statewise.errors import CheckpointError, ConfigError, PluginError
from statewise.layers.linear_attention.base import LinearAttention
from statewise.layers.linear_attention.kda import KimiDeltaAttention
from statewise.layers.mixer import Capabilities
from statewise.layers.pluggable import BUILT_IN, PluggableLayer, resolve
from tests.plugin_packages import fresh_registry, layer_source, write_package

KDA = "kimi_gated_delta_net_attention"


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    with fresh_registry():
        yield


class One(LinearAttention):
    state_kind = "nothing"
    capabilities = Capabilities({"cpu": "nothing"})

    def state_spec(self) -> Any: ...
    def forward(self, hidden: Any, batch: Any, state: Any) -> Any: ...


class Two(One):
    pass


class Three(One):
    pass


# Claims


def test_a_name_has_one_holder_and_one_replacement_in_any_order() -> None:
    for order in ((One, Two), (Two, One)):
        with fresh_registry():
            for layer in order:
                PluggableLayer.register("x", replace=layer is Two)(layer)
            assert PluggableLayer.get("x") is Two
            with pytest.raises(PluginError, match=r"'x' is claimed by both .*One .* and .*Three .*replace=True"):
                PluggableLayer.register("x")(Three)
            with pytest.raises(PluginError, match=r"'x' is replaced by both .*Two .* and .*Three"):
                PluggableLayer.register("x", replace=True)(Three)
            assert PluggableLayer.get("x") is Two
            assert PluggableLayer.origin("x") == f"registered by {__name__}, in place of {__name__}.One"
            assert PluggableLayer.name_of(Two) == PluggableLayer.name_of(One) == "x"


def test_a_class_may_claim_its_name_again() -> None:
    PluggableLayer.register("x")(One)
    again = type("One", (One,), {"__module__": One.__module__})  # as if its module had been executed once more
    PluggableLayer.register("x")(again)
    assert PluggableLayer.get("x") is again


def test_a_replacement_needs_something_to_replace() -> None:
    PluggableLayer.register("kda", replace=True)(One)
    with pytest.raises(PluginError, match=rf"test_registry\.One .* replaces the layer 'kda', .* known: .*{KDA}"):
        PluggableLayer.get(KDA)


def test_a_layer_says_all_that_the_engine_needs() -> None:
    def made(base: type = LinearAttention, **members: Any) -> type:
        return type("Made", (base,), members)

    def nothing(self: Any) -> None: ...

    for layer, message in (
        (made(forward=nothing), r"'x' \(.*Made .*\) has no method state_spec\(\)"),
        (made(state_spec=nothing), r"has no method forward\(\)"),
        (made(state_spec=nothing, forward=nothing), "has no state_kind"),
        (made(state_spec=nothing, forward=nothing, state_kind="x"), "has no capabilities"),
        (made(One, scope="token"), "must have the scope 'record' or 'page'"),
        (made(object), "must derive from LinearAttention or TokenMixer"),
        ("text", "must derive from LinearAttention or TokenMixer"),
    ):
        with pytest.raises(PluginError, match=message):
            PluggableLayer.register("x")(layer)  # type: ignore[type-var]
    assert "x" not in PluggableLayer.names()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PluginError, match=rf"no layer is registered as 'nonsense'; known: .*{KDA}"):
        PluggableLayer.get("nonsense")


def test_every_file_that_registers_a_layer_is_known_as_built_in() -> None:
    files = [file for package in (attention, linear_attention) for file in Path(package.__path__[0]).glob("*.py")]
    registering = {file.stem for file in files if "@PluggableLayer.register(" in file.read_text()}
    assert registering == {module.rpartition(".")[2] for module in BUILT_IN}
    assert {PluggableLayer.origin(name) for name in PluggableLayer.names()} == {"built in"}


# A layer for a model


def test_config_json_may_choose_other_layers() -> None:
    PluggableLayer.register("x")(One)
    asked = (KDA, "multi_head_latent_attention", KDA)
    assert resolve(asked, {}) == asked
    assert resolve(asked, {KDA: "x"}) == ("x", asked[1], "x")
    swapped = resolve(asked, {KDA: asked[1], asked[1]: KDA})
    assert swapped == (asked[1], KDA, asked[1])
    with pytest.raises(CheckpointError, match=rf"names 'lightning', .* of this model; its layers are {KDA}, multi_"):
        resolve(asked, {"lightning": "x"})
    with pytest.raises(PluginError, match=rf"no layer is registered as 'y'; known: .*{KDA}.*, x"):
        resolve(asked, {KDA: "y"})


def test_a_layer_that_does_not_fit_a_model_says_which_and_why() -> None:
    class Wide(One):
        def __init__(self, config: Any, engine_config: EngineConfig, prefix: str) -> None:
            super().__init__(config, engine_config, prefix, num_heads=config.num_heads, head_dim=2)
            self.split_heads(config.odd)

    PluggableLayer.register("wide")(Wide)
    with pytest.raises(PluginError, match=r"'wide' \(.*Wide .*\) at layers\.0 cannot be made: .* 'num_heads'"):
        PluggableLayer.make("wide", SimpleNamespace(hidden_size=8), EngineConfig(), "layers.0")
    two = type("Two", (), {"rank": 0, "size": 2, "all_reduce": None})()
    sizes = SimpleNamespace(hidden_size=8, num_heads=4, odd=3)
    with pytest.raises(ConfigError, match=r"3 heads of layers\.0 cannot be split over 2 ranks"):
        PluggableLayer.make("wide", sizes, EngineConfig(ranks=two), "layers.0")


# Entry points


@pytest.mark.parametrize(
    ("source", "entries"),
    [
        (layer_source("Sum", "'running_sum'"), {"any": "package_a"}),
        (layer_source("Sum", "'running_sum'"), {"any": "package_a:Sum"}),
        (layer_source("Sum"), {"running_sum": "package_a:Sum"}),  # the entry point's name registers it
    ],
)
def test_an_entry_point_is_a_module_or_a_layer(tmp_path: Path, source: str, entries: dict[str, str]) -> None:
    with fresh_registry(write_package(tmp_path, "package_a", source, entries)):
        assert PluggableLayer.get("running_sum").__name__ == "Sum"
        assert PluggableLayer.origin("running_sum") == "package-a 1.0"
        assert PluggableLayer.names().count("running_sum") == 1
    assert "running_sum" not in PluggableLayer.names()


def test_a_plug_in_replaces_a_built_in_layer_whichever_comes_first(tmp_path: Path) -> None:
    write_package(tmp_path, "package_a", layer_source("Sum", f"'{KDA}', replace=True"))
    with fresh_registry(tmp_path):
        PluggableLayer._claims.clear()  # as if nothing had been imported yet
        import package_a

        PluggableLayer.register(KDA)(KimiDeltaAttention)
        assert PluggableLayer.get(KDA) is package_a.Sum
        kda = "statewise.layers.linear_attention.kda.KimiDeltaAttention"
        assert PluggableLayer.origin(KDA) == f"package-a 1.0, in place of {kda}"


def test_a_plug_in_may_build_on_another_layer_of_the_registry(tmp_path: Path) -> None:
    source = "from statewise.layers.pluggable import PluggableLayer\n"
    source += f"@PluggableLayer.register('derived')\nclass Derived(PluggableLayer.get('{KDA}')):\n    pass\n"
    with fresh_registry(write_package(tmp_path, "package_a", source)):
        assert issubclass(PluggableLayer.get("derived"), KimiDeltaAttention)


@pytest.mark.parametrize("replace", [False, True])
def test_two_packages_with_one_name_are_both_named(tmp_path: Path, replace: bool) -> None:
    name = f"'{KDA}', replace=True" if replace else "'running_sum'"
    write_package(tmp_path / "a", "package_a", layer_source("Sum", name))
    write_package(tmp_path / "b", "package_b", layer_source("Total", name))
    verb = "replaced" if replace else "claimed"
    pattern = rf"{verb} by both package_(a\.Sum|b\.Total) \(package-[ab] 1\.0\) and package_(a\.Sum|b\.Total) \(pack"
    with fresh_registry(tmp_path / "a", tmp_path / "b"):
        for _ in range(2):  # it does not go away by asking again
            with pytest.raises(PluginError, match=pattern) as caught:
                PluggableLayer.get(KDA)
            assert "package_a.Sum" in str(caught.value)
            assert "package_b.Total" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("import nowhere_to_be_found", "package_a", "could not be loaded: ModuleNotFoundError: No module named 'nowh"),
        ("x = = 1", "package_a", "could not be loaded: SyntaxError"),
        ("raise SystemExit('gone')", "package_a", "could not be loaded: SystemExit: gone"),
        ("", "package_a:Missing", "could not be loaded: AttributeError: .*Missing"),
        ("", "package_a", "registers no layer"),
        ("def setup(): ...", "package_a:setup", "neither a layer nor a module that registers one: found function"),
        ("class Bare: ...", "package_a:Bare", "neither a layer nor a module that registers one: found Bare"),
    ],
)
def test_an_entry_point_that_is_nothing_of_the_kind_is_named(
    tmp_path: Path, source: str, value: str, message: str
) -> None:
    with (
        fresh_registry(write_package(tmp_path, "package_a", source, {"the_entry": value})),
        pytest.raises(PluginError, match=rf"plug-in 'the_entry' \({value}, package-a 1.0\).* {message}"),
    ):
        PluggableLayer.get(KDA)


def test_a_built_in_name_cannot_be_claimed_unawares(tmp_path: Path) -> None:
    write_package(tmp_path, "package_a", layer_source("Sum", f"'{KDA}'"))
    pattern = r"claimed by both statewise\..*KimiDeltaAttention \(built in\) and package_a\.Sum \(package-a 1\.0\)"
    with fresh_registry(tmp_path), pytest.raises(PluginError, match=pattern):
        PluggableLayer.get(KDA)
