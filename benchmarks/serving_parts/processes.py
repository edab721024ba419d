"""A server in its own processes, and what the system says about them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

import httpx

Found = TypeVar("Found")
START_S = 60.0
REAL = ["-c", "from statewise.cli import main; main()", "serve", "demo", "--port", "0"]
FAKE = ["-m", "benchmarks.serving_parts.fake_server"]


class Server:
    """`statewise serve demo` on a free port of the loopback, to be used as a context: it is ended behind it."""

    def __init__(self, *options: str, pace: float | None = None) -> None:
        """With `pace`, the engine is the fake one, which makes so many steps a second; 0: as many as it can."""
        command = [*REAL, *options] if pace is None else [*FAKE, str(pace), *options]
        self._log: IO[str] = tempfile.TemporaryFile("w+", prefix="serving-")  # noqa: SIM115  as long as the server
        self.process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=self._log)
        try:
            self.port = int(self.until(lambda: re.search(r"at https?://\S+:(\d+)", self.log()))[1])
            self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
            self.until(lambda: self.client.get("/ready").status_code == 200)
        except BaseException:
            self.process.kill()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def until(self, look: Callable[[], Found], seconds: float = START_S) -> Found:
        """The first true answer. Raises `RuntimeError` when none comes, with the end of the log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if found := look():
                return found
            time.sleep(0.05)
        raise RuntimeError(f"not in {seconds:g} s: {self.log()[-2000:]}")

    @property
    def engine(self) -> int:
        """The process id of the engine."""
        return children(self.process.pid)[0]

    def stop(self) -> int:
        """End it in an orderly way. Returns its exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_seconds(pid: int) -> float:
    """Of all threads, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
