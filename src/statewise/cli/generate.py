"""`statewise generate`: continue one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.answer import answer_data, answer_text, print_stream, raise_failure
from statewise.cli.display import print_json
from statewise.cli.loading import load
from statewise.cli.options import (
    engine_arguments,
    engine_options,
    model_argument,
    sampling_arguments,
    sampling_options,
)
from statewise.cli.prompt import given_prompt, prompt_options, system_option

if TYPE_CHECKING:
    from statewise import Structure


@click.command()
@model_argument
@prompt_options
@system_option
@sampling_options
@click.option("--n", "-n", type=int, help="Independent continuations. Default: 1.")
@click.option(
    "--json-schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Answer with JSON that follows the schema in this file.",
)
@click.option("--regex", help="Answer with text that this expression matches as a whole.")
@click.option("--choice", "choices", multiple=True, help="Answer with one of these. Repeatable.")
@click.option("--logprobs", type=int, help="Alternatives to report for each token (with --json).")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--stream/--no-stream", default=None, help="Print text as it comes. Default: yes, unless --json or --n.")
def generate(
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    prompt_token_ids: list[int] | None,
    chat: bool,
    system: str | None,
    as_json: bool,
    stream: bool | None,
    json_schema: Path | None,
    regex: str | None,
    choices: tuple[str, ...],
    **options: Any,
) -> None:
    """Continue a prompt and print the text.

    Without a prompt, standard input is read, less one final line break. A checkpoint without a tokenizer takes
    --prompt-token-ids and prints token ids.
    """
    if stream and as_json:
        raise click.UsageError("--stream cannot be combined with --json")
    if options["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs is shown with --json only")
    request = given_prompt(prompt, prompt_file, prompt_token_ids, chat, system)
    if prompt_token_ids is not None:
        request = {"prompt_token_ids": request}

    from statewise import SamplingParams

    params = SamplingParams(**sampling_arguments(options), structure=_structure(json_schema, regex, choices))
    if stream is None:
        stream = not as_json and params.n == 1
    if stream and params.n > 1:
        raise click.UsageError("--stream shows one continuation; leave out --n")
    llm = load(model, **engine_arguments(options))
    if stream:
        print_stream(llm, llm.stream(request, params))
        return
    output = (llm.chat(request, params) if chat else llm.generate(request, params))[0]
    raise_failure(output)
    if as_json:
        print_json(answer_data(output, with_logprobs=params.logprobs is not None))
        return
    for completion in output.outputs:
        if params.n > 1:
            click.secho(f"[{completion.index}]", dim=True)
        click.echo(answer_text(llm, completion.text, completion.token_ids))


def _structure(json_schema: Path | None, regex: str | None, choices: tuple[str, ...]) -> Structure | None:
    from statewise import Structure

    if (json_schema is not None) + (regex is not None) + bool(choices) > 1:
        raise click.UsageError("give one of --json-schema, --regex and --choice")
    if json_schema is not None:
        return Structure.json_schema(json_schema.read_text(errors="replace"), "--json-schema")
    if regex is not None:
        return Structure.regex(regex, "--regex")
    return Structure.choice(choices, "--choice") if choices else None
