"""`statewise snapshot save` and `load`: a session into a file, and on from there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.answer import answer_data, print_stream
from statewise.cli.display import bytes_text, print_json
from statewise.cli.loading import load as load_model
from statewise.cli.options import (
    engine_arguments,
    engine_options,
    model_argument,
    sampling_arguments,
    sampling_options,
)
from statewise.cli.prompt import given_prompt, prompt_options, system_option
from statewise.errors import RequestError, SnapshotError

if TYPE_CHECKING:
    from statewise import RequestOutput, SamplingParams
    from statewise.api.session import Session

_json = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


@click.command()
@model_argument
@click.argument("file", type=click.Path(dir_okay=False, writable=True, path_type=Path))
@prompt_options
@system_option
@engine_options
@_json
def save(
    model: str,
    file: Path,
    prompt: str | None,
    prompt_file: Path | None,
    prompt_token_ids: list[int] | None,
    chat: bool,
    system: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compute a prompt with MODEL and write the session to FILE, which is made or replaced.

    Without a prompt, standard input is read, less one final line break. The exit status is 2 if nothing was written.
    """
    arguments = _engine_arguments(options)
    content = given_prompt(prompt, prompt_file, prompt_token_ids, chat, system)
    if not file.parent.is_dir():
        raise click.BadParameter(f"there is no directory {str(file.parent)!r}", param_hint="FILE")
    llm = load_model(model, **arguments)
    started = time.perf_counter()
    session = llm.session().append(content)
    computed = time.perf_counter()
    size = session.save(file)
    written = time.perf_counter()
    found = {
        "file": str(file),
        "tokens": session.info.num_tokens,
        "bytes": size,
        "prefill_s": computed - started,
        "write_s": written - computed,
    }
    if as_json:
        print_json(found)
        return
    seconds = f"computed in {found['prefill_s']:.2f} s, written in {found['write_s']:.2f} s"
    click.echo(f"saved {file.name}: {found['tokens']:,} tokens, {bytes_text(size)}, {seconds}")


@click.command("load")
@model_argument
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@prompt_options
@click.option("--answer", is_flag=True, help="Go on without a further prompt.")
@sampling_options
@engine_options
@_json
def take_up(
    model: str,
    file: Path,
    prompt: str | None,
    prompt_file: Path | None,
    prompt_token_ids: list[int] | None,
    chat: bool,
    answer: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Load the session in FILE into MODEL; with a prompt, go on from there and print the answer.

    The session's own tokens are not computed. FILE stays as it is. The exit status is 1 for a file that is refused, 2
    for any other error.
    """
    arguments = _engine_arguments(options)
    content = given_prompt(prompt, prompt_file, prompt_token_ids, chat, required=False)
    goes_on = answer or content is not None
    if sampling_arguments(options) and not goes_on:
        raise click.UsageError("options of an answer need one: give --prompt, or --answer to go on without")

    from statewise import SamplingParams

    params = SamplingParams(**sampling_arguments(options))
    llm = load_model(model, **arguments)
    started = time.perf_counter()
    try:
        session = llm.load_session(file)
    except SnapshotError as error:
        if as_json:
            print_json({"loaded": False, "reason": str(error)})
        else:
            click.echo(f"refused: {error}", err=True)
        click.get_current_context().exit(1)
    milliseconds = 1000 * (time.perf_counter() - started)
    info = session.info
    if not as_json:
        turns = f"{len(info.turns):,} turn{'' if len(info.turns) == 1 else 's'}"
        names = f", checkpoints {', '.join(info.checkpoints)}" if info.checkpoints else ""
        line = f"loaded {file.name}: {info.num_tokens:,} tokens, {turns}{names}, {milliseconds:.1f} ms"
        click.echo(line, err=goes_on)  # an answer has standard output to itself
    if content is not None:
        session.append(content)
    if goes_on and not as_json:
        print_stream(llm, session.stream(params))
    if as_json:
        found = {
            "loaded": True,
            "file": str(file),
            "tokens": info.num_tokens,
            "turns": info.turns,
            "checkpoints": info.checkpoints,
            "load_ms": milliseconds,
        }
        print_json({**found, "answer": answer_data(_answer(session, params))} if goes_on else found)


def _answer(session: Session, params: SamplingParams) -> RequestOutput:
    output = None
    for delta in session.stream(params):
        output = delta.output or output
    if output is None:
        raise RequestError("session", "the answer was interrupted")
    return output


def _engine_arguments(options: dict[str, Any]) -> dict[str, Any]:
    arguments = engine_arguments(options)
    if arguments.get("prefix_cache") is False:
        raise click.UsageError("--no-prefix-cache keeps no session; leave it out")
    return arguments
