"""A served demo: a real process, a real socket, and a client for it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

START_S = 90.0


class Served:
    """A server process and what it has said."""

    def __init__(self, *options: str, environment: dict[str, str] | None = None, before: str = "") -> None:
        """`before` is run in the HTTP process first."""
        script = f"{before}\nfrom statewise.cli import main; main()"
        command = [sys.executable, "-c", script, "serve", "demo", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--dtype", "float32", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | (environment or {}),
        )
        self.log: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        found = self.until(lambda: re.search(r"at (https?://[^\s\"]+)", "".join(self.log)))
        self.client = httpx.Client(base_url=found[1], timeout=30)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def until(self, look: Any) -> Any:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            if found := look():
                return found
            time.sleep(0.02)
        raise AssertionError("".join(self.log)[-2000:])

    def ready(self) -> Served:
        self.until(lambda: self.client.get("/ready").status_code == 200)
        return self

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=30)
        finally:
            self.process.kill()
            self.client.close()
