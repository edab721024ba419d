"""Plug-in packages made on the spot, and a registry that forgets them again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from statewise.layers.pluggable import BUILT_IN, PluggableLayer

LAYER = """
import torch
from statewise.layers.linear_attention.base import LinearAttention
from statewise.layers.mixer import Capabilities
from statewise.layers.pluggable import PluggableLayer
from statewise.memory.blocks import Field, Shard, StateSpec

class {name}(LinearAttention):
    state_kind = "sum"
    capabilities = Capabilities({{"cpu": "torch"}})

    def __init__(self, config, engine_config, prefix):
        super().__init__(config, engine_config, prefix, num_heads=4, head_dim=4)

    def state_spec(self):
        return StateSpec(total=Field((self.hidden_size,), torch.float32))

    def forward(self, hidden, batch, state):  # a sequence at a time
        out = torch.empty_like(hidden)
        for i, block in enumerate(batch.records.tolist()):
            rows = slice(int(batch.query_start[i]), int(batch.query_start[i + 1]))
            total = hidden[rows].float().cumsum(0) + (0 if batch.fresh[i] else state["total"][block])
            out[rows], state["total"][block] = total.to(hidden.dtype), total[-1]
        return out
"""
"""Source of a layer without weights: y_t = x_0 + ... + x_t."""


def layer_source(name: str, register: str = "", **changes: str) -> str:
    """The source of the layer, a class `name`; `register` decorates it, `changes` replaces text by text."""
    source = LAYER.format(name=name)
    for old, new in changes.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source.replace("class ", f"@PluggableLayer.register({register})\nclass ") if register else source


def write_package(directory: Path, name: str, source: str, entries: Mapping[str, str] | None = None) -> Path:
    """What pip leaves of a package of one module `name` in a directory; `entries` are its entry points."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.py").write_text(source)
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in (entries or {name: name}).items()]
    (info / "entry_points.txt").write_text("\n".join(["[statewise.plugins]", *lines, ""]))
    return directory


@contextmanager
def fresh_registry(*directories: Path) -> Iterator[None]:
    """As in a new process with `directories` on its path: entry points are looked for again, and forgotten behind."""
    for module in BUILT_IN:  # a module registers its layers once
        import_module(module)
    claims, complete = {name: list(held) for name, held in PluggableLayer._claims.items()}, PluggableLayer._complete
    modules, path = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(directory) for directory in directories]
    PluggableLayer._complete = False
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(tuple(map(str, directories)) or ("\0",)):
                del sys.modules[name]
        PluggableLayer._claims.clear()
        PluggableLayer._claims.update(claims)
        PluggableLayer._complete = complete
