"""A log of whole lines: each says when, how bad, who and for which request."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from statewise.server import logs

Lines = Callable[[], list[str]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    """What is written to stderr after `logs.configure`, which is undone."""
    for owner, name in ((sys, "excepthook"), (threading, "excepthook"), (warnings, "formatwarning")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    try:
        yield lambda: capsys.readouterr().err.splitlines()
    finally:
        logging.captureWarnings(False)
        root.handlers = handlers
        root.setLevel(level)


def test_a_record_is_one_object_whatever_is_in_it(written: Lines) -> None:
    logs.configure(True)
    nasty = 'a "quoted"\nline\x1b[2J \ud800 \u2028 end'
    logging.getLogger("one").warning("%s", nasty)
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        logging.getLogger("two").exception("it failed")
    logging.getLogger("three").info("odd", extra={"fields": {"value": object(), "message": "forged", "count": 3}})
    first, second, third = (json.loads(line) for line in written())
    assert (first["message"], first["level"], first["logger"], first["process"]) == (nasty, "WARNING", "one", "server")
    assert datetime.fromisoformat(first["time"]).tzinfo == UTC
    assert second["exception"].startswith("Traceback") and "ValueError: bad\nthing" in second["exception"]
    assert (third["message"], third["count"]) == ("odd", 3)


def test_text_lines_have_the_same_parts(written: Lines) -> None:
    logs.configure(False, "engine")
    with logs.serving("req-1"):
        logging.getLogger("one").info("hello %d", 3)
    logging.getLogger("one").info("nobody's")
    first, second = written()
    assert first.split(" ", 1)[1] == "INFO engine one id=req-1 hello 3"
    assert second.split(" ", 1)[1] == "INFO engine one nobody's"


def test_what_is_logged_has_the_id_of_the_request_that_it_is_for(written: Lines) -> None:
    logs.configure(True)
    logger = logging.getLogger("handler")

    async def handle(name: str) -> None:
        with logs.serving(name):
            asyncio.get_running_loop().call_later(0.05, logger.info, "later, of %s", name)
            await asyncio.sleep(0.01)
            logger.info("of %s", name)
            await asyncio.to_thread(logger.info, "in a thread, of %s", name)

    async def run() -> None:
        await asyncio.gather(*(handle(f"req-{number}") for number in range(3)))
        await asyncio.sleep(0.1)

    asyncio.run(run())
    lines = [json.loads(line) for line in written()]
    assert len(lines) == 9
    for line in lines:
        expected = None if "later" in line["message"] else line["message"].split()[-1]
        assert line.get("request_id") == expected


def test_warnings_and_what_ends_a_thread_are_lines_too(written: Lines) -> None:
    logs.configure(True)
    warnings.warn("old\nthing", UserWarning, stacklevel=1)

    def fail() -> None:
        raise RuntimeError("in a thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    sys.excepthook(*_caught())
    lines: list[Any] = [json.loads(line) for line in written()]
    assert "UserWarning: old\nthing" in lines[0]["message"]
    assert "in a thread" in lines[1]["exception"] and "at the end" in lines[2]["exception"]


def _caught() -> Any:
    try:
        raise KeyError("at the end")
    except KeyError:
        return sys.exc_info()


def test_an_engine_process_that_fails_says_so_in_json() -> None:
    command = [sys.executable, "-m", "statewise.server.engine_process", "/nonexistent/socket", "--log-json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=False)
    assert ended.returncode != 0 and ended.stdout == ""
    (line,) = (json.loads(line) for line in ended.stderr.splitlines())
    assert (line["process"], line["level"]) == ("engine", "CRITICAL")
    assert "FileNotFoundError" in line["exception"]
