"""A model for a verb, with a progress bar where loading takes long enough to wonder."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import progress_bar

if TYPE_CHECKING:
    from statewise import LLM

LARGE_CHECKPOINT = 1 << 30  # bytes
PATIENCE = 4.0  # seconds of silence before a word about what is going on
COMPILING = "compiling kernels for this processor; only the first start takes so long"


def load(model: str, **arguments: Any) -> LLM:
    """The model, ready to run. Says on stderr which layers were chosen. Raises StatewiseError."""
    llm = _load(model, **arguments)
    context = click.get_current_context(silent=True)
    if context is not None:
        context.call_on_close(llm.close)
    if sys.stderr.isatty() or _verbose():
        from statewise.api.selection import selection_lines

        for line in selection_lines(llm.summary()):
            click.secho(line, dim=True, err=True)
    return llm


def _load(model: str, **arguments: Any) -> LLM:
    from statewise import LLM

    if checkpoint_bytes(model) < LARGE_CHECKPOINT:
        timer = threading.Timer(PATIENCE, lambda: print(COMPILING, file=sys.stderr, flush=True))  # noqa: T201
        timer.daemon = True
        timer.start()
        try:
            return LLM(model, **arguments)
        finally:
            timer.cancel()
    with progress_bar(f"Loading {Path(model).name}", unit_is_bytes=True) as update:
        if update is None:
            return LLM(model, **arguments)
        return LLM(model, progress=update, **arguments)


def _verbose() -> bool:
    """Whether the verb was called with --verbose. Without a terminal nobody is reading along unless asked."""
    context = click.get_current_context(silent=True)
    return bool(context and context.params.get("verbose"))


def checkpoint_bytes(model: str) -> int:
    directory = Path(model)
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) if directory.is_dir() else 0
