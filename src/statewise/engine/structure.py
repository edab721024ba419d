"""The form that an answer must have, bounded before anything compiles it. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from statewise.errors import RequestError

StructureKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]

MAX_CHARACTERS = 1 << 16  # of a schema, an expression or a grammar
MAX_DEPTH = 64  # of a schema
MAX_CHOICES = 1024


@dataclass(frozen=True)
class Structure:
    """What tokens an answer may be made of, as one text that `Grammars` compiles.

    `value` is a JSON schema as JSON, a regular expression, a JSON list of strings, or a Lark grammar in llguidance's
    dialect; empty for any JSON object. Build one with the functions below, which name the field at fault.
    """

    kind: StructureKind
    value: str = ""
    after: str = ""  # the structure begins behind the first of these, such as </think>; any text may stand before
    field: str = dataclasses.field(default="structure", compare=False)  # of the request that asked for it

    @staticmethod
    def json_object(field: str = "json_object") -> Structure:
        """Any JSON object."""
        return Structure("json_object", field=field)

    @staticmethod
    def json_schema(schema: Mapping[str, Any] | bool | str, field: str = "json_schema") -> Structure:
        """JSON that follows a schema, given as an object or as its text. Raises `RequestError`."""
        if isinstance(schema, str):
            _bounded(field, schema)
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise RequestError(field, f"{field} is not valid JSON") from None
        if not isinstance(schema, Mapping | bool):
            raise RequestError(field, f"{field} must be a JSON schema: an object")
        if _deeper(schema, MAX_DEPTH):
            raise RequestError(field, f"{field} is nested more than {MAX_DEPTH} deep")
        return Structure("json_schema", _bounded(field, json.dumps(schema, ensure_ascii=False)), field=field)

    @staticmethod
    def regex(expression: str, field: str = "regex") -> Structure:
        """Text that a regular expression (Rust's dialect, without look-around) matches as a whole."""
        return Structure("regex", _bounded(field, expression), field=field)

    @staticmethod
    def choice(choices: Sequence[str], field: str = "choice") -> Structure:
        """One of several strings. Raises `RequestError`."""
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not 1 <= len(choices) <= MAX_CHOICES:
            raise RequestError(field, f"{field} must be a list of 1 to {MAX_CHOICES} strings")
        if not all(isinstance(one, str) and one for one in choices):
            raise RequestError(field, f"{field} must hold strings that are not empty")
        return Structure("choice", _bounded(field, json.dumps(list(choices), ensure_ascii=False)), field=field)

    @staticmethod
    def grammar(lark: str, field: str = "grammar") -> Structure:
        """Text that a Lark grammar, whose rule `start` it begins with, derives."""
        return Structure("grammar", _bounded(field, lark), field=field)


def _bounded(field: str, text: str) -> str:
    if not isinstance(text, str) or not text:
        raise RequestError(field, f"{field} must be a string that is not empty")
    if len(text) > MAX_CHARACTERS:
        raise RequestError(field, f"{field} has {len(text)} characters, at most {MAX_CHARACTERS} are allowed")
    return text


def _deeper(value: object, depth: int) -> bool:
    """Whether a JSON value is nested deeper than `depth`."""
    level = [value]
    while level and depth >= 0:
        depth -= 1
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else ())
        ]
    return bool(level)
