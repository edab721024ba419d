"""Options from a file or from the environment, for a verb with more of them than a command line should have."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import click

MAX_FILE = 1 << 20  # bytes


def from_environment(command: click.Command, prefix: str) -> None:
    """Let each parameter of a verb be given by a variable: with the prefix `APP_SERVE`, --max-queued by
    `APP_SERVE_MAX_QUEUED`. Named after the option, not after what the code calls it."""
    for parameter in command.params:
        parameter.envvar = f"{prefix}_{key_of(parameter).upper().replace('-', '_')}"


def read_config(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Callback of an eager option: the file's values become defaults, behind the command line and the environment.

    Keys are the names of options, with - or _ between their words, and `model`. Raises `click.BadParameter`, which
    names the key.
    """
    if path is None:
        return
    known = {key_of(one): one for one in context.command.params if one is not option}
    values: dict[str, Any] = {}
    for name, value in _load(path).items():
        key = str(name).replace("_", "-")
        if key not in known:
            raise click.BadParameter(f"{path.name} has {str(name)[:80]!r}, which is no option of {context.info_name}")
        parameter = known[key]
        if (parameter.name or "") in values:
            raise click.BadParameter(f"{path.name} has {key!r} twice")
        try:
            values[parameter.name or ""] = _value(parameter, value)
        except ValueError as error:
            raise click.BadParameter(f"{path.name}: {key} must be {error}") from None
    context.default_map = values


def key_of(parameter: click.Parameter) -> str:
    """What a parameter is called in a file: `max-queued` for --max-queued, `model` for the argument MODEL."""
    return max(parameter.opts, key=len).lstrip("-")


def _load(path: Path) -> dict[Any, Any]:
    try:
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"it has more than {MAX_FILE >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        values = _yaml(text) if path.suffix.lower() in (".yaml", ".yml") else tomllib.loads(text)
    except ImportError:
        raise click.BadParameter("YAML needs the package PyYAML; write the file as TOML") from None
    except (OSError, ValueError, RecursionError) as error:
        raise click.BadParameter(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise click.BadParameter(f"{path.name} must map options to values")
    return values


def _yaml(text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return {} if values is None else values


def _value(parameter: click.Parameter, value: Any) -> Any:
    """What click takes for a value of a file. Raises `ValueError` with what was expected."""
    if parameter.multiple:
        if isinstance(value, dict):  # of --set, as a table
            return [f"{key}={json.dumps(one)}" for key, one in value.items()]
        listed = value if isinstance(value, list) else [value]
        return [_single(parameter, one, "a string or a list of strings") for one in listed]
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if isinstance(parameter.type, click.types.IntParamType):
        if type(value) is not int:
            raise ValueError("a whole number")
        return value
    if isinstance(parameter.type, click.types.FloatParamType):
        if type(value) not in (int, float):
            raise ValueError("a number")
        return value
    numbers = parameter.type.name == "memory_size"  # 1073741824 as well as "1GiB"
    return _single(parameter, value, "a string or a whole number" if numbers else "a string", numbers)


def _single(parameter: click.Parameter, value: Any, expected: str, numbers: bool = False) -> str:
    if isinstance(value, str) and value:
        return value
    if numbers and type(value) is int:
        return str(value)
    raise ValueError(expected)
