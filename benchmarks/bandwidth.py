"""The memory bandwidth that this machine reaches: the ceiling of every decode step.

python -m benchmarks.bandwidth [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

GIBIBYTE = 1 << 30
REPEATS = 5


def best(action: Callable[[], object], bytes_moved: int) -> dict[str, float]:
    """Median and best bytes per second of an action, in GB/s."""
    action()
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        rates.append(bytes_moved / (time.perf_counter() - start) / 1e9)
    return {"median": statistics.median(rates), "best": max(rates)}


def measure_bandwidth(threads: int) -> dict[str, dict[str, float]]:
    """GB/s of reading, of copying and of updating in place (both read + write), over buffers of 1 GiB."""
    torch.set_num_threads(threads)
    source = torch.ones(GIBIBYTE // 4)
    read = best(source.sum, GIBIBYTE)
    update = best(lambda: source.mul_(1.0), 2 * GIBIBYTE)
    target = torch.zeros_like(source)
    return {"read": read, "copy": best(lambda: target.copy_(source), 2 * GIBIBYTE), "update": update}


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the memory bandwidth, in GB/s")
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure_bandwidth(parser.parse_args().threads)))


if __name__ == "__main__":
    main()
