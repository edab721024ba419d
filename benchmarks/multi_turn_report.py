"""Turns the runs of `multi_turn.py` into tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.table import Table

from benchmarks.replay import Control, Run, Served, last_turns

Runs = Mapping[str, Sequence[Run]]  # by variant, one entry per round


def overview(runs: Runs) -> Table:
    """What each variant found again, and what it had to compute a second time; sums over a trace."""
    table = Table(title="the whole trace; counts of the first round, seconds the median of all")
    table.add_column("memory")
    for heading in ("prompt tokens", "found", "hit rate", "recomputed", "turns found whole", "evicted", "from host"):
        table.add_column(heading, justify="right")
    table.add_column("seconds", justify="right")
    for name, several in runs.items():
        served = several[0].served
        prompt, cached = sum(len(one.prompt) for one in served), sum(one.cached for one in served)
        again = sum(one.known > 0 for one in served)
        row = [f"{prompt:,}", f"{cached:,}", f"{cached / prompt:.1%}", f"{sum(one.recomputed for one in served):,}"]
        row.append(f"{sum(one.hit for one in served)} of {again}")
        row += [str(several[0].evictions), str(several[0].from_host)]
        table.add_row(name, *row, f"{statistics.median(run.seconds for run in several):.2f}")
    served = next(iter(runs.values()))[0].served
    prompt, known = sum(len(one.prompt) for one in served), sum(one.known for one in served)
    table.add_section()
    table.add_row("without a limit", f"{prompt:,}", f"{known:,}", f"{known / prompt:.1%}", "0", *4 * ["-"])
    return table


def by_turn(runs: Runs) -> Table:
    """Median time to first token of each turn, over conversations and rounds."""
    table = Table(title="time to first token, median ms")
    table.add_column("memory")
    numbers = sorted({one.turn.number for run in next(iter(runs.values())) for one in run.served})
    for number in numbers:
        table.add_column(f"turn {number}", justify="right")
    for name, several in runs.items():
        served = [one for run in several for one in run.served]
        times = [[1e3 * one.first_token_s for one in served if one.turn.number == number] for number in numbers]
        table.add_row(name, *(f"{statistics.median(each):.1f}" for each in times))
    return table


def same_answers(runs: Runs) -> list[str]:
    """How many turns have the tokens that they have without a cache, where that has run."""
    reference = runs.get("no cache")
    if reference is None:
        return []
    expected = {one.turn: one.answer for one in reference[0].served}
    lines = []
    for name, several in runs.items():
        if several is not reference:
            same = sum(one.answer == expected[one.turn] for one in several[0].served)
            lines.append(f"{name}: {same} of {len(expected)} answers have the tokens that they have without a cache")
    return lines


def against_controls(runs: Runs) -> Table:
    """The last turn's time to first token against that of equally many new tokens whose history is surely there."""
    table = Table(title="the last turn against its new tokens alone: median ratio (ratio of the sums)")
    for heading in ("memory", "as many new tokens behind"):
        table.add_column(heading)
    for heading in ("control ms", "turns that hit", "their ratio", "all turns", "their ratio"):
        table.add_column(heading, justify="right")
    for name, several in runs.items():
        for behind in several[0].controls:
            pairs = [pair for run in several for pair in zip(last_turns(run.served), run.controls[behind], strict=True)]
            hits = [pair for pair in pairs if pair[0].hit]
            alone = 1e3 * statistics.median(statistics.median(one.first_token_s) for _, one in pairs)
            row = [f"{alone:.1f}", str(len(hits)), _ratio(hits), str(len(pairs)), _ratio(pairs)]
            table.add_row(name, behind, *row)
    return table


def _ratio(pairs: Sequence[tuple[Served, Control]]) -> str:
    if not pairs:
        return "-"
    turns = [served.first_token_s for served, _ in pairs]
    alone = [statistics.median(one.first_token_s) for _, one in pairs]
    median = statistics.median(mine / other for mine, other in zip(turns, alone, strict=True))
    return f"{median:.2f} ({sum(turns) / sum(alone):.2f})"
