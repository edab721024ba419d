"""The checks, in the order in which they are run and shown."""

from __future__ import annotations

from importlib import import_module

from statewise.conformance.check import CHECKS as CHECKS

# Each adds its checks to the list.
_NAMES = ("recurrence", "freshness", "batching", "records", "window", "interior", "sharding", "numbers", "long_input")
for _name in _NAMES:
    import_module(f"{__name__}.{_name}")
