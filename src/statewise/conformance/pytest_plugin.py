"""The checks as pytest tests: one item per layer, check and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytest

from statewise.conformance.checks import CHECKS
from statewise.conformance.findings import Finding
from statewise.conformance.kit import DTYPES, run_check
from statewise.conformance.making import require_contract
from statewise.conformance.subject import Subject
from statewise.conformance.targets import layers_named
from statewise.errors import StatewiseError

MADE = "made"  # the one test of a layer that cannot be made


class LayerContract:
    """Base of a test class: every check of the kit, on `layer`, in every dtype that the layer has.

        class TestMyLayer(LayerContract):
            layer = MyLayer

    What cannot be checked for want of a reference is skipped; what does not concern the layer passes.
    """

    layer: ClassVar[Any] = None
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    long: ClassVar[int] = 4_096  # tokens of the longest input

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "finding" in metafunc.fixturenames:
            metafunc.parametrize(("dtype", "check"), _planned(self.layer, self.dtypes, self.long))

    @pytest.fixture
    def finding(self, dtype: str, check: str) -> Finding:
        return _finding(self.layer, dtype, check, self.long)

    def test_contract(self, finding: Finding) -> None:
        _judge(finding)


class LayerChecks:
    """What `--conformance` adds to a run of pytest. Without other arguments it is all of the run."""

    def __init__(self, config: Any) -> None:
        self.targets: list[str] = config.getoption("conformance")
        self.long: int = config.getoption("conformance_long")
        if config.args_source != config.ArgsSource.ARGS:
            config.args = []

    def pytest_collection_modifyitems(self, session: Any, items: list[Any]) -> None:
        for target in self.targets:
            try:
                layers = layers_named(target)
            except StatewiseError as error:
                raise pytest.UsageError(f"--conformance: {error}") from None
            for name, layer in layers.items():
                items.extend(self._items(session, name, layer))

    def _items(self, session: Any, name: str, layer: Any) -> Iterator[Any]:
        for dtype, check in _planned(layer, tuple(DTYPES), self.long):
            label = f"{name}[{dtype}-{check}]"
            item = LayerItem.from_parent(session, name=label, nodeid=f"conformance::{label}")
            item.layer, item.dtype, item.check, item.long = layer, dtype, check, self.long
            yield item


class LayerItem(pytest.Item):
    """One check of one layer in one dtype."""

    layer: Any
    dtype: str
    check: str
    long: int

    def runtest(self) -> None:
        _judge(_finding(self.layer, self.dtype, self.check, self.long))

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        return (
            super().repr_failure(excinfo, "short")
            if not excinfo.errisinstance(pytest.fail.Exception)
            else str(excinfo.value)
        )

    def reportinfo(self) -> tuple[Path, None, str]:
        return Path(__file__), None, ""


def _planned(layer: Any, dtypes: tuple[str, ...], long: int) -> list[tuple[str, str]]:
    """(dtype, check) of every test. A layer that cannot be made has one test, which fails with the reason."""
    able: list[str] = []
    for dtype in dtypes:
        try:
            require_contract(layer)
            if DTYPES[dtype] in layer.capabilities.dtypes:
                _subject(layer, dtype, long)
                able.append(dtype)
        except StatewiseError:
            return [(dtype, MADE)]
    return [(dtype, one.name) for dtype in able for one in CHECKS] or [(dtypes[0], MADE)]


def _finding(layer: Any, dtype: str, check: str, long: int) -> Finding:
    try:
        subject = _subject(layer, dtype, long)
    except StatewiseError as error:
        return Finding(check, dtype, "failed", str(error))
    return Finding(MADE, dtype, "held", "The layer can be made.") if check == MADE else run_check(check, subject)


@lru_cache(maxsize=8)
def _subject(layer: Any, dtype: str, long: int) -> Subject:
    return Subject(layer, DTYPES[dtype], long=long)


def _judge(finding: Finding) -> None:
    if finding.status == "not checked":
        pytest.skip(f"{finding.check}: {finding.message}")
    if finding.status == "failed":
        pytest.fail(f"{finding.check} ({finding.dtype}): {finding.message}", pytrace=False)
