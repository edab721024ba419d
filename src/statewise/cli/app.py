"""The `statewise` command: its verbs, and how their errors end."""

from __future__ import annotations

from typing import Any

import click

from statewise import __version__
from statewise.cli.bench import bench
from statewise.cli.chat import chat
from statewise.cli.completion import completion
from statewise.cli.conformance import conformance
from statewise.cli.eval import evaluate
from statewise.cli.generate import generate
from statewise.cli.inspect import inspect
from statewise.cli.plan import plan
from statewise.cli.serve import serve
from statewise.cli.snapshot import snapshot
from statewise.errors import StatewiseError


class _Verbs(click.Group):
    """Ends a verb that failed with one line instead of a traceback: 2 for an error of the user's, 130 for Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StatewiseError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(130)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", "-V", prog_name="statewise")
def main() -> None:
    """Serve language models with linear attention.

    MODEL is the directory of a checkpoint, or `demo` for the small model that comes with Statewise.
    """


for verb in (generate, chat, inspect, plan, evaluate, bench, conformance, serve, snapshot, completion):
    main.add_command(verb)
