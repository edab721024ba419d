"""The kit that proves that a layer keeps its contract: `statewise conformance`, or in pytest.

In a test file of the package that has the layer:

    from statewise.conformance import LayerContract

    class TestMyLayer(LayerContract):
        layer = MyLayer

or without one: `pytest -p statewise.conformance --conformance mypackage.layer:MyLayer`. Importing this package loads
neither torch nor pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statewise.conformance.check import Check as Check
    from statewise.conformance.checks import CHECKS as CHECKS
    from statewise.conformance.findings import Finding as Finding
    from statewise.conformance.findings import Report as Report
    from statewise.conformance.kit import prove as prove
    from statewise.conformance.kit import run_check as run_check
    from statewise.conformance.kit import run_checks as run_checks
    from statewise.conformance.pytest_plugin import LayerContract as LayerContract
    from statewise.conformance.subject import Subject as Subject
    from statewise.conformance.targets import layers_named as layers_named

_EXPORTS = {
    "CHECKS": "checks",
    "Check": "check",
    "Finding": "findings",
    "LayerContract": "pytest_plugin",
    "Report": "findings",
    "Subject": "subject",
    "layers_named": "targets",
    "prove": "kit",
    "run_check": "kit",
    "run_checks": "kit",
}
__all__ = [
    "CHECKS",
    "Check",
    "Finding",
    "LayerContract",
    "Report",
    "Subject",
    "layers_named",
    "prove",
    "run_check",
    "run_checks",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'statewise.conformance' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"statewise.conformance.{_EXPORTS[name]}"), name)


def pytest_addoption(parser: Any) -> None:
    parser.getgroup("statewise").addoption(
        "--conformance",
        action="append",
        default=[],
        metavar="LAYER",
        help="check a layer's contract: a registered name, module:Class, or all; repeatable",
    )
    parser.getgroup("statewise").addoption(
        "--conformance-long", type=int, default=4096, metavar="TOKENS", help="tokens of the longest input (4096)"
    )


def pytest_configure(config: Any) -> None:
    if config.getoption("conformance"):
        from statewise.conformance import pytest_plugin

        config.pluginmanager.register(pytest_plugin.LayerChecks(config), "statewise-conformance")
