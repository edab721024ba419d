"""`statewise completion`: what a shell needs to complete verbs, options and models."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

PROGRAM = "statewise"
VARIABLE = "_STATEWISE_COMPLETE"  # by which a shell asks for completions; click's name for a program called statewise
MOST_MODELS = 200  # directories looked into for one completion
PLACES = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(list(PLACES)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what SHELL needs to complete verbs, options and models.

    \b
    bash:  eval "$(statewise completion bash)"    in ~/.bashrc
    zsh:   eval "$(statewise completion zsh)"     in ~/.zshrc, behind compinit
    fish:  statewise completion fish | source     in ~/.config/fish/config.fish
    """
    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"click knows no completion for {shell}")
    click.echo(found(context.find_root().command, {}, PROGRAM, VARIABLE).source())


def complete_model(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For an argument MODEL."""
    return models_like(incomplete)


def models_like(incomplete: str) -> list[CompletionItem]:
    """`demo`, checkpoints, and directories that may hold some."""
    typed = Path(incomplete).expanduser()
    folder = typed if incomplete.endswith(os.sep) or not incomplete else typed.parent
    shown = incomplete[: len(incomplete) - len(os.path.basename(incomplete))]
    found = [CompletionItem(incomplete, type="dir")]  # first: bash forgets what came before it
    if "demo".startswith(incomplete):
        found.append(CompletionItem("demo", help="the small model that comes with Statewise"))
    try:
        names = sorted(name for name in os.listdir(folder) if (shown + name).startswith(incomplete))[:MOST_MODELS]
    except OSError:
        return found
    return found + [CompletionItem(shown + name) for name in names if (folder / name / "config.json").is_file()]
