"""`statewise bench serve`: how fast a server answers, over HTTP."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import progress_bar
from statewise.cli.options import override
from statewise.errors import ConfigError, RequestError, StatewiseError

if TYPE_CHECKING:
    from statewise.traffic.measure import Measurement
    from statewise.traffic.workload import Endpoint

SPAN_LIMIT = 10_000_000  # tokens


class _Span(click.ParamType[tuple[int, int]]):
    """A or A:B."""

    name = "A[:B]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        try:
            low, high = (int(part) for part in (str(value).split(":") * 2)[:2])
        except ValueError:
            low, high = 0, -1
        if ":" in str(value) and str(value).count(":") > 1:
            low, high = 0, -1
        if not 1 <= low <= high <= SPAN_LIMIT:
            self.fail(f"{str(value)[:80]!r} is no length such as 128, or 64:256 for any between", param, ctx)
        return low, high


def _writable(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """A measurement must not be lost because its file cannot be written."""
    if path is not None:
        if parameter.name == "plot" and path.suffix.lower() != ".svg":
            raise click.BadParameter("the plot is drawn as SVG; name it FILE.svg", context, parameter)
        if not os.access(path.parent, os.W_OK):
            raise click.BadParameter(f"{path.name} cannot be written there", context, parameter)
    return path


_FILE = click.Path(dir_okay=False, writable=True, allow_dash=True, path_type=Path)
_READABLE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


@click.command("serve", short_help="Measure a server with OpenAI's API.")
@click.argument("url")
@click.option("--model", help="Model to ask for. Default: the first that the server lists.")
@click.option("--endpoint", type=click.Choice(["completions", "chat"]), help="Default: completions, or the file's.")
@click.option("--concurrency", type=click.IntRange(1, 100_000), help="Conversations at once. Default: 16.")
@click.option("--request-rate", type=float, metavar="R", help="Begin R conversations per second, answered or not.")
@click.option("--burstiness", type=float, default=1.0, show_default=True, help="1: Poisson; less: bursts; more: even.")
@click.option("--num-requests", type=click.IntRange(1), help="Default: 100, or none with --duration.")
@click.option("--duration", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Send for so long.")
@click.option("--prompt-tokens", type=_Span(), default="256", show_default=True, help="Length of random prompts.")
@click.option("--output-tokens", type=_Span(), default="64", show_default=True, help="Most tokens of an answer.")
@click.option("--prompt-file", type=_READABLE, help="JSONL with prompt or messages, and max_tokens.")
@click.option("--shared-prefix-tokens", type=click.IntRange(0, SPAN_LIMIT), default=0, help="Equal start of all.")
@click.option("--turns", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Requests a conversation.")
@click.option("--sessions", is_flag=True, help="Turns go on in a session of the server instead of repeating the text.")
@click.option("--ignore-eos", is_flag=True, help="Answers as long as they may be.")
@click.option("--temperature", type=float, help="Default: the server's.")
@click.option(
    "--set", "fields", type=override, multiple=True, metavar="KEY=VALUE", help="Another field of requests. Repeatable."
)
@click.option("--api-key-file", type=_READABLE, help="File with the key. Default: STATEWISE_API_KEY.")
@click.option("--seed", type=click.IntRange(0), help="The same prompts and times again. Default: others at each run.")
@click.option("--warm-up", type=click.IntRange(0), default=1, show_default=True, help="Requests that do not count.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True, help="A request's."
)
@click.option("--json", "json_file", type=_FILE, callback=_writable, help="Write the result here; - prints it.")
@click.option("--records", is_flag=True, help="Each request in the JSON too.")
@click.option("--plot", type=_FILE, callback=_writable, metavar="FILE.svg", help="Draw latencies and throughput.")
@click.pass_context
def bench_serve(
    context: click.Context, /, url: str, json_file: Path | None, records: bool, plot: Path | None, **options: Any
) -> None:
    """Measure the server at URL, such as http://127.0.0.1:8000.

    Without --request-rate, --concurrency conversations run at any time. With it, they begin at random times whether or
    not the server keeps up, and latency counts from then on. Exit code 1: the server cannot be measured, or nothing
    was answered.
    """
    try:
        measured = _measure(url, options)
    except RequestError as error:
        raise click.UsageError(str(error)) from None
    except StatewiseError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        context.exit(1)
    from statewise.cli.bench_report import print_report, result_of, summary_line
    from statewise.traffic.plot import svg

    result = result_of(measured, records)
    printed = json_file is not None and str(json_file) == "-"
    if json_file is not None:
        text = json.dumps(result, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        click.echo(text, nl=False) if printed else json_file.write_text(text, encoding="utf-8")
    if not printed:
        print_report(measured)
    if plot is not None:
        report = measured.report
        speed = f"{report.requests_per_second:,.2f} requests/s, {report.output_tokens_per_second:,.0f} output tokens/s"
        title, subtitle = f"{measured.model} at {measured.url}", f"{summary_line(measured)}: {speed}"
        plot.write_text(svg(measured.run, report, title, subtitle), encoding="utf-8")
    if not measured.report.completed:
        context.exit(1)


def _measure(url: str, options: dict[str, Any]) -> Measurement:
    try:
        from statewise.traffic.arrivals import Pattern
        from statewise.traffic.measure import Plan, measure
        from statewise.traffic.workload import Span, read_prompts
    except ImportError as error:
        raise ConfigError(f"measuring a server needs {error.name}: pip install 'statewise[server]'") from None
    rate, concurrency, requests = options["request_rate"], options["concurrency"], options["num_requests"]
    pattern = Pattern(
        concurrency=16 if concurrency is None and rate is None else concurrency,
        rate=rate,
        burstiness=options["burstiness"],
        requests=100 if requests is None and options["duration"] is None else requests,
        duration=options["duration"],
    )
    listed = None
    endpoint: Endpoint = options["endpoint"] or "completions"
    if options["prompt_file"] is not None:
        if options["turns"] > 1 or options["shared_prefix_tokens"]:
            raise RequestError("turns", "--turns and --shared-prefix-tokens are for random prompts, not for a file's")
        given = click.get_current_context().get_parameter_source("output_tokens")
        asked = options["output_tokens"][1] if given is not click.core.ParameterSource.DEFAULT else None
        listed, found = read_prompts(options["prompt_file"], asked)
        if options["endpoint"] not in (None, found):
            raise RequestError("endpoint", f"the prompts of the file are for --endpoint {found}")
        endpoint = found
    fields = dict(options["fields"])
    if options["temperature"] is not None:
        fields["temperature"] = options["temperature"]
    if options["ignore_eos"]:
        fields["ignore_eos"] = True
    plan = Plan(
        pattern=pattern,
        endpoint=endpoint,
        model=options["model"],
        prompt_tokens=Span(*options["prompt_tokens"]),
        output_tokens=Span(*options["output_tokens"]),
        shared_prefix_tokens=options["shared_prefix_tokens"],
        turns=options["turns"],
        sessions=options["sessions"],
        listed=listed,
        fields=fields,
        warm_up=options["warm_up"],
        timeout_s=options["timeout"],
        seed=random.SystemRandom().randrange(1 << 31) if options["seed"] is None else options["seed"],
    )
    with progress_bar("Measuring", unit_is_bytes=False) as update:
        return measure(url, _api_key(options["api_key_file"]), plan, update)


def _api_key(path: Path | None) -> str | None:
    """The key of a file (the first that it lists, as `key` or `name: key`), or of the environment."""
    if path is None:
        return os.environ.get("STATEWISE_API_KEY") or None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, colon, key = line.strip().partition(": ")
        if name and not name.startswith("#"):
            return key.strip() if colon else name
    raise ConfigError(f"{path.name} holds no API key")
