"""What a server says when it starts, in a terminal and in a log."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import asdict
from io import StringIO
from typing import Any

import msgspec
import pytest

from statewise.api.summary import inspect_model
from statewise.cli.startup import TerminalReport
from statewise.server import messages, startup
from statewise.server.engine_client import EngineClient

URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def info() -> messages.Loaded:
    summary = inspect_model("demo", "float32")
    return messages.Loaded(
        max_length=1000,
        vocab_size=10,
        num_records=20,
        num_pages=80,
        record_bytes=2048,
        page_bytes=1024,
        page_size=100,
        summary=msgspec.to_builtins(asdict(summary)),
        max_running=16,
        disk_bytes=1 << 30,
    )


class Recorder:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def loading(self, done: int, total: int) -> None:
        self.heard.append((done, total))

    def ready(self, rows: list[tuple[str, str]]) -> None:
        self.heard.append(dict(rows))

    def failed(self, reason: str) -> None:
        self.heard.append(reason)

    def close(self) -> None:
        self.heard.append("closed")


def heard(info: messages.Loaded | None) -> list[Any]:
    engine, recorder = EngineClient("demo", {}), Recorder()

    async def run() -> None:
        saying = asyncio.create_task(startup.say(engine, URL, recorder))
        await asyncio.sleep(0)
        engine.loading = messages.Loading(5, 10)
        await asyncio.sleep(3 * startup.POLL_S)
        engine.info, engine.failure = info, None if info else "a tensor is missing"
        engine.phase = "ready" if info else "dead"
        await saying

    asyncio.run(run())
    return recorder.heard


def test_a_start_is_followed_to_its_end(info: messages.Loaded) -> None:
    first, *middle, table, closed = heard(info)
    assert first == (0, 0) and set(middle) == {(5, 10)} and closed == "closed"
    assert table["address"] == URL
    assert table["model"].startswith("demo: ") and table["model"].endswith("float32 on cpu")
    assert table["records"].startswith("20 of 2.0 KiB each, 40.0 KiB")
    assert table["at once"] == "16 sequences; of the full length of 1,000 tokens, 8"
    assert "1.0 GiB of disk" in table["prefix cache"]
    assert sum(name.startswith(startup.LAYERS) for name in table) == 2
    assert heard(None)[-2:] == ["a tensor is missing", "closed"]


def test_a_log_has_a_line_for_each_row_or_one_object(info: messages.Loaded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rows = startup.rows(info, URL)
    startup.LogReport(as_json=False).ready(rows)
    assert [record.getMessage() for record in caplog.records] == [f"{name}: {value}" for name, value in rows]
    caplog.clear()
    startup.LogReport(as_json=True).ready(rows)
    (record,) = caplog.records
    fields: dict[str, Any] = record.__dict__["fields"]
    assert len(fields["layers"]) == 2 and {"model", "records", "pages", "at_once", "address"} < fields.keys()


def test_a_terminal_shows_a_bar_and_a_table(info: messages.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    report = TerminalReport("demo")
    for done in (0, 1 << 20, 2 << 20):
        report.loading(done, 2 << 20)
    report.ready(startup.rows(info, URL))
    shown = terminal.getvalue()
    assert "Loading demo" in shown
    assert shown.rindex("Loading demo") < shown.rindex("records") < shown.rindex(URL)
    report = TerminalReport("demo")
    report.loading(0, 0)
    report.failed("a tensor is missing")
    assert "cannot be served: a tensor is missing" in terminal.getvalue()
