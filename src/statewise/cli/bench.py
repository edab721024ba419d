"""`statewise bench`: how fast this machine runs a model, without a server; `bench serve` is in bench_serve.py."""

from __future__ import annotations

import os
import random
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from statewise.cli.bench_serve import bench_serve
from statewise.cli.completion import models_like
from statewise.cli.display import bytes_text, console, print_json, progress_bar
from statewise.cli.loading import load
from statewise.cli.options import engine_arguments, engine_options, integers, model_argument

if TYPE_CHECKING:
    from statewise import LLM, RequestOutput


class _Bench(click.Group):
    """What is no verb of the group is the MODEL, or an option, of `bench offline`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [bench_offline.name or "", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        models = [] if incomplete.startswith("-") else models_like(incomplete)
        return models + super().shell_complete(ctx, incomplete)


@click.group(cls=_Bench, subcommand_metavar="MODEL | serve URL", short_help="Measure this machine, or a server.")
def bench() -> None:
    """Measure how fast this machine runs MODEL, or how fast a server answers.

    `statewise bench MODEL` needs no server. Its options: `statewise bench offline --help`.
    """


@bench.command("offline", short_help="Measure this machine; what `statewise bench MODEL` does.")
@model_argument
@click.option(
    "--batch", type=integers, default="1,16", metavar="SIZES", show_default=True, help="Batch sizes to decode."
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Prompt to prefill.")
@click.option("--decode-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to decode.")
@click.option("--context", type=click.IntRange(1), default=16, show_default=True, help="Tokens before those decoded.")
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs, of which the best counts.")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def bench_offline(
    model: str,
    batch: list[int],
    prompt_tokens: int,
    decode_tokens: int,
    context: int,
    repeat: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure prefill speed, decode speed and memory."""
    if min(batch) < 1:
        raise click.BadParameter("batch sizes begin at 1", param_hint="--batch")
    options["max_running"] = options["max_running"] or max(64, *batch)
    started = time.perf_counter()
    llm = load(model, **{"prefix_cache": False, **engine_arguments(options)})  # every run draws the same prompts
    loaded = time.perf_counter() - started
    runs = [("prefill", 1), *(("decode", size) for size in batch)]
    rates: list[float] = []
    with progress_bar("Measuring", unit_is_bytes=False) as update:
        for done, (phase, size) in enumerate(runs):
            if update:
                update(done, len(runs), f"{phase}, batch {size}")
            prompt, answer = (prompt_tokens, 1) if phase == "prefill" else (context, decode_tokens + 1)
            _run(llm, size, min(prompt, 64), 2)  # warms caches and thread pools
            rates.append(max(_rate(phase, _run(llm, size, prompt, answer)) for _ in range(repeat)))
    summary = llm.summary()
    result = {
        "model": summary.name,
        "dtype": summary.dtype,
        "processors": len(os.sched_getaffinity(0)),
        "load_s": loaded,
        "prefill": {"prompt_tokens": prompt_tokens, "tokens_per_second": rates[0]},
        "decode": [
            {"batch": size, "tokens_per_second": rate, "milliseconds_per_step": 1000 * size / rate}
            for size, rate in zip(batch, rates[1:], strict=True)
        ],
        "peak_memory_bytes": peak_memory(),
    }
    if as_json:
        print_json(result)
    else:
        _print(result)


bench.add_command(bench_serve)


def peak_memory() -> int:
    """The most memory that this process held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _run(llm: LLM, size: int, prompt_tokens: int, answer_tokens: int) -> list[RequestOutput]:
    """Generate from `size` random prompts at once."""
    from statewise import SamplingParams, StatewiseError

    draw = random.Random(prompt_tokens)
    prompts = [
        {"prompt_token_ids": [draw.randrange(llm.config.vocab_size) for _ in range(prompt_tokens)]} for _ in range(size)
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, ignore_eos=True, max_tokens=answer_tokens))
    for output in outputs:
        if output.error is not None:
            raise StatewiseError(f"a request failed: {output.error}")
    return outputs


def _rate(phase: str, outputs: list[RequestOutput]) -> float:
    """Tokens per second of all sequences together."""
    metrics = [output.metrics for output in outputs]
    if phase == "prefill":
        seconds = max((each.time_to_first_token_s or 0) - (each.queue_s or 0) for each in metrics)
        return sum(each.prompt_tokens for each in metrics) / max(seconds, 1e-9)
    seconds = max(each.decode_s or 0 for each in metrics)
    return sum(each.completion_tokens - 1 for each in metrics) / max(seconds, 1e-9)


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"{result['model']} in {result['dtype']}, {result['processors']} processors"
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    for name in ("batch", "tokens/s", "ms/step"):
        table.add_column(name, justify="right")
    prefill = result["prefill"]
    table.add_row(f"prefill {prefill['prompt_tokens']:,}", "1", f"{prefill['tokens_per_second']:,.0f}", "")
    for row in result["decode"]:
        speed = f"{row['tokens_per_second']:,.1f}"
        table.add_row("decode", str(row["batch"]), speed, f"{row['milliseconds_per_step']:.2f}")
    console().print(table)
    click.echo(f"loaded in {result['load_s']:.2f} s, peak memory {bytes_text(result['peak_memory_bytes'])}")
