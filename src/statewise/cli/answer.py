"""An answer as a verb prints it: text as it comes, or all of it as data."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from statewise.errors import StatewiseError

if TYPE_CHECKING:
    from statewise import LLM, Completion, RequestOutput
    from statewise.engine.request import Delta


def print_stream(llm: LLM, deltas: Iterable[Delta]) -> None:
    """Print an answer step by step. Raises `StatewiseError` where it fails."""
    last: RequestOutput | None = None
    shown = False
    for delta in deltas:
        text = answer_text(llm, delta.text, delta.token_ids)
        between = " " if shown and text and llm.tokenizer is None else ""
        click.echo(between + text, nl=False)
        sys.stdout.flush()
        shown = shown or bool(text)
        last = delta.output or last
    click.echo()
    if last is not None:
        raise_failure(last)


def answer_text(llm: LLM, text: str, token_ids: list[int]) -> str:
    """The text; for a checkpoint without tokenizer its ids."""
    return text if llm.tokenizer is not None else " ".join(str(token_id) for token_id in token_ids)


def raise_failure(output: RequestOutput) -> None:
    if output.error is not None:
        raise StatewiseError(output.error)


def answer_data(output: RequestOutput, with_logprobs: bool = False) -> dict[str, Any]:
    """An answer with its usage and timings; several continuations stand under `choices`."""
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
