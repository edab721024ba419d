"""What remembering prompts is worth to conversations that return, when there is not room for all of them.

    python -m benchmarks.multi_turn [--model DIRECTORY] [--room 0.33] [--concurrency 1] [--json FILE]

The same trace runs without a cache, with a cache that forgets what was least recently used, with Statewise's own
eviction, and with that and a second tier in host memory, each in a process of its own. README.md beside this file says
what the columns mean.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.conversations import BETWEEN_STARTS_S, SYSTEM_TOKENS, Trace, make_trace
from benchmarks.least_recently_used import LeastRecentlyUsed
from benchmarks.multi_turn_report import against_controls, by_turn, overview, same_answers
from benchmarks.replay import Replay, Run, controls, warm_up

PAGE_SIZE = 64


@dataclass(frozen=True)
class Variant:
    """A way to remember. `settings` are those of `LLM` that make it."""

    name: str
    settings: dict[str, Any]
    least_recently_used: bool = False


def variants(host_mib: int | None) -> list[Variant]:
    """The two policies are compared in the device's pools alone, without the tier below."""
    return [
        Variant("no cache", {"prefix_cache": False, "host_cache": 0}),
        Variant("least recently used", {"host_cache": 0}, least_recently_used=True),
        Variant("statewise", {"host_cache": 0}),
        Variant("statewise, host tier", {"host_cache": None if host_mib is None else host_mib << 20}),
    ]


def play(variant: Variant, trace: Trace, options: argparse.Namespace) -> Run:
    """Run a variant in a fresh engine, in a process that does nothing else."""
    import torch

    from statewise import LLM

    if options.threads:
        torch.set_num_threads(options.threads)
    records, pages = trace.room(options.room, options.concurrency, PAGE_SIZE)
    with LLM(
        options.model,
        dtype=options.dtype,
        num_records=records,
        num_pages=pages,
        page_size=PAGE_SIZE,
        max_running=options.concurrency,
        **variant.settings,
    ) as llm:
        cache = llm.engine.scheduler.cache
        if variant.least_recently_used:
            cache.device.policy = LeastRecentlyUsed()
        warm_up(llm)
        before = cache.device.evictions
        replay = Replay(llm, trace, options.concurrency)
        seconds = replay.play()
        run = Run(variant.name, seconds, replay.served, cache.device.evictions - before, cache.counts.raised)
        if cache.enabled and options.concurrency == 1:
            run.controls = controls(llm, replay.served)
        return run


def play_all(trace: Trace, options: argparse.Namespace, console: Console) -> dict[str, list[Run]]:
    """Every variant and round in a process of its own: what a library has prepared for the shapes of one would
    otherwise serve the next. The variants take turns."""
    runs: dict[str, list[Run]] = {}
    for number in range(options.rounds):
        for variant in variants(options.host_mib):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                run = process.submit(play, variant, trace, options).result()
            runs.setdefault(variant.name, []).append(run)
            console.print(f"round {number + 1}: {variant.name}, {run.seconds:.1f} s")
    return runs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="conversations that return, with room for a part of them")
    parser.add_argument("--model", default="demo", help="a checkpoint directory, or demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, help="of torch and numba (default: one per core)")
    parser.add_argument("--conversations", type=int, default=20)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system-tokens", type=int, default=SYSTEM_TOKENS, help="that all conversations begin with")
    parser.add_argument("--between-starts", type=float, default=BETWEEN_STARTS_S, help="mean seconds, of the trace")
    parser.add_argument("--room", type=float, default=1 / 3, help="part of the conversations that the pools can hold")
    parser.add_argument("--host-mib", type=int, help="of the host tier (default: the engine's own choice)")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time")
    parser.add_argument("--rounds", type=int, default=1, help="times that all variants run")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    if options.conversations < 1 or options.turns < 1 or options.concurrency < 1 or options.rounds < 1:
        parser.error("conversations, turns, concurrency and rounds must be at least 1")
    return options


def main() -> None:
    options, console = parse(), Console()
    console = console if console.is_terminal else Console(width=150)  # a file or a pipe: room for the whole table
    trace = make_trace(
        options.seed, options.conversations, options.turns, options.system_tokens, options.between_starts
    )
    records, pages = trace.room(options.room, options.concurrency, PAGE_SIZE)
    runs = play_all(trace, options, console)
    console.print(f"{trace.conversations} conversations of {options.turns} turns; {records} records, {pages} pages")
    console.print(overview(runs))
    console.print(by_turn(runs))
    for line in same_answers(runs):
        console.print(line, highlight=False)
    if options.concurrency == 1:
        console.print(against_controls(runs))
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        samples = [run.samples() for several in runs.values() for run in several]
        answer = {"settings": settings, "records": records, "pages": pages, "runs": samples}
        options.json.write_text(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
