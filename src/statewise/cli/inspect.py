"""`statewise inspect`: what a checkpoint is made of and what its sequences cost."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import bytes_text, console, count_text, print_json, ranges_text
from statewise.cli.options import dtype_option, memory_size, model_argument, overrides_option

if TYPE_CHECKING:
    from statewise.api.model_summary import LayerSummary, ModelSummary

_LENGTHS = (1024, 8192, 32768, 131072, 1048576)


@click.command()
@model_argument
@dtype_option
@overrides_option
@click.option("--page-size", type=click.IntRange(1, 4096), help="Tokens per page. Default: 64.")
@click.option(
    "--memory",
    type=memory_size,
    metavar="BYTES",
    help="Memory for weights and sequences: 16GiB. Default: what is free.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(
    model: str, memory: int | None, overrides: tuple[tuple[str, Any], ...], as_json: bool, **options: Any
) -> None:
    """Show layers, parameters and bytes of the state.

    Reads no weights.
    """
    from statewise.api.summary import inspect_model

    given = {name: value for name, value in options.items() if value is not None}
    summary = inspect_model(model, overrides=dict(overrides), **given)
    from statewise.engine.runner import available_memory

    budget = memory if memory is not None else available_memory()
    capacity = sequences_that_fit(summary, budget)
    if as_json:
        print_json({**asdict(summary), "memory_bytes": budget, "capacity": capacity})
        return
    _print_layers(summary)
    _print_totals(summary)
    _print_capacity(summary, budget, capacity, given=memory is not None)


def sequences_that_fit(summary: ModelSummary, memory: int) -> list[dict[str, int]]:
    """For several lengths in tokens: bytes of one sequence, and how many fit beside the weights."""
    lengths = [length for length in _LENGTHS if length < summary.max_length] + [summary.max_length]
    rows = []
    for length in lengths:
        pages = -(-length // summary.page_size)
        size = summary.record_bytes + pages * summary.page_bytes
        fit = max(memory - summary.weight_bytes, 0) // size if size else 0
        rows.append({"tokens": length, "sequence_bytes": size, "sequences": fit})
    return rows


def _print_layers(summary: ModelSummary) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("layers")
    table.add_column("what", overflow="fold")
    for name in ("parameters", "state", "page/token"):
        table.add_column(name, justify="right", no_wrap=True)

    def group(layer: LayerSummary) -> tuple[str, str, str, str, str]:
        served_by = f"{layer.layer_class} ({layer.provider})"
        kernels = "; ".join(filter(None, (layer.kernels, layer.details)))
        return layer.kind, layer.registered_name, served_by, layer.feed_forward, kernels

    groups = [list(members) for _, members in groupby(sorted(summary.layers, key=group), key=group)]
    for layers in sorted(groups, key=lambda members: min(layer.index for layer in members)):
        kind, name, served_by, feed_forward, kernels = group(layers[0])
        table.add_row(
            ranges_text([layer.index for layer in layers]),
            f"{name}\n{served_by}\n{kind}, {feed_forward}\n{kernels}\n",
            count_text(sum(layer.parameters for layer in layers)),
            bytes_text(sum(layer.state_bytes for layer in layers)),
            bytes_text(sum(layer.page_bytes_per_token for layer in layers)),
        )
    click.echo(f"{summary.name}: {summary.architecture}")
    console().print(table)


def _print_totals(summary: ModelSummary) -> None:
    click.echo(f"parameters   {count_text(summary.parameters)} ({bytes_text(summary.weight_bytes)} in {summary.dtype})")
    click.echo(f"record       {bytes_text(summary.record_bytes)} per sequence, whatever its length")
    click.echo(f"page         {bytes_text(summary.page_bytes)} per {summary.page_size} tokens")
    click.echo(f"length       up to {summary.max_length:,} tokens")


def _print_capacity(summary: ModelSummary, budget: int, capacity: list[dict[str, int]], given: bool) -> None:
    from rich.table import Table

    source = "" if given else " that is free here"
    table = Table(title=f"In {bytes_text(budget)}{source}, beside the weights", title_justify="left")
    for name in ("tokens of a sequence", "bytes of a sequence", "sequences"):
        table.add_column(name, justify="right")
    for row in capacity:
        table.add_row(f"{row['tokens']:,}", bytes_text(row["sequence_bytes"]), f"{row['sequences']:,}")
    click.echo()
    console().print(table)
