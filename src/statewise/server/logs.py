"""How the processes of a server write their logs: a line of text for each record, or a JSON object.

A logger's caller may give `extra={"fields": {...}}`: a JSON line has these beside the message. Prompts, keys and query
strings are never logged; that is for each caller to keep.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

_RUNNING: ContextVar[list[str] | None] = ContextVar("running", default=None)


@contextmanager
def serving(request_id: str | None) -> Iterator[None]:
    """What is logged within has the name that the client knows the request by."""
    running = [request_id] if request_id is not None else []
    token = _RUNNING.set(running)
    try:
        yield
    finally:
        running.clear()  # what was begun within and goes on, such as a timer, has a copy of the context
        _RUNNING.reset(token)


def _request_id() -> str | None:
    running = _RUNNING.get()
    return running[0] if running else None


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the time, since a progress display puts itself in between."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: object) -> None:
        pass


class TextLines(logging.Formatter):
    """Time, level, process, logger, request id, message; a traceback below."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        words = [_time(record), record.levelname, self._process, record.name]
        request_id = _request_id()
        if request_id is not None and "fields" not in record.__dict__:
            words.append(f"id={request_id}")
        return " ".join([*words, record.message])


class JsonLines(logging.Formatter):
    """The same as an object in one line; a traceback is the text `exception`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := _request_id()) is not None:
            line["request_id"] = request_id
        line |= {name: value for name, value in record.__dict__.get("fields", {}).items() if name not in line}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)


def configure(as_json: bool, process: str = "server", level: int = logging.INFO) -> None:
    """Write all of this process's log to stderr: also warnings, and exceptions that end it or a thread of it."""
    handler = LineHandler()
    handler.setFormatter(JsonLines(process) if as_json else TextLines(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    warnings.formatwarning = _warning
    if as_json:
        sys.excepthook = _ended
        threading.excepthook = _thread_ended


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{filename}:{lineno}: {category.__name__}: {message}"


def _ended(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    logging.getLogger("statewise").critical("the process ends", exc_info=(kind, error, trace))


def _thread_ended(arguments: threading.ExceptHookArgs) -> None:
    error = arguments.exc_value
    logging.getLogger("statewise").critical("a thread ends", exc_info=error if error is not None else True)
