"""The checks, in the order in which they are run and shown."""

from __future__ import annotations

from importlib import import_module

from statewise.conformance.check import CHECKS as CHECKS

# Each adds its checks to the list.
for _name in ("recurrence", "freshness", "batching", "records", "window", "sharding", "numbers", "long_input"):
    import_module(f"{__name__}.{_name}")
