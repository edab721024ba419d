"""Turns chat messages into prompt text with the checkpoint's own Jinja template, in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from statewise.engine.hiding import STAND_INS
from statewise.errors import CheckpointError, RequestError

MAX_MESSAGES = 10_000
MAX_RENDERED_CHARACTERS = 16_000_000
MAX_EXPONENT = 64
MAX_ARGUMENT_CHARACTERS = 32

# What a request may hand to a template besides its messages. Anything else could reach names the template trusts.
ALLOWED_ARGUMENTS: Mapping[str, tuple[type, ...]] = {
    "enable_thinking": (bool,),
    "thinking": (bool,),
    "preserve_thinking": (bool,),
    "reasoning_effort": (str,),
}


_NOT_ASCII = re.compile(f"[^\\x00-\\x7f{STAND_INS}]")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _RaisedByTemplate(TemplateError):
    """The template called raise_exception: its message is for the user."""


def _raise_exception(message: str) -> NoReturn:
    raise _RaisedByTemplate(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter sorts keys and escapes <, >, & and everything beyond ASCII: not what models were trained on.
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox in which no single expression makes a huge value. How long loops run is for the caller to bound."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= MAX_RENDERED_CHARACTERS and abs(right) <= MAX_EXPONENT):
            raise TemplateError("a power is too large")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and len(value) * times > MAX_RENDERED_CHARACTERS:
                    raise TemplateError("a repetition is too long")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled template. Safe to render from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are names that the template may use, such as bos_token. Raises CheckpointError."""
        environment = _Bounded(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            message = f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            raise CheckpointError(message) from None
        self._special_tokens = dict(special_tokens)
        self.words: frozenset[str] = frozenset(_words(environment.parse(source)))  # that it may look for
        self._wants_parts = False
        self._wants_parts = not self._shows_content() and self._shows_content(as_parts=True)

    def _shows_content(self, as_parts: bool = False) -> bool:
        """Whether a message's text gets through. MiniMax-Text-01's template reads lists of parts and drops strings."""
        text = "statewise"
        content = _parts(text) if as_parts else text
        system = {"role": "system", "content": _parts("") if as_parts else ""}
        user = {"role": "user", "content": content}
        for messages in ([user], [system, user]):  # a template may refuse a chat without a system message
            try:
                return text in self.render(messages, True, None, {})
            except RequestError:
                continue
        return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> str:
        """The prompt text of messages that check_messages has normalised. Raises RequestError."""
        if self._wants_parts:
            messages = [{**message, "content": _parts(message["content"])} for message in messages]
        names = {**self._special_tokens, **arguments, "messages": messages, "tools": tools}
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._pieces(names, add_generation_prompt):
                length += len(piece)
                if length > MAX_RENDERED_CHARACTERS:
                    raise RequestError("messages", f"the chat is longer than {MAX_RENDERED_CHARACTERS} characters")
                pieces.append(piece)
        except _RaisedByTemplate as error:
            raise RequestError("messages", f"the chat template refuses these messages: {error.message}") from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise RequestError("messages", f"the chat template cannot render these messages: {reason}") from None
        except (MemoryError, RecursionError) as error:
            raise RequestError("messages", f"the chat template ran out of bounds ({type(error).__name__})") from None
        return "".join(pieces)

    def _pieces(self, names: dict[str, Any], add_generation_prompt: bool) -> Iterator[str]:
        return self._template.generate(**names, add_generation_prompt=add_generation_prompt)


def _words(tree: nodes.Template) -> Iterator[str]:
    """The strings in a template's expressions, and the names by which it takes things out of others."""
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value
    for found in tree.find_all(nodes.Getattr):
        yield found.attr


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise RequestError for a template argument that is unknown or of the wrong type."""
    for name, value in arguments.items():
        types = ALLOWED_ARGUMENTS.get(name)
        if types is None:
            allowed = ", ".join(ALLOWED_ARGUMENTS)
            raise RequestError(name, f"chat template argument {name!r} is not known; the known ones are {allowed}")
        if not isinstance(value, types):
            raise RequestError(name, f"chat template argument {name!r} must be a {types[0].__name__}")
        if isinstance(value, str) and len(value) > MAX_ARGUMENT_CHARACTERS:
            limit = MAX_ARGUMENT_CHARACTERS
            raise RequestError(name, f"chat template argument {name!r} must have at most {limit} characters")


def check_tools(tools: Any) -> None:
    """Raise RequestError unless `tools` is None or a list of objects."""
    if tools is None:
        return
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools", "tools must be a list of objects")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Normalised copies of the messages: content as one string, tool-call arguments as dicts.

    Raises RequestError, which names the message and the key at fault.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("messages", "messages must be a non-empty list of {role, content} objects")
    if len(messages) > MAX_MESSAGES:
        raise RequestError("messages", f"messages has {len(messages)} entries, more than the limit of {MAX_MESSAGES}")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(field, f"{field} must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role or len(role) > 64:
        raise RequestError(f"{field}.role", f"{field}.role must be a string of 1 to 64 characters")
    checked = dict(message)
    calls = message.get("tool_calls")
    if calls is not None:
        checked["tool_calls"] = _check_tool_calls(calls, f"{field}.tool_calls")
    content = message.get("content")
    checked["content"] = "" if content is None and calls else _content_text(content, f"{field}.content")
    return checked


def _content_text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RequestError(field, f"{field} must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            where = f"{field}[{index}]"
            raise RequestError(where, f'{where} must be {{"type": "text", "text": "…"}}: only text is served')
        texts.append(text)
    return "".join(texts)


def _check_tool_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise RequestError(field, f"{field} must be a list")
    return [_check_tool_call(call, f"{field}[{index}]") for index, call in enumerate(calls)]


def _check_tool_call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(field, f"{field}.function must be an object with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{field}.function.arguments", f"{field}.function.arguments must be a JSON object")
    return {**call, "function": {**function, "arguments": dict(arguments)}}
