"""`statewise plan`: whether a model fits an amount of memory, and how much fits beside it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import bytes_text, console, count_text, print_json
from statewise.cli.options import memory_size, model_argument, overrides_option

if TYPE_CHECKING:
    from statewise.api.accounting import SequenceCost
    from statewise.api.plan import Plan

WIDTH = 79  # columns of the report
_LABEL = 12  # columns of a line's first word


@click.command()
@model_argument
@click.option(
    "--memory", type=memory_size, metavar="BYTES", help="Memory of the device: 80GiB. Default: what is free here."
)
@click.option(
    "--context", type=int, metavar="TOKENS", help="Longest sequence. Default: 131072, or the model's limit if less."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Type of weights and pages. Default: auto, the checkpoint's.",
)
@click.option("--record-dtype", type=click.Choice(["fp32", "bf16"]), help="Type of recurrent matrices. Default: fp32.")
@click.option("--page-size", type=click.IntRange(1, 4096), metavar="TOKENS", help="Tokens per page. Default: 64.")
@click.option(
    "--reserve", type=memory_size, metavar="BYTES", help="Kept for activations and runtime. Default: a tenth."
)
@overrides_option
@click.option("--json", "as_json", is_flag=True, help="Print exact numbers as JSON.")
def plan(model: str, overrides: tuple[tuple[str, Any], ...], as_json: bool, **options: Any) -> None:
    """Say what fits into a device's memory.

    MODEL may also be a config.json: no weights are read.
    """
    from statewise.api.plan import plan_model

    given = {name: value for name, value in options.items() if value is not None}
    result = plan_model(model, overrides=dict(overrides), **given)
    if as_json:
        print_json(result)
        return
    _print_needs(result, memory_is_given="memory" in given, reserve_is_given="reserve" in given)
    _print_chart(result)
    if result.fits:
        _print_mixes(result)
        _print_frozen(result)


def _print_needs(plan: Plan, memory_is_given: bool, reserve_is_given: bool) -> None:
    path = Path(plan.model)
    name = (path.parent if path.name == "config.json" else path).name or plan.model
    layers = f"{plan.num_layers} layers, {plan.num_linear_layers} of them linear"
    memory, given = plan.memory, "" if reserve_is_given else ": a tenth, assumed"
    click.echo(f"{name}: {plan.architecture}")
    click.echo(f"{layers}, {count_text(plan.parameters)} parameters, up to {plan.max_length:,} tokens\n")
    if not plan.fits:
        click.echo(textwrap.fill(f"DOES NOT FIT: {_what_is_missing(plan)}.", WIDTH) + "\n")
    fields = ", ".join(f"{field.name} {bytes_text(field.bytes)} {field.dtype}" for field in plan.record_fields)
    per_token = f"{bytes_text(plan.page_bytes_per_token)} per token"
    _say("weights", f"{bytes_text(memory.weight_bytes)} in {plan.dtype}")
    _say("record", f"{bytes_text(plan.record_bytes)} per sequence of any length" + f": {fields}" * bool(fields))
    _say("page", f"{bytes_text(plan.page_bytes)} per {plan.page_size:,} tokens, {per_token}")
    _say("reserve", f"{bytes_text(memory.reserve_bytes)} for activations and runtime{given}")
    source = "" if memory_is_given else " that are free here"
    _say("room", f"{bytes_text(memory.room_bytes)} of {bytes_text(memory.total_bytes)}{source} are left for sequences")
    needed = bytes_text(memory.smallest_bytes)
    _say("smallest", f"{needed} hold weights, reserve and one sequence of {plan.context:,} tokens")
    for note in plan.notes:
        _say("note", note)


def _what_is_missing(plan: Plan) -> str:
    memory = plan.memory
    weights, total = bytes_text(memory.weight_bytes), bytes_text(memory.total_bytes)
    missing = f"{bytes_text(memory.missing_bytes)} ({memory.missing_bytes:,} bytes)"
    if memory.weight_bytes > memory.total_bytes:
        return f"the weights alone take {weights} of {total}; with reserve and one short sequence {missing} are missing"
    return f"beside the weights, reserve and one short sequence are {missing} too large"


def _print_chart(plan: Plan) -> None:
    click.echo("\nMemory of one sequence by its tokens, on a log scale")
    for line in chart_lines(plan.sequences):
        click.echo(line)
    full = plan.full_attention
    _say("o", "this model")
    _say("x", f"full attention: {full.description}")
    if full.cheaper_from is None:
        return
    where = f"from {full.cheaper_from:,} tokens on" if full.cheaper_from > 1 else "at every length"
    beyond = ", beyond this model's limit" if full.cheaper_from > plan.max_length else ""
    _say("cheaper", f"this model takes less {where}{beyond}")


def chart_lines(rows: Sequence[SequenceCost], width: int = WIDTH) -> list[str]:
    """A line for each length: the amounts, then `o` and `x` at their places on a common logarithmic axis."""
    amounts = [amount for row in rows for amount in (row.bytes, row.full_attention_bytes)]
    low, high = max(min(amounts), 1), max(*amounts, 1)
    label = max(len("tokens"), *(len(f"{row.tokens:,}") for row in rows))
    head = f"{'tokens':>{label}}  {'this model':>10}  {'full attention':>14}  "
    axis = width - len(head)

    def place(amount: int) -> int:
        return round(math.log(max(amount, low) / low) / (math.log(high / low) or 1.0) * (axis - 1))

    ends = bytes_text(low), bytes_text(high)
    lines = [head + ends[0] + ends[1].rjust(axis - len(ends[0]))]
    for row in rows:
        ours, theirs = place(row.bytes), place(row.full_attention_bytes)
        first, last = sorted((ours, theirs))
        marks = [" "] * first + ["-"] * (last - first + 1)
        marks[theirs], marks[ours] = "x", "o" if ours != theirs else "*"
        texts = f"{row.tokens:>{label},}  {bytes_text(row.bytes):>10}  {bytes_text(row.full_attention_bytes):>14}  "
        lines.append(texts + "".join(marks))
    return lines


def _print_mixes(plan: Plan) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("sequences at once", no_wrap=True)
    for name in ("mean size", "this model", "cached tokens", "full attention"):
        table.add_column(name, justify="right", no_wrap=True)
    for mix in plan.mixes:
        table.add_row(
            mix.name,
            bytes_text(mix.mean_bytes),
            f"{mix.sequences:,}",
            f"{mix.cached_tokens:,}",
            f"{mix.full_attention_sequences:,}",
        )
    click.echo()
    console().print(table)
    for mix in plan.mixes:
        if len(mix.shares) > 1:
            shares = ", ".join(f"{share.percent} % of {share.tokens:,}" for share in mix.shares)
            click.echo(f"{mix.name}: {shares} tokens")


def _print_frozen(plan: Plan) -> None:
    kept = plan.frozen
    turn = bytes_text(kept.every_turn_bytes // kept.turns)
    click.echo()
    _say(
        "checkpoint",
        "a record and the pages that cover its tokens, as much as the sequence in the chart; the next one of the same "
        f"conversation costs a record and its new pages, {turn} for a turn of {kept.turn_tokens} tokens on average",
    )
    _say(
        "frozen",
        f"{kept.every_turn_conversations:,} conversations of {kept.turns} turns of {kept.turn_tokens} tokens with a "
        f"checkpoint of every turn ({bytes_text(kept.every_turn_bytes)} each), or {kept.last_turn_conversations:,} "
        f"with the last one only ({bytes_text(kept.last_turn_bytes)})",
    )


def _say(word: str, text: str) -> None:
    indent = " " * _LABEL
    click.echo(textwrap.fill(text, WIDTH, initial_indent=f"{word:<{_LABEL}}", subsequent_indent=indent))
