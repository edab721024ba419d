"""Tool choices that leave the model none: a JSON schema for its answer, and the calls in such an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from statewise.errors import RequestError
from statewise.server.answers.choose import make_parser
from statewise.server.answers.parts import ToolCall, parse
from statewise.server.answers.tools import Tools
from statewise.server.answers.writer import MAX_CALLS

_MAX_DEPTH = 64
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# Keywords whose value maps names to schemas, and keywords whose value is data that only looks like schemas.
_MAPS = frozenset(("properties", "patternProperties", "dependentSchemas", "$defs", "definitions"))
_DATA = frozenset(("const", "enum", "default", "example", "examples"))


def structure_for(tools: Tools | None, tool_choice: Any, parallel: bool = False) -> dict[str, Any] | None:
    """The JSON schema that the answer must follow, or None where the model may choose.

    "required" asks for one call, or with `parallel` for a list of at least one; {"type": "function", "function":
    {"name": …}} for one call of that tool. Raises `RequestError` for any other choice but "auto" and "none".
    """
    if tool_choice in (None, "auto", "none"):
        return None
    if not tools:
        raise RequestError("tool_choice", "tool_choice asks for a call, but tools is empty")
    if tool_choice == "required":
        names = tools.names
    else:
        names, parallel = (_named(tools, tool_choice),), False
    place = "#/items" if parallel else "#"
    calls = [
        _call(tools, name, place if len(names) == 1 else f"{place}/anyOf/{index}") for index, name in enumerate(names)
    ]
    one = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_CALLS} if parallel else one


def calls_from_json(text: str, tools: Tools, new_id: Callable[[str, int], str] | None = None) -> tuple[ToolCall, ...]:
    """The calls of an answer that follows `structure_for`'s schema; none where it does not, as when it was cut off."""
    return parse(make_parser("json", tools, reasoning=False, stream_arguments=False, new_id=new_id), text).tool_calls


def _named(tools: Tools, tool_choice: Any) -> str:
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        wanted = 'auto, none, required or {"type": "function", "function": {"name": "…"}}'
        raise RequestError("tool_choice", f"tool_choice must be {wanted}")
    if name not in tools:
        raise RequestError("tool_choice", f"tool_choice names the tool {name[:100]!r}, which is not in tools")
    return name


def _call(tools: Tools, name: str, place: str) -> dict[str, Any]:
    """The schema of a call, which stands at `place` in the whole schema."""
    schema = tools.parameters(name) or _NO_ARGUMENTS
    if "properties" in schema and "additionalProperties" not in schema:  # a forced call has no end where any name goes
        schema = {**schema, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": _moved(schema, f"{place}/properties/arguments", 0)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str, depth: int) -> Any:
    """A copy of a schema that is no longer the root: references into itself begin at `place`."""
    if depth > _MAX_DEPTH:
        raise RequestError("tools", f"a tool's parameters are nested more than {_MAX_DEPTH} deep")
    if isinstance(schema, list):
        return [_moved(one, place, depth + 1) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy: dict[str, Any] = {}
    for word, value in schema.items():
        if word == "$ref" and isinstance(value, str) and value.startswith("#"):
            copy[word] = place + value[1:]
        elif word in _MAPS and isinstance(value, Mapping):
            copy[word] = {key: _moved(inner, place, depth + 1) for key, inner in value.items()}
        else:
            copy[word] = value if word in _DATA else _moved(value, place, depth + 1)
    return copy
