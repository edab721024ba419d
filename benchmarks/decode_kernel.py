"""The fused decode step of the gated delta rule against the memory bandwidth measured in the same run.

    python -m benchmarks.decode_kernel [--threads 2] [--json FILE]

A step reads and writes the state of each sequence once; its other operands are a hundredth of that. Every call
takes other blocks of a 1 GiB pool, so that the states come from memory and not from a cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bandwidth import GIBIBYTE, measure_bandwidth
from statewise.ops.batch import Batch, Piece, build_batch
from statewise.ops.delta_rule import gated_delta_rule

HEADS, WIDTH = 8, 128
BATCHES = (1, 8, 16, 64)
BLOCKS = GIBIBYTE // (HEADS * WIDTH * WIDTH * 4)
ROUNDS = 5


def batches(size: int) -> list[Batch]:
    """Decode batches that together visit every block of the pool once."""
    groups = [range(first, first + size) for first in range(0, BLOCKS, size)]
    return [build_batch([Piece([0], 9, record) for record in group], page_size=64) for group in groups]


def step_seconds(size: int, state: torch.Tensor) -> list[float]:
    """Seconds per decode step of `size` sequences, one entry per round over the pool."""
    q, k, v = torch.randn(3, size, HEADS, WIDTH).unbind()
    g, beta = -0.1 * torch.rand(size, HEADS, WIDTH), torch.rand(size, HEADS)
    steps, seconds = batches(size), []
    for _ in range(ROUNDS + 1):  # the first one warms up
        start = time.perf_counter()
        for batch in steps:
            gated_delta_rule(q, k, v, g, beta, state, batch, scale=WIDTH**-0.5)
        seconds.append((time.perf_counter() - start) / len(steps))
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="the fused decode step against the memory bandwidth")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    bandwidth = measure_bandwidth(options.threads)
    ceiling = max(bandwidth["copy"]["best"], bandwidth["update"]["best"])
    state = torch.randn(BLOCKS, HEADS, WIDTH, WIDTH)
    table = Table(
        "batch", "median us", "best us", "GB/s", "of the ceiling", title="gated delta rule, decode, fp32 state"
    )
    figures = []
    for size in BATCHES:
        seconds = step_seconds(size, state)
        moved = 2 * size * state[0].nbytes
        rate = moved / statistics.median(seconds) / 1e9
        figures.append({"batch": size, "seconds": seconds, "gb_s": rate, "of_ceiling": rate / ceiling})
        times = (f"{1e6 * statistics.median(seconds):.1f}", f"{1e6 * min(seconds):.1f}")
        table.add_row(str(size), *times, f"{rate:.1f}", f"{rate / ceiling:.0%}")
    console = Console()
    console.print(table)
    rates = ", ".join(f"{name} {rate['best']:.1f} GB/s" for name, rate in bandwidth.items())
    console.print(
        f"memory bandwidth, best of a few, {options.threads} threads: {rates}; the ceiling is {ceiling:.1f} GB/s"
    )
    if options.json:
        options.json.write_text(json.dumps({"bandwidth": bandwidth, "decode": figures}, indent=2))


if __name__ == "__main__":
    main()
