"""The prompt that a verb is given: its options, and what they spell."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from statewise.cli.options import integers

Command = TypeVar("Command", bound=Callable[..., Any])

_PROMPT = [
    click.option("--prompt", "-p", help="The prompt."),
    click.option(
        "--prompt-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A file of UTF-8 text that is the prompt, less one final line break.",
    ),
    click.option("--prompt-token-ids", type=integers, metavar="IDS", help="The prompt as token ids: 1,2,3."),
    click.option("--chat", is_flag=True, help="Take the prompt as a user's message and apply the chat template."),
]
system_option = click.option("--system", metavar="TEXT", help="With --chat: the system message.")


def prompt_options(command: Command) -> Command:
    for option in reversed(_PROMPT):
        command = option(command)
    return command


def given_prompt(
    prompt: str | None,
    prompt_file: Path | None,
    prompt_token_ids: list[int] | None,
    chat: bool,
    system: str | None = None,
    *,
    required: bool = True,
) -> Any:
    """Text, token ids, or messages. Without a prompt standard input is read, or if it is not `required`, None."""
    if sum(source is not None for source in (prompt, prompt_file, prompt_token_ids)) > 1:
        raise click.UsageError("give one of --prompt, --prompt-file and --prompt-token-ids")
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    if prompt_token_ids is not None:
        if chat:
            raise click.UsageError("--chat needs a prompt as text")
        return prompt_token_ids
    if prompt_file is not None:
        prompt = _text(prompt_file)
    elif prompt is None:
        if not required:
            if chat:
                raise click.UsageError("--chat needs a prompt")
            return None
        prompt = _standard_input()
    if not chat:
        return prompt
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": prompt}]


def _text(file: Path) -> str:
    try:
        return _decoded(file.read_bytes(), file.name)
    except OSError as error:
        raise click.UsageError(f"{file.name} cannot be read: {error.strerror}") from None


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise click.UsageError("give --prompt, --prompt-file, --prompt-token-ids, or text on standard input")
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise click.UsageError(f"{source} is not UTF-8 text") from None
