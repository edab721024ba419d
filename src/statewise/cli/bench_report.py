"""A measurement of a server as a table and as JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import click

from statewise import __version__
from statewise.cli.display import console
from statewise.traffic.measure import Measurement
from statewise.traffic.record import Record
from statewise.traffic.statistics import PERCENTILES, Spread

LATE_SHARE = 0.05  # of a median answer; where nothing but this machine holds requests up, more is too much


def print_report(measured: Measurement) -> None:
    from rich.table import Table

    report = measured.report
    server = f" {measured.server_version}" if measured.server_version else ""
    click.echo(f"{measured.model} at {measured.url}{server}: {summary_line(measured)}")
    table = Table()
    table.add_column("milliseconds")
    for name in ("mean", *(f"p{share}" for share in PERCENTILES), "most"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, Spread | None]] = [("time to first token", report.first_token)]
    if measured.plan.pattern.rate is not None:
        rows.append(("  from its intended start", report.first_token_intended))
    rows += [
        ("between events with tokens", report.between_events),
        ("per output token", report.per_token),
        ("whole answer", report.total),
    ]
    if measured.plan.pattern.rate is not None:
        rows.append(("  from its intended start", report.total_intended))
    for name, spread in rows:
        if spread is not None:
            values = (spread.mean, *spread.percentiles.values(), spread.most)
            table.add_row(name, *(_milliseconds(value) for value in values))
    console().print(table)
    failed = f", {report.failed:,} failed" if report.failed else ""
    cached = f" ({report.cached_share:.0%} of them cached)" if report.cached_share is not None else ""
    click.echo(
        f"{report.completed:,} requests answered{failed} in {report.seconds:.2f} s, at most "
        f"{report.peak_concurrency:,} at once\n"
        f"{report.prompt_tokens:,} prompt tokens{cached}, {report.output_tokens:,} output tokens\n"
        f"{report.requests_per_second:,.2f} requests/s, {report.output_tokens_per_second:,.1f} output tokens/s, "
        f"{report.total_tokens_per_second:,.1f} tokens/s in all"
    )
    for error in report.errors:
        click.secho(f"{error.count:,} × {error.kind}: {error.message}", fg="red", err=True)
    for note in notes(measured):
        click.secho(f"note: {note}", fg="yellow", err=True)


def notes(measured: Measurement) -> list[str]:
    """What a reader of the figures should know."""
    report, pattern, found = measured.report, measured.plan.pattern, []
    if report.uncounted:
        found.append(f"{report.uncounted:,} answers came without token counts; their events are counted instead")
    free = pattern.rate is not None and pattern.concurrency is None and not measured.plan.sessions
    if free and report.sent_late and report.total:
        late = report.sent_late.percentiles["p99"]
        if late > max(0.005, LATE_SHARE * report.total.percentiles["p50"]):
            found.append(
                f"this machine does not keep up with the rate: 1 % of the requests went {_milliseconds(late)} ms late"
            )
    return found


def summary_line(measured: Measurement) -> str:
    """The settings in a few words."""
    pattern = measured.plan.pattern
    parts: list[str] = [measured.plan.endpoint]
    if pattern.rate is not None:
        parts.append(f"{pattern.rate:g} conversations/s asked for")
    if pattern.concurrency is not None:
        parts.append(f"{'at most ' if pattern.rate is not None else ''}{pattern.concurrency} at once")
    if measured.plan.turns > 1:
        parts.append(f"{measured.plan.turns} turns{' in sessions' if measured.plan.sessions else ''}")
    return ", ".join([*parts, f"seed {measured.plan.seed}"])


def result_of(measured: Measurement, records: bool) -> dict[str, Any]:
    """Everything that was measured and how, for a JSON file. Times are seconds."""
    plan = measured.plan
    settings = asdict(plan)
    settings["prompt_file_lines"] = None if plan.listed is None else len(plan.listed.turns)
    del settings["listed"]
    result: dict[str, Any] = {
        "statewise": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "began": measured.began.isoformat(timespec="seconds"),
        "url": measured.url,
        "model": measured.model,
        "server_version": measured.server_version,
        "settings": settings | {"prompts": measured.prompts},
        "report": asdict(measured.report),
    }
    if records:
        result["records"] = [_record(record, measured.run.began) for record in measured.run.records]
    return result


def _record(record: Record, began: float) -> dict[str, Any]:
    return {
        "conversation": record.conversation,
        "turn": record.turn,
        "intended_s": record.intended - began,
        "started_s": record.started - began,
        "first_token_s": record.first_token_s,
        "per_token_s": record.per_token_s,
        "total_s": record.total_s,
        "events": len(record.times),
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cached_tokens": record.cached_tokens,
        "finish_reason": record.finish_reason,
        "error": None if record.failure is None else asdict(record.failure),
    }


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
