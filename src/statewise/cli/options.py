"""Options that several verbs share, and how they reach the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from statewise.cli.completion import complete_model

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def integers(text: str) -> list[int]:
    """Integers divided by commas or blanks: 1,2,3."""
    try:
        numbers = [int(part) for part in re.split(r"[\s,]+", text.strip(" ,[]")) if part]
    except ValueError:
        numbers = []
    if not numbers:
        raise click.BadParameter(f"{text[:80]!r} is not a list of integers such as 1,2,3")
    return numbers


def memory_size(text: str) -> int:
    """Bytes, from a number with a unit: 512MB, 16GiB."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kmgt]i?)?b?", text.strip().lower())
    if match is None:
        raise click.BadParameter(f"{text[:80]!r} is not an amount of memory such as 512MB or 16GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def override(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON where it is JSON: slope_formula=hf, postnorm=false, replace_layers={"a": "b"}."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise click.BadParameter(f"{text[:80]!r} is not of the form KEY=VALUE")
    try:
        return key.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return key.strip(), value


model_argument = click.argument("model", shell_complete=complete_model)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Type of weights and activations. Default: auto, the checkpoint's where the processor is good at it.",
)

overrides_option = click.option(
    "--set",
    "overrides",
    type=override,
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a key of the checkpoint's config.json; the value is JSON or plain text. Repeatable.",
)

_ENGINE = [
    dtype_option,
    overrides_option,
    click.option("--max-prefill-tokens", type=int, help="Prompt tokens per step. Default: 2048."),
    click.option("--max-running", type=int, help="Sequences that run at once. Default: 64."),
    click.option("--num-records", type=int, help="State records to allot. Default: by the memory there is."),
    click.option("--num-pages", type=int, help="Attention pages to allot. Default: by the memory there is."),
    click.option("--max-length", type=int, help="Longest prompt and answer together, in tokens. Default: the model's."),
    click.option(
        "--prefix-cache/--no-prefix-cache",
        default=None,
        help="Keep the memory of prompts for those that begin alike. Default: yes, except in bench.",
    ),
    click.option(
        "--host-cache",
        type=memory_size,
        metavar="SIZE",
        help="Host memory for checkpoints that leave the pools, such as 4GiB. Default: as much as the pools have.",
    ),
    click.option(
        "--disk-cache",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIRECTORY",
        help="Keep checkpoints that leave host memory here; a later run goes on from them.",
    ),
    click.option(
        "--disk-cache-size",
        "disk_cache_bytes",
        type=memory_size,
        metavar="SIZE",
        help="The most that --disk-cache may hold. Default: 10GiB.",
    ),
    click.option("--verbose", "-v", is_flag=True, help="Say which layers were chosen where stderr is no terminal too."),
]

_SAMPLING = [
    click.option("--max-tokens", type=int, help="Most tokens to generate. Default: 256."),
    click.option("--min-tokens", type=int, help="Fewest tokens to generate."),
    click.option("--temperature", type=float, help="0 takes the most likely token."),
    click.option("--top-p", type=float, help="Sample among the likeliest tokens that hold this probability together."),
    click.option("--top-k", type=int, help="Sample among this many of the likeliest tokens. 0: no limit."),
    click.option("--min-p", type=float, help="Leave out tokens less likely than this share of the likeliest one."),
    click.option("--repetition-penalty", type=float, help="Above 1, tokens seen before become less likely."),
    click.option("--presence-penalty", type=float, help="Subtracted once from the logit of a token generated before."),
    click.option("--frequency-penalty", type=float, help="Subtracted for each time that a token was generated."),
    click.option("--seed", type=int, help="The same seed gives the same text."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times."),
    click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True, help="End at this token. Repeatable."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on behind the model's end token."),
]

_ENGINE_NAMES = (
    "dtype",
    "max_prefill_tokens",
    "max_running",
    "num_records",
    "num_pages",
    "max_length",
    "prefix_cache",
    "host_cache",
    "disk_cache",
    "disk_cache_bytes",
)
_SAMPLING_NAMES = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "n",
    "best_of",
    "logprobs",
)


def engine_options(command: Command) -> Command:
    return _decorate(command, _ENGINE)


def sampling_options(command: Command) -> Command:
    return _decorate(command, _SAMPLING)


def engine_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What was given of the engine's options; the rest is left to the defaults of `LLM`."""
    given = {name: options[name] for name in _ENGINE_NAMES if options.get(name) is not None}
    return given | ({"overrides": dict(options["overrides"])} if options.get("overrides") else {})


def sampling_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What was given of the sampling options; the rest is left to the defaults of `SamplingParams`."""
    return {name: options[name] for name in _SAMPLING_NAMES if options.get(name) not in (None, ())}


def _decorate(command: Command, options: Sequence[Callable[[Any], Any]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
