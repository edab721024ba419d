"""`statewise conformance`: whether a layer keeps its contract, check by check."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import console, print_json, progress_bar
from statewise.errors import StatewiseError

if TYPE_CHECKING:
    from statewise.conformance import Finding, Report

_MARKS = {"held": "held", "failed": "FAILED", "not checked": "not checked", "not applicable": "-"}
_STYLES = {"held": "green", "failed": "bold red", "not checked": "yellow", "not applicable": "dim"}
_DTYPES = ("float32", "bfloat16")
_ALIASES = {"fp32": "float32", "f32": "float32", "float": "float32", "bf16": "bfloat16"}
_MOST_SEED = (1 << 32) - 1
_IN_FULL = 2  # failures; the others mostly follow from them
_CLAUSE_END = r"; |\. |, (?:the limit is|it must be) | \(first at "
_BAR_FROM, _BAR_WIDTH = -8, 24  # the bar of an error starts at 1e-8 and has its full width at 1


class _Dtype(click.Choice[str]):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in _ALIASES:
            self.fail(f"{value!r} is not one of them, did you mean {_ALIASES[value]!r}?", param, ctx)
        return super().convert(value, param, ctx)


@click.command(short_help="Prove that a layer keeps its contract.")
@click.argument("layer")
@click.option("--dtype", type=_Dtype([*_DTYPES, "both"]), help="Default: those that the layer lists.")
@click.option("--device", default="cpu", help="Where the layer runs; cpu is the only choice so far.")
@click.option(
    "--long", type=click.IntRange(64, 1 << 20), default=65_536, help="Tokens of the longest input. Default: 65536."
)
@click.option("--seed", type=click.IntRange(0, _MOST_SEED), default=0, help="Of weights and inputs. Default: 0.")
@click.option("--check", "only", multiple=True, metavar="NAME", help="Run this check only. May be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def conformance(
    ctx: click.Context,
    layer: str,
    dtype: str | None,
    device: str,
    long: int,
    seed: int,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Prove that a linear-attention or attention layer keeps its contract.

    LAYER is a registered name, module:Class, or `all` for every registered layer. The exit status is 0 if checks held
    and none failed, 1 if one failed or none could be made, 2 if a layer cannot be built or does not run in the dtype
    or on the device.
    """
    from statewise.conformance import CHECKS, Report, layers_named, run_checks
    from statewise.conformance.kit import check_options

    check_options(device, only)
    asked = None if dtype is None else _DTYPES if dtype == "both" else (dtype,)
    total = len(asked or _DTYPES) * len(only or CHECKS)
    reports: list[Report] = []
    layers = layers_named(layer)
    broken = False
    for name, found in layers.items():
        findings: list[Finding] = []
        try:
            with progress_bar(name, unit_is_bytes=False) as update:
                for finding in run_checks(found, asked, device=device, only=only, long=long, seed=seed):
                    findings.append(finding)
                    if update is not None:
                        update(len(findings), total)
        except StatewiseError as error:
            if len(layers) == 1:
                raise
            broken = True
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            continue
        reports.append(Report(name, tuple(findings)))
        if not as_json:
            _show(reports[-1])
    # Of all layers together something must have held; a layer that one check does not concern is no failure.
    held = any(report.held for report in reports)
    passed = held and not broken and not any(report.failed for report in reports)
    if as_json:
        print_json({"passed": passed, "layers": [{**asdict(report), "passed": report.passed} for report in reports]})
    elif reports and not held and not any(report.failed for report in reports):
        click.echo("nothing was checked, so nothing is proved")
    ctx.exit(2 if broken else 0 if passed else 1)


def _show(report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    click.echo(f"{report.layer}")
    dtypes = tuple(dict.fromkeys(finding.dtype for finding in report.findings))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype, no_wrap=True)
        table.add_column("error", justify="right", no_wrap=True)
        table.add_column("limit", justify="right", no_wrap=True)
    found = {(finding.check, finding.dtype): finding for finding in report.findings}
    for check in dict.fromkeys(finding.check for finding in report.findings):
        cells: list[Any] = [check]
        for dtype in dtypes:
            finding = found[check, dtype]
            cells += [Text(_MARKS[finding.status], _STYLES[finding.status]), *_numbers(finding)]
        table.add_row(*cells)
    console().print(table)
    for finding in report.findings:
        if finding.curve:
            _show_curve(finding)
    click.echo()
    _show_failures(report.failed)
    unchecked = [finding for finding in report.findings if finding.status == "not checked"]
    for message, same in _by(unchecked, lambda finding: finding.message):
        click.echo(f"not checked  {_names(same)}: {message}")
    for finding in report.findings:
        if finding.remark:
            click.echo(f"remark  {_names([finding])}: {finding.remark}")
    click.echo(_total(report))


def _show_failures(failures: list[Finding]) -> None:
    """The first ones in full, the others by their first clause; checks that say the same stand together."""
    groups = _by(failures, lambda finding: finding.problem)
    for problem, same in groups[:_IN_FULL]:
        messages = {finding.message for finding in same}
        click.echo(f"FAILED  {_names(same)}: {messages.pop() if len(messages) == 1 else problem}")
    clauses = [finding for _, same in groups[_IN_FULL:] for finding in same]
    for clause, same in _by(clauses, lambda finding: re.split(_CLAUSE_END, finding.problem)[0]):
        more = "" if all(finding.problem == clause for finding in same) else " …"
        click.echo(f"FAILED  {_names(same)}: {clause}{more}")
    if clauses:
        click.echo("Repair the first; many follow from it. --check NAME or --json shows the others in full.")


def _by(findings: list[Finding], text: Callable[[Finding], str]) -> list[tuple[str, list[Finding]]]:
    """Findings in groups of the same text, in the order of their first."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(text(finding), []).append(finding)
    return list(groups.items())


def _names(findings: list[Finding]) -> str:
    checks = ", ".join(dict.fromkeys(finding.check for finding in findings))
    return f"{checks} ({', '.join(dict.fromkeys(finding.dtype for finding in findings))})"


def _numbers(finding: Finding) -> tuple[str, str]:
    if finding.error is None or finding.limit is None:
        return "", ""
    return f"{finding.error:.1e}" if finding.error else "0", f"{finding.limit:.0e}" if finding.limit else "exact"


def _show_curve(finding: Finding) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("tokens", "output", "state"):
        table.add_column(name, justify="right")
    table.add_column("output, 1e-8 to 1")
    for point in finding.curve:
        table.add_row(f"{point.tokens:,}", f"{point.output:.1e}", f"{point.state:.1e}", _bar(point.output))
    click.echo(f"\ndrift against the fp64 recurrence, {finding.dtype}")
    console().print(table)


def _bar(error: float) -> str:
    """A length that grows with the logarithm."""
    if not math.isfinite(error):
        return "#" * _BAR_WIDTH
    share = 1 - math.log10(max(error, 10.0**_BAR_FROM)) / _BAR_FROM
    return "#" * round(_BAR_WIDTH * min(max(share, 0.0), 1.0))


def _total(report: Report) -> str:
    counts = {status: sum(finding.status == status for finding in report.findings) for status in _MARKS}
    seconds = sum(finding.seconds for finding in report.findings)
    parts = [f"{count} {status}" for status, count in counts.items() if count]
    return f"{report.layer}: {', '.join(parts)} in {seconds:.0f} s\n"
