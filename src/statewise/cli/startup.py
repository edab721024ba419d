"""A server's start in a terminal: a bar while the weights are loaded, then a table."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from statewise.cli.display import console, progress_bar
from statewise.cli.loading import COMPILING, PATIENCE


class TerminalReport:
    """Writes to stderr, which must be a terminal."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = time.monotonic()
        self._shown = ExitStack()
        self._update: Any = None

    def loading(self, done: int, total: int) -> None:
        if self._update is None:
            self._update = self._shown.enter_context(progress_bar(f"Loading {self._name}", unit_is_bytes=True))
        waits = done >= total and time.monotonic() - self._begun > PATIENCE
        if self._update is not None:
            self._update(done, total or None, COMPILING if waits else None)

    def ready(self, rows: list[tuple[str, str]]) -> None:
        from rich.table import Table

        self.close()
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        console(stderr=True).print(table)

    def failed(self, reason: str) -> None:
        self.close()
        console(stderr=True).print(f"The model cannot be served: {reason}", style="bold red")

    def close(self) -> None:
        self._shown.close()
