"""The server under load and under faults, on the demo model and on an engine that costs nothing.

    python -m benchmarks.serving events     # server-sent events a second
    python -m benchmarks.serving overhead   # tokens a second over HTTP against the engine alone
    python -m benchmarks.serving load       # 200 streams for a minute, every text checked
    python -m benchmarks.serving cuts       # 1,000 clients that leave
    python -m benchmarks.serving short      # memory that stays of each of many requests

Client, HTTP process and engine share the machine, so on two cores each takes from the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving_parts import events, load, overhead

Figures = list[dict[str, Any]]
EVENTS_GOAL, OVERHEAD_GOAL = 120_000, 0.05


def table(title: str, headings: str, rows: Iterable[Iterable[str]]) -> Table:
    result = Table(title=title)
    for number, heading in enumerate(headings.split("|")):
        result.add_column(heading, justify="right" if number else "left")
    for row in rows:
        result.add_row(*row)
    return result


def run_events(options: argparse.Namespace, console: Console) -> Figures:
    figures = []
    for one in events.run(options.streams or 32, options.seconds or 5.0, options.rounds, options.paces):
        figures.append(one)
        console.print(f"{one['path']}, {one['pace'] or 'any number of'} steps/s: {one['events_s']:,.0f} events/s")
    rows = (
        (
            one["path"],
            f"{one['pace']:,.0f}" if one["pace"] else "flooded",
            f"{one['events_s']:,.0f}",
            f"{one['events_per_read']:.1f}",
            f"{one['cpu_us_per_event']:.1f}",
            f"{one['busy']:.2f}",
            f"{one['resident_mib']:.0f}",
        )
        for one in figures
    )
    headings = "path|engine steps/s|events/s|events per read|CPU us per event|cores busy|HTTP MiB"
    console.print(table(f"{figures[0]['streams']} streams, no engine; goal {EVENTS_GOAL:,} events/s", headings, rows))
    return figures


def run_overhead(options: argparse.Namespace, console: Console) -> Figures:
    one = overhead.run(options.streams or 16, options.tokens, options.rounds, options.dtype)
    low, high = one["overhead_range"]
    console.print(
        f"{one['streams']} streams of {one['tokens']} tokens, {one['dtype']}: engine {one['engine_tok_s']:,.0f} tok/s, "
        f"server {one['server_tok_s']:,.0f} tok/s: {one['overhead']:+.1%} (rounds {low:+.1%} to {high:+.1%}; goal "
        f"{OVERHEAD_GOAL:.0%}); HTTP process {one['http_busy']:.2f} cores"
    )
    return [one]


def run_load(options: argparse.Namespace, console: Console) -> Figures:
    one = load.load(options.streams or 200, options.seconds or 60.0)
    console.print(
        f"{one['answers']:,} answers, {one['tok_s']:,.0f} tok/s; failed: {one['failed'] or 'none'}; "
        f"another text than alone: {one['wrong'] or 'none'}; left: {one['records_used']} records for "
        f"{one['checkpoints']} checkpoints; exit status {one['exit_status']}"
    )
    rows = ([str(at + 1), *(f"{value:.0f}" for value in memory.values())] for at, memory in enumerate(one["memory"]))
    console.print(table("memory while it ran, and at the end", "twelfth|HTTP MiB|engine MiB", rows))
    return [one]


def run_cuts(options: argparse.Namespace, console: Console) -> Figures:
    one = load.cuts(options.clients)
    console.print_json(data=one)
    return [one]


def run_short(options: argparse.Namespace, console: Console) -> Figures:
    one = load.short(options.clients * 6)
    console.print(f"{one['requests']:,} requests; HTTP MiB after each sixth: {[round(m, 1) for m in one['http_mib']]}")
    return [one]


RUNS: dict[str, Callable[[argparse.Namespace, Console], Figures]] = {
    "events": run_events,
    "overhead": run_overhead,
    "load": run_load,
    "cuts": run_cuts,
    "short": run_short,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the server under load and under faults")
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--streams", type=int, help="at once (default: 32 for events, 16 for overhead, 200 for load)")
    parser.add_argument("--seconds", type=float, help="of each measurement (default: 5 for events, 60 for load)")
    parser.add_argument("--rounds", type=int, default=6, help="of events and overhead")
    parser.add_argument("--paces", type=float, nargs="+", default=[0.0, 1000.0], help="steps/s; 0: as many as go")
    parser.add_argument("--tokens", type=int, default=512, help="of an answer, for overhead")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="for overhead")
    parser.add_argument("--clients", type=int, default=1000, help="for cuts; short sends six times as many")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def main() -> None:
    options, console = parse(), Console()
    console = console if console.is_terminal else Console(width=150)
    figures = RUNS[options.what](options, console)
    if options.json:
        options.json.write_text(json.dumps({"what": options.what, "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
