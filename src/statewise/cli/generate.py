"""`statewise generate`: continue one prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import print_json
from statewise.cli.loading import load
from statewise.cli.options import (
    engine_arguments,
    engine_options,
    integers,
    model_argument,
    sampling_arguments,
    sampling_options,
)
from statewise.errors import StatewiseError

if TYPE_CHECKING:
    from statewise import LLM, Completion, RequestOutput, SamplingParams


@click.command()
@model_argument
@click.option("--prompt", "-p", help="The prompt. Without it, standard input is read, less one final line break.")
@click.option("--prompt-token-ids", type=integers, metavar="IDS", help="The prompt as token ids: 1,2,3.")
@click.option("--chat", is_flag=True, help="Take the prompt as a user's message and apply the chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: the system message.")
@sampling_options
@click.option("--n", "-n", type=int, help="Independent continuations. Default: 1.")
@click.option("--logprobs", type=int, help="Alternatives to report for each token (with --json).")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--stream/--no-stream", default=None, help="Print text as it comes. Default: yes, unless --json or --n.")
def generate(
    model: str,
    prompt: str | None,
    prompt_token_ids: list[int] | None,
    chat: bool,
    system: str | None,
    as_json: bool,
    stream: bool | None,
    **options: Any,
) -> None:
    """Continue a prompt and print the text.

    A checkpoint without a tokenizer takes --prompt-token-ids and prints token ids.
    """
    if stream and as_json:
        raise click.UsageError("--stream cannot be combined with --json")
    if options["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs is shown with --json only")
    request = _request(prompt, prompt_token_ids, chat, system)

    from statewise import SamplingParams

    params = SamplingParams(**sampling_arguments(options))
    if stream is None:
        stream = not as_json and params.n == 1
    if stream and params.n > 1:
        raise click.UsageError("--stream shows one continuation; leave out --n")
    llm = load(model, **engine_arguments(options))
    if stream:
        _print_stream(llm, request, params)
        return
    output = (llm.chat(request, params) if chat else llm.generate(request, params))[0]
    _raise_failure(output)
    if as_json:
        print_json(_result(output, with_logprobs=params.logprobs is not None))
        return
    for completion in output.outputs:
        if params.n > 1:
            click.secho(f"[{completion.index}]", dim=True)
        click.echo(_text(llm, completion.text, completion.token_ids))


def _request(prompt: str | None, prompt_token_ids: list[int] | None, chat: bool, system: str | None) -> Any:
    """What `LLM` takes: a string, token ids, or messages."""
    if prompt is not None and prompt_token_ids is not None:
        raise click.UsageError("give one of --prompt and --prompt-token-ids")
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    if prompt_token_ids is not None:
        if chat:
            raise click.UsageError("--chat needs a prompt as text")
        return {"prompt_token_ids": prompt_token_ids}
    if prompt is None:
        prompt = _standard_input()
    if not chat:
        return prompt
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": prompt}]


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise click.UsageError("give --prompt, --prompt-token-ids, or text on standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise click.UsageError("standard input is not UTF-8 text") from None


def _print_stream(llm: LLM, request: Any, params: SamplingParams) -> None:
    last: RequestOutput | None = None
    shown = False
    for delta in llm.stream(request, params):
        text = _text(llm, delta.text, delta.token_ids)
        between = " " if shown and text and llm.tokenizer is None else ""
        click.echo(between + text, nl=False)
        sys.stdout.flush()
        shown = shown or bool(text)
        last = delta.output or last
    click.echo()
    if last is not None:
        _raise_failure(last)


def _text(llm: LLM, text: str, token_ids: list[int]) -> str:
    """The text; for a checkpoint without tokenizer its ids."""
    return text if llm.tokenizer is not None else " ".join(str(token_id) for token_id in token_ids)


def _raise_failure(output: RequestOutput) -> None:
    if output.error is not None:
        raise StatewiseError(output.error)


def _result(output: RequestOutput, with_logprobs: bool) -> dict[str, Any]:
    choices = [_choice(completion, with_logprobs) for completion in output.outputs]
    metrics = output.metrics
    # The first token of each continuation belongs to the prefill.
    decoded = metrics.completion_tokens - len(output.outputs)
    result = choices[0] if len(choices) == 1 else {"choices": choices}
    return {
        **result,
        "usage": {
            "prompt_tokens": metrics.prompt_tokens,
            "completion_tokens": metrics.completion_tokens,
            "total_tokens": metrics.prompt_tokens + metrics.completion_tokens,
            "cached_tokens": metrics.cached_tokens,
        },
        "timings": {
            "queue_s": metrics.queue_s,
            "time_to_first_token_s": metrics.time_to_first_token_s,
            "decode_s": metrics.decode_s,
            "tokens_per_second": decoded / metrics.decode_s if metrics.decode_s and decoded > 0 else None,
            "total_s": metrics.total_s,
        },
    }


def _choice(completion: Completion, with_logprobs: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if with_logprobs:
        choice["logprobs"] = completion.logprobs
    return choice
