"""A report as a picture: an SVG that needs nothing to be drawn with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from statewise.traffic.drive import Run
from statewise.traffic.statistics import Report

WIDTH, HEIGHT = 960, 430
TOP, PANEL_HEIGHT, PANEL_WIDTH = 96, 250, 380
LEFT = (64, 536)  # of the two panels
POINTS = 200  # of a curve, at most
COLORS = ("#0b6e99", "#b4540a", "#5b3a8e", "#2f7d32")
INK, SOFT, LINES = "#1d2329", "#5a646e", "#dfe4e8"

Point = tuple[float, float]


@dataclass(frozen=True)
class _Axis:
    """From values to places."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def svg(run: Run, report: Report, title: str, subtitle: str) -> str:
    """Left, which share of the latencies is below a time; right, tokens per second and running requests over time."""
    done = [record for record in run.records if record.failure is None]
    curves = [
        ("between tokens", sorted(b - a for one in done for a, b in zip(one.times, one.times[1:]) if b > a)),
        ("first token", sorted(value for one in done if (value := one.first_token_s) is not None)),
        ("whole answer", sorted(one.total_s for one in done)),
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(24, 32, title, size=17, weight=600),
        _text(24, 52, subtitle, fill=SOFT),
        *_latencies([(name, values) for name, values in curves if values]),
        *_throughput(report),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _latencies(curves: Sequence[tuple[str, list[float]]]) -> Iterable[str]:
    left, bottom = LEFT[0], TOP + PANEL_HEIGHT
    yield _text(left, TOP - 14, "Share of latencies below a time", weight=600)
    if not curves:
        yield _text(left, TOP + 20, "no complete answers", fill=SOFT)
        return
    low = 10 ** math.floor(math.log10(max(1e-6, min(values[len(values) // 100] for _, values in curves))))
    high = 10 ** math.ceil(math.log10(max(low * 10, *(values[-1] for _, values in curves))))
    across, up = _Axis(low, high, left, left + PANEL_WIDTH, log=True), _Axis(0, 1, bottom, TOP)
    for share in (0, 0.25, 0.5, 0.75, 0.9, 1):
        yield from _grid_row(left, up(share), f"{share:.0%}")
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        yield _line(across(10.0**power), TOP, across(10.0**power), bottom, LINES)
        yield _text(across(10.0**power), bottom + 18, _seconds(10.0**power), anchor="middle", fill=SOFT)
    for number, (name, values) in enumerate(curves):
        chosen = {round(at * (len(values) - 1) / POINTS) for at in range(POINTS + 1)}
        points = [(across(values[at]), up((at + 1) / len(values))) for at in sorted(chosen)]
        color = COLORS[number]
        yield _path([(points[0][0], up(0)), *points], color)
        yield from _key(left + number * 130, bottom + 46, name, color)


def _throughput(report: Report) -> Iterable[str]:
    left, bottom = LEFT[1], TOP + PANEL_HEIGHT
    yield _text(left, TOP - 14, "Over time", weight=600)
    bins = report.timeline
    if not bins or bins[-1].end <= 0:
        return
    ends = bins[-1].end
    across = _Axis(0, ends, left, left + PANEL_WIDTH)
    tokens = _ticks(max(one.output_tokens_per_second for one in bins))
    running = _ticks(max(one.running for one in bins))
    speed, load = _Axis(0, tokens[-1], bottom, TOP), _Axis(0, running[-1], bottom, TOP)
    for value in tokens:
        yield from _grid_row(left, speed(value), f"{value:,g}")
    for value in running:
        yield _text(left + PANEL_WIDTH + 8, load(value) + 4, f"{value:,g}", fill=COLORS[1])
    for value in _ticks(ends):
        if value <= ends:
            yield _text(across(value), bottom + 18, f"{value:g} s", anchor="middle", fill=SOFT)
    kinds: tuple[tuple[Callable[[int], float], _Axis, str, str], ...] = (
        (lambda at: bins[at].running, load, COLORS[1], "running requests (right)"),
        (lambda at: bins[at].output_tokens_per_second, speed, COLORS[0], "output tokens/s (left)"),
    )
    for number, (value_of, axis, color, name) in enumerate(kinds):
        points: list[Point] = []
        for at, one in enumerate(bins):
            points += [(across(one.start), axis(value_of(at))), (across(one.end), axis(value_of(at)))]
        yield _path(points, color)
        yield from _key(left + number * 190, bottom + 46, name, color)


def _ticks(most: float) -> list[float]:
    """Round values from 0 to `most` or just above."""
    if not most > 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(most / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 4 >= most)
    return [step * at for at in range(math.ceil(most / step - 1e-9) + 1)]


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:g} µs"
    return f"{value * 1e3:g} ms" if value < 1 else f"{value:g} s"


def _grid_row(left: float, y: float, label: str) -> Iterable[str]:
    yield _line(left, y, left + PANEL_WIDTH, y, LINES)
    yield _text(left - 8, y + 4, label, anchor="end", fill=SOFT)


def _key(x: float, y: float, name: str, color: str) -> Iterable[str]:
    yield f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="14" height="4" rx="2" fill="{color}"/>'
    yield _text(x + 20, y - 3, name, fill=INK)


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _path(points: Sequence[Point], color: str) -> str:
    route = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{route}" fill="none" stroke="{color}" stroke-width="2" stroke-linejoin="round"/>'


def _text(
    x: float, y: float, text: str, size: int = 12, weight: int = 400, fill: str = INK, anchor: str = "start"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
