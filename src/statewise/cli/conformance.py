"""`statewise conformance`: whether a layer keeps its contract, check by check."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import console, print_json, progress_bar

if TYPE_CHECKING:
    from statewise.conformance import Finding, Report

_MARKS = {"held": "held", "failed": "FAILED", "not checked": "not checked", "not applicable": "-"}
_STYLES = {"held": "green", "failed": "bold red", "not checked": "yellow", "not applicable": "dim"}
_BAR_FROM, _BAR_WIDTH = -8, 24  # the bar of an error starts at 1e-8 and has its full width at 1


@click.command()
@click.argument("layer")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "both"]), default="both", help="Default: both.")
@click.option("--device", default="cpu", help="Where the layer runs. Default: cpu.")
@click.option(
    "--long", type=click.IntRange(64, 1 << 20), default=65_536, help="Tokens of the longest input. Default: 65536."
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights and inputs. Default: 0.")
@click.option("--check", "only", multiple=True, metavar="NAME", help="Run this check only. May be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def conformance(
    ctx: click.Context,
    layer: str,
    dtype: str,
    device: str,
    long: int,
    seed: int,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Prove that a linear-attention or attention layer keeps its contract.

    LAYER is a registered name, module:Class, or `all` for every registered layer. The exit status is 1 if a check
    fails.
    """
    from statewise.conformance import CHECKS, Report, layers_named, run_checks

    dtypes = ("float32", "bfloat16") if dtype == "both" else (dtype,)
    reports = []
    for name, found in layers_named(layer).items():
        findings: list[Finding] = []
        total = len(dtypes) * len(only or CHECKS)
        with progress_bar(name, unit_is_bytes=False) as update:
            for finding in run_checks(found, dtypes, device=device, only=only, long=long, seed=seed):
                findings.append(finding)
                if update is not None:
                    update(len(findings), total)
        reports.append(Report(name, tuple(findings)))
        if not as_json:
            _show(reports[-1], dtypes)
    passed = all(report.passed for report in reports)
    if as_json:
        print_json({"passed": passed, "layers": [{**asdict(report), "passed": report.passed} for report in reports]})
    ctx.exit(0 if passed else 1)


def _show(report: Report, dtypes: tuple[str, ...]) -> None:
    from rich.table import Table
    from rich.text import Text

    click.echo(f"{report.layer}")
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
    _show_messages(report.failed, "FAILED")
    _show_messages([finding for finding in report.findings if finding.status == "not checked"], "not checked")
    click.echo(_total(report))


def _show_messages(findings: list[Finding], mark: str) -> None:
    """One sentence and more each; checks that say the same stand together."""
    for message in dict.fromkeys(finding.message for finding in findings):
        same = [finding for finding in findings if finding.message == message]
        names = ", ".join(dict.fromkeys(finding.check for finding in same))
        dtypes = ", ".join(dict.fromkeys(finding.dtype for finding in same))
        click.echo(f"{mark}  {names} ({dtypes}): {message}")


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
