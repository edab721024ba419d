"""What a server says of itself when it starts: how far the loading is, then what is served and how much fits."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import msgspec

from statewise.api.amounts import bytes_text, count_text
from statewise.api.model_summary import ModelSummary
from statewise.api.selection import selection_lines
from statewise.server import messages
from statewise.server.engine_client import EngineClient

logger = logging.getLogger(__name__)
POLL_S = 0.1
LAYERS = "layer"  # how the names of their rows begin


class Report(Protocol):
    """Where it is said. The calls come in this order, the first any number of times."""

    def loading(self, done: int, total: int) -> None:
        """Bytes of the weights; both 0 before the first word about them."""

    def ready(self, rows: list[tuple[str, str]]) -> None:
        """What is served: names and values."""

    def failed(self, reason: str) -> None:
        """The model cannot be served."""

    def close(self) -> None:
        """Nothing more will be said."""


class LogReport:
    """A few lines of the log, or one JSON object."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def loading(self, done: int, total: int) -> None:
        pass

    def ready(self, rows: list[tuple[str, str]]) -> None:
        if self._as_json:
            layers = [f"{name}: {value}" for name, value in rows if name.startswith(LAYERS)]
            fields = {name.replace(" ", "_"): value for name, value in rows if not name.startswith(LAYERS)}
            logger.info("ready", extra={"fields": {**fields, "layers": layers}})
            return
        for name, value in rows:
            logger.info("%s: %s", name, value)

    def failed(self, reason: str) -> None:
        logger.error("the model cannot be served: %s", reason)

    def close(self) -> None:
        pass


async def say(engine: EngineClient, url: str, report: Report) -> None:
    """Follow the first start of the engine to its end."""
    try:
        while engine.phase == "loading":
            found = engine.loading or messages.Loading(0, 0)
            report.loading(found.done, found.total)
            await asyncio.sleep(POLL_S)
        if engine.phase == "ready" and engine.info is not None:
            report.ready(rows(engine.info, url))
        elif engine.phase == "dead":
            report.failed(engine.failure or "the engine has ended")
    finally:
        report.close()


def rows(info: messages.Loaded, url: str) -> list[tuple[str, str]]:
    """The start-up table."""
    summary = msgspec.convert(info.summary, ModelSummary)
    layers = [line.partition(": ") for line in selection_lines(summary)]
    weights = f"{count_text(summary.parameters)} parameters, {bytes_text(summary.weight_bytes)}"
    return [
        ("model", f"{summary.name}: {summary.architecture}, {weights}, {summary.dtype} on {info.device}"),
        *((where, what) for where, _, what in layers),
        ("records", f"{_pool(info.num_records, info.record_bytes)}, one for a sequence of any length"),
        ("pages", f"{_pool(info.num_pages, info.page_bytes)}, one for {info.page_size} tokens"),
        ("at once", _at_once(info)),
        ("prefix cache", _cache(info)),
        ("address", url),
    ]


def _pool(count: int, block: int) -> str:
    return f"{count:,} of {bytes_text(block)} each, {bytes_text(count * block)}" if block else "none are needed"


def _at_once(info: messages.Loaded) -> str:
    whole = min(info.num_records, info.max_running)
    if info.page_bytes:
        whole = min(whole, info.num_pages // -(-info.max_length // info.page_size))
    most = min(info.num_records, info.max_running)
    return f"{most:,} sequences; of the full length of {info.max_length:,} tokens, {whole:,}"


def _cache(info: messages.Loaded) -> str:
    if not info.prefix_cache:
        return "off"
    below = f"{bytes_text(info.host_bytes)} of host memory" if info.host_bytes else "no host memory"
    return f"the pools, {below}, " + (f"{bytes_text(info.disk_bytes)} of disk" if info.disk_bytes else "no disk")
