"""The tools that a request offers: their names, and the types of their parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from statewise.errors import RequestError
from statewise.server.answers.json_value import read_json

MAX_TOOLS = 128
MAX_NAME = 128
_MAX_SCHEMAS = 200  # how many schemas are looked at for the type of one parameter: references may go in circles
_FORBIDDEN = frozenset("\"'<>()`")  # they end a name in the formats of some families
_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "boolean"),  # before int, of which it is one
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (list, "array"),
    (dict, "object"),
)


class Tools:
    """The functions of a request's `tools`, by name."""

    def __init__(self, definitions: Sequence[Mapping[str, Any]]) -> None:
        """`definitions` as OpenAI spells them: {"type": "function", "function": {"name", "parameters"}}.

        Raises `RequestError`, which names the definition at fault.
        """
        if len(definitions) > MAX_TOOLS:
            raise RequestError("tools", f"tools has {len(definitions)} entries, more than the limit of {MAX_TOOLS}")
        self._parameters: dict[str, Mapping[str, Any]] = {}
        self._types: dict[tuple[str, str], frozenset[str]] = {}
        for index, definition in enumerate(definitions):
            field = f"tools[{index}].function"
            function = definition.get("function") if isinstance(definition, Mapping) else None
            if not isinstance(function, Mapping):
                raise RequestError(field, f"{field} must be an object with a name")
            name = function.get("name")
            if not isinstance(name, str) or not _is_name(name):
                wanted = f"1 to {MAX_NAME} printable characters without spaces, quotes and brackets"
                raise RequestError(f"{field}.name", f"{field}.name must have {wanted}")
            if name in self._parameters:
                raise RequestError(f"{field}.name", f"{field}.name {name!r} is used by an earlier tool")
            parameters = function.get("parameters")
            if parameters is not None and not isinstance(parameters, Mapping):
                raise RequestError(f"{field}.parameters", f"{field}.parameters must be a JSON schema")
            self._parameters[name] = parameters or {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __len__(self) -> int:
        return len(self._parameters)

    def parameters(self, name: str) -> Mapping[str, Any]:
        """The schema of a tool's arguments; empty where the request gave none."""
        return self._parameters[name]

    def types(self, name: str, key: str) -> frozenset[str]:
        """The JSON types that a parameter may have; empty where its schema does not say."""
        if (name, key) not in self._types:
            schema = self._parameters[name]
            properties = schema.get("properties")
            inner = properties.get(key) if isinstance(properties, Mapping) else None
            self._types[name, key] = _types(inner, schema, [_MAX_SCHEMAS])
        return self._types[name, key]

    def value(self, name: str, key: str, text: str) -> str:
        """The JSON text of a parameter that a family writes without JSON's quotes.

        A parameter that can only be a string is its text as it stands. Any other is read as JSON, and stays text where
        it is none, or is of a type that a parameter which may be a string does not have.
        """
        types = self.types(name, key)
        bare = text.strip()
        if types == {"string"}:
            return json.dumps(text, ensure_ascii=False)
        if "boolean" in types and bare.lower() in ("true", "false"):
            return bare.lower()
        if bare == "null" and (not types or "null" in types):
            return bare
        value = read_json(bare)
        kind = _kind(value)
        fits = kind in types or (kind == "integer" and "number" in types)
        if value is None or (not fits and (kind == "string" or "string" in types)):
            return json.dumps(text, ensure_ascii=False)
        return bare


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and all(
        letter.isprintable() and not letter.isspace() and letter not in _FORBIDDEN for letter in name
    )


def _kind(value: Any) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "null")


def _types(schema: Any, root: Mapping[str, Any], left: list[int]) -> frozenset[str]:
    """The types that a schema allows; empty: any. `left` counts down the schemas that may still be looked at."""
    left[0] -= 1
    if not isinstance(schema, Mapping) or left[0] < 0:
        return frozenset()
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset((named,))
    if isinstance(named, list):
        return frozenset(one for one in named if isinstance(one, str))
    if "const" in schema:
        return frozenset((_kind(schema["const"]),))
    if isinstance(schema.get("enum"), list):
        return frozenset(_kind(one) for one in schema["enum"])
    if isinstance(schema.get("$ref"), str):
        return _types(_referenced(schema["$ref"], root), root, left)
    for word in ("anyOf", "oneOf"):
        choices = schema.get(word)
        if isinstance(choices, list) and choices:
            each = [_types(one, root, left) for one in choices[:_MAX_SCHEMAS]]
            return frozenset[str]().union(*each) if all(each) else frozenset()
    together = schema.get("allOf")
    if isinstance(together, list):
        each = [_types(one, root, left) for one in together[:_MAX_SCHEMAS]]
        return next((types for types in each if types), frozenset())
    return frozenset()


def _referenced(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference such as "#/$defs/Place" points to; None for one that points nowhere or elsewhere."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
