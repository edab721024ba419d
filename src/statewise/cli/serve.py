"""`statewise serve`: a model over HTTP."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from statewise.cli.config_file import from_environment, read_config
from statewise.cli.options import engine_arguments, engine_options, memory_size, model_argument
from statewise.cli.startup import TerminalReport
from statewise.errors import ConfigError, StatewiseError

VARIABLES = "STATEWISE_SERVE"  # with which the names of environment variables begin


@click.command(
    short_help="Serve a model over HTTP.",
    epilog="Each option can be a variable of the environment too: --max-queued is STATEWISE_SERVE_MAX_QUEUED.",
)
@model_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option(
    "--unix-socket",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Listen here instead, for a proxy of this machine.",
)
@click.option("--served-model-name", help="What clients call the model. Default: as it is given here.")
@click.option("--api-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Keys, one a line.")
@click.option("--cors-origin", "cors_origins", multiple=True, help="Let pages of this origin ask. Repeatable.")
@click.option("--allowed-host", "hosts", multiple=True, help="Another name that clients may use. Repeatable.")
@click.option("--max-queued", type=click.IntRange(1, 1 << 20), default=512, show_default=True, help="Requests at once.")
@click.option("--max-choices", type=click.IntRange(1, 1 << 16), default=128, show_default=True, help="Of one request.")
@click.option("--max-sessions", type=click.IntRange(0, 1 << 24), default=4096, show_default=True, help="Kept at once.")
@click.option(
    "--session-ttl",
    type=click.FloatRange(1),
    default=86_400.0,
    metavar="SECONDS",
    show_default=True,
    help="How long a session is kept without use.",
)
@click.option(
    "--max-import",
    type=memory_size,
    default="4GiB",
    metavar="SIZE",
    show_default=True,
    help="The largest session file that is taken in.",
)
@click.option("--drain", "drain_seconds", type=float, default=30.0, show_default=True, help="Seconds, at the end.")
@click.option("--tls-certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--restart-engine", is_flag=True, help="Start the engine again when it dies.")
@click.option(
    "--answer-format",
    type=click.Choice(["kimi", "minimax", "ling", "hermes", "none"]),
    help="How the model writes tool calls. Default: as its chat template shows.",
)
@click.option("--page/--no-page", default=True, show_default=True, help="Serve the page at / for people.")
@click.option("--log-json", is_flag=True, help="Write the log as JSON.")
@click.option("--otlp-endpoint", metavar="URL", help="Send traces to this OpenTelemetry collector, over HTTP.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="Read options from a TOML or YAML file; the command line wins.",
)
@engine_options
def serve(model: str, **options: Any) -> None:
    """Serve MODEL with OpenAI's API and sessions over HTTP."""
    try:
        from statewise.server.launch import launch
    except ImportError as error:
        raise ConfigError(f"serving needs the package {error.name}: pip install 'statewise[server]'") from None
    arguments = engine_arguments(options)
    for name in ("disk_cache",):
        if name in arguments:
            arguments[name] = str(arguments[name])
    terminal = sys.stderr.isatty() and not options["log_json"]
    try:
        if not launch(model, arguments, options, TerminalReport(Path(model).name) if terminal else None):
            click.get_current_context().exit(1)
    except StatewiseError as error:
        if not options["log_json"]:
            raise
        logging.getLogger(__name__).critical("%s", error)  # a line like all others
        click.get_current_context().exit(2)


from_environment(serve, VARIABLES)
