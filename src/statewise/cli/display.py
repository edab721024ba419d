"""How amounts, results and progress look in a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import click

from statewise.api.amounts import bytes_text as bytes_text
from statewise.api.amounts import count_text as count_text
from statewise.api.amounts import ranges_text as ranges_text

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    result = Console(stderr=stderr, highlight=False, markup=False)
    if not result.is_terminal:
        result.width = 200  # a pipe has no width; tables take what they need
    return result


def print_json(value: Any) -> None:
    click.echo(json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Data that JSON can hold: dataclasses become objects, a number without a finite value becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def progress_bar(description: str, unit_is_bytes: bool) -> Iterator[Any]:
    """A bar on stderr that vanishes at its end, as a function (done, total); None where nobody would see it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn(binary_units=True) if unit_is_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=None)

        def update(done: float, total: float, description: str | None = None) -> None:
            progress.update(task, completed=done, total=total, description=description)

        yield update
