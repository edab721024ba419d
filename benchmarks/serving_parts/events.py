"""How many server-sent events the HTTP process makes, with an engine that costs nothing.

Flooded, the engine is always ahead, and events that are ready together leave together. Paced, each step of the engine
comes alone, so that every event is a write of its own: the processor time per event is what one more token costs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.serving_parts.processes import Server, cpu_seconds, resident_bytes

PATHS = ("/v1/completions", "/v1/chat/completions")
WARM_UP_S = 1.5


def measure(server: Server, path: str, streams: int, seconds: float) -> dict[str, Any]:
    """One client for so many seconds."""
    arguments = map(str, (server.port, path, streams, WARM_UP_S, seconds))
    client = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving_parts.counting_client", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(WARM_UP_S + 0.3)
    busy, begin = cpu_seconds(server.process.pid), time.perf_counter()
    time.sleep(seconds - 0.6)
    busy, passed = cpu_seconds(server.process.pid) - busy, time.perf_counter() - begin
    output, _ = client.communicate(timeout=60)
    if client.returncode:
        raise RuntimeError(server.log()[-2000:])
    result = json.loads(output)
    rate = result["events"] / result["seconds"]
    return {
        "path": path,
        "streams": streams,
        "events_s": rate,
        "events_per_read": result["events"] / max(result["reads"], 1),
        "resident_mib": resident_bytes(server.process.pid) / (1 << 20),
        "busy": busy / passed,
        "cpu_us_per_event": 1e6 * busy / passed / rate,
    }


def run(streams: int, seconds: float, rounds: int, paces: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Every path in every round, with a server for each pace of the engine in steps a second; 0: as many as go."""
    for pace in paces:
        with Server(pace=pace) as server:
            for _ in range(rounds):
                for path in PATHS:
                    yield {"pace": pace, **measure(server, path, streams, seconds)}
                    time.sleep(0.5)  # for what was cut to end
