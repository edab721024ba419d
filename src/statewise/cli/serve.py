"""`statewise serve`: a model over HTTP."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from statewise.cli.options import engine_arguments, engine_options, model_argument
from statewise.errors import ConfigError

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Defaults for the other options, from a file."""
    if path is None:
        return
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml  # type: ignore[import-untyped]

            values = yaml.safe_load(path.read_text())
        else:
            values = tomllib.loads(path.read_text())
    except ImportError:
        raise click.BadParameter("YAML needs the package PyYAML; write the file as TOML") from None
    except Exception as error:
        raise click.BadParameter(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise click.BadParameter(f"{path.name} must map options to values")
    known = {parameter.name for parameter in context.command.params}
    given = {str(name).replace("-", "_"): value for name, value in values.items()}
    strange = sorted(given.keys() - known)
    if strange:
        raise click.BadParameter(f"{path.name} has {strange[0]!r}, which is no option of serve")
    context.default_map = given


@click.command(short_help="Serve a model over HTTP.")
@model_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--served-model-name", help="What clients call the model. Default: as it is given here.")
@click.option("--api-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Keys, one a line.")
@click.option("--cors-origin", "cors_origins", multiple=True, help="Let pages of this origin ask. Repeatable.")
@click.option("--allowed-host", "hosts", multiple=True, help="Another name that clients may use. Repeatable.")
@click.option("--max-queued", type=click.IntRange(1, 1 << 20), default=512, show_default=True, help="Requests at once.")
@click.option("--drain", "drain_seconds", type=float, default=30.0, show_default=True, help="Seconds, at the end.")
@click.option("--tls-certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--restart-engine", is_flag=True, help="Start the engine again when it dies.")
@click.option("--log-json", is_flag=True, help="Write the log as JSON.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="Read options from a TOML or YAML file; the command line wins.",
)
@engine_options
def serve(model: str, **options: Any) -> None:
    """Serve MODEL with OpenAI's API and sessions over HTTP."""
    try:
        from statewise.server.launch import launch
    except ImportError as error:
        raise ConfigError(f"serving needs the package {error.name}: pip install 'statewise[server]'") from None
    if options["host"] not in _LOOPBACK and options["api_key_file"] is None:
        click.secho("warning: everybody who reaches this address can use the model; give --api-key-file", err=True)
    arguments = engine_arguments(options)
    for name in ("disk_cache",):
        if name in arguments:
            arguments[name] = str(arguments[name])
    launch(model, arguments, options)
