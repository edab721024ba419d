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
from statewise.conformance.subject import Subject, require_contract
from statewise.conformance.targets import layers_named


class LayerContract:
    """Base of a test class: every check of the kit, on `layer`, in every dtype that the layer has.

        class TestMyLayer(LayerContract):
            layer = MyLayer

    What cannot be checked for want of a reference is skipped; what does not concern the layer passes.
    """

    layer: ClassVar[Any]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    long: ClassVar[int] = 4_096  # tokens of the longest input

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "finding" in metafunc.fixturenames:
            able = [dtype for dtype in self.dtypes if DTYPES[dtype] in self.layer.capabilities.dtypes]
            metafunc.parametrize(("dtype", "check"), [(dtype, one.name) for dtype in able for one in CHECKS])

    @pytest.fixture
    def finding(self, dtype: str, check: str) -> Finding:
        return run_check(check, _subject(self.layer, dtype, self.long))

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
            for name, layer in layers_named(target).items():
                items.extend(self._items(session, name, layer))

    def _items(self, session: Any, name: str, layer: Any) -> Iterator[Any]:
        require_contract(layer)
        for dtype in (dtype for dtype in DTYPES if DTYPES[dtype] in layer.capabilities.dtypes):
            for one in CHECKS:
                label = f"{name}[{dtype}-{one.name}]"
                item = LayerItem.from_parent(session, name=label, nodeid=f"conformance::{label}")
                item.layer, item.dtype, item.check, item.long = layer, dtype, one.name, self.long
                yield item


class LayerItem(pytest.Item):
    """One check of one layer in one dtype."""

    layer: Any
    dtype: str
    check: str
    long: int

    def runtest(self) -> None:
        _judge(run_check(self.check, _subject(self.layer, self.dtype, self.long)))

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        return (
            super().repr_failure(excinfo, "short")
            if not excinfo.errisinstance(pytest.fail.Exception)
            else str(excinfo.value)
        )

    def reportinfo(self) -> tuple[Path, None, str]:
        return Path(__file__), None, ""


@lru_cache(maxsize=8)
def _subject(layer: Any, dtype: str, long: int) -> Subject:
    return Subject(layer, DTYPES[dtype], long=long)


def _judge(finding: Finding) -> None:
    if finding.status == "not checked":
        pytest.skip(f"{finding.check}: {finding.message}")
    if finding.status == "failed":
        pytest.fail(f"{finding.check} ({finding.dtype}): {finding.message}", pytrace=False)
