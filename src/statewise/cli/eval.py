"""`statewise eval`: score a model on skills that have exact answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import console, progress_bar
from statewise.cli.loading import load
from statewise.cli.options import engine_arguments, engine_options, model_argument
from statewise.errors import RequestError

if TYPE_CHECKING:
    from statewise.evaluation.score import Report


@click.command("eval")
@model_argument
@click.option("--skills", metavar="NAMES", help="Skills divided by commas. Default: all.")
@click.option("--n", "-n", "instances", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Per row.")
@click.option("--seed", type=click.IntRange(0, 1_000_000), default=0, show_default=True, help="Chooses the instances.")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def evaluate(model: str, skills: str | None, instances: int, seed: int, as_json: bool, **options: Any) -> None:
    """Score exact answers, per skill and distance.

    Answers are greedy and count where they equal the expected text.
    """
    from statewise.evaluation.score import evaluate as score
    from statewise.evaluation.skills import SKILLS

    names = None if skills is None else [name.strip() for name in skills.split(",") if name.strip()]
    unknown = [] if names is None else [name for name in names if name not in SKILLS]
    if unknown or names == []:
        found = ", ".join(unknown) or "none given"
        raise RequestError("skills", f"skills: unknown {found}; the known ones are {', '.join(SKILLS)}")
    llm = load(model, **engine_arguments(options))
    with progress_bar("Scoring", unit_is_bytes=False) as update:

        def show(skill: str, distance: int, done: int, total: int) -> None:
            update(done, total, f"{skill} {distance or ''}")

        report = score(llm, instances, skills=names, seed=seed, progress=show if update else None)
    if as_json:
        click.echo(report.to_json())
    else:
        _print_report(model, report)


def _print_report(model: str, report: Report) -> None:
    from rich.table import Table

    table = Table(title=f"{model}: exact match", title_justify="left", show_footer=True)
    table.add_column("skill", footer="all")
    table.add_column("distance", justify="right")
    table.add_column("n", justify="right", footer=str(sum(row.n for row in report.skills)))
    table.add_column("exact match", justify="right", footer=f"{report.exact_match:.1%}")
    previous = None
    for row in report.skills:
        name = row.skill if row.skill != previous else ""
        table.add_row(name, str(row.distance or "-"), str(row.n), f"{row.exact_match:.1%}")
        previous = row.skill
    console().print(table)
